"""Who imports whom: the contracts of pyproject.toml are kept, each can fail, and plug-ins keep out.

The contracts run on a copy of the packages in which one import is planted, so that a contract which
forbids nothing is noticed.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pdcore
import pdcore.extend

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ROOT / "pyproject.toml"
PACKAGES = {
    "pdcore": "",
    "pdcore_backends": "backends",
    "pdcore_adapters": "adapters",
    "pdcore_conformance": "conformance",
}
ROOMS = "The rooms of pdcore import downwards only"
DISTRIBUTION = "pdcore < backends < adapters < conformance"
BACKENDS = "Backends do not import one another"
DOOR = "Backends and adapters import pdcore and pdcore.extend only"
FRAMEWORKS = "pdcore imports no framework"

# An import each, as its file, its statement, and the module that it is of; and the contract broken.
PLANTED = {
    ROOMS: [
        ("pdcore/errors.py", "from . import arrays", "pdcore.arrays"),
        ("pdcore/spec/heads.py", "from ..lowering import Plan", "pdcore.lowering"),
        ("pdcore/reference/inputs.py", "from ..lowering import Plan", "pdcore.lowering"),
        ("pdcore/lowering/plan.py", "from ..reference import reference_keys", "pdcore.reference"),
        ("pdcore/backend/call.py", "from ..plugins import load_backend", "pdcore.plugins"),
        ("pdcore/plugins/inventory.py", "from ..dispatch import choose", "pdcore.dispatch"),
        ("pdcore/dispatch/tracing.py", "from ..attention import bind", "pdcore.attention"),
        ("pdcore/attention.py", "from .derivation import derive", "pdcore.derivation"),
        ("pdcore/derivation/layers.py", "from ..svr import fit", "pdcore.svr"),
        ("pdcore/svr/fitting.py", "from ..cli import main", "pdcore.cli"),
        ("pdcore/cli/pieces.py", "from ..extend import Plan", "pdcore.extend"),
        ("pdcore/moved.py", "from .errors import SpecError", "pdcore.errors"),
        ("pdcore/datasets/__init__.py", "from ..arrays import dtype_name", "pdcore.arrays"),
    ],
    DISTRIBUTION: [
        ("pdcore/spec/heads.py", "import pdcore_backends.numpy", "pdcore_backends.numpy"),
        (
            "backends/pdcore_backends/numpy/impl.py",
            "import pdcore_conformance",
            "pdcore_conformance",
        ),
        ("adapters/pdcore_adapters/bound.py", "import pdcore_conformance", "pdcore_conformance"),
    ],
    BACKENDS: [
        (
            "backends/pdcore_backends/numpy/impl.py",
            "import pdcore_backends.cupy",
            "pdcore_backends.cupy",
        ),
        (
            "backends/pdcore_backends/jax/impl.py",
            "from ..torch import choice",
            "pdcore_backends.torch.choice",
        ),
    ],
    DOOR: [
        ("backends/pdcore_backends/cupy/impl.py", "from pdcore.spec import Batch", "pdcore.spec"),
        (
            "adapters/pdcore_adapters/flax/attention.py",
            "from pdcore.dispatch import choose",
            "pdcore.dispatch",
        ),
        (
            "adapters/pdcore_adapters/sklearn.py",
            "from pdcore.svr.checks import float64",
            "pdcore.svr.checks",
        ),
    ],
    FRAMEWORKS: [
        ("pdcore/arrays.py", "import torch", "torch"),
        ("pdcore/attention.py", "import jax.numpy", "jax"),
        ("pdcore/svr/solvers.py", "import cupy", "cupy"),
    ],
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a folder with the packages and their contracts."""
    pytest.importorskip("importlinter")
    folder = tmp_path_factory.mktemp("house")
    for package, above in PACKAGES.items():
        source = Path(importlib.import_module(package).__file__).parent
        ignored = shutil.ignore_patterns("__pycache__", "*.cu*", "*.npz", "*.json")
        shutil.copytree(source, folder / above / package, ignore=ignored)
    shutil.copy(SETTINGS, folder)
    return folder


def linted(folder):
    """Run `lint-imports` on the packages of a folder; return its exit code and its output."""
    path = os.pathsep.join(str(folder / above) for above in PACKAGES.values())
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Contracts:" in done.stdout, done.stdout + done.stderr
    return done.returncode, done.stdout


def test_contracts_are_kept(copy):
    code, output = linted(copy)
    assert code == 0, output


