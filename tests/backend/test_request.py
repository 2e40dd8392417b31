"""The features that a call needs of a backend: neither fewer nor more."""

from __future__ import annotations

import pytest

from pdcore_conformance.judge.calls import Call

SMALL = Call()
NEEDS = {
    "softmax": (SMALL, {"exponential"}),
    "sh(1,1)": (SMALL.but(spec="sh(1,1)"), {"exponential"}),
    "sh(1,2)": (SMALL.but(spec="sh(1,2)"), {"exponential", "head_scaling"}),
    "softcap": (SMALL.but(spec="softmax(softcap=2)"), {"softcap"}),
    "linear": (SMALL.but(spec="linear+h(count)"), {"features", "count"}),
    "bn": (SMALL.but(spec="bn"), {"exponential", "batch"}),
    "running": (SMALL.but(spec="bn(statistics=running)"), {"exponential", "running"}),
    "iebn": (SMALL.but(spec="iebn"), {"exponential", "user_normalization"}),
    "causal": (SMALL.but(spec="causal"), {"exponential", "causal"}),
    "window": (SMALL.but(spec="sparse(2,inf)"), {"exponential", "window"}),
    "grouped": (SMALL.but(heads=4), {"exponential", "gqa"}),
    "padding": (SMALL.but(key_mask="right"), {"exponential", "key_mask"}),
    "offset": (SMALL.but(offset="end"), {"exponential", "offset"}),
    "int": (SMALL.but(offset=3), {"exponential"}),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_call_needs_these_features(name: str) -> None:
    call, expected = NEEDS[name]
    request = call.request("numpy", "cpu", lse=False, vjp=False)
    assert set(request.features()) == {"float32", *expected}
    with_more = call.request("numpy", "cpu", lse=True, vjp=True)
    assert set(with_more.features()) == {"float32", *expected, "lse", "vjp"}
