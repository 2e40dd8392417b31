"""A backend runs the features that it declares, and refuses the others with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pdcore import attention, attention_vjp, attention_weights
from pdcore.backend import FEATURES

from ..judge.calls import Call, drawn
from ..judge.subject import PROPERTIES, Nonconforming, Subject
from ..judge.ways import SHARDS

SMALL = Call()

#: For each feature, a call that needs it and as little else as possible.
CALLS: Mapping[str, Call] = {
    "exponential": SMALL,
    "softcap": SMALL.but(spec="softmax(softcap=2)"),
    "gaussian": SMALL.but(spec="gaussian(gamma=0.3)"),
    "cosine": SMALL.but(spec="cosine"),
    "polynomial": SMALL.but(spec="polynomial"),
    "features": SMALL.but(spec="linear"),
    "user_kernel": SMALL.but(spec="conformance_logistic"),
    "batch": SMALL.but(spec="bn"),
    "running": SMALL.but(spec="bn(statistics=running)"),
    "prefix": SMALL.but(spec="bn(statistics=prefix)"),
    "user_normalization": SMALL.but(spec="conformance_centred"),
    "head_scaling": SMALL.but(spec="sh(1,2)"),
    "count": SMALL.but(spec="softmax+h(count)"),
    "sink": SMALL.but(spec="h(sum,sink=param)"),
    "alibi": SMALL.but(spec="alibi"),
    "relative": SMALL.but(spec="relative(3)"),
    "labels": SMALL.but(spec="labels(3)"),
    "causal": SMALL.but(spec="causal"),
    "window": SMALL.but(spec="sparse(2,2)"),
    "mask": SMALL.but(mask="random"),
    "key_mask": SMALL.but(key_mask="right"),
    "bias": SMALL.but(bias="full"),
    "offset": SMALL.but(spec="causal", offset="sequence"),
    "gqa": SMALL.but(heads=4),
    "lse": SMALL,
    "float16": SMALL.but(dtype="float16"),
    "bfloat16": SMALL.but(dtype="bfloat16"),
    "float32": SMALL,
    "float64": SMALL.but(dtype="float64"),
    "vjp": SMALL,
    "weights": SMALL,
    "dropout": SMALL,
    "axis_name": SMALL,
    "group": SMALL,
    "segments": SMALL.but(keys=9, segments="ragged"),
}


@pytest.mark.parametrize("feature", sorted(set(FEATURES) - PROPERTIES))
def test_feature(feature: str, subject: Subject) -> None:
    """A feature declared full is not refused; any other is refused with a reason."""
    call = CALLS[feature]
    arrays = drawn(call)

    def attempt() -> Any:
        with subject.watched(arrays) as (q, k, v, options):
            if feature == "vjp":
                return attention_vjp(q, k, v, call.spec, backend=subject.name, **options)
            if feature == "weights":
                return attention_weights(q, k, v, call.spec, backend=subject.name, **options)
            options_of: dict[str, dict[str, Any]] = {
                "lse": {"return_lse": True},
                "dropout": {"dropout": 0.25, "seed": 1},
                **{name: {name: by} for name, by in SHARDS.items()},
            }
            options = {**options, **options_of.get(feature, {})}
            return attention(q, k, v, call.spec, backend=subject.name, **options)

    missing = subject.unclaimed([feature])
    if missing:
        subject.refuses(missing, attempt, call)
    elif feature in SHARDS:
        # Shards exist only inside of a shard map, or of processes, which the test of shards runs.
        subject.evidence.note = "see shards"
    else:
        subject.accepts(attempt)


@pytest.mark.parametrize("missing", ["gaussian", "bias", "causal"])
def test_refusals_follow_the_declaration(missing: str, subject: Subject) -> None:
    """`refusals` may add reasons, but refuses every feature that is not declared."""
    request = CALLS[missing].request(subject.info.library, subject.device)
    reasons = subject.backend.refusals(request)
    if subject.claims(missing) and reasons:
        raise Nonconforming(f"{missing} is declared full, but refusals gives {reasons!r}")
    if not subject.claims(missing) and not reasons:
        raise Nonconforming(f"{missing} is not declared, but refusals gives no reason")
