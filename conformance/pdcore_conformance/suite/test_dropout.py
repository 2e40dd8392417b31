"""Dropout in training: which weights are dropped, the same on every backend, and gradients."""

from __future__ import annotations

import numpy as np
import pytest

from pdcore.reference.dropout import keeps

from ..judge.calls import DROPOUT_SEED, Arrays, Call
from ..judge.subject import Nonconforming, Subject

P = 0.3

#: Heads of one scale run together; blocks begin at other rows and keys than 0.
SPECS = [
    "softmax",
    "bn",
    "gaussian(gamma=0.3)",
    "h(sum,sink=2)",
    "sh(1,2,1,2)",
    "sh(3,1,3,1)",
    "h(one)",
]


def dropped(spec: str, **more: object) -> Call:
    """Return a call of several sequences and heads, two query heads to each key head."""
    known = {"lead": (3,), "heads": 8, "key_heads": 4, "rows": 6, "keys": 12, "dropout": P}
    return Call(spec=spec, **{**known, **more})  # type: ignore[arg-type]


@pytest.mark.claims("dropout", "exponential", "lse")
@pytest.mark.parametrize("spec", SPECS)
def test_dropout_is_that_of_the_oracle(spec: str, subject: Subject) -> None:
    """A weight is dropped by its place among all sequences, heads, queries and keys."""
    subject.judge(dropped(spec))


@pytest.mark.claims("dropout", "vjp", "exponential")
@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,2,1,2)", "h(sum,sink=param)", "alibi+causal"])
def test_gradients_are_those_of_what_is_kept(spec: str, subject: Subject) -> None:
    """The pullback drops the weights that the result has dropped."""
    subject.judge(dropped(spec, heads=4), "vjp")


@pytest.mark.claims("dropout", "autodiff", "exponential")
@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,2,1,2)"])
def test_automatic_gradients_are_those_of_what_is_kept(spec: str, subject: Subject) -> None:
    """The framework's reverse mode drops them too."""
    subject.judge(dropped(spec, heads=4), "autodiff")


@pytest.mark.claims("dropout", "exponential")
@pytest.mark.parametrize("rows", [5, 300])
def test_the_stream_is_the_same_bit_by_bit(rows: int, subject: Subject) -> None:
    """With q = 0 and unit columns as values, out shows each weight that is kept, over blocks."""
    keys = 2 * rows + 7
    call = dropped("softmax", lead=(), heads=2, key_heads=1, rows=rows, keys=keys, value_dim=keys)
    missing = subject.unclaimed(call.features())
    drawn = call.arrays()
    units = np.eye(keys, dtype=np.float32)[None]
    arrays = Arrays(np.zeros_like(drawn.q), drawn.k, units, drawn.options)
    if missing:
        subject.refuses(missing, lambda: subject.attempt(arrays, "softmax", lse=False), call)
        return
    out = subject.compute(arrays, "softmax", lse=False)["out"]
    expected = keeps(P, DROPOUT_SEED, np.arange(2), rows, np.arange(keys))
    if wrong := int((expected != (out != 0)).sum()):
        raise Nonconforming(f"{wrong} of {expected.size} weights are not as the stream has them")


@pytest.mark.claims("dropout", "exponential", "lse")
def test_no_dropout_is_none(subject: Subject) -> None:
    """A probability of 0 changes no bit, whatever the seed."""
    call = Call(rows=33, keys=40)
    arrays = call.arrays()
    missing = subject.unclaimed([*call.features(lse=True), "dropout"])
    if missing:
        attempt = lambda: subject.attempt(arrays, "softmax", dropout=P, seed=1)  # noqa: E731
        subject.refuses(missing, attempt, call)
        return
    plain = subject.compute(arrays, "softmax")
    none = subject.compute(arrays, "softmax", dropout=0.0, seed=7)
    if any((plain[name] != none[name]).any() for name in plain):
        raise Nonconforming("dropout=0.0 changes the result")
