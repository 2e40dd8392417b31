"""What the suite asks of every array library; a module of tests has a fixture ``library``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pdcore_conformance.frameworks import Framework

DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "int32", "int64")


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
def test_there_and_back(library: Framework, dtype: str) -> None:
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strides_are_kept(library: Framework, dtype: str) -> None:
    for x in layouts(dtype):
        x = np.asarray(x)
        there = library.asarray(x)
        given = there.strides if library.library == "numpy" else there.stride()
        unit = 1 if library.library == "numpy" else x.itemsize
        if library.library != "numpy" and any(stride < 0 for stride in x.strides):
            assert there.is_contiguous()
        elif x.size:
            assert tuple(stride * unit for stride in given) == x.strides


def test_what_is_no_array_of_the_library(library: Framework) -> None:
    for other in (1.0, [1.0], None, "x", np.float64(1)):
        assert not library.is_array(other)
    assert library.is_array(np.zeros(2)) == (library.library == "numpy")


# --- what is there --------------------------------------------------------------------------------


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


# --- transformations ------------------------------------------------------------------------------


def product(x: Any) -> tuple[Any, Any]:
    """Give a^2 b, and the square root of a."""
    a, b = x["a"], x["b"]
    return a * a * b, a**0.5


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"a": rng.uniform(1, 2, (3, 2)), "b": rng.normal(size=(3, 2)), "c": np.ones(2)}


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
        np.testing.assert_array_equal(library.asnumpy(gradients["c"]), 0.0)  # nothing depends on it
        _, alone = library.vjp(product, there, (d[0], None))
        np.testing.assert_allclose(library.asnumpy(alone["a"]), 2 * a * b * d_out, rtol=1e-13)


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
