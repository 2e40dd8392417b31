"""Every value of every axis, alone and with every value of every other axis."""

from __future__ import annotations

from ..judge import user_axes
from ..judge.calls import Call
from ..judge.combinations import AXES, build_call
from ..judge.judging import DTYPES, judged
from ..judge.subject import Subject

user_axes.register()
SINGLE = [
    value for axis, values in AXES.items() if axis not in ("dtype", "through") for value in values
]

test_one = judged(
    "One axis at a time, in every dtype.",
    *(call for dtype in DTYPES for value in SINGLE if (call := build_call((value,), dtype=dtype))),
)
test_gradient_of_one = judged(
    "Gradients, one axis at a time.",
    *(
        call
        for dtype in ("float32", "float64")
        for value in SINGLE
        if (call := build_call((value,), dtype=dtype))
    ),
    through="vjp",
)


def test_combination(call: Call, through: str, subject: Subject) -> None:
    """Every pair of values of two axes, and triples of axes that meet in one kernel.

    The calls follow from what the backend declares, see `pdcore_conformance.judge.combinations`;
    the plugin of the suite passes them.
    """
    subject.judge(call, through)
