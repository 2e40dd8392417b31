"""Which specs a decoder computes, and the plans by which it does."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UnsupportedError
from ..lowering import Group, Plan, Signature, lower
from ..spec import (
    AttentionSpec,
    Batch,
    Conv2d,
    Convolution,
    HeadScaling,
    Identity,
    Normalization,
    Support,
)

__all__ = ["check_spec", "plan_of", "plan_of_last"]


def check_spec(spec: AttentionSpec) -> None:
    """Raise an `UnsupportedError` for a spec whose rows depend on keys that are still to come."""
    if spec.support.ahead != 0:
        raise UnsupportedError(
            f"decoder: {spec} sees keys after a query's position, which a decoder does not have "
            "yet; add causal, or a window without keys ahead, such as sparse(64,0)"
        )
    t, why = spec.normalization, ""
    if getattr(t, "allow_leak", False):
        why = "allow_leak=true takes statistics of keys that are still to come"
    elif isinstance(t, Batch):
        if t.statistics not in ("running", "prefix"):
            why = f"{t.statistics} statistics change with every key; use statistics=prefix"
    elif isinstance(t, Convolution):
        if t.looks_ahead or isinstance(t, Conv2d):
            why = f"{t.word} reads a whole grid; use conv1d(padding=causal)"
    elif t.statistics_state() is not None:
        why = f"{t.word} takes statistics of all keys; use bn(statistics=prefix)"
    elif type(t).apply_keys is not Normalization.apply_keys:
        why = f"{t.word} may read the neighbours of a key, which a decoder does not carry for it"
    if spec.by_label:
        why = "it reads labels, which a decoder does not carry"
    if why:
        raise UnsupportedError(f"decoder: {spec}: {why}")


def plan_of(spec: AttentionSpec, signature: Signature) -> Plan:
    """Lower a spec, but for a convolution, which keys have been through when they are stored."""
    if isinstance(spec.normalization, Convolution):
        spec = replace(spec, normalization=Identity())
    return lower(spec, signature)


def plan_of_last(plan: Plan, spec: AttentionSpec, signature: Signature) -> Plan:
    """Return the plan of one row that sees every key it is given, pooled or not."""
    free = plan_of(replace(spec, support=Support(), heads=HeadScaling()), signature)
    groups = tuple(Group(1, group.heads) for group in plan.groups)
    return replace(free, groups=groups, transforms=plan.transforms, summary=plan.summary)
