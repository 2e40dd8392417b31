"""Installed distributions for the tests of plugins, without installing anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from contextlib import contextmanager
from pathlib import Path

from pdcore.backend import BackendInfo
from pdcore.plugins import registry as plugins

HERE = Path(__file__).resolve().parents[1]
EXAMPLE = HERE / "example_plugin"
BROKEN = HERE / "broken_plugins"
VARIABLES = ("PDCORE_BACKEND", "PDCORE_BLOCK", "PDCORE_PLUGINS")

#: Prints what a fresh interpreter finds.
REPORT = """
import json, sys
from pdcore.plugins import registry as plugins
from pdcore.spec import vocabulary
registered = plugins.registered()
third_party = [n for n in registered if not plugins._entries[n].owner.built_in]
print(json.dumps({
    "registered": list(registered),
    "third_party": third_party,
    "unavailable": {n: plugins.unavailable_reason(i) for n, i in registered.items()},
    "broken": {n: str(b) for n, b in plugins.broken.items()},
    "disabled": plugins.disabled,
    "words": sorted({*vocabulary.kernel_words(), *vocabulary.normalization_words()}),
    "modules": sorted(sys.modules),
}))
"""


def add_distribution(folder, name, entry_points, *, version="1.0"):
    """Write the metadata of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{point} = {value}" for point, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[pdcore]", *lines, ""]))


def fresh(script, *paths, **variables):
    """Run a script in a fresh interpreter, away from the checkout, and read the JSON it prints."""
    environment = {name: text for name, text in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, sys.path)])}
    completed = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | variables,
        cwd=paths[0] if paths else None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


@contextmanager
def rediscovered(monkeypatch):
    """Discover anew in the block, and once more after it, without what it added."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plugins._reset()
    try:
        yield
    finally:
        plugins._reset()


def module(monkeypatch, name, **contents):
    """Put a module into sys.modules."""
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def info(name, load="nowhere:Missing", **fields):
    return BackendInfo(name=name, load=load, library="numpy", **fields)
