"""Dropout in the CUDA kernels, on the emulator: the weights of every other backend are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emulated_checks import random_mask
from emulated_cupy import NAME, register

import pdcore
from pdcore.extend import unregister_backend

SEED = 2**63 + 5
#: A spec, and the arguments of its call.
CALLS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "causal+sh(1,2)": {"key_mask": random_mask(2, 70)},
    "exponential(softcap=2)+sparse(9,3)": {"bias": np.ones((4, 1, 70))},
}


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register()
    yield
    unregister_backend(NAME)


def arrays(dtype: str) -> list[Any]:
    rng = np.random.default_rng(3)
    shapes = ((2, 4, 66, 5), (2, 2, 70, 5), (2, 2, 70, 3))
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", CALLS)
def test_values_and_gradients_are_those_of_numpy(spec: str, dtype: str) -> None:
    q, k, v = arrays(dtype)
    call = {n: x.astype(dtype) if n == "bias" else x for n, x in CALLS[spec].items()}
    more = {**call, "dropout": 0.4, "seed": SEED}
    plan = str(pdcore.explain(q, k, v, spec, backend=NAME, **more))
    assert "and dropout, compiled in" in plan
    results = []
    for backend in (NAME, "numpy"):
        out, lse, vjp = pdcore.attention_vjp(q, k, v, spec, backend=backend, **more)
        results.append(
            {"out": out, "lse": lse, **vjp(np.cos(out), np.where(np.isfinite(lse), lse, 0))}
        )
    tolerance = 1e-12 if dtype == "float64" else 1e-5
    for name, wanted in results[1].items():
        scale = float(np.max(np.abs(wanted), where=np.isfinite(wanted), initial=0.0))
        np.testing.assert_allclose(
            results[0][name], wanted, rtol=0, atol=tolerance * scale, err_msg=name
        )


def test_dropped_weights_are_exactly_zero() -> None:
    q, k = np.zeros((1, 4, 66, 5), np.float32), np.zeros((1, 2, 70, 5), np.float32)
    units = np.broadcast_to(np.eye(70, dtype=np.float32), (1, 2, 70, 70))
    found, wanted = (
        pdcore.attention(q, k, units, dropout=0.3, seed=SEED, backend=backend) != 0
        for backend in (NAME, "numpy")
    )
    np.testing.assert_array_equal(found, wanted)


def test_tensor_cores_leave_dropout_to_others() -> None:
    q, k, v = (np.zeros((1, 2, 8, 64), np.float16) for _ in range(3))
    with_it, without = (
        str(pdcore.explain(q, k, v, backend=NAME, **more))
        for more in ({"dropout": 0.1, "seed": 1}, {})
    )
    assert "tensor cores drop no weights" in with_it
    assert "tensor cores drop no weights" not in without
