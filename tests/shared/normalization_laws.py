"""Normalizations that declare nothing, on the backend of a module's fixture ``name``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.plugins import registry as plugins
from pdcore.reference import reference_attention
from pdcore.spec.vocabulary import unregister
from pdcore_conformance.frameworks import framework
from pdcore_conformance.judge.calls import dtype_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Standardized(pdcore.Normalization):
    """T(x) = (x - mu) / sqrt(var + eps), the formula of Attention-BN, and no declarations."""

    eps: float = 1e-5
    word = "standardized"

    def statistics_state(self) -> pdcore.Statistics:
        return pdcore.Moments()

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return (x - state["mean"]) / xp.sqrt(state["var"] + self.eps)

    def latex(self) -> str:
        return "x"


@dataclass(frozen=True)
class Doubled(pdcore.Normalization):
    """T(x) = 2 x, which keeps a mean far from 0, and no declarations."""

    word = "doubled"

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return 2.0 * x

    def latex(self) -> str:
        return "2 x"


@dataclass(frozen=True)
class Raised(pdcore.Normalization):
    """T(x) = x + 100, and no declarations."""

    word = "raised"

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x + 100.0

    def latex(self) -> str:
        return "x + 100"


@pytest.fixture(autouse=True)
def words() -> Iterator[None]:
    for cls in (Standardized, Doubled, Raised):
        pdcore.register_normalization(cls)
    yield
    for cls in (Standardized, Doubled, Raised):
        unregister(cls.word)


def draw(mean: float, dtype: str) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 40, 32))
    kind = dtype_of(dtype)
    return (q + mean).astype(kind), (k + mean).astype(kind), v.astype(kind)


def takes(name: str, dtype: str) -> bool:
    return plugins.registered()[name].support(dtype) == "full"


def kernels(name: str, spec: str, dtype: str) -> list[str]:
    """Return the kernel that `explain` names."""
    library = framework(plugins.registered()[name].library)
    arrays = map(library.asarray, draw(0.0, dtype))
    steps = pdcore.explain(*arrays, spec, backend=name).plan.steps
    return [step.partition(",")[0] for step in steps if step.startswith("kernel")]


def errors(name: str, spec: str, mean: float, dtype: str, literal: str = "bn") -> list[float]:
    """Return the root mean square errors of out, without and with lse, and of lse."""
    library = framework(plugins.registered()[name].library)
    q, k, v = draw(mean, dtype)
    with library.precision(dtype):
        arrays = list(map(library.asarray, (q, k, v)))
        alone = pdcore.attention(*arrays, spec, backend=name)
        out, lse = pdcore.attention(*arrays, spec, return_lse=True, backend=name)
    wide = (x.astype(np.float64) for x in (q, k, v))
    want, level = reference_attention(*wide, literal, return_lse=True)
    pairs = ((alone, want), (out, want), (lse, level))
    gaps = [library.asnumpy(x).astype(np.float64) - y for x, y in pairs]
    return [float(np.sqrt(np.mean(gap * gap))) for gap in gaps]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_kernel_is_that_of_batch_normalization(name: str, dtype: str) -> None:
    if takes(name, dtype):
        assert kernels(name, "standardized", dtype) == kernels(name, "bn", dtype)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_it_is_as_exact_as_batch_normalization(name: str, mean: float) -> None:
    if takes(name, "bfloat16"):
        *outs, lse = errors(name, "standardized", mean, "bfloat16")
        for own, bn in zip(outs, errors(name, "bn", mean, "bfloat16")[:2], strict=True):
            assert own <= 2 * bn + 1e-6
        assert lse <= 0.03  # a kernel that folds bn reads exact keys, of which T(k) is rounded


def test_keys_that_stay_far_from_zero_are_rounded_near_a_point(name: str) -> None:
    if takes(name, "bfloat16"):
        spec = "softmax(scale=0.001)+raised"  # bfloat16 has steps of 0.5 at 100
        alone, out, _ = errors(name, spec, 0.0, "bfloat16", spec)
        assert max(alone, out) <= 2e-3


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_it_runs_in_float16_and_is_right(name: str, mean: float) -> None:
    if takes(name, "float16"):
        alone, out, lse = errors(name, "standardized", mean, "float16")
        assert max(alone, out) <= 5e-3
        assert lse <= 5e-2


def test_rows_that_leave_the_range_of_float16_are_right(name: str) -> None:
    if not takes(name, "float16"):
        return
    library = framework(plugins.registered()[name].library)
    q, k, v = draw(0.0, "float16")
    q, k = (np.asarray(40_000 * np.sign(x), np.float16) for x in (q, k))
    k[..., 1:, :] = 0
    q[..., 1:] = 0  # one feature alone, so that 2 x = 80,000 is an operand and no overflow
    out = pdcore.attention(*map(library.asarray, (q, k, v)), "doubled", backend=name)
    out = library.asnumpy(out).astype(float)
    assert np.isfinite(out).all()
    seen = (q[..., :1].astype(float) * k[..., :1, :1].astype(float)) > 0
    others = v[..., 1:, :].astype(float).mean(-2, keepdims=True)
    want = np.where(seen, v[..., :1, :].astype(float), others)
    np.testing.assert_allclose(out, want, rtol=0, atol=4e-3)
