"""Each rewrite of the lowering is exact, and a wrong variant of the rewrite fails the same check.

`exact` compares a plan's result with the oracle at 1e-12 relative. Every rewrite has cases that
pass this check, and defects planted in the plan, its transforms or a step of a backend that fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from reference_cases import (
    INF,
    Array,
    Case,
    PlainNumpy,
    check_forward,
    cotangents,
    normal_case,
    run,
)

from pdcore.backend import feature_contraction
from pdcore.lowering import (
    FeatureRows,
    Features,
    Fold,
    GaussianRows,
    Group,
    Normalize,
    Plan,
    Rows,
    Scores,
    Signature,
    Summary,
    UnitRows,
    central,
    first_real,
    lower,
)
from pdcore.spec import (
    Batch,
    Expression,
    Moments,
    Polynomial,
    Statistics,
    Visibility,
    log,
    parse,
    trace,
)
from pdcore_conformance.judge.budget import expect, judge, worst


def exact(case: Case, plan: Plan | None = None, backend: PlainNumpy | None = None) -> None:
    """Check a plan, by default that of the case, against the oracle."""
    with np.errstate(all="ignore"):
        out, lse = run(backend or PlainNumpy(), case, plan=plan)
    check_forward(case, out, lse)


def caught(case: Case, plan: Plan | None = None, backend: PlainNumpy | None = None) -> None:
    """Check that `exact` fails because a result is wrong, not by another error."""
    with pytest.raises(AssertionError, match=r"out|lse"):
        exact(case, plan, backend)


def spread(case: Case, seed: int = 9) -> Case:
    """Return the case with different distributions of queries and keys, to show mix-ups."""
    rng = np.random.default_rng(seed)
    return replace(case, q=0.7 * case.q - 0.4, k=case.k * 1.3 + rng.normal(size=case.k.shape[-1]))


def padded(case: Case, seed: int = 5) -> Case:
    rng = np.random.default_rng(seed)
    real = rng.random((*case.k.shape[:-3], case.k.shape[-2])) < 0.7
    real[..., 1] = False
    real[..., 3] = True
    return replace(case, call={**case.call, "key_mask": real})


def with_transform(case: Case, transform: Any, at: int = 0) -> Plan:
    """Lower the case, and replace one of its transforms."""
    plan = case.plan()
    transforms = list(plan.transforms)
    transforms[at] = transform
    return replace(plan, transforms=tuple(transforms))


def forward_only(rows: Rows) -> tuple[Rows, Any]:
    return rows, None


# --- terms constant along a row, and Attention-BN as a scaled query -------------------------------


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


# --- statistics -----------------------------------------------------------------------------------


class DefectiveStatistics(PlainNumpy):
    """A backend whose statistics have one defect."""

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.defect = defect
        self.unpooled: dict[int, Array] = {}

    def pool(self, kind: str, x: Any, weights: Any) -> Any:
        self.unpooled[x.shape[-1]] = x
        return super().pool(kind, x, weights)

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        match self.defect:
            case "padding counted":
                mask = None
            case "over the keys before pooling":
                keys = self.unpooled.get(keys.shape[-1], keys)
            case "weighted by the length of the window":
                if self.unpooled:
                    counts = np.asarray([2, 2, 2, 1])
                    keys = np.repeat(keys, counts, axis=-2)
        final = dict(super().statistics(summary, keys, mask))
        match self.defect:
            case "one position early":
                final = {
                    n: np.concat([x[..., :1, :], x[..., :-1, :]], axis=-2) for n, x in final.items()
                }
            case "one position late":
                final = {
                    n: np.concat([x[..., 1:, :], x[..., -1:, :]], axis=-2) for n, x in final.items()
                }
            case "of the whole sequence":
                final = {n: np.broadcast_to(x[..., -1:, :], x.shape) for n, x in final.items()}
            case "of another head":
                final = {n: np.flip(x, axis=-3) for n, x in final.items()}
        return final


STATISTICS_DEFECTS = {
    "padding counted": [
        "bn(eps=0.3)",
        "bn(eps=0.3,statistics=batch)",
        "bn(eps=0.3,statistics=prefix)",
        "linear+bn(eps=0.3)",
    ],
    "over the keys before pooling": ["bn(eps=0.3)+sh(2,1)", "gaussian(0.3)+bn(eps=0.3)+sh(1,2)"],
    "weighted by the length of the window": ["bn(eps=0.3)+sh(2,2)"],
    "one position early": ["causal+bn(eps=0.3,statistics=prefix)"],
    "one position late": ["causal+bn(eps=0.3,statistics=prefix)"],
    "of the whole sequence": ["causal+bn(eps=0.3,statistics=prefix)"],
    "of another head": ["bn(eps=0.3)", "bn(eps=0.3,statistics=prefix)"],
}


@pytest.mark.parametrize(
    ("defect", "text"), [(d, t) for d, texts in STATISTICS_DEFECTS.items() for t in texts]
)
def test_statistics(defect: str, text: str) -> None:
    case = spread(normal_case(text))
    if defect == "padding counted":
        case = padded(case)
    exact(case, backend=DefectiveStatistics("none"))
    caught(case, backend=DefectiveStatistics(defect))


@pytest.mark.parametrize("text", ["bn(eps=0.3,statistics=batch)", "linear+bn(statistics=batch)"])
def test_batch_statistics_are_over_all_sequences(text: str) -> None:
    case = padded(spread(normal_case(text, lead=(2, 3))))
    exact(case)
    plan = case.plan()
    assert plan.summary is not None
    caught(case, replace(plan, summary=Summary(plan.summary.statistics, "sequence")))


class OnePass(Moments):
    """Moments with the variance computed as E[x^2] - E[x]^2."""

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: Any = None) -> Any:
        return sums_of_squares(self, keys, mask, xp.zeros_like(keys[..., :1, :]))


class ShiftedByTheFirstKey(Moments):
    """Moments with sums of x - x_0: good for a large mean, but x_0 may be an outlier."""

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: Any = None) -> Any:
        return sums_of_squares(self, keys, mask, keys[..., :1, :])


def sums_of_squares(statistics: Moments, keys: Array, mask: Any, shift: Array) -> dict[str, Array]:
    state = Moments.of(statistics, keys, mask, xp=np)
    moved = keys - shift if mask is None else np.where(mask, keys - shift, np.float32(0.0))
    total = np.sum(moved, axis=-2, keepdims=True)
    return {**state, "m2": np.sum(moved * moved, axis=-2, keepdims=True) - total**2 / state["n"]}


def offset_keys(n: int = 512) -> Case:
    return normal_case("bn", n=8, m=n, d=8, mean=100.0, sd=0.1, dtype=np.float32)


def outlying_first_key() -> Case:
    """Return a case whose first key is at least 1e4 from the others."""
    case = normal_case("bn", n=8, m=512, d=8, dtype=np.float32)
    case.k[..., 0, :] = 1e4 * np.arange(1, 9)
    return case


def variance_error(statistics: Statistics, keys: Array, mask: Any = None) -> float:
    """Compute the largest relative error of the variance in float32."""
    state = statistics.of(keys, mask, xp=np)
    var = statistics.finalize(state, xp=np)["var"]
    where = True if mask is None else np.broadcast_to(mask, keys.shape)
    true = np.var(keys.astype(np.float64), axis=-2, keepdims=True, where=where)
    return float(np.max(np.abs(var - true) / true))


def test_the_variance_is_taken_in_two_passes() -> None:
    offset, outlier = offset_keys().k, outlying_first_key().k
    padding = np.arange(512)[:, None] > 0  # the outlier stands in padding
    two_passes, one_pass, shifted = Moments(), OnePass(), ShiftedByTheFirstKey()
    assert variance_error(two_passes, offset) < 1e-5
    assert variance_error(two_passes, outlier) < 1e-5
    assert variance_error(two_passes, outlier, padding) < 1e-5
    assert variance_error(one_pass, offset) > 0.1
    assert variance_error(shifted, offset) < 1e-3
    assert variance_error(shifted, outlier, padding) > 0.1


def within_budget(case: Case, plan: Plan | None = None, backend: PlainNumpy | None = None) -> float:
    """Compute the error over the budget, in the dtype of the case."""
    with np.errstate(all="ignore"):
        out, lse = run(backend or PlainNumpy(), case, plan=plan)
    verdicts = judge({"out": out, "lse": lse}, expect(*case.qkv, case.spec, **case.call))
    return worst(verdicts)


@pytest.mark.parametrize("make", [offset_keys, outlying_first_key])
def test_float32_statistics_stay_within_the_budget(make: Callable[[], Case]) -> None:
    assert within_budget(make()) <= 1.0


def test_one_pass_variance_leaves_the_budget() -> None:
    case = offset_keys()
    plan = case.plan()
    assert within_budget(case, replace(plan, summary=Summary(OnePass(), "sequence"))) > 10.0


# --- gaussian -------------------------------------------------------------------------------------


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


# --- any positive kernel is softmax over log kappa ------------------------------------------------


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


# --- features -------------------------------------------------------------------------------------

FEATURES = [
    "linear",
    "relu+h(count)",
    "random_features(6,1)+h(one)",
    "linear+bn(eps=0.3)+sh(1,2)",
    "linear+causal",
    "random_features(6,1)+causal+sh(2,3)",
    "relu+causal+h(one)",
]


@pytest.mark.parametrize("text", FEATURES)
def test_features_are_scores_of_their_products(text: str) -> None:
    case = spread(normal_case(text))
    exact(case)
    exact(padded(case))
    plan = case.plan()
    c = plan.contraction
    assert isinstance(c, Features)
    scores = Scores("log_features" if c.log else "features")
    exact(padded(case), replace(plan, contraction=scores))
    caught(case, replace(plan, contraction=Scores("log")))  # exp(phi.phi)
    other = replace(c, log=not c.log)
    caught(case, replace(plan, contraction=other))


@pytest.mark.parametrize("text", ["linear", "random_features(6,1)+h(count)", "relu+causal"])
def test_masked_features_run_as_scores(text: str) -> None:
    case = spread(normal_case(text))
    mask = np.random.default_rng(3).random((5, 7)) < 0.6
    case = replace(case, call={**case.call, "mask": mask})
    plan = case.plan()
    assert isinstance(plan.contraction, Scores)
    exact(case)
    without = lower(case.spec, Signature(3, 2, "float64", masked=False))
    assert isinstance(without.contraction, Features)
    caught(case, without)


@pytest.mark.parametrize(
    "text",
    [
        "linear+sparse(2,1)",
        "linear+sparse(inf,1)",
        "random_features(6,1)+sparse(3,inf)",
        "relu+causal+sparse(3,3)",
    ],
)
def test_features_in_a_window_run_as_scores(text: str) -> None:
    case = spread(normal_case(text, n=9, m=9))
    plan = case.plan()
    assert isinstance(plan.contraction, Scores)
    exact(case)
    log_domain = plan.contraction.weight == "log_features"
    caught(case, replace(plan, contraction=Features(plan.spec.kernel, log=log_domain)))


def test_a_window_to_the_right_of_causal_is_no_window() -> None:
    plan = lower(parse("linear+causal+sparse(inf,4)"), Signature(3, 2, "float64"))
    assert isinstance(plan.contraction, Features)
    exact(normal_case("linear+causal+sparse(inf,4)", n=9, m=9))


LONG_CAUSAL = ["linear+causal", "random_features(6,1)+causal+h(count)", "relu+causal+sh(1,3)"]


@pytest.mark.parametrize("offset", [0, 40, -30, "array", "end"])
@pytest.mark.parametrize("text", LONG_CAUSAL)
@pytest.mark.sampled(3)
def test_causal_features_over_several_chunks(text: str, offset: Any) -> None:
    case = spread(normal_case(text, n=150, m=170))
    if offset == "array":
        offset = np.asarray([3, -70])
    exact(padded(replace(case, call={**case.call, "offset": offset})))


def both_gradients(text: str, offset: Any) -> list[dict[str, Array]]:
    """Compute the gradients of a contraction by features, and of the same by scores."""
    case = padded(spread(normal_case(text, n=190, m=170)))
    case = replace(case, call={**case.call, "offset": offset})
    plan = case.plan()
    assert isinstance(plan.contraction, Features)
    weight = "log_features" if plan.contraction.log else "features"
    grads = []
    with np.errstate(all="ignore"):
        for variant in (plan, replace(plan, contraction=Scores(weight))):
            _, lse, vjp = PlainNumpy().attention_vjp(variant, case.inputs())
            grads.append(vjp(*cotangents(case, lse)))
    return grads


@pytest.mark.parametrize("offset", [0, 40, -30, "array", "end"])
@pytest.mark.parametrize("text", LONG_CAUSAL)
@pytest.mark.sampled(3)
def test_causal_gradients_over_several_chunks(
    text: str, offset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = np.asarray([3, -70]) if offset == "array" else offset
    got, want = both_gradients(text, offset)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-11 * np.max(np.abs(x)))
    # All rows of a window see the same pooled keys, so a chunk of keys meets many chunks of rows.
    true = feature_contraction.prefix_contract

    def narrow(*arguments: Any, **options: Any) -> Any:
        return true(*arguments, **{**options, "step": 1})

    monkeypatch.setattr(feature_contraction, "prefix_contract", narrow)
    wrong, _ = both_gradients(text, offset)
    same = all(np.allclose(wrong[n], x, rtol=0, atol=1e-6) for n, x in want.items())
    assert same != ("sh(" in text)


@pytest.mark.parametrize("text", LONG_CAUSAL)
def test_a_state_of_one_chunk_too_many_is_caught(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = spread(normal_case(text, n=150, m=170))
    true = feature_contraction._running

    def inclusive(*arguments: Any) -> Any:
        states, tops = true(*arguments)
        later = [
            None if x is None else np.concat([x[..., 1:, :, :], x[..., -1:, :, :]], axis=-3)
            for x in (states, tops)
        ]
        return tuple(later)

    monkeypatch.setattr(feature_contraction, "_running", inclusive)
    caught(case)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize(
    "text", ["linear+causal", "random_features(6,1)+causal", "causal+bn(eps=0.3,statistics=prefix)"]
)
def test_prefixes_off_by_one_are_caught(
    text: str, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = spread(normal_case(text, n=7, m=7))
    true = Visibility.prefix_counts

    def moved(self: Visibility, start: int, stop: int, ahead: int = 0) -> Any:
        return np.clip(true(self, start, stop, ahead) + shift, 0, self.keys)

    exact(case)
    monkeypatch.setattr(Visibility, "prefix_counts", moved)
    caught(case)


@dataclass(frozen=True)
class DefectiveFeatures:
    inner: FeatureRows
    defect: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        right, _ = self.inner(rows, state, params, xp=xp)
        if self.defect == "queries alone":
            return forward_only(right._replace(k=rows.k))
        return forward_only(right._replace(q=right.q + 1e-6))


@pytest.mark.parametrize("text", ["linear", "relu", "random_features(3,1)"])
def test_feature_maps_on_one_side_are_caught(text: str) -> None:
    case = spread(normal_case(text))
    inner = case.plan().transforms[0]
    assert isinstance(inner, FeatureRows)
    caught(case, with_transform(case, DefectiveFeatures(inner, "queries alone")))
    caught(case, with_transform(case, DefectiveFeatures(inner, "queries off by 1e-6")))


# --- heads ----------------------------------------------------------------------------------------

SCALED = [
    "sh(1,2,1)",
    "sh(3,1,2)+h(count)",
    "linear+sh(2,1,2)+causal",
    "bn(eps=0.3)+sh(2,3,2)",
    "sh(2,1,3,pool=first)+sparse(4,4)",
]


@pytest.mark.parametrize("text", SCALED)
def test_heads_of_equal_scale_run_as_one_call(text: str) -> None:
    case = spread(normal_case(text, heads=3, m=8, n=8))
    exact(case)
    exact(padded(case))
    plan = case.plan()
    assert sorted(h for g in plan.groups for h in g.heads) == [0, 1, 2]
    assert len({g.scale for g in plan.groups}) == len(plan.groups)
    # Each head gets the scale of the next head.
    scales = case.spec.heads.scales
    wrong = tuple(Group(g.scale, tuple((h + 1) % 3 for h in g.heads)) for g in plan.groups)
    assert any(scales[h] != g.scale for g in wrong for h in g.heads)
    caught(case, replace(plan, groups=wrong))
    # Heads of a group joined in the wrong order. Exchanging two heads in `groups` would not do, as
    # `join` undoes the permutation, so exchange the keys of two heads.
    if any(len(g.heads) > 1 for g in plan.groups):
        (first, second), *_ = [g.heads for g in plan.groups if len(g.heads) > 1]
        order = list(range(3))
        order[first], order[second] = second, first
        mixed = replace(case, k=case.k[:, order], v=case.v[:, order])
        out, lse = run(PlainNumpy(), mixed)
        with pytest.raises(AssertionError):
            check_forward(case, out, lse)


def test_query_heads_share_key_heads_in_blocks() -> None:
    case = spread(normal_case("softmax", heads=2, group=3))
    exact(case)
    strided = [0, 2, 4, 1, 3, 5]  # query head i with key head i % 2
    out, lse = run(PlainNumpy(), replace(case, q=case.q[:, strided]))
    back = np.argsort(strided)
    with pytest.raises(AssertionError, match="out"):
        check_forward(case, out[:, back], lse[:, back])


class DefectivePool(PlainNumpy):
    """A backend whose pooling has one defect."""

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.defect = defect

    def pool(self, kind: str, x: Any, weights: Any) -> Any:
        scale = weights.shape[-1]
        if self.defect == "divided by the scale":
            weights = np.where(weights > 0, 1.0 / scale, 0.0)
        if self.defect == "sums":
            weights = np.where(weights > 0, 1.0, 0.0)
        if self.defect == "last window dropped":
            weights = np.concat([weights[..., :-1, :], 0.0 * weights[..., -1:, :]], axis=-2)
        if self.defect == "the other pool":
            first = np.cumsum(weights > 0, axis=-1) * (weights > 0) == 1
            if (np.sum(weights > 0, axis=-1) > 1).any():
                weights = np.where(first, 1.0, 0.0)
        return super().pool(kind, x, weights)


@pytest.mark.parametrize(
    "defect", ["divided by the scale", "sums", "last window dropped", "the other pool"]
)
@pytest.mark.parametrize("text", ["sh(1,3)", "bn(eps=0.3)+sh(3,3)", "linear+sh(2,3)"])
def test_pooling(text: str, defect: str) -> None:
    case = padded(spread(normal_case(text, m=8)))
    exact(case, backend=DefectivePool("none"))
    caught(case, backend=DefectivePool(defect))


def test_the_pool_of_the_plan() -> None:
    case = padded(spread(normal_case("sh(1,3)")))
    caught(case, replace(case.plan(), pool="first"))
    case = padded(spread(normal_case("sh(1,3,pool=first)")))
    exact(case)
    caught(case, replace(case.plan(), pool="mean"))


@pytest.mark.parametrize(
    "text", ["sh(2,3)+causal", "sh(2,1)+sparse(2,1)", "linear+sh(2,3)+causal+h(count)"]
)
def test_a_pooled_key_occupies_its_whole_window(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = spread(normal_case(text, n=8, m=8))
    exact(case)
    by_position, prefix_counts = Visibility.by_position, Visibility.prefix_counts

    def by_first_position(self: Visibility, *block: int) -> Any:
        # A window counts as seen from its first position instead of its last.
        eager = dataclasses.replace(self, offset=self.offset + self.scale - 1)
        return by_position(self, *block) | by_position(eager, *block)

    def early(self: Visibility, start: int, stop: int, ahead: int = 0) -> Any:
        return prefix_counts(self, start, stop, ahead + self.scale - 1)

    monkeypatch.setattr(Visibility, "by_position", by_first_position)
    monkeypatch.setattr(Visibility, "prefix_counts", early)
    monkeypatch.setattr(Visibility, "key_range", lambda self, start, stop: (0, self.keys))
    monkeypatch.setattr(Visibility, "whole", lambda self, *block: False)
    caught(case)


def test_a_mask_must_allow_every_real_key_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    case = padded(spread(normal_case("sh(2,3)", m=8)))
    mask = np.random.default_rng(2).random((5, 8)) < 0.6
    case = replace(case, call={**case.call, "mask": mask})
    exact(case)
    true = Visibility.by_mask
    monkeypatch.setattr(
        Visibility, "by_mask", lambda self, *b: true(dataclasses.replace(self, real=None), *b)
    )
    caught(case)  # padding that the mask forbids now hides its window


# --- normalisers ----------------------------------------------------------------------------------

COUNTED = [
    "softmax+causal",
    "gaussian(gamma=0.3)+sparse(2,1)",
    "linear+causal",
    "sh(1,2)",
    "bn(eps=0.3)",
]


@pytest.mark.parametrize("text", COUNTED)
def test_the_count_is_that_of_the_visible_keys(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = padded(spread(normal_case(text + "+h(count)")))
    exact(case)

    def everyone(self: Visibility, bias: Any = None) -> Any:
        return np.full((self.rows,), self.length)

    monkeypatch.setattr(Visibility, "counts", everyone)
    caught(case)


@pytest.mark.parametrize("text", COUNTED)
def test_normalisers_are_not_exchanged(text: str) -> None:
    for h in ("sum", "count", "one"):
        case = padded(spread(normal_case(f"{text}+h({h})")))
        exact(case)
        for other in {"sum", "count", "one"} - {h}:
            caught(case, replace(case.plan(), normaliser=other))


def test_a_bias_of_minus_infinity_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = spread(normal_case("softmax+h(count)"))
    bias = np.random.default_rng(4).normal(size=(4, 5, 7))
    bias[..., 2] = -INF
    case = replace(case, call={"bias": bias})
    exact(case)
    true = Visibility.counts
    monkeypatch.setattr(Visibility, "counts", lambda self, bias=None: true(self))
    caught(case)


# --- what the plan says ---------------------------------------------------------------------------

STEPS = {
    "bn": [
        "statistics: moments over the real keys of the sequence",
        "fold:",
        "sigma^2",
        "goes to L",
        "scores: log kappa = 0.5 q'.k'",
    ],
    "bn(statistics=batch)": ["of all sequences of the call"],
    "causal+bn(statistics=prefix)": ["up to each position", "c = the first real key"],
    "sh(1,2)": ["heads [1]: keys and values pooled (mean) over windows of 2"],
    "gaussian(0.3)+h(count)": ["gaussian:", "row constant", "h(count): out exp(L - log n)"],
    "cosine+h(one)": ["cosine: unit rows", "h(one): out exp(L)"],
    "linear+bn": ["normalize: queries and keys by bn", "features:", "O(N + M)"],
    "linear+causal": ["by prefix sums over chunks"],
    "linear+sparse(1,1)": ["features under a window run as scores", "O(N M)"],
    "polynomial": ["log kappa = (2.0 * log(abs(", "with s = q'.k'"],
}


@pytest.mark.parametrize("text", STEPS)
def test_the_steps_are_told(text: str) -> None:
    plan = lower(parse(text), Signature(4, 2, "float32"))
    steps = "\n".join(plan.steps)
    for part in STEPS[text]:
        assert part in steps, steps
    assert "sigma^2" not in "\n".join(lower(parse("bn"), Signature(4, 2, "float16")).steps)


def test_lowering_needs_one_scale_for_each_head() -> None:
    with pytest.raises(ValueError, match=r"3 scales.*one for each of the 2 key heads"):
        lower(parse("sh(1,2,3)"), Signature(4, 2, "float64"))
