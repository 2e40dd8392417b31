"""Small random calls over all axes at once."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..judge.calls import Call
from ..judge.combinations import AXES, build_call
from ..judge.subject import Nonconforming, Subject

#: The number of examples, and the number where a library compiles a program for each.
EXAMPLES, FEW_EXAMPLES = 250, 30

#: The axes in whose place sizes are drawn.
SIZES = ("dtype", "lead", "lengths", "through")


@st.composite
def calls(draw: st.DrawFn) -> Call | None:
    """Draw at most one value of each axis, and sizes."""
    values: list[Any] = [
        value
        for axis, choices in AXES.items()
        if axis not in SIZES and draw(st.booleans()) and (value := draw(st.sampled_from(choices)))
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
    fewest = 40 if parsed.normalization.word == "mixture" else 0
    return call.but(**sizes, keys=fewest + draw(st.integers(0, 13)))


@pytest.mark.parametrize("through", ["forward", "vjp"])
def test_any_call(subject: Subject, through: str) -> None:
    """Any combination of axes is computed right, or refused.

    All examples run: a failure of one kind must not hide the others. Of each kind, the example
    with the fewest values that are not the default is reported.
    """
    failures: dict[str, tuple[str, str]] = {}

    @settings(
        max_examples=FEW_EXAMPLES if subject.framework.compiles else EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(call=calls())
    def run(call: Call | None) -> None:
        if call is None:
            return
        if through == "vjp":
            # Where the variance is 0, the gradient of the variance is rounding error alone.
            call = call.but(draw="normal")
        try:
            subject.judge(call, through)
        except Nonconforming as error:
            found = (call.label, str(error))
            kind = re.sub(r"[-+]?\d\S*", "#", str(error))
            failures[kind] = min(failures.get(kind, found), found, key=lambda f: len(f[0]))
        # Some of the calls may be refused as declared, which must not decide the outcome of all.
        subject.evidence.outcome = None

    run()
    if failures:
        lines = [f"{label}: {message}" for label, message in failures.values()]
        raise Nonconforming(f"{len(lines)} kinds of failures:\n" + "\n".join(lines))
