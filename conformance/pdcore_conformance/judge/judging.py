"""Build the tests of the suite, each from a rule in one sentence and the calls that try it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from .calls import Call
from .subject import Subject

__all__ = ["DTYPES", "claims", "each", "full", "judged", "specs"]

DTYPES = ("float32", "float64", "float16", "bfloat16")


def judged(why: str, *calls: Any, through: str = "forward") -> Callable[..., None]:
    """Build a test that compares each of these calls with the oracle.

    Parameters
    ----------
    why : str
        The rule, in one sentence, that a backend breaks where the test fails.
    *calls : Call
        The calls; `full(call)` for one of the full grid only.
    through : {"forward", "vjp", "autodiff", "weights"}
        See `pdcore_conformance.judge.subject.Subject.judge`.
    """

    @pytest.mark.parametrize("call", calls, ids=_label)
    def test(call: Call, subject: Subject) -> None:
        subject.judge(call, through)

    test.__doc__ = why
    test.through = through  # type: ignore[attr-defined]
    return test


def full(call: Call) -> Any:
    """Return a call as a parameter that only the full grid runs."""
    return pytest.param(call, marks=pytest.mark.full_grid)


def claims(*features: str) -> pytest.MarkDecorator:
    """Return a mark for a test that needs these features; it runs where they are declared."""
    return pytest.mark.claims(*features)


def each(calls: Sequence[Any]) -> pytest.MarkDecorator:
    """Return a mark that runs a test on each of these calls, as its argument `call`."""
    return pytest.mark.parametrize("call", calls, ids=_label)


def specs(base: Call, *texts: str) -> list[Call]:
    """Return the call with each of these specs."""
    return [base.but(spec=text) for text in texts]


def _label(call: Call) -> str:
    return call.label
