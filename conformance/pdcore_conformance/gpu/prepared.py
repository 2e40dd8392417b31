"""What is prepared at home for a machine with a GPU: wheels, the commit, and lists of cases.

This module imports the standard library alone: it is what makes the others importable.

The folder `FOLDER` in the root of the checkout is made by `pdcore_conformance.gpu.prepare`, and is
ignored by git. The command works without it where the machine has all packages.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = [
    "COMMIT",
    "FOLDER",
    "NAMES",
    "ROOT",
    "ROOTS",
    "carry",
    "cases",
    "missing",
    "name_commit",
    "tree",
]

ROOT = Path(__file__).resolve().parents[3]
#: The folders of packages in a checkout.
ROOTS = (".", "backends", "adapters", "conformance")
FOLDER = ROOT / "gpu-prepared"
#: The distributions without which the suite does not run, beside NumPy and the frameworks.
NAMES = (
    "array-api-compat",
    "autograd",
    "hypothesis",
    "iniconfig",
    "ml_dtypes",
    "msgspec",
    "packaging",
    "pluggy",
    "pygments",
    "pytest",
    "sortedcontainers",
)
#: The modules without which the command does not run.
_NEEDED = ("numpy", "pluggy", "array_api_compat", "pytest", "hypothesis", "autograd", "msgspec")
#: The variable that names the commit of a checkout without git.
COMMIT = "PDCORE_COMMIT"
#: The folders whose files are the code of a commit.
_CODE = ("pdcore", *ROOTS[1:])


def carry(folder: Path = FOLDER) -> list[str]:
    """Make the prepared wheels importable, those that are not installed; return their names."""
    wheels = sorted((folder / "wheels").glob("*.whl"))
    absent = [wheel for wheel in wheels if not _installed(wheel.name.partition("-")[0])]
    if not absent:
        return []
    # Libraries for C cannot be imported from a wheel, so all are unpacked. Children use the folder
    # too, so the system removes it, not this process.
    into = tempfile.mkdtemp(prefix="pdcore-wheels-")
    for wheel in absent:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(into)
    sys.path.append(into)
    return ["-".join(wheel.name.split("-")[:2]) for wheel in absent]


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def missing() -> list[str]:
    """Return the modules that the command needs and that are not there."""
    return [name for name in _NEEDED if find_spec(name) is None]


def name_commit(folder: Path = FOLDER) -> str | None:
    """Set `COMMIT` to the prepared commit; return why its files are not those of that commit."""
    if COMMIT in os.environ or ((ROOT / ".git").exists() and shutil.which("git")):
        return None
    prepared = _read(folder / "commit.json")
    if not prepared:
        return f"there is neither .git nor {folder.name}/commit.json; set {COMMIT} to name it"
    if prepared["tree"] != tree():
        return f"the code has changed since {folder.name}/commit.json was written"
    os.environ[COMMIT] = prepared["commit"]
    return None


@cache
def tree(root: Path = ROOT) -> str:
    """Return a hash of the code of a checkout."""
    digest = hashlib.sha256()
    for path in _files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(root: Path) -> Iterator[Path]:
    kinds = re.compile(r".*\.(py|cu|cuh|ini|jinja)")
    for folder in _CODE:
        yield from sorted(path for path in (root / folder).rglob("*") if kinds.fullmatch(path.name))


def cases(target: str, folder: Path = FOLDER) -> Sequence[str] | None:
    """Return the prepared list of a target's cases of the core level, None without one.

    A list of other code than this is none.
    """
    if _read(folder / "commit.json").get("tree") != tree():
        return None
    found: Sequence[str] | None = _read(folder / "cases.json").get(target)
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
