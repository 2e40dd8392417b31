"""Small random calls over all axes at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..judge.calls import Call
from ..judge.subject import Subject
from .test_axes import AXES, build_call

EXAMPLES = 150


@st.composite
def calls(draw: st.DrawFn) -> Call | None:
    """Draw at most one value of each axis, and sizes."""
    values: list[Any] = [
        value for axis in AXES.values() if (value := draw(st.sampled_from([None, *axis])))
    ]
    sizes = {
        "lead": draw(st.sampled_from([(), (1,), (2,), (2, 2)])),
        "rows": draw(st.integers(0, 12)),
        "dim": draw(st.integers(1, 9)),
        "value_dim": draw(st.integers(1, 6)),
        "dtype": draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"])),
        "draw": draw(st.sampled_from(["normal", "constant", "zeros", "equal"])),
        "seed": draw(st.integers(0, 9)),
    }
    call = build_call(tuple(values))
    if call is None:
        return None
    parsed = call.parsed
    if parsed.normaliser != "sum" and parsed.normalization.statistics_state() is not None:
        return None  # equal keys have variance 0, and kappa itself overflows
    return call.but(**sizes, keys=draw(st.integers(0, 13)))


@pytest.mark.parametrize("through", ["forward", "vjp"])
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(call=calls())
def test_any_call(subject: Subject, through: str, call: Call | None) -> None:
    """Any combination of axes is computed right, or refused."""
    if call is not None:
        if through == "vjp":
            # Where the variance is 0, the gradient of the variance is rounding error alone.
            call = call.but(draw="normal")
        subject.judge(call, through)
        # Some of the calls may be refused as declared, which must not decide the outcome of all.
        subject.evidence.outcome = None
