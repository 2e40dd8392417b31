"""The array libraries of the suite: conversion of arrays, precision, transformations."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pdcore_conformance.frameworks import Framework, framework

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "int32", "int64")
LIBRARIES = [
    "numpy",
    "array_api_strict",
    pytest.param("torch", marks=pytest.mark.torch),
    pytest.param("jax", marks=pytest.mark.jax),
]
DIFFERENTIABLE = LIBRARIES[2:]


@pytest.fixture
def library(request: pytest.FixtureRequest) -> Framework:
    pytest.importorskip(request.param)
    return framework(request.param)


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def layouts(dtype: str) -> Iterator[np.ndarray]:
    base = np.arange(24.0).reshape(2, 3, 4).astype(dtype_of(dtype))
    yield base
    yield base.transpose(2, 0, 1)
    yield base[:, ::2, 1:]
    yield base[:, ::-1]
    yield np.broadcast_to(base[:1], (5, 3, 4))
    yield base[:, :0]
    yield base[0, 0, 0]
    fixed = base.copy()
    fixed.setflags(write=False)
    yield fixed


# --- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
def test_arrays_are_converted_both_ways(library: Framework, dtype: str) -> None:
    if dtype in ("float16", "bfloat16") and library.library == "array_api_strict":
        with pytest.raises(TypeError, match=f"array_api_strict has no {dtype}"):
            library.asarray(np.zeros(3, dtype_of(dtype)))
        assert library.missing(dtype) == f"array_api_strict {library.version()} has no {dtype}"
        return
    assert library.missing(dtype) is None
    with library.precision("float64"):
        for x in layouts(dtype):
            x = np.asarray(x)
            there = library.asarray(x)
            assert library.is_array(there)
            assert library.dtype_of(there) == dtype
            assert library.device_of(there) == "cpu"
            back = library.asnumpy(there)
            assert type(back) is np.ndarray
            assert back.dtype == x.dtype
            np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    "library", ["numpy", pytest.param("torch", marks=pytest.mark.torch)], indirect=True
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strides_are_kept(library: Framework, dtype: str) -> None:
    for x in layouts(dtype):
        x = np.asarray(x)
        there = library.asarray(x)
        strides = there.strides if library.library == "numpy" else there.stride()
        unit = 1 if library.library == "numpy" else x.itemsize
        if library.library != "numpy" and any(stride < 0 for stride in x.strides):
            assert there.is_contiguous()
        elif x.size:
            assert tuple(stride * unit for stride in strides) == x.strides


@pytest.mark.torch
def test_a_tensor_shares_nothing_with_its_array() -> None:
    pytest.importorskip("torch")
    x = np.zeros(3)
    framework("torch").asarray(x).fill_(1.0)
    assert not x.any()


@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
def test_other_objects_are_no_arrays_of_the_library(library: Framework) -> None:
    for other in (1.0, [1.0], None, "x", np.float64(1)):
        assert not library.is_array(other)
    assert library.is_array(np.zeros(2)) == (library.library == "numpy")


# --- availability --------------------------------------------------------------------------------


@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
def test_availability(library: Framework) -> None:
    assert library.available("cpu") is None
    assert library.devices()[0]
    assert library.versions()[library.library] == library.version()
    assert library.policy()
    if "cuda:0" not in library.devices():
        assert library.available("cuda") == (
            f"{library.library} {library.version()} sees no CUDA device"
        )
        assert str(library.available("cuda:1")).endswith("sees no CUDA device cuda:1")
    assert "has no device tpu, only" in str(library.available("tpu"))
    assert library.memory("cpu") is None


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
    pytest.importorskip("array_api_strict")
    library = Framework("array_api_strict")  # the base class
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


# --- precision, poison ----------------------------------------------------------------------------


@pytest.mark.torch
def test_torch_precision() -> None:
    torch = pytest.importorskip("torch")
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        with framework("torch").precision("float32"):
            assert switch.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


@pytest.mark.jax
def test_jax_precision_is_global() -> None:
    jax = pytest.importorskip("jax")
    from concurrent.futures import ThreadPoolExecutor

    def settings() -> tuple[Any, ...]:
        return jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision

    before = settings()
    library = framework("jax")
    with ThreadPoolExecutor(1) as thread:
        for dtype in ("float64", "float32"):
            with library.precision(dtype):
                assert (
                    settings()
                    == thread.submit(settings).result()
                    == (dtype == "float64", "highest")
                )
    assert settings() == before
    with library.precision("float32"):
        assert library.dtype_of(library.asarray(np.zeros(2, np.int64))) == "int32"
        with pytest.raises(TypeError, match="float64 only under precision"):
            library.asarray(np.zeros(2))


@pytest.mark.jax
def test_jax_frees_its_programs_regularly(monkeypatch: pytest.MonkeyPatch) -> None:
    jax = pytest.importorskip("jax")
    from pdcore_conformance.frameworks import on_jax

    monkeypatch.setattr(on_jax, "CLEARING", 3)
    library = on_jax.JaxFramework("jax")
    double = jax.jit(lambda x: 2 * x)
    sizes = []
    for _ in range(4):
        with library.precision("float32"):
            double(jax.numpy.ones(2))
        sizes.append(double._cache_size())
    assert sizes == [1, 1, 0, 1]


@pytest.mark.parametrize("library", LIBRARIES, indirect=True)
def test_poisoned_memory(library: Framework) -> None:
    xp = library.xp
    if library.library == "jax":
        assert not library.poisons
        return
    assert library.poisons
    with library.poisoned():
        like = library.asarray(np.zeros((2, 2)))
        for x in (xp.empty((3, 2)), xp.empty_like(like), xp.empty((2,), dtype=xp.float32)):
            assert np.isnan(library.asnumpy(x)).all()
        whole = library.asnumpy(xp.empty((2,), dtype=xp.int64))
        assert (whole == np.iinfo(np.int64).max).all()
    again = library.asnumpy(xp.empty((2,), dtype=xp.int64))
    assert again.shape == (2,)


@pytest.mark.torch
def test_torch_poison_reaches_new_empty_and_backward() -> None:
    torch = pytest.importorskip("torch")
    cotangents = []

    class Fresh(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Any) -> Any:
            cotangents.append(d.new_empty(2))
            return d

    with framework("torch").poisoned():
        x = torch.ones(2, requires_grad=True)
        Fresh.apply(x).sum().backward()
        assert torch.isnan(x.new_empty(3)).all()
        assert torch.isnan(torch.empty_strided((2, 2), (1, 2))).all()
        half = torch.empty(2, dtype=torch.bfloat16)
    assert torch.isnan(half).all()
    assert torch.isnan(cotangents[0]).all()


# --- transformations ------------------------------------------------------------------------------


def product(x: Any) -> tuple[Any, Any]:
    """Return a^2 b, and the square root of a."""
    a, b = x["a"], x["b"]
    return a * a * b, a**0.5


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"a": rng.uniform(1, 2, (3, 2)), "b": rng.normal(size=(3, 2)), "c": np.ones(2)}


@pytest.mark.parametrize("library", DIFFERENTIABLE, indirect=True)
def test_reverse_mode(library: Framework, arrays: dict[str, np.ndarray]) -> None:
    a, b = arrays["a"], arrays["b"]
    d_out, d_lse = np.random.default_rng(1).normal(size=(2, 3, 2))
    with library.precision("float64"):
        there = {name: library.asarray(x) for name, x in arrays.items()}
        d = library.asarray(d_out), library.asarray(d_lse)
        outputs, gradients = library.vjp(product, there, d)
        np.testing.assert_allclose(library.asnumpy(outputs[0]), a * a * b, rtol=1e-14)
        np.testing.assert_allclose(
            library.asnumpy(gradients["a"]),
            2 * a * b * d_out + d_lse / (2 * np.sqrt(a)),
            rtol=1e-13,
        )
        np.testing.assert_allclose(library.asnumpy(gradients["b"]), a * a * d_out, rtol=1e-13)
        np.testing.assert_array_equal(
            library.asnumpy(gradients["c"]), 0.0
        )  # the result does not depend on c
        _, alone = library.vjp(product, there, (d[0], None))
        np.testing.assert_allclose(library.asnumpy(alone["a"]), 2 * a * b * d_out, rtol=1e-13)


@pytest.mark.parametrize("library", DIFFERENTIABLE, indirect=True)
def test_second_derivatives(library: Framework, arrays: dict[str, np.ndarray]) -> None:
    a, b = arrays["a"], arrays["b"]
    d_out, d_lse, toward_a, toward_b = np.random.default_rng(1).normal(size=(4, 3, 2))
    with library.precision("float64"):
        there = {name: library.asarray(x) for name, x in arrays.items()}
        d = library.asarray(d_out), library.asarray(d_lse)
        toward = {"a": toward_a, "b": toward_b, "c": np.ones(2)}
        first, second = library.double_vjp(
            product, there, d, {name: library.asarray(x) for name, x in toward.items()}
        )
        _, gradients = library.vjp(product, there, d)
        for name in "abc":
            np.testing.assert_allclose(
                library.asnumpy(first[name]), library.asnumpy(gradients[name]), rtol=1e-13
            )
        bend = 2 * b * d_out - d_lse / (4 * a**1.5)
        expected = bend * toward_a + 2 * a * d_out * toward_b
        np.testing.assert_allclose(library.asnumpy(second["a"]), expected, rtol=1e-12)
        np.testing.assert_allclose(
            library.asnumpy(second["b"]), 2 * a * d_out * toward_a, rtol=1e-12
        )
        np.testing.assert_array_equal(library.asnumpy(second["c"]), 0.0)


@pytest.mark.parametrize("library", DIFFERENTIABLE, indirect=True)
def test_forward_mode(library: Framework, arrays: dict[str, np.ndarray]) -> None:
    a, b = arrays["a"], arrays["b"]
    direction = np.random.default_rng(1).normal(size=(3, 2))
    with library.precision("float64"):
        there = {name: library.asarray(x) for name, x in arrays.items()}
        outputs, derivatives = library.jvp(product, there, {"a": library.asarray(direction)})
        np.testing.assert_allclose(library.asnumpy(outputs[0]), a * a * b, rtol=1e-14)
        np.testing.assert_allclose(
            library.asnumpy(derivatives[0]), 2 * a * b * direction, rtol=1e-13
        )
        np.testing.assert_allclose(
            library.asnumpy(derivatives[1]), direction / (2 * np.sqrt(a)), rtol=1e-13
        )


@pytest.mark.parametrize("library", DIFFERENTIABLE, indirect=True)
def test_map_and_compiler(library: Framework, arrays: dict[str, np.ndarray]) -> None:
    a, b = arrays["a"], arrays["b"]

    def rows(x: Any) -> tuple[Any, Any]:
        assert x["a"].shape == (2,)  # one example
        return product(x)

    with library.precision("float64"):
        there = {name: library.asarray(arrays[name]) for name in "ab"}
        transformed = [(library.vmap, rows)]
        if library.missing("compile") is None:
            transformed.append((library.compile, product))
        for transform, function in transformed:
            out, lse = transform(function)(there)
            np.testing.assert_allclose(library.asnumpy(out), a * a * b, rtol=1e-14)
            np.testing.assert_allclose(library.asnumpy(lse), np.sqrt(a), rtol=1e-14)


@pytest.mark.torch
def test_torch_compile_without_a_compiler(monkeypatch: Any) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("PATH", "")
    assert framework("torch").missing("compile") == (
        "torch.compile takes a C++ compiler, and there is none"
    )


def test_unknown_features_are_not_missing() -> None:
    assert framework("numpy").missing("causal") is None
    assert framework("numpy").missing("jvp") == "numpy has no jvp"
