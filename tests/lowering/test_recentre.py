"""Attention-BN without division is exact, and wrong variants of its rewrite fail the same check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, PlainNumpy, cotangents, normal_case, run
from rewrite_cases import caught, exact, forward_only, padded, spread, with_transform

from pdcore.lowering import Normalize, Plan, Recentre, Rows, Signature, Unread, first_real, lower
from pdcore.spec import Batch, Mean, parse

RECENTRED = [
    "bn(beta=0.6,with_std=false)",
    "bn(beta=param,with_std=false)+h(count)",
    "bn(beta=0.6,statistics=batch,with_std=false)+h(one)",
    "bn(beta=0.6,statistics=running,with_std=false)",
    "bn(beta=param,statistics=prefix,with_std=false)+causal",
    "bn(beta=0.6,statistics=prefix,with_std=false)+sh(1,2)",
]
DEFECTS = [
    "divided",
    "beta forgotten",
    "query not centred",
    "keys shifted the other way",
    "c forgotten in the constant",
    "beta mu forgotten in the constant",
    "sign of the constant",
    "tau forgotten in the constant",
    "constant of the query as it came",
    "constant dropped",
]


@dataclass(frozen=True)
class Defective:
    """A `Recentre` with one defect."""

    batch: Batch
    scale: float
    defect: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        defect = self.defect
        mean = (params if self.batch.statistics == "running" else state)["mean"]
        beta = self.batch.weight(params)
        shift = mean
        if self.batch.statistics == "prefix":
            shift = first_real(rows.k, rows.key_mask, xp=xp)
        centre = mean if defect == "beta forgotten" else beta * mean
        q = rows.q if defect == "query not centred" else rows.q - centre
        if defect == "divided":
            q = q / 1.1
        k = rows.k + shift if defect == "keys shifted the other way" else rows.k - shift
        gap = self.scale * (shift - centre)
        match defect:
            case "c forgotten in the constant":
                gap = -self.scale * centre
            case "beta mu forgotten in the constant":
                gap = self.scale * (shift + 0.0 * centre)
            case "sign of the constant":
                gap = -gap
            case "tau forgotten in the constant":
                gap = gap / self.scale
            case "constant dropped":
                gap = 0.0 * gap
        read = rows.q if defect == "constant of the query as it came" else q
        return forward_only(rows._replace(q=q, k=k, row_constant=xp.sum(read * gap, axis=-1)))


def defective(case: Case, defect: str) -> Plan:
    step = case.plan().transforms[0]
    assert isinstance(step, Recentre)
    return with_transform(case, Defective(step.batch, step.scale, defect))


@pytest.mark.parametrize("text", RECENTRED)
def test_it_is_softmax_attention_of_recentred_queries(text: str) -> None:
    case = spread(normal_case(text))
    plan = case.plan()
    assert isinstance(plan.transforms[0], Recentre)
    assert plan.summary is None or type(plan.summary.statistics) is Mean
    exact(case)
    exact(padded(case))
    exact(case, defective(case, "none"))  # so what follows differs by its defect alone


@pytest.mark.parametrize("text", RECENTRED)
@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_caught(text: str, defect: str) -> None:
    case = spread(normal_case(text, n=6, m=6))
    caught(case, defective(case, defect))


@pytest.mark.parametrize("text", [t for t in RECENTRED if "prefix" not in t])
def test_it_is_the_normalization_applied(text: str) -> None:
    case = padded(spread(normal_case(text)))
    plan = case.plan()
    assert isinstance(plan.transforms[0], Recentre)
    literal = replace(plan, transforms=(Normalize(plan.transforms[0].batch),))
    exact(case, literal)
    grads = {}
    for name, variant in (("rewritten", plan), ("literal", literal)):
        _, lse, vjp = PlainNumpy().attention_vjp(variant, case.inputs())
        grads[name] = vjp(*cotangents(case, lse))
    assert grads["rewritten"].keys() == grads["literal"].keys() >= {"q", "k", "v"}
    for name, x in grads["literal"].items():
        np.testing.assert_allclose(
            grads["rewritten"][name], x, rtol=0, atol=1e-12 * np.max(np.abs(x)), err_msg=name
        )


@pytest.mark.parametrize("text", RECENTRED)
def test_the_point_that_keys_are_relative_to_changes_nothing(text: str) -> None:
    case = spread(normal_case(text))
    step = case.plan().transforms[0]
    assert isinstance(step, Recentre)

    for shift in (0.0, 3.0):

        def about(
            rows: Rows, state: Any, params: Any, *, xp: Any, shift: float = shift
        ) -> tuple[Rows, Any]:
            return step.about(xp.full_like(rows.k[..., :1, :], shift), rows, state, params, xp=xp)

        exact(case, with_transform(case, about))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("text", ["bn(with_std=false)", "bn(statistics=prefix,with_std=false)"])
def test_sixteen_bits_hold_the_rows(text: str, dtype: str) -> None:
    plan = lower(parse(text), Signature(4, 2, dtype))
    assert plan.holds == "float16"
    assert any("recentre: q' = q - beta mu, k' = k - c" in step for step in plan.steps)
    assert not any("float32" in step or "sigma" in step for step in plan.steps)


def test_the_gaussian_kernel_needs_no_statistics() -> None:
    for text in ("bn(with_std=false)", "bn(beta=0.5,statistics=batch,with_std=false)"):
        plan = lower(parse(f"gaussian(0.3)+{text}"), Signature(4, 2, "float32"))
        assert plan.summary is None
        assert (
            plan.transforms == lower(parse("gaussian(0.3)"), Signature(4, 2, "float32")).transforms
        )
        assert plan.steps[0] == "a shift of queries and keys cancels in |x - y|: no statistics"
    plan = lower(parse("gaussian(0.3)+bn(beta=param,with_std=false)"), Signature(4, 2, "float32"))
    assert plan.transforms[0] == Unread(("beta",))
    assert lower(parse("gaussian(0.3)+bn"), Signature(4, 2, "float32")).summary is not None


OTHER_KERNELS = [
    "softmax(softcap=2)",
    "polynomial(4)",
    "cosine(2)",
    "linear",
    "random_features(6,1)",
]


@pytest.mark.parametrize("kernel", [*OTHER_KERNELS, "gaussian(gamma=0.3)"])
@pytest.mark.parametrize("statistics", ["sequence", "batch", "running"])
def test_other_kernels_are_of_recentred_points(kernel: str, statistics: str) -> None:
    case = spread(
        normal_case(f"{kernel}+bn(beta=0.6,statistics={statistics},with_std=false)", n=6, m=8)
    )
    exact(case)
    exact(padded(case))


def test_a_mean_beyond_the_dtype_is_visible() -> None:
    case = normal_case("bn(with_std=false)", n=3, m=6, dtype=np.float32)
    case.k[...] = 3e38
    with np.errstate(all="ignore"):
        out, _ = run(PlainNumpy(), case)
    assert np.isnan(out).all()
