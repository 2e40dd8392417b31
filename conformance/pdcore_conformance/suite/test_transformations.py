"""Transformations of functions: second derivatives, forward mode, vmap, compilers, shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from ..judge.budget import judge
from ..judge.calls import Arrays, Call
from ..judge.judging import claims, each
from ..judge.subject import Nonconforming, Subject
from ..judge.ways import SHARDS, cotangents

SMALL = Call(rows=6, keys=7, dim=4, value_dim=3)
PLAN = (
    "softmax",
    "bn",
    "linear",
    "causal",
    "gaussian(gamma=0.3)",
    "bn+sh(1,2)",
    "cosine",
    "causal+linear",
    "causal+bn(statistics=prefix)",
    "random_features(count=8)",
)
CALLS = [SMALL.but(spec=text, dtype=d) for d in ("float32", "float64") for text in PLAN]
WIDE = [SMALL.but(spec=text, dtype="float64") for text in PLAN]


def function(subject: Subject, call: Call) -> Callable[[Mapping[str, Any]], tuple[Any, Any]]:
    """Return the attention as a function of a mapping with q, k and v, by `pdcore.bind`."""
    from pdcore import bind

    layer = bind(call.spec, backend=subject.name)
    return lambda x: tuple(layer(x["q"], x["k"], x["v"], return_lse=True))


def directions(call: Call, arrays: Arrays) -> dict[str, np.ndarray]:
    """Draw a direction for each of q, k and v."""
    rng = np.random.default_rng(1)
    inputs = {"q": arrays.q, "k": arrays.k, "v": arrays.v}
    return {n: np.asarray(rng.standard_normal(x.shape), x.dtype) for n, x in inputs.items()}


@claims("double_backward")
@each(WIDE)
def test_gradients_are_differentiable(call: Call, subject: Subject) -> None:
    """Compare the derivative of the gradients along a direction with the oracle's."""
    from ..judge.directional import gradient_derivatives

    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays, d = call.arrays(), cotangents(call)
    with subject.watched(arrays) as (q, k, v, _):
        direction = directions(call, arrays)
        _, second = subject.framework.double_vjp(
            function(subject, call),
            {"q": q, "k": k, "v": v},
            tuple(map(subject.there, d)),
            {n: subject.there(x) for n, x in direction.items()},
        )
        result = {n: subject.back(x, n) for n, x in second.items()}
    expected = gradient_derivatives(arrays.q, arrays.k, arrays.v, call.spec, direction, *d)
    require_close(result, expected, 1e-8, "second derivative")


@claims("jvp")
@each(WIDE)
def test_forward_mode_is_the_derivative(call: Call, subject: Subject) -> None:
    """Compare derivatives of out and lse along a direction with the oracle's."""
    from ..judge.directional import output_derivatives

    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    direction = directions(call, arrays)
    with subject.watched(arrays) as (q, k, v, _):
        _, derivatives = subject.framework.jvp(
            function(subject, call),
            {"q": q, "k": k, "v": v},
            {n: subject.there(x) for n, x in direction.items()},
        )
        result = {n: subject.back(x, n) for n, x in zip(("out", "lse"), derivatives, strict=True)}
    expected = output_derivatives(arrays.q, arrays.k, arrays.v, call.spec, direction)
    require_close(result, expected, 1e-9, "derivative")


@claims("vmap")
@each([call.but(lead=(3, 2)) for call in CALLS])
def test_map_is_a_loop(call: Call, subject: Subject) -> None:
    """The framework's vmap over the first axis agrees with the oracle for each example."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.arrays()
    with subject.watched(arrays) as (q, k, v, _):
        out, lse = subject.framework.vmap(function(subject, call))({"q": q, "k": k, "v": v})
        result = {"out": subject.back(out), "lse": subject.back(lse, "lse")}
    subject.evidence.add(judge(result, subject.expected(call, arrays)))


@claims("compile")
@each([*CALLS, SMALL.but(rows=70, keys=130), SMALL.but(heads=4, spec="bn")])
def test_compiled_is_the_same(call: Call, subject: Subject) -> None:
    """The call compiled as one program by the framework agrees with the oracle."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    reason = subject.framework.missing("compile")
    if reason is not None:
        subject.evidence.outcome, subject.evidence.note = "not claimed", reason
        return
    arrays = call.arrays()
    with subject.framework.precision(call.dtype):
        q, k, v = (subject.there(x) for x in (arrays.q, arrays.k, arrays.v))
        compiled = subject.framework.compile(function(subject, call))
        out, lse = compiled({"q": q, "k": k, "v": v})
        result = {"out": subject.back(out), "lse": subject.back(lse, "lse")}
    subject.evidence.add(judge(result, subject.expected(call, arrays)))


@pytest.mark.parametrize("spec", ["softmax", "bn", "linear"])
@pytest.mark.parametrize(
    "feature", [pytest.param(name, marks=pytest.mark.claims(name, "float32")) for name in SHARDS]
)
def test_shards_agree_with_the_whole(feature: str, spec: str, subject: Subject) -> None:
    """A sequence in shards has the results of the whole sequence."""
    call = Call(spec=spec, rows=16, keys=16)
    arrays = call.arrays()
    if not subject.claims(feature):
        option = {feature: SHARDS[feature]}
        subject.refuses([feature], lambda: subject.attempt(arrays, spec, **option), call)
        return
    if subject.framework.shards_by != feature:
        raise Nonconforming(
            f"{feature} is declared, and the suite has no way to shard arrays of "
            f"{subject.info.library} so: what cannot be judged must not be declared"
        )
    if feature == "group" and not subject.device.startswith("cpu"):
        subject.evidence.outcome = "not claimed"
        subject.evidence.note = "ranks need a GPU each, so they are judged on the CPU"
        return
    shard = subject.framework.shard
    with subject.watched(arrays) as (q, k, v, _):
        out, lse = shard(subject.name, spec, q, k, v)
        result = {"out": subject.back(out), "lse": subject.back(lse, "lse")}
    subject.evidence.add(judge(result, subject.expected(call, arrays)))


def require_close(
    result: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], relative: float, what: str
) -> None:
    """Raise Nonconforming where a result is far from the oracle's, by its largest entry."""
    for name, x in result.items():
        y = np.asarray(expected[name], np.longdouble)
        error = float(np.max(np.abs(x - y), initial=0.0))
        bound = relative * (1.0 + float(np.max(np.abs(y), initial=0.0)))
        if not error <= bound:
            raise Nonconforming(f"{what} of {name}: error {error:.3g}, bound {bound:.3g}")
