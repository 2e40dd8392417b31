"""The fold of Attention-BN is exact, and wrong variants of the fold fail the same check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, PlainNumpy, cotangents, normal_case
from rewrite_cases import caught, exact, forward_only, padded, spread, with_transform

from pdcore.lowering import Fold, Normalize, Plan, Rows, Signature, first_real, lower
from pdcore.spec import Batch, Moments, parse


@dataclass(frozen=True)
class DefectiveFold:
    """A `Fold` with one defect."""

    batch: Batch
    scale: float
    defect: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        defect, eps = self.defect, self.batch.eps
        moments = params if self.batch.statistics == "running" else state
        mean, var = moments["mean"], moments["var"]
        if defect == "sample variance":
            n = state["n"]
            var = var * n / xp.where(n > 1, n - 1, n)
        beta = self.batch.weight(params)
        shift = mean
        if self.batch.statistics == "prefix":
            shift = first_real(rows.k, rows.key_mask, xp=xp)
        centre = mean if defect == "beta forgotten" else beta * mean
        inverse = 1.0 / (var + eps)
        match defect:
            case "sigma for sigma squared":
                inverse = xp.sqrt(inverse)
            case "eps after the root":
                inverse = 1.0 / (xp.sqrt(var) + eps) ** 2
            case "eps twice":
                inverse = 1.0 / (var + 2 * eps)
            case "no eps":
                inverse = 1.0 / var
        q = rows.q if defect == "query not centred" else rows.q - centre
        q = q * inverse
        k = rows.k + shift if defect == "keys shifted the other way" else rows.k - shift
        gap = shift - centre
        match defect:
            case "beta forgotten in the constant":
                gap = shift - mean
            case "c forgotten in the constant":
                gap = -centre
            case "beta mu forgotten in the constant":
                gap = shift + 0.0 * centre
            case "sign of the constant":
                gap = -gap
        constant = self.scale * xp.sum(q * gap, axis=-1)
        if defect == "tau forgotten in the constant":
            constant = constant / self.scale
        if defect == "constant dropped":
            constant = xp.zeros_like(constant)
        return forward_only(rows._replace(q=q, k=k, row_constant=constant))


def defective_fold(case: Case, defect: str) -> Plan:
    fold = case.plan().transforms[0]
    assert isinstance(fold, Fold)
    return with_transform(case, DefectiveFold(fold.batch, fold.scale, defect))


FOLDED = [
    "bn(beta=0.6,eps=0.3)",
    "bn(beta=param,eps=0.3)+h(count)",
    "bn(beta=0.6,eps=0.3,statistics=batch)+h(one)",
    "bn(beta=0.6,eps=0.3,statistics=running)",
    "bn(beta=param,eps=0.3,statistics=prefix)+causal",
    "bn(beta=0.6,eps=0.3,statistics=prefix)+sh(1,2)",
]
FOLD_DEFECTS = [
    "sigma for sigma squared",
    "eps after the root",
    "eps twice",
    "no eps",
    "beta forgotten",
    "query not centred",
    "keys shifted the other way",
    "beta forgotten in the constant",
    "c forgotten in the constant",
    "beta mu forgotten in the constant",
    "sign of the constant",
    "tau forgotten in the constant",
    "constant dropped",
]


@pytest.mark.parametrize("text", FOLDED)
def test_batch_normalization_is_a_scaled_query(text: str) -> None:
    case = spread(normal_case(text))
    assert isinstance(case.plan().transforms[0], Fold)
    exact(case)
    exact(padded(case))
    exact(case, defective_fold(case, "none"))  # so what follows differs by its defect alone


@pytest.mark.parametrize("text", FOLDED)
@pytest.mark.parametrize("defect", FOLD_DEFECTS)
def test_a_defective_fold_is_caught(text: str, defect: str) -> None:
    case = spread(normal_case(text, n=6, m=6))
    caught(case, defective_fold(case, defect))


@pytest.mark.parametrize("text", [t for t in FOLDED if "running" not in t])
def test_the_sample_variance_is_caught(text: str) -> None:
    case = spread(normal_case(text))
    caught(case, defective_fold(case, "sample variance"))


@pytest.mark.parametrize("text", [t for t in FOLDED if "prefix" not in t])
def test_the_fold_is_the_normalization_applied(text: str) -> None:
    case = padded(spread(normal_case(text)))
    plan = case.plan()
    assert isinstance(plan.transforms[0], Fold)
    literal = replace(plan, transforms=(Normalize(plan.transforms[0].batch),))
    exact(case, literal)
    grads = {}
    for name, variant in (("folded", plan), ("literal", literal)):
        _, lse, vjp = PlainNumpy().attention_vjp(variant, case.inputs())
        grads[name] = vjp(*cotangents(case, lse))
    assert grads["folded"].keys() == grads["literal"].keys() >= {"q", "k", "v"}
    for name, x in grads["literal"].items():
        np.testing.assert_allclose(
            grads["folded"][name], x, rtol=0, atol=1e-12 * np.max(np.abs(x)), err_msg=name
        )


@pytest.mark.parametrize(
    "text",
    ["bn(beta=0.6,eps=0.3)", "bn(beta=param,statistics=batch)", "bn(beta=0.6,statistics=running)"],
)
def test_dividing_both_sides_by_sigma_is_exact_too(text: str) -> None:
    case = padded(spread(normal_case(text)))
    fold = case.plan().transforms[0]
    assert isinstance(fold, Fold)
    assert not fold.split
    exact(case, with_transform(case, replace(fold, split=True)))
    # The two folds differ, although their attention is the same.
    state = Moments().finalize(Moments().of(case.k, None, xp=np), xp=np)
    params = {n: np.reshape(x, (2, 1, 3)) for n, x in case.call.get("params", {}).items()}
    q = np.reshape(case.q, (2, 2, 10, 3))
    plain, divided = (
        replace(fold, split=split)(Rows(q, case.k), state, params, xp=np)[0]
        for split in (False, True)
    )
    assert np.abs(plain.q - divided.q).max() > 0.01


@pytest.mark.parametrize("heads", [1, 2])
def test_float16_holds_the_rows_only_when_both_sides_are_divided(heads: int) -> None:
    case = normal_case("bn", heads=heads, n=9, m=9, dtype=np.float16)
    case.k[..., 0] = 3.0  # a constant feature has variance 0
    fold = case.plan().transforms[0]
    assert isinstance(fold, Fold)
    assert fold.split
    wide = case.cast(np.float32)
    q = np.reshape(wide.q, (*wide.k.shape[:2], 18, 3))
    state = Moments().finalize(Moments().of(wide.k, None, xp=np), xp=np)
    with np.errstate(over="ignore"):
        for split in (True, False):
            rows, _ = replace(fold, split=split)(Rows(q, wide.k), state, {}, xp=np)
            fits = np.isfinite(rows.q.astype(np.float16)).all()
            assert fits == split
    for dtype in ("bfloat16", "float32", "float64"):
        other = lower(case.spec, Signature(3, heads, dtype)).transforms[0]
        assert isinstance(other, Fold)
        assert not other.split


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_prefix_rows_are_announced_to_be_float32(dtype: str) -> None:
    plan = lower(parse("causal+bn(statistics=prefix)"), Signature(4, 2, dtype))
    assert plan.accumulate == "float32"
    assert any(f"{dtype} rows are computed in float32" in step for step in plan.steps)
    plan = lower(parse("causal+bn(statistics=prefix)"), Signature(4, 2, "float32"))
    assert not any("computed in float32" in step for step in plan.steps)
