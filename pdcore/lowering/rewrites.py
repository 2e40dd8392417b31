"""Lower a spec to a plan by exact rewrites.

Every rewrite here is an identity; `tests/lowering` checks each against the oracle, and checks that
a wrong variant fails.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from ..errors import UnsupportedError
from ..spec import (
    AttentionSpec,
    Batch,
    Cosine,
    Elu,
    Exponential,
    Expression,
    FeatureMap,
    Gaussian,
    Identity,
    KeySet,
    PointwiseKernel,
    RandomFeatures,
    Relu,
    as_spec,
    default_scale,
)
from .fold import ConstantFeature, Fold, Recentre, Unread
from .plan import Features, Group, Plan, Scores, Summary, Transform
from .scaled_rows import ScaledRows
from .transforms import FeatureRows, GaussianRows, KeyShift, Normalize, UnitRows

__all__ = ["Signature", "lower", "restored"]

#: Feature maps that act on single entries, with their names in `Features.phi`.
PHI: Mapping[type[FeatureMap], str] = {Elu: "elu", Relu: "relu"}


class Signature(NamedTuple):
    """The properties of a call on which a plan depends; sequence lengths are not among them.

    Attributes
    ----------
    dim : int
        The number of features, D.
    heads : int
        The number of key heads.
    dtype : str
        The dtype of q, k and v.
    masked : bool
        Whether the call has a `mask`.
    """

    dim: int
    heads: int
    dtype: str
    masked: bool = False


def lower(spec: AttentionSpec, signature: Signature) -> Plan:
    """Lower a spec to a plan.

    Parameters
    ----------
    spec : AttentionSpec
        The attention to compute.
    signature : Signature
        The call's feature count, heads and dtype, and whether it has a mask.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        When the spec has another number of scales than the call has key heads.
    """
    spec = spec.for_heads(signature.heads)
    groups = tuple(Group(*g) for g in spec.heads.groups(signature.heads))
    steps = [
        f"heads {list(g.heads)}: keys and values pooled ({spec.heads.pool}) over windows of "
        f"{g.scale}"
        for g in groups
        if g.scale > 1
    ]
    summary = _summary(spec, steps)
    transforms, contraction = _contraction(spec, signature, steps)
    if spec.terms:
        assert isinstance(contraction, Scores)
        contraction = _with_terms(spec, contraction, steps)
    if spec.normaliser != "sum":
        steps.append(
            "h(count): out exp(L - log n)" if spec.normaliser == "count" else "h(one): out exp(L)"
        )
    if spec.sink is not None:
        steps.append("sink s: out exp(L - L') with L' = log(exp L + exp s)")
    return Plan(
        spec=spec,
        groups=groups,
        pool=spec.heads.pool,
        summary=summary,
        transforms=transforms,
        contraction=contraction,
        normaliser=spec.normaliser,
        accumulate="float32" if signature.dtype in ("float16", "bfloat16") else signature.dtype,
        steps=tuple(steps),
        support=spec.support,
        # A feature that holds a row constant is as large as scores.
        holds="float32" if spec.prefix and not spec.plain_exponential else spec.normalization.holds,
        constants=tuple(p.name for p in spec.parameters() if not p.differentiable),
        sink=spec.sink,
        by_query_head=tuple(p.name for p in spec.parameters() if p.by_query_head),
        text=" ".join([*map(str, signature[:3]), str(int(signature.masked)), str(spec)]),
    )


def restored(text: str) -> Plan:
    """Lower a plan again from its `Plan.text`, for a compiler that passes only text."""
    dim, heads, dtype, masked, spec = text.split(" ", 4)
    # By the spec, not its text: a word may be defined anew.
    return _lowered(as_spec(spec), Signature(int(dim), int(heads), dtype, bool(int(masked))))


_lowered = lru_cache(maxsize=256)(lower)


def _summary(spec: AttentionSpec, steps: list[str]) -> Summary | None:
    """Return the statistics step of a spec, and describe the step in `steps`."""
    statistics = spec.normalization.statistics_state()
    if spec.shift_cancels:
        steps.append("a shift of queries and keys cancels in |x - y|: no statistics")
        return None
    if statistics is None:
        return None
    scope = "sequence"
    if isinstance(spec.normalization, Batch):
        scope = spec.normalization.statistics
    if type(statistics) is KeySet:
        steps.append("statistics: none; the keys of the sequence are kept as they are")
        return Summary(statistics, scope)
    over = {
        "sequence": "the real keys of the sequence",
        "batch": "the real keys of all sequences of the call",
        "prefix": "the real keys up to each position",
    }
    name = re.sub(r"(?<!^)(?=[A-Z])", " ", type(statistics).__name__).lower()
    steps.append(f"statistics: {name} over {over[scope]}")
    return Summary(statistics, scope)


def _contraction(
    spec: AttentionSpec, signature: Signature, steps: list[str]
) -> tuple[tuple[Transform, ...], Scores | Features]:
    """Return the transforms and the contraction of a spec, and describe them in `steps`."""
    kernel, normalization = spec.kernel, spec.normalization
    transforms: list[Transform] = []
    if isinstance(normalization, Batch) and spec.plain_exponential:
        assert isinstance(kernel, Exponential)
        scale = default_scale(kernel.scale, signature.dim)
        transforms.append(_fold(spec, normalization, scale, signature.dtype, steps))
        steps.append(f"scores: log kappa = {scale:.6g} q'.k'")
        return tuple(transforms), Scores(scale=scale)
    if spec.prefix:
        assert isinstance(normalization, Batch)
        transforms.append(ConstantFeature(_fold(spec, normalization, 1.0, signature.dtype, steps)))
    elif spec.shift_cancels:
        learned = tuple(p.name for p in spec.parameters() if p.differentiable)
        transforms += [Unread(learned)] if learned else []
    elif not isinstance(normalization, Identity):
        transforms.append(Normalize(normalization))
        steps.append(normalization.step())
    if isinstance(kernel, Gaussian):
        transforms.append(GaussianRows(kernel.gamma))
        steps.append(
            "gaussian: log kappa = 2 gamma q'.k' + key bias (-gamma |k'|^2) + row "
            "constant (-gamma |q'|^2), after a common shift"
        )
        return tuple(transforms), Scores(scale=2.0 * kernel.gamma)
    if isinstance(kernel, Cosine):
        transforms.append(UnitRows())
        steps.append(f"cosine: unit rows; scores: log kappa = {kernel.scale:.6g} q'.k'")
        return tuple(transforms), Scores(scale=kernel.scale)
    if isinstance(kernel, FeatureMap):
        if kernel.has_feature_scale:
            transforms.append(ScaledRows(kernel))
            steps.append("feature scale: small features over their largest, whose log goes to L")
        transforms.append(FeatureRows(kernel, PHI.get(type(kernel), "")))
        return tuple(transforms), _features(spec, kernel, signature, steps)
    if not isinstance(kernel, PointwiseKernel):
        raise UnsupportedError(
            f"{kernel.word}: no formula, as {type(kernel).__name__} is neither a PointwiseKernel "
            "nor a FeatureMap"
        )
    if spec.plain_exponential:
        assert isinstance(kernel, Exponential)
        scale = default_scale(kernel.scale, signature.dim)
        if transforms and signature.dtype in ("float16", "bfloat16"):
            transforms.append(KeyShift(scale))
            steps.append("16 bits round keys relative to a point c among them; tau q'.c goes to L")
        inner = "q'.k'" if transforms else "q.k"
        steps.append(f"scores: log kappa = {scale:.6g} {inner}")
        return tuple(transforms), Scores(scale=scale)
    expression = kernel.expression(signature.dim)
    steps.append(f"scores: log kappa = {expression} with s = q'.k'")
    scalars = tuple(p.name for p in kernel.parameters())
    return tuple(transforms), Scores(expression=expression, scalars=scalars)


def _fold(
    spec: AttentionSpec, normalization: Batch, scale: float, dtype: str, steps: list[str]
) -> Fold | Recentre:
    """Return the transform of Attention-BN under a kernel of inner products, and describe it."""
    centre = "the first real key" if spec.prefix else "mu"
    constant = (
        "the row constant tau q'.(c - beta mu) goes to L"
        if spec.plain_exponential
        else "one more feature, q'.(c - beta mu) of a row and 1 of a key"
    )
    if not normalization.with_std:
        steps.append(f"recentre: q' = q - beta mu, k' = k - c, c = {centre}; {constant}")
        return Recentre(normalization, scale)
    # float16 cannot hold (q - beta mu) / (var + eps): its range ends at 65,504.
    split = dtype == "float16" and not spec.prefix
    counted = normalization.statistics in ("sequence", "batch")
    closed = counted or (spec.prefix and spec.support.ahead == 0)
    steps.append(
        f"fold: q' = (q - beta mu) / {'sigma' if split else 'sigma^2'}, "
        f"k' = (k - c){' / sigma' if split else ''}, c = {centre}; {constant}"
    )
    if spec.prefix and dtype in ("float16", "bfloat16"):
        steps.append(f"{dtype} rows are computed in float32: q' of a short prefix leaves its range")
    return Fold(normalization, scale, split, closed)


def _with_terms(spec: AttentionSpec, c: Scores, steps: list[str]) -> Scores:
    """Return a contraction whose log kappa has the terms too."""
    expression = c.expression
    if expression is None:
        expression = c.scale * Expression("input", (), "s")
    scalars, removing = c.scalars, c.removing
    for term in spec.terms:
        expression = expression + term.expression()
        removing = (*removing, *term.expression().entries)
        scalars = (*scalars, *(p.name for p in term.parameters()))
        steps.append(f"{term.word}: log kappa + {term.expression()}, block by block")
    return replace(c, expression=expression, scalars=scalars, removing=removing)


def _features(
    spec: AttentionSpec, kernel: FeatureMap, signature: Signature, steps: list[str]
) -> Scores | Features:
    """Return the contraction of a feature map, by features if possible, else by scores."""
    window = spec.support.left != float("inf") or (
        spec.support.right != float("inf") and not spec.support.causal
    )
    if signature.masked or window:
        why = "a mask" if signature.masked else "a window"
        steps.append(
            f"features under {why} run as scores with weights phi(q).phi(k), O(N M): "
            "differences of prefix sums would cancel"
        )
        weight = "log_features" if kernel.log_domain else "features"
        return Scores(weight=weight, signed=kernel.signed)
    causal = " by prefix sums over chunks" if spec.support.causal else ""
    steps.append(f"features: phi(q).sum phi(k) v, O(N + M){causal}")
    return Features(
        kernel,
        log=kernel.log_domain,
        signed=kernel.signed,
        phi=PHI.get(type(kernel), ""),
        count=kernel.count if isinstance(kernel, RandomFeatures) else None,
    )
