"""Judge a peer by the topics of its page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

import numpy as np

from pdcore import attention
from pdcore.errors import NoBackendError, UnsupportedError

from ..judge.budget import expect, judge, worst
from ..judge.calls import Arrays, Call, dtype_of
from ..judge.subject import Nonconforming, NoSuchArrayError, Subject
from .cases import TOPICS, Case, drawn

__all__ = ["Judged", "judged", "judged_case"]


class Judged(TypedDict):
    """The outcome of a case on a peer.

    ``outcome`` is ``"right"``, ``"wrong"`` or ``"refused"``; ``error`` for another exception than
    a refusal. ``ratio`` is the largest error over its budget, None where nothing was compared.
    """

    topic: str
    case: str
    outcome: str
    ratio: float | None
    message: str


def judged(subject: Subject) -> list[Judged]:
    """Judge a peer by every case of every topic."""
    return [judged_case(subject, topic.name, case) for topic in TOPICS for case in topic.cases]


def judged_case(subject: Subject, topic: str, case: Case) -> Judged:
    """Judge a peer by one case."""
    result = Judged(topic=topic, case=case.label, outcome="right", ratio=None, message="")
    lse = topic == "log-sum-exp"
    if lse and not subject.claims("lse"):
        return result | {"outcome": "refused", "message": "returns no log-sum-exp"}
    if case.gradients and not subject.claims("autodiff"):
        return result | {"outcome": "refused", "message": "has no gradients"}
    try:
        arrays = drawn(case)
        got, expected = _results(subject, case, arrays, lse)
        try:
            verdicts = judge(got, expected)
        except (TypeError, ValueError) as error:  # another dtype or shape
            raise Nonconforming(str(error)) from error
    except (UnsupportedError, NoBackendError, NoSuchArrayError) as error:
        reason = str(error).splitlines()[0]
        return result | {"outcome": "refused", "message": reason}
    except Nonconforming as error:
        return result | {"outcome": "wrong", "message": str(error)}
    except Exception as error:  # noqa: BLE001 - an error of the library is an outcome
        text = " ".join(str(error).split())[:300]
        return result | {"outcome": "error", "message": f"{type(error).__name__}: {text}"}
    ratio = worst(verdicts)
    over = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
    if over:
        return result | {"outcome": "wrong", "ratio": ratio, "message": "; ".join(over)}
    return result | {"ratio": ratio}


def _results(subject: Subject, case: Case, arrays: Arrays, lse: bool) -> tuple[Any, Any]:
    """Return the outputs of a case on the peer, and those that it should have."""
    call = case.call
    if not case.gradients:
        got = subject.attempt(arrays, call.spec, lse)
        return got, expect(arrays.q, arrays.k, arrays.v, call.spec, **arrays.options)
    d_out = _cotangent(call)
    with subject.watched(arrays) as (q, k, v, options):
        inputs = {"q": q, "k": k, "v": v} | ({"bias": options["bias"]} if call.bias else {})

        def function(x: Mapping[str, Any]) -> tuple[Any, Any]:
            more = {**options, **{n: x[n] for n in x if n == "bias"}}
            out = attention(x["q"], x["k"], x["v"], call.spec, backend=subject.name, **more)
            return out, out[..., 0]  # in the place of lse, with no cotangent

        (out, _), gradients = subject.framework.vjp(function, inputs, (subject.there(d_out), None))
        got = {"out": subject.back(out)}
        got |= {f"d_{n}": subject.back(gradients[n], f"d_{n}") for n in inputs}
    expected = expect(arrays.q, arrays.k, arrays.v, call.spec, d_out=d_out, **arrays.options)
    return got, expected


def _cotangent(call: Call) -> Any:
    """Draw a cotangent of out."""
    shape = (*call.lead, call.heads, call.rows, call.value_dim)
    return (
        np.random.default_rng(len(call.label)).standard_normal(shape).astype(dtype_of(call.dtype))
    )


def as_number(ratio: float | None) -> float | str | None:
    """Return a ratio as JSON has it: infinity is a string."""
    return "inf" if ratio is not None and math.isinf(ratio) else ratio
