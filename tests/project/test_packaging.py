"""The distribution: what it declares, and what importing it costs."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib import metadata, resources

import pytest

import pdcore

DISTRIBUTION = metadata.distribution("pdcore")

# Needed at first use only. Of array_api_compat, the namespaces of single libraries.
LATE = {
    "autograd",
    "clarabel",
    "aeon",
    "click",
    "cupy",
    "equinox",
    "flax",
    "hypothesis",
    "jax",
    "matplotlib",
    "ml_dtypes",
    "pytest",
    "qpsolvers",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "torch",
    "typer",
}
COMPAT_LIBRARIES = {"cupy", "dask", "jax", "numpy", "torch"}


def modules_after(statement: str, folder) -> set[str]:
    """Return the modules loaded in a fresh interpreter, away from the checkout."""
    report = "import sys; print(*sys.modules)"
    completed = subprocess.run(
        [sys.executable, "-c", f"{statement}; {report}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return set(completed.stdout.split())


def test_import_loads_only_the_required_libraries(tmp_path):
    loaded = modules_after("import pdcore", tmp_path)
    top = {name.partition(".")[0] for name in loaded}
    assert "pdcore" in top
    assert not top & LATE
    compat = {f"array_api_compat.{library}" for library in COMPAT_LIBRARIES}
    assert not loaded & compat


def test_import_loads_nothing_else_installed(tmp_path):
    """The list above cannot name a dependency that nobody has thought of; this one need not."""
    owners = metadata.packages_distributions()
    bare = {name.partition(".")[0] for name in modules_after("pass", tmp_path)}
    top = {name.partition(".")[0] for name in modules_after("import pdcore", tmp_path)}
    third_party = {name for name in top - bare if name in owners}
    assert third_party <= {"array_api_compat", "numpy", "pdcore", "pdcore_backends", "pluggy"}


@pytest.mark.parametrize("name", pdcore.__all__)
def test_public_name_exists(name):
    assert hasattr(pdcore, name)


def test_public_names_are_listed_once():
    assert len(set(pdcore.__all__)) == len(pdcore.__all__)


def test_star_import_gives_the_public_names():
    namespace: dict[str, object] = {}
    exec("from pdcore import *", namespace)
    assert set(pdcore.__all__) <= set(namespace)


def test_entry_points():
    declared = {
        entry.name: entry.value for entry in DISTRIBUTION.entry_points if entry.group == "pdcore"
    }
    assert declared["numpy"] == "pdcore_backends.numpy"
    for value in declared.values():
        importlib.import_module(value)


def test_cuda_headers_are_in_the_package():
    header = resources.files("pdcore_backends").joinpath("cupy", "kernels", "ptx.cuh")
    assert "mma_m16n8k16" in header.read_text("utf-8")


def test_console_script():
    [script] = [entry for entry in DISTRIBUTION.entry_points if entry.group == "console_scripts"]
    assert (script.name, script.value) == ("pdcore", "pdcore.cli:main")


def test_extras_and_requirements():
    extras = set(DISTRIBUTION.metadata.get_all("Provides-Extra"))
    assert extras >= {"torch", "jax", "flax", "equinox", "cupy", "cli", "conformance", "svr", "dev"}
    assert "aeon" in extras
    required = {
        requirement.partition(">")[0].strip()
        for requirement in DISTRIBUTION.requires
        if "extra ==" not in requirement
    }
    assert required == {"array-api-compat", "numpy", "pluggy"}
    assert DISTRIBUTION.metadata["Requires-Python"] == ">=3.11"
    assert DISTRIBUTION.metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize(
    "package", ["pdcore", "pdcore_backends", "pdcore_adapters", "pdcore_conformance"]
)
def test_package_is_typed_and_documented(package):
    assert importlib.import_module(package).__doc__
    assert resources.files(package).joinpath("py.typed").is_file()
