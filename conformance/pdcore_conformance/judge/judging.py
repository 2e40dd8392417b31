"""How the suite is written: a test is a sentence and the calls that try it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from .calls import Call
from .subject import Subject

__all__ = ["DTYPES", "claims", "each", "full", "judged", "specs"]

DTYPES = ("float32", "float64", "float16", "bfloat16")


def judged(why: str, *calls: Any, through: str = "forward") -> Callable[..., None]:
    """Make a test that judges each of some calls by the oracle.

    Parameters
    ----------
    why : str
        What a backend that fails has got wrong.
    *calls : Call
        Or `full(call)`, for the full grid only.
    through : {"forward", "vjp", "autodiff", "weights"}
        See `pdcore_conformance.judge.subject.Subject.judge`.
    """

    @pytest.mark.parametrize("call", calls, ids=_label)
    def test(call: Call, subject: Subject) -> None:
        subject.judge(call, through)

    test.__doc__ = why
    test.asked = through  # type: ignore[attr-defined]
    return test


def full(call: Call) -> Any:
    """Keep a call for the full grid."""
    return pytest.param(call, marks=pytest.mark.full_grid)


def claims(*features: str) -> pytest.MarkDecorator:
    """Mark a test as asking for features that a backend claims or does not."""
    return pytest.mark.claims(*features)


def each(calls: Sequence[Any]) -> pytest.MarkDecorator:
    """Run a test on each of some calls, as its argument `call`."""
    return pytest.mark.parametrize("call", calls, ids=_label)


def specs(base: Call, *texts: str) -> list[Call]:
    """Give a call for each of some specs."""
    return [base.but(spec=text) for text in texts]


def _label(call: Call) -> str:
    return call.label
