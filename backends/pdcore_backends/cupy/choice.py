"""The choice of the CUDA kernels that run a plan, and the reasons against them."""

from __future__ import annotations

import math
from dataclasses import replace

from pdcore.extend import FeatureRows, Features, Plan, Request, Scores

from .feature_programs import columns_for as feature_columns
from .features import CompiledFeatures, state_blocks
from .grouped import launches
from .pooling import pooled
from .programs import columns_for, scalar_of, tile
from .runtime import BLOCKS, too_old
from .scores import Compiled
from .statistics import summarised
from .tensor_cores import TensorCores, folded_in, rounded_in, unfit

__all__ = ["chosen", "limit", "uncapturable"]


def chosen(plan: Plan, request: Request, capability: int, library: str) -> Plan:
    """Choose the kernels that run a plan, and state them in its steps.

    Parameters
    ----------
    plan : Plan
    request : Request
    capability : int
        The device's compute capability, 90 for 9.0.
    library : str
        The array library whose operations compute everything else.
    """
    plan = pooled(plan, request, capability, library)
    plan = summarised(plan, request, capability, library)
    c = plan.contraction
    if why := limit(plan, request, capability):
        step = f"kernel: {library}'s own operations, O(N + M) memory: {why}"
        return plan.chosen(c, step)
    # A pullback needs `out` before rounding: in dk the rounding error of d_out . out would be
    # multiplied by the mean of the keys.
    rounds = not plan.rescales and not plan.prefix and not request.vjp
    if isinstance(c, Features):
        return _by_features(plan, c, request.dtype, rounds)
    return _by_scores(plan, c, request, capability, rounds)


def _by_scores(plan: Plan, c: Scores, request: Request, capability: int, rounds: bool) -> Plan:
    log_w = "scale s" if c.expression is None else str(c.expression)
    what = f"log w = {log_w}" if c.weight == "log" else "w = s"
    what += ", and dropout," if request.dropout else ""
    step = f"kernel: tiles of CUDA cores in {plan.accumulate}, with {what} compiled in"
    if request.dtype != plan.accumulate:
        why = unfit(plan, request, capability)
        if not why:
            step = f"kernel: tiles of tensor cores in {request.dtype}, with {what} compiled in"
            c = replace(c, choice=TensorCores(rounds, request.dtype))
            plan = plan.chosen(c, step + _scales(plan))
            return folded_in(rounded_in(plan, request.dtype), request)
        step += f", {_stored(plan, request.dtype, rounds)}; {why}"
    step += _scales(plan, apart=request.dtype != plan.accumulate)
    return plan.chosen(replace(c, choice=Compiled(rounds)), step)


def _by_features(plan: Plan, c: Features, dtype: str, rounds: bool) -> Plan:
    """Choose the kernels of features; phi is compiled in if they have it, else array calls."""
    raw = bool(c.phi)
    phi = "phi compiled in" if raw else f"{'log ' if c.log else ''}phi by array calls"
    if raw:
        plan = replace(plan, transforms=plan.transforms[:-1])
    step = f"kernel: states of chunks on CUDA cores in {plan.accumulate}, {phi}"
    if dtype != plan.accumulate:
        step += f", {_stored(plan, dtype, rounds)}"
    return plan.chosen(replace(c, raw=raw, choice=CompiledFeatures(rounds)), step)


def _stored(plan: Plan, dtype: str, rounds: bool) -> str:
    """Return which arrays of a 16-bit call the kernels read and write without a cast."""
    names = [] if plan.transforms else ["q"]
    if not plan.pools:
        names += [*([] if plan.transforms else ["k"]), "v", *(["out"] if rounds else [])]
    if not names:
        return "of rows that were cast"
    return f"of {', '.join(names)} in {dtype}" + (", other rows cast" if len(names) < 4 else "")


def _scales(plan: Plan, apart: bool = False) -> str:
    """Return the number of launches for the scales; `apart`: pooled keys have another dtype."""
    scales = [group.scale for group in plan.groups]
    if len(scales) == 1:
        return ""
    count = launches(["pooled" if apart and scale > 1 else "" for scale in scales])
    many = "one launch" if count == 1 else f"{count} launches"
    order = ", longest first" if count < len(scales) else ""
    return f"; {len(scales)} scales in {many} of the forward{order}"


def uncapturable(plan: Plan) -> str:
    """Return why a plan cannot run while its stream is captured; empty if it can."""
    heads = [head for group in plan.groups for head in group.heads]
    if heads != sorted(heads):
        return (
            "heads of different scales alternate, whose indices would be copied from the host; "
            "put heads of one scale beside each other"
        )
    if any(isinstance(step, FeatureRows) for step in plan.transforms):
        return (
            "phi is array calls, which may be matrix products of the library or need arrays of "
            "the host"
        )
    if plan.contraction.choice is None:
        return "the call runs by matrix products of the library, which cannot be captured"
    return ""


def limit(plan: Plan, request: Request, capability: int) -> str:
    """Return why the kernels cannot run a plan on a device; empty if they can.

    Parameters
    ----------
    plan : Plan
    request : Request
    capability : int
        The device's compute capability, 90 for 9.0.
    """
    c = plan.contraction
    if isinstance(c, Scores) and c.weight == "log_features":
        return "no kernel takes log features, whose maxima differ from block to block"
    expression = c.expression if isinstance(c, Scores) else None
    if request.vjp and expression is not None and expression.entries:
        return "no kernel gives the gradients of tables"
    if not request.q[-1]:
        return "got D = 0, and a tile takes one feature at least"
    if why := too_old(capability):
        return why
    size = tile(scalar_of(plan.accumulate))
    *lead, rows, dim = request.q
    keys, value_dim = request.v[-2:]
    longest = max(rows, keys)
    blocks = math.prod(lead) * -(-longest // size)
    if request.bias is not None:
        blocks = max(blocks, math.prod(lead) * -(-rows // size) * -(-keys // size))
    if isinstance(c, Features):
        dim = dim if c.count is None else c.count
        blocks = max(blocks, state_blocks(dim, value_dim, longest, math.prod(lead), size))
    columns = feature_columns if isinstance(c, Features) else columns_for
    slices, most = max(-(-n // columns(n)) for n in (dim, value_dim, 1)), columns(2**31)
    if max(longest, blocks) > BLOCKS[0] - size or slices > BLOCKS[1]:
        return (
            f"got q {request.q} and v {request.v}, and a grid has {BLOCKS[0]} by {BLOCKS[1]} "
            f"blocks at most, of {size} rows and keys and {most} columns"
        )
    return ""
