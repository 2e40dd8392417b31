"""Prefix statistics under kernels of inner products: one more feature, and wrong variants of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, PlainNumpy, normal_case, run
from rewrite_cases import caught, exact, forward_only, padded, spread, with_transform

from pdcore.lowering import ConstantFeature, Rows, Scores, Signature, lower
from pdcore.spec import parse

SPECS = [
    f"{kernel}+{text}"
    for kernel in ("softmax(softcap=2)", "polynomial(4)")
    for text in (
        "causal+bn(beta=param,eps=0.3,statistics=prefix)",
        "bn(beta=0.6,eps=0.3,statistics=prefix)+sh(1,2)",
        "bn(beta=0.6,statistics=prefix,with_std=false)",
        "causal+sparse(4,0)+h(count)+bn(beta=0.6,statistics=prefix,with_std=false)",
    )
]


@dataclass(frozen=True)
class Defective:
    """A `ConstantFeature` with one defect."""

    step: Any
    defect: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        rows, _ = self.step(rows, state, params, xp=xp)
        last = rows.q[..., -1:]
        match self.defect:
            case "constant added to L alone":
                rows = rows._replace(row_constant=last[..., 0])
                last = xp.zeros_like(last)
            case "constant forgotten":
                last = xp.zeros_like(last)
            case "sign of the constant":
                last = -last
            case "constant in bfloat16":
                bits = last.astype(np.float32).view(np.int32) & np.int32(-(2**16))
                last = bits.view(np.float32).astype(last.dtype)
        return forward_only(rows._replace(q=xp.concat([rows.q[..., :-1], last], axis=-1)))


@pytest.mark.parametrize("text", SPECS)
def test_one_more_feature_is_exact(text: str) -> None:
    case = spread(normal_case(text))
    [step] = case.plan().transforms
    assert isinstance(step, ConstantFeature)
    exact(case)
    exact(padded(case))
    exact(case, with_transform(case, Defective(step, "none")))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize(
    "defect",
    [
        "constant added to L alone",
        "constant forgotten",
        "sign of the constant",
        "constant in bfloat16",
    ],
)
def test_a_defect_is_caught(text: str, defect: str) -> None:
    case = spread(normal_case(text, n=6, m=6))
    caught(case, with_transform(case, Defective(case.plan().transforms[0], defect)))


def far(text: str) -> Case:
    case = normal_case(text, n=30, m=30)
    case.q[...] += 100
    case.k[...] += 100
    return case


def test_a_mean_far_from_zero_costs_no_digits() -> None:
    case = far("softmax(softcap=5)+causal+bn(statistics=prefix,eps=0.1)")
    narrow = case.cast(np.float32)
    out, lse = run(PlainNumpy(), narrow)
    want = narrow.cast(np.float64).reference()
    np.testing.assert_allclose(out, want[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(lse, want[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("with_std", ["true", "false"])
def test_sixteen_bits_do_not_hold_the_feature(dtype: str, with_std: str) -> None:
    spec = parse(f"softmax(softcap=2)+bn(statistics=prefix,with_std={with_std})")
    plan = lower(spec, Signature(4, 2, dtype))
    assert plan.holds == "float32"
    assert isinstance(plan.contraction, Scores)
    assert any(
        "one more feature, q'.(c - beta mu) of a row and 1 of a key" in s for s in plan.steps
    )
