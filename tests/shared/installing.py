"""Distributions that look installed, and fresh interpreters, for the tests of plug-ins."""

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

#: A script that prints as JSON what a new interpreter discovers.
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
    """Run a script in a new interpreter, outside of the checkout, and parse its JSON output."""
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
    """Discover plug-ins again at the start of the block and after it, without its additions."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    plugins._reset()
    try:
        yield
    finally:
        plugins._reset()


def module(monkeypatch, name, **contents):
    """Create a module with these contents in sys.modules."""
    created = types.ModuleType(name)
    vars(created).update(contents)
    monkeypatch.setitem(sys.modules, name, created)
    return created


def info(name, load="nowhere:Missing", **fields):
    return BackendInfo(name=name, load=load, library="numpy", **fields)
