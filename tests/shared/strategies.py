"""Hypothesis strategies for specs and for calls that fit them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference_cases import INF, Array, Case

from pdcore.spec import (
    AttentionSpec,
    Batch,
    Cosine,
    Elu,
    Exponential,
    Gaussian,
    HeadScaling,
    Identity,
    Kernel,
    Normalization,
    PointwiseKernel,
    Polynomial,
    RandomFeatures,
    Relu,
    Support,
)

SCALES = st.sampled_from([None, 0.25, 0.8])

#: Every built-in kernel, with arguments that a spec may have.
KERNELS: st.SearchStrategy[Kernel] = st.one_of(
    st.just(Exponential()),
    st.builds(Exponential, scale=SCALES, softcap=st.sampled_from([None, 0.7, 3.0])),
    st.builds(Gaussian, gamma=st.sampled_from([0.1, 0.4])),
    st.builds(Cosine, scale=st.sampled_from([1.0, 2.5])),
    st.builds(
        Polynomial,
        degree=st.sampled_from([2, 4]),
        coef0=st.sampled_from([0.0, 0.5, 1.0]),
        scale=SCALES,
    ),
    st.just(Elu()),
    st.just(Relu()),
    st.builds(RandomFeatures, count=st.integers(1, 6), seed=st.integers(0, 3), scale=SCALES),
)

SUPPORTS = st.builds(
    Support,
    causal=st.booleans(),
    left=st.sampled_from([INF, INF, 0, 1, 3]),
    right=st.sampled_from([INF, INF, 0, 2, 5]),
)


@st.composite
def specs(
    draw: st.DrawFn, heads: int, kernels: st.SearchStrategy[Kernel] = KERNELS
) -> AttentionSpec:
    """Draw a valid spec for a number of key heads."""
    kernel, support = draw(kernels), draw(SUPPORTS)
    inner = isinstance(kernel, PointwiseKernel)
    normalization: Normalization = Identity()
    if draw(st.booleans()):
        scopes = ["sequence", "batch", "running", *(["prefix"] * 3 if inner else [])]
        statistics = draw(st.sampled_from(scopes))
        normalization = Batch(
            beta=draw(st.sampled_from([1.0, 0.5, 0.0, "param"])),
            # Large, so that a single key, whose variance is 0, is not ill-conditioned.
            eps=draw(st.sampled_from([0.25, 1.0])),
            statistics=statistics,
            allow_leak=support.ahead == 0 and statistics in ("sequence", "batch"),
        )
    scaling = HeadScaling()
    widest = int(min(4, support.left + support.right + 1))
    if draw(st.booleans()):
        pool, half = draw(st.sampled_from(["mean", "first"])), draw(st.booleans())
        scales = () if half else tuple(draw(st.integers(1, widest)) for _ in range(heads))
        scaling = HeadScaling(scales, pool, draw(st.integers(1, widest)) if half else None)
    normaliser = draw(st.sampled_from(["sum", "count", "one"]))
    sinks = [None, -0.5] if normaliser == "sum" and kernel.has_log else [None]
    sink = draw(st.sampled_from(sinks))
    return AttentionSpec(kernel, normaliser, normalization, scaling, support, sink)


@st.composite
def values(
    draw: st.DrawFn, shape: tuple[int, ...], bound: float = 3.0, dense: bool = False
) -> Array:
    """Draw an array, with entries that Hypothesis chooses, or from a normal distribution."""
    if dense or draw(st.booleans()):
        seed = draw(st.integers(0, 2**16))
        return np.clip(np.random.default_rng(seed).standard_normal(shape), -bound, bound)
    steps = st.integers(-int(16 * bound), int(16 * bound)).map(lambda i: i / 16)
    return draw(hnp.arrays(np.float64, shape, elements=steps))


def broadcastable(full: tuple[int, ...]) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw a shape that broadcasts to `full`, with at most as many axes."""
    return st.tuples(
        st.integers(1, len(full)), st.lists(st.booleans(), min_size=len(full), max_size=len(full))
    ).map(
        lambda drawn: tuple(1 if one else size for one, size in zip(drawn[1], full, strict=True))[
            -drawn[0] :
        ]
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    largest: int = 9,
    smallest: int = 0,
    dense: bool = False,
    kernels: st.SearchStrategy[Kernel] = KERNELS,
) -> Case:
    """Draw a spec and float64 arrays for a call, with every argument that the spec allows.

    Unless `dense`, many entries of queries, keys and values are equal or 0.
    """
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 2)]))
    heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    n, m = draw(st.integers(smallest, largest)), draw(st.integers(smallest, largest))
    d, dv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    spec = draw(specs(heads, kernels))
    full = (*lead, heads * group, n, m)
    call: dict[str, Any] = {}
    masks = st.integers(0, 2**16).map(np.random.default_rng)
    if draw(st.booleans()):
        call["key_mask"] = draw(masks).random((*lead, m)) < 0.75
    if draw(st.integers(0, 3)) == 0:
        call["mask"] = draw(masks).random(draw(broadcastable(full))) < 0.75
    if spec.kernel.has_log and spec.heads.largest == 1 and draw(st.integers(0, 2)) == 0:
        shape = draw(broadcastable(full))
        bias = draw(values(shape, 1.0))
        call["bias"] = np.where(draw(masks).random(shape) < 0.15, -INF, bias)
    offset = draw(st.sampled_from(["none", "int", "scalar", "sequence", "end"]))
    if offset == "end":
        call["offset"] = "end"
    elif offset == "int":
        call["offset"] = draw(st.integers(-3, 9))
    elif offset != "none":
        shape = () if offset == "scalar" else lead
        call["offset"] = np.asarray(draw(masks).integers(-3, 9, size=shape))
    params = {}
    for p in spec.parameters():
        sizes = {"H": heads, "D": d}
        shape = tuple(sizes[s] for s in draw(st.sampled_from(p.shapes)))  # type: ignore[index]
        params[p.name] = draw(values(shape, 1.0))
        if p.name == "var":
            params[p.name] = 0.25 + np.abs(params[p.name])
    if params:
        call["params"] = params
    shapes = [(*lead, heads * group, n, d), (*lead, heads, m, d), (*lead, heads, m, dv)]
    q, k, v = (draw(values(shape, dense=dense)) for shape in shapes)
    return Case(spec, q, k, v, call)
