"""The rewrites of kernels are exact, and wrong variants fail the same check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from reference_cases import normal_case
from rewrite_cases import caught, exact, forward_only, padded, spread, with_transform, within_budget

from pdcore.lowering import GaussianRows, Rows, Scores, UnitRows, central
from pdcore.spec import Expression, Polynomial, log, parse, trace


@dataclass(frozen=True)
class DefectiveGaussian:
    gamma: float
    defect: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        shift = central(rows.k, rows.key_mask, xp=xp)
        if self.defect == "no shift":
            shift = xp.zeros_like(shift)
        q = rows.q if self.defect == "keys shifted alone" else rows.q - shift
        k = rows.k - shift
        key_bias = -self.gamma * xp.sum(k * k, axis=-1)
        constant = -self.gamma * xp.sum(q * q, axis=-1)
        match self.defect:
            case "no key bias":
                key_bias = None
            case "half the key bias":
                key_bias = 0.5 * key_bias
            case "constant dropped":
                constant = xp.zeros_like(constant)
            case "square before the shift":
                key_bias = -self.gamma * xp.sum(rows.k * rows.k, axis=-1)
        return forward_only(Rows(q, k, key_bias, constant, rows.key_mask))


GAUSSIANS = [
    "gaussian(gamma=0.3)",
    "gaussian(gamma=0.3)+bn(eps=0.3)+h(count)",
    "gaussian(gamma=0.3)+sh(1,2)+h(one)",
]


@pytest.mark.parametrize("text", GAUSSIANS)
def test_gaussian_rows(text: str) -> None:
    case = spread(normal_case(text))
    exact(case)
    exact(padded(case))
    at = len(case.plan().transforms) - 1
    assert isinstance(case.plan().transforms[at], GaussianRows)
    for harmless in ("none", "no shift"):
        exact(case, with_transform(case, DefectiveGaussian(0.3, harmless), at))
    for defect in (
        "keys shifted alone",
        "no key bias",
        "half the key bias",
        "constant dropped",
        "square before the shift",
    ):
        caught(case, with_transform(case, DefectiveGaussian(0.3, defect), at))
    plan = case.plan()
    caught(case, replace(plan, contraction=Scores(scale=0.3)))  # gamma for 2 gamma


def test_gaussian_needs_its_shift_far_from_the_origin() -> None:
    case = normal_case("gaussian(gamma=0.5)", n=16, m=64, d=8, mean=100.0, dtype=np.float32)
    assert within_budget(case) <= 1.0
    assert within_budget(case, with_transform(case, DefectiveGaussian(0.5, "no shift"))) > 10.0


def test_the_gaussian_shift_is_not_moved_by_an_outlier() -> None:
    case = normal_case("gaussian(gamma=0.5)", n=16, m=64, d=8, mean=100.0, dtype=np.float32)
    case.k[..., 0, :] = -1e4
    assert within_budget(case) <= 1.0

    @dataclass(frozen=True)
    class ShiftedByTheMean:
        def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
            shift = xp.mean(rows.k, axis=-2, keepdims=True)
            q, k = rows.q - shift, rows.k - shift
            return forward_only(
                Rows(q, k, -0.5 * xp.sum(k * k, axis=-1), -0.5 * xp.sum(q * q, axis=-1), None)
            )

    assert within_budget(case, with_transform(case, ShiftedByTheMean())) > 1.0


def test_the_scale_of_softmax() -> None:
    case = spread(normal_case("softmax", d=4))
    exact(case)
    plan = case.plan()
    assert plan.contraction == Scores(scale=0.5)
    for wrong in (1.0, 0.25, 2.0):
        caught(case, replace(plan, contraction=Scores(scale=wrong)))


@dataclass(frozen=True)
class DefectiveUnits:
    defect: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        right, _ = UnitRows()(rows, state, params, xp=xp)
        match self.defect:
            case "queries as they are":
                right = right._replace(q=rows.q)
            case "keys as they are":
                right = right._replace(k=rows.k)
            case "eps added to the length":
                length = xp.linalg.norm(rows.k, axis=-1, keepdims=True)
                right = right._replace(k=rows.k / (length + 1e-6))
        return forward_only(right)


@pytest.mark.parametrize("text", ["cosine(scale=2)", "cosine+bn(eps=0.3)+h(one)"])
def test_cosine_rows(text: str) -> None:
    case = spread(normal_case(text))
    case.q[0, 0, 1] = 0.0
    case.k[0, 0, 2] = 0.0
    exact(case)
    at = len(case.plan().transforms) - 1
    for defect in ("queries as they are", "keys as they are", "eps added to the length"):
        caught(case, with_transform(case, DefectiveUnits(defect), at))


def test_unit_rows_of_extreme_lengths() -> None:
    case = spread(normal_case("cosine", d=4))
    case.k[..., :3, :] *= 1e200  # the square of the length overflows
    case.q[..., :2, :] *= 1e-200  # and vanishes
    units, _ = UnitRows()(Rows(case.q, case.k), {}, {}, xp=np)
    for x in (units.q, units.k):
        np.testing.assert_allclose(np.sum(x * x, axis=-1), 1.0, rtol=1e-14)


POLYNOMIALS = [
    "polynomial(degree=4,coef0=0.5)",
    "polynomial(degree=2,coef0=0)+h(count)",
    "polynomial(degree=2)+bn(eps=0.3)+sh(1,2)",
]


@pytest.mark.parametrize("text", POLYNOMIALS)
def test_polynomials_are_logarithms(text: str) -> None:
    case = padded(spread(normal_case(text, n=8, m=8)))
    kernel = case.spec.kernel
    assert isinstance(kernel, Polynomial)
    exact(case)
    plan = case.plan()

    def without_abs(s: Expression) -> Expression:
        return kernel.degree * log(s / 3**0.5 + kernel.coef0)

    wrong = {
        "no absolute value": trace(without_abs, ("s",)),
        "another degree": replace(kernel, degree=kernel.degree + 2).expression(3),
        "another constant": replace(kernel, coef0=kernel.coef0 + 0.25).expression(3),
        "no degree": plan.contraction.expression / float(kernel.degree),
    }
    for expression in wrong.values():
        caught(case, replace(plan, contraction=Scores(expression=expression)))


def test_the_cap_of_softmax() -> None:
    case = spread(normal_case("softmax(softcap=1.5)"))
    exact(case)
    plan = case.plan()
    caught(case, replace(plan, contraction=Scores(scale=3**-0.5)))
    other = parse("softmax(softcap=1.6)").kernel
    caught(case, replace(plan, contraction=Scores(expression=other.expression(3))))
