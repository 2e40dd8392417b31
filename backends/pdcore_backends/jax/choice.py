"""The choice of the kernel of a plan by scores: cuDNN, or blocks of rows and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import jax

from pdcore.extend import GaussianRows, Plan, Request, Scores

from .cudnn import TILE
from .device import find

__all__ = ["ByBlocks", "ByCudnn", "chosen", "unfit"]

#: The most features that cuDNN runs on every device, and the unit of their number.
MOST, UNIT = 128, 8
#: The most blocks of a grid along y and z, the axes of sequences and of heads.
GRID_MOST = 65_535


@dataclass(frozen=True)
class ByBlocks:
    """A contraction by scores in blocks, see `.scores`.

    Attributes
    ----------
    turns : bool
        Whether key heads may run one after the other, see `.blocks.sizes`.
    """

    turns: bool


@dataclass(frozen=True)
class ByCudnn:
    """A contraction by scores that cuDNN computes, see `.cudnn`.

    Attributes
    ----------
    dtype : str
        The dtype of the queries, keys and values that cuDNN reads.
    causal : bool
        Whether keys after the position of a row are hidden.
    """

    dtype: str
    causal: bool


def chosen(plan: Plan, request: Request) -> Plan:
    """Choose the kernel of a plan by scores, and state it in its steps."""
    c = plan.contraction
    if not isinstance(c, Scores):
        return plan
    why = unfit(plan, c, request)
    if not why:
        return _by_cudnn(plan, c, request)
    # The arrays of a shard are on one device.
    alone = request.axis_name is not None or len(jax.devices("cpu")) == 1
    kind = request.device.partition(":")[0]
    turns = alone and kind == "cpu"
    order = "key heads in turn where they are large" if turns else "all heads at once"
    step = f"kernel: blocks of rows and keys, {order}, O(N + M) memory"
    if kind == "cuda":
        step += f"; not cuDNN: {why}"
    return plan.chosen(replace(c, choice=ByBlocks(turns)), step)


def _by_cudnn(plan: Plan, c: Scores, request: Request) -> Plan:
    causal = plan.support.causal
    step = (
        f"kernel: cuDNN, which reads {request.dtype}; it has no forward-mode derivatives and "
        "no gradients of gradients: ask for the log-sum-exp, which goes by blocks, to have "
        "them"
    )
    tiles = (
        f"gradients by blocks of rows and keys unless queries and keys are multiples of {TILE}: in "
        "a tile that they fill in part cuDNN's may be NaN"
    )
    more = ["causal rows at another offset than 0: blocks of rows and keys"] if causal else []
    return plan.chosen(replace(c, choice=ByCudnn(request.dtype, causal)), step, tiles, *more)


def unfit(plan: Plan, c: Scores, request: Request) -> str:
    """Return why cuDNN cannot run a call; empty if it can."""
    support = plan.support
    why = _missing(request.device)
    if why:
        return why
    if request.dtype not in ("float16", "bfloat16"):
        return f"it has no {request.dtype}"
    biased = any(isinstance(step, GaussianRows) for step in plan.transforms)
    if c.weight != "log" or c.expression is not None or biased:
        return "weights that are no exp of an inner product"
    if request.dropout:
        return "dropout, which no kernel of a library draws from pdcore's stream"
    if request.axis_name is not None:
        return "shards merge by the log-sum-exp"
    if not plan.fits(request.dtype):
        return "transformed queries and keys that 16 bit may not hold"
    if request.segments == "traced":
        return "traced ids of packed sequences"
    if request.lse or request.vjp or request.weights or plan.rescales:
        return "the log-sum-exp is needed, and it has no gradient of that"
    for name in ("mask", "key_mask", "bias"):
        if getattr(request, name) is not None:
            return f"{name} may leave a row without keys, which it does not give zeros"
    if support.left != math.inf or (support.right != math.inf and not support.causal):
        return "a window"
    if support.causal and request.offset in ("array", "sequence"):
        return "positions that are arrays"
    if support.causal and any(group.scale > 1 for group in plan.groups):
        return "pooled keys under causal"
    *lead, heads, rows, dim = request.q
    if rows < TILE:
        return (
            f"fewer than {TILE} queries, as in decoding, where every step would build a plan of it"
        )
    if max(math.prod(lead), heads) > GRID_MOST:
        return (
            f"more than {GRID_MOST:,} sequences or heads, the most blocks of a grid along y and z"
        )
    if dim != request.v[-1] or dim % UNIT or dim > MOST:
        return (
            f"{dim} features and {request.v[-1]} of values; it has equally many, multiples of "
            f"{UNIT} up to {MOST}"
        )
    return "" if all(request.q + request.k) else "nothing to compute"


@lru_cache(maxsize=64)
def _missing(device: str) -> str:
    kind = device.partition(":")[0]
    if kind != "cuda":
        return f"{kind} is no CUDA device"
    capability = str(getattr(find(device), "compute_capability", "0.0"))
    if int(capability.partition(".")[0]) < 8:
        return f"compute capability {capability} is below 8.0"
    return ""
