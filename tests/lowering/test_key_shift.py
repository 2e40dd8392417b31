"""Keys of any normalization are near 0 before 16 bits round them, which is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, PlainNumpy, cotangents, normal_case
from rewrite_cases import caught, exact, forward_only, padded, spread

from pdcore.lowering import KeyShift, Plan, Rows, Signature, lower
from pdcore.spec import parse

SPECS = ["iebn", "mixture(components=1)+h(count)", "conv1d+sh(1,2)", "iebn(allow_leak=true)+causal"]


def shifted(case: Case, step: Any = None) -> Plan:
    """Lower a case in float64 with the step that its plan has for 16 bits."""
    plan = case.plan()
    step = KeyShift(plan.contraction.scale) if step is None else step
    return replace(plan, transforms=(*plan.transforms, step))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_plans_of_sixteen_bits_have_the_step(text: str, dtype: str) -> None:
    plan = lower(parse(text), Signature(3, 2, dtype))
    sixteen = dtype in ("float16", "bfloat16")
    assert isinstance(plan.transforms[-1], KeyShift) == sixteen
    assert any("16 bits round keys relative to a point c" in s for s in plan.steps) == sixteen
    assert not plan.fits("float16")
    assert plan.fits("bfloat16")


@pytest.mark.parametrize("text", SPECS)
def test_the_shift_is_exact(text: str) -> None:
    case = spread(normal_case(text))
    for one in (case, padded(case)):
        exact(one, shifted(one))
        grads = []
        for plan in (one.plan(), shifted(one)):
            _, lse, vjp = PlainNumpy().attention_vjp(plan, one.inputs())
            grads.append(vjp(*cotangents(one, lse)))
        for name, x in grads[0].items():
            np.testing.assert_allclose(
                grads[1][name], x, rtol=0, atol=1e-11 * np.max(np.abs(x)), err_msg=name
            )


@pytest.mark.parametrize("defect", ["constant dropped", "tau forgotten", "sign"])
def test_a_defect_is_caught(defect: str) -> None:
    case = spread(normal_case("iebn"))
    step = KeyShift(case.plan().contraction.scale)

    def defective(rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        moved, _ = step(rows, state, params, xp=xp)
        factor = {"constant dropped": 0.0, "tau forgotten": 1 / step.scale, "sign": -1.0}[defect]
        return forward_only(moved._replace(row_constant=factor * moved.row_constant))

    caught(case, shifted(case, defective))