def test_no_exceptions():
    linter = tomllib.loads(SETTINGS.read_text("utf-8"))["tool"]["importlinter"]
    assert len(linter["contracts"]) == 5
    for settings in (linter, *linter["contracts"]):
        assert not {"ignore_imports", "exclude_type_checking_imports"} & set(settings)


def name_of(path):
    """Return the module that a file of the copy is."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] in PACKAGES else parts[1:])


@pytest.mark.parametrize("within", ["", "def _planted():\n    ", "if TYPE_CHECKING:\n    "])
def test_each_contract_can_fail(copy, within):
    """At the top of a file, in a function, and for type checkers alone."""
    lines = [line for contract in PLANTED.values() for line in contract]
    before = {copy / path: (copy / path).read_bytes() for path, _, _ in lines}
    for path, statement, _ in lines:
        with (copy / path).open("a", encoding="utf-8") as stream:
            stream.write(f"\n\n{within}{statement}\n")
    try:
        code, output = linted(copy)
    finally:
        for file, text in before.items():
            file.write_bytes(text)
    assert code == 1
    details = output.partition("Broken contracts")[2]
    parts = re.split(r"^(.+)\n-{8,}$", details, flags=re.MULTILINE)
    chains = dict(zip(parts[1::2], parts[2::2], strict=True))
    for contract, planted in PLANTED.items():
        assert f"{contract} BROKEN" in output
        for path, _, imported in planted:
            assert f"{name_of(path)} -> {imported}" in chains[contract]


def test_room_outside_the_order_is_noticed(copy):
    stray = copy / "pdcore" / "stray.py"
    stray.touch()
    try:
        code, output = linted(copy)
    finally:
        stray.unlink()
    assert code == 1
    assert f"{ROOMS} BROKEN" in output
    assert "stray" in output


def imports(tree):
    """Yield the module and the name of every import of a syntax tree; "" imports the module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def plugin_files():
    example = ROOT / "tests" / "example_plugin"
    template = Path(importlib.import_module("pdcore_conformance").__file__).parent / "template"
    files = [*example.rglob("*.py"), *template.glob("project/**/*.py.jinja")]
    assert len(files) >= 9
    return [pytest.param(file, id=f"{file.parent.name}/{file.name}") for file in files]


def rendered(text):
    """Return a template's text as Python: a block of Jinja is empty, a value is a name."""
    for opening, closing, value in (("{%", "%}", ""), ("{{ '", "' }}", ""), ("{{", "}}", "name")):
        while opening in text:
            before, _, rest = text.partition(opening)
            text = before + value + rest.partition(closing)[2]
    return text


@pytest.mark.parametrize("file", plugin_files())
def test_plugins_import_only_what_they_may(file):
    text = file.read_text("utf-8")
    for module, name in imports(ast.parse(rendered(text) if file.suffix == ".jinja" else text)):
        package = module.partition(".")[0]
        if not package.startswith("pdcore") or (file.parent.name == "tests" and "conf" in package):
            continue
        assert module in ("pdcore", "pdcore.extend"), f"{file}: import {module}"
        if name:
            source = pdcore if module == "pdcore" else pdcore.extend
            assert name in source.__all__ or (module, name) == ("pdcore", "extend")


def test_backends_and_adapters_import_public_names():
    for package in ("pdcore_backends", "pdcore_adapters"):
        for file in Path(importlib.import_module(package).__file__).parent.rglob("*.py"):
            for module, name in imports(ast.parse(file.read_text("utf-8"))):
                if module.partition(".")[0] != "pdcore" or not name or name == "extend":
                    continue
                room = importlib.import_module(module)
                assert name in room.__all__, f"{file}: from {module} import {name}"


def test_extend_exports_public_names_once():
    names = pdcore.extend.__all__
    assert len(names) == len(set(names))
    for name in names:
        assert not name.startswith("_")
        assert hasattr(pdcore.extend, name)


def test_extend_agrees_with_pdcore():
    for name in set(pdcore.__all__) & set(pdcore.extend.__all__):
        assert getattr(pdcore, name) is getattr(pdcore.extend, name)


def test_no_private_name_crosses_a_room():
    folder = Path(pdcore.__file__).parent
    for file in folder.rglob("*.py"):
        room = file.relative_to(folder).parts[0]
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level or not node.module:
                continue
            inside = node.level < len(file.relative_to(folder).parts)
            for alias in node.names:
                private = alias.name.startswith("_") and not alias.name.startswith("__")
                assert inside or not private, f"{file} in {room}: {alias.name}"
