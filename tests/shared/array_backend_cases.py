"""Calls with every argument, for the tests of `ArrayBackend` on every library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from reference_cases import Array, Case, PlainNumpy, normal_case

from pdcore.backend import Inputs

SPECS = [
    "softmax",
    "softmax(softcap=2)+causal",
    "gaussian(gamma=0.3)+h(count)",
    "cosine(scale=2)+sparse(2,1)",
    "polynomial(degree=4)+h(one)",
    "linear",
    "linear+causal",
    "linear+causal+sh(1,2)+h(count)",
    "relu+sparse(2,2)",
    "random_features(6,1)",
    "random_features(6,1)+causal",
    "bn",
    "bn(beta=param,eps=0.1)+sh(1,2)",
    "bn(statistics=batch,eps=0.1)+h(count)",
    "bn(statistics=running,beta=param)+causal",
    "causal+bn(statistics=prefix,eps=0.1)",
    "bn(statistics=prefix,beta=param,eps=0.1)+sh(2,3)",
    "sh(3,2,pool=first)+causal",
    "gaussian(gamma=0.3)+bn(eps=0.1)",
    "linear+bn(beta=0.5,eps=0.1)",
]


def full_case(text: str, offset: Any = 2) -> Case:
    """Draw a call with every argument that the spec can have."""
    case = normal_case(text, n=6, m=9, seed=11)
    rng = np.random.default_rng(12)
    call: dict[str, Any] = {"key_mask": rng.random((2, 9)) < 0.8, "offset": offset, **case.call}
    if "linear" not in text and "features" not in text:
        call["mask"] = rng.random((2, 1, 6, 9)) < 0.8
    if case.spec.kernel.has_log and case.spec.heads.largest == 1:
        call["bias"] = rng.normal(size=(4, 6, 9))
    return replace(case, call=call)


def per_sequence(text: str) -> Case:
    return full_case(text, offset=np.asarray([2, -1]))


def gradients_by_numpy(case: Case, d_out: Array, d_lse: Array) -> dict[str, Array]:
    return PlainNumpy().attention_vjp(case.plan(), case.inputs())[2](d_out, d_lse)


def same_gradients(got: dict[str, Any], want: dict[str, Array]) -> None:
    for name, x in got.items():
        assert x is not None, name
        np.testing.assert_allclose(
            np.asarray(x),
            want[name],
            rtol=0,
            atol=1e-11 * max(np.max(np.abs(want[name])), 1.0),
            err_msg=name,
        )


def with_leaves(case: Case, leaves: dict[str, Any], asarray: Any) -> Inputs:
    """Give the inputs of a call with some arrays exchanged for those of a framework."""
    inputs = case.inputs(asarray)
    own = {n: leaves[n] for n in ("q", "k", "v", "bias") if n in leaves}
    params = {**inputs.params, **{n: x for n, x in leaves.items() if n not in own}}
    return inputs._replace(**own, params=params)
