"""Dropout in training, which drops weights after normalization."""

from __future__ import annotations

import numpy as np
import pytest

from ..judge.budget import judge
from ..judge.calls import Arrays, Call
from ..judge.subject import Nonconforming, Subject

P = 0.3


@pytest.mark.claims("dropout", "float32", "exponential", "lse")
@pytest.mark.parametrize("spec", ["softmax", "bn", "gaussian(gamma=0.3)", "h(sum,sink=2)"])
def test_weights_are_dropped_and_the_rest_scaled(spec: str, subject: Subject) -> None:
    """With the identity as values, out is the weights: each is 0 or w / (1 - p), a share p is 0."""
    call = Call(spec=spec, rows=64, keys=64, value_dim=64)
    missing = subject.unclaimed([*call.features(lse=True), "dropout"])
    if missing:
        subject.refuses(missing, lambda: subject.attempt(call.arrays(), spec, dropout=P), call)
        return
    drawn = call.arrays()
    values = np.broadcast_to(np.eye(64, dtype="float32"), drawn.v.shape)
    arrays = Arrays(drawn.q, drawn.k, np.ascontiguousarray(values), drawn.options)
    whole = subject.compute(arrays, spec)
    dropped = subject.compute(arrays, spec, dropout=P)
    subject.evidence.add(judge({"lse": dropped["lse"]}, subject.expected(call, arrays)))
    kept = dropped["out"] != 0
    share = float(np.mean(~kept))
    # The bound is five standard deviations of a binomial share.
    if abs(share - P) > 5 * (P * (1 - P) / kept.size) ** 0.5:
        raise Nonconforming(f"a share {share:.3f} of the weights is 0, expected about {P}")
    expected = whole["out"][kept] / (1 - P)
    if not np.allclose(dropped["out"][kept], expected, rtol=1e-4, atol=1e-7):
        raise Nonconforming("weights that are kept are not w / (1 - p)")
