"""The array libraries of the suite: conversion of arrays, precision, transformations."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import framework_checks
import numpy as np
import pytest
from framework_checks import (  # noqa: F401 - collected here too
    test_availability,
    test_poisoned_memory,
    test_there_and_back,
    test_what_is_no_array_of_the_library,
)

from pdcore_conformance.frameworks import Framework, framework

ml_dtypes = pytest.importorskip("ml_dtypes")


@pytest.fixture(params=["numpy", "array_api_strict"])
def library(request: pytest.FixtureRequest) -> Framework:
    return framework(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strides_of_numpy_are_kept(dtype: str) -> None:
    framework_checks.test_strides_are_kept(framework("numpy"), dtype)


def test_a_library_that_is_not_installed() -> None:
    assert framework("no_such_library").available("cpu") == "not installed: no_such_library"


def test_a_library_that_cannot_be_imported(tmp_path: Any, monkeypatch: Any) -> None:
    (tmp_path / "broken_library.py").write_text("raise OSError('libcudart.so.99: not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    reason = framework("broken_library").available("cpu")
    assert reason == "broken_library cannot be imported: OSError: libcudart.so.99: not found"


def test_cupy_without_a_device_has_a_reason() -> None:
    library = framework("cupy")
    reason = library.available("cuda")
    if library.unimportable() is None and library.devices():
        assert reason is None
        assert library.available("cpu") == "cupy runs on CUDA devices only"
    else:
        assert reason is not None
        assert reason.startswith("not installed: cupy") or "sees no CUDA device" in reason


def test_no_framework_is_imported_before_it_is_needed() -> None:
    code = """
import sys
from pdcore_conformance.frameworks import framework
libraries = [framework(name) for name in ("numpy", "array_api_strict", "torch", "jax", "cupy", "x")]
left = {name.partition(".")[0] for name in sys.modules}
left &= {"torch", "jax", "jaxlib", "cupy", "array_api_strict", "ml_dtypes"}
sys.exit(str(left) if left else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_any_library_of_the_standard(monkeypatch: Any) -> None:
    library = Framework("array_api_strict")  # by what every library has, nothing of its own
    x = np.arange(6.0).reshape(2, 3)
    there = library.asarray(x)
    assert library.is_array(there)
    assert library.dtype_of(there) == "float64"
    np.testing.assert_array_equal(library.asnumpy(there), x)
    with library.precision("float64"), library.poisoned():
        pass
    library.synchronize(there)
    library.release()
    assert not library.has_autodiff
    assert not library.poisons
    for name in ("vjp", "double_vjp", "jvp", "vmap", "compile"):
        count = {"vjp": 3, "double_vjp": 4, "jvp": 3, "vmap": 1, "compile": 1}[name]
        with pytest.raises(NotImplementedError, match="array_api_strict has no"):
            getattr(library, name)(*[None] * count)


def test_unknown_features_are_not_missing() -> None:
    assert framework("numpy").missing("causal") is None
    assert framework("numpy").missing("jvp") == "numpy has no jvp"
