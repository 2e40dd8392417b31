"""The choice of the kernel for a plan by scores: PyTorch's attention, FlexAttention, or blocks.

The choice depends on the plan and on shapes, dtype and device of the call, never on the values of
arrays. It is stored in the slot `choice` of the contraction, and described in the plan's steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from pdcore.extend import Fold, Plan, Recentre, Request, Scores

from . import device
from .kernels import TILE, by_cudnn
from .terms import linear_scale

__all__ = ["Blocked", "Flexed", "Fused", "Termed", "chosen", "not_native"]

#: The block of FlexAttention: a shorter call has no block to skip, so compiling does not pay.
FLEX_LEAST = 128
#: The most features whose tiles fit into the shared memory of a multiprocessor.
FLEX_MOST = 256
#: The most blocks of a grid along y and z, the axes that PyTorch's kernels give to sequences and to
#: heads.
GRID_MOST = 65_535


@dataclass(frozen=True)
class Blocked:
    """The choice of blocks for a contraction by scores, see `.blocked`.

    Attributes
    ----------
    plan : str
        `Plan.text`, from which `.operators` lowers the plan again.
    """

    plan: str


@dataclass(frozen=True)
class Flexed(Blocked):
    """The choice of FlexAttention for a contraction by scores, see `.flex`.

    Attributes
    ----------
    dtype : str
        The dtype in which the kernel reads queries, keys and values.
    """

    dtype: str


@dataclass(frozen=True)
class Termed(Blocked):
    """The choice of the fused CPU kernel with terms of positions and labels, see `.terms`.

    Attributes
    ----------
    scale : float
        tau, where log kappa is tau s and the terms.
    """

    scale: float


class OnePass(NamedTuple):
    """A fold that computes its statistics itself, see `pdcore.lowering.Fold`.

    Attributes
    ----------
    of : {"sequence", "batch", "running", "prefix"}
        The keys over which the statistics are computed.
    beta : float or None
        The weight of the mean; None where the weight is a parameter of the call.
    eps : float or None
        As in `Fold`; None for a `Recentre`, which does not divide.
    split, closed
        As in `Fold`.
    """

    of: str
    beta: float | None
    eps: float | None
    split: bool = False
    closed: bool = False


@dataclass(frozen=True)
class Fused(Blocked):
    """The choice of `scaled_dot_product_attention`, see `.fused`.

    Attributes
    ----------
    dtype : str
        The dtype in which the kernel reads queries, keys and values where L is read.
    narrow : str
        The same for a `.fused.FusedCall`, where L is not read.
    causal : bool
        Whether keys after a row's position are hidden, and no others.
    window : tuple of int or inf, or None
        How many positions before and after its own a row sees; None without a window.
    whole : bool
        Whether L is not read, so that the call may be a `.fused.FusedCall`.
    direct : bool
        Whether `.fused.direct` may compute the call.
    fold : OnePass or None
        The fold, if it is the only transform of the plan.
    """

    dtype: str
    narrow: str
    causal: bool
    window: tuple[float, float] | None
    whole: bool
    direct: bool
    fold: OnePass | None


def chosen(plan: Plan, request: Request) -> Plan:
    """Choose the kernel of a plan by scores, and describe the choice in the plan's steps."""
    c = plan.contraction
    if not isinstance(c, Scores):
        return plan
    why = _not_fused(plan, c, request)
    if not why:
        return _fused(plan, c, request)
    scale = _scale_of_terms(c, request)
    if scale is not None:
        step = (
            "kernel: scaled_dot_product_attention (flash) on blocks of rows, to whose scores terms "
            "are added; in a trace, in torch.func, and where a bias or a parameter requires a "
            "gradient: blocks of our own"
        )
        return plan.chosen(replace(c, choice=Termed(plan.text, scale)), step)
    limit = _not_flex(c, request)
    if not limit:
        return _flexed(plan, c, request, why)
    step = f"kernel: blocks of our own, O(N + M) memory, for {why}; not FlexAttention: {limit}"
    return plan.chosen(replace(c, choice=Blocked(plan.text)), step)


def not_native(request: Request) -> str:
    """Return why PyTorch's own kernel cannot drop the weights of a call; empty if it can."""
    plan = request.lower()
    assert isinstance(plan.contraction, Scores)
    if request.sharding is not None:
        return "shards of a sequence"
    if why := _not_fused(plan, plan.contraction, request):
        return why
    if request.lse or request.vjp or plan.rescales:
        return "the log-sum-exp"
    return "a window" if _window(plan) else ""


def _fused(plan: Plan, c: Scores, request: Request) -> Plan:
    support, kind = plan.support, device.kind(request.device)
    window = (support.left, support.ahead) if _window(plan) else None
    causal = support.causal and window is None
    whole = not (request.lse or request.vjp or request.weights) and not plan.rescales
    choice = Fused(
        plan=plan.text,
        dtype=plan.accumulate if kind == "cpu" else _kernel_dtype(plan, request),
        narrow=request.dtype if plan.fits(request.dtype) else plan.accumulate,
        causal=causal,
        window=window,
        whole=whole,
        direct=whole and kind == "cpu" and _direct(plan, request),
        fold=_one_pass(plan),
    )
    steps = [f"kernel: scaled_dot_product_attention ({_fused_kernels(request, kind)})"]
    if request.dropout:
        steps.append("weights dropped by PyTorch's own random numbers")
    if window is not None:
        steps.append(
            "a window: blocks of rows with the keys that they see; in a trace and in torch.func "
            "blocks of our own"
        )
    if kind == "cuda" and whole and _by_cudnn(request):
        steps.append(
            f"gradients not by cuDNN unless queries and keys are multiples of {TILE}: in a tile "
            "that they fill in part its gradient may be NaN"
        )
    if kind == "cuda" and not whole:
        flash = choice.dtype != "float32" and request.key_mask is None
        steps.append(
            f"here {'flash' if flash else 'memory-efficient'}, in {choice.dtype}, as "
            "the log-sum-exp is asked for or needed"
        )
    fold = choice.fold
    if whole and fold is not None and fold.eps is None:
        steps.append("keys as they are (c = 0), but for pooled ones, running means and gradients")
    elif kind == "cuda" and whole and fold is not None and fold.of == "sequence":
        why = device.unfolded(request.device, request.dtype, request.k[-1])
        steps.append(
            "statistics and fold: two Triton kernels"
            if not why
            else f"statistics and fold: PyTorch's operations, not Triton: {why}"
        )
    if request.mask is not None or request.bias is not None:
        steps.append(
            f"the mask or bias goes there as {request.dtype}; one that requires a "
            "gradient goes by blocks of our own"
        )
    if causal:
        steps.append(
            "causal rows at another offset than 0 that see some keys only: blocks of our own"
        )
    return plan.chosen(replace(c, choice=choice), *steps)


def _by_cudnn(request: Request) -> bool:
    """Check whether cuDNN may run a call on some device, if it computes no gradient."""
    added = (request.mask, request.key_mask, request.bias)
    return (
        added == (None,) * 3
        and not request.dropout
        and by_cudnn(request.q[-2], request.k[-2], derived=False)
    )


def _fused_kernels(request: Request, kind: str) -> str:
    """Return the names of the fused kernels that may run a call."""
    if kind == "cpu":
        return "math, with an (N, M) array" if request.dropout else "flash"
    if (request.mask, request.key_mask, request.bias) != (None,) * 3:
        return "memory-efficient"
    return "cuDNN, flash or memory-efficient" if _by_cudnn(request) else "flash or memory-efficient"


def _one_pass(plan: Plan) -> OnePass | None:
    """Return the fold of a plan; None unless the fold is its only transform."""
    step = plan.transforms[0] if len(plan.transforms) == 1 else None
    if isinstance(step, Recentre):
        return OnePass(step.of, step.beta, None)
    if not isinstance(step, Fold):
        return None
    return OnePass(step.of, step.beta, step.eps, step.split, step.closed)


def _direct(plan: Plan, request: Request) -> bool:
    """Check whether nothing but a fold without parameters comes before PyTorch's function."""
    fold = _one_pass(plan)
    if fold is None:
        alone = not plan.transforms
    else:
        alone = fold.beta is not None and fold.of != "running"
    return (
        alone
        and not plan.pools
        and not _window(plan)
        and request.offset == "int"
        and request.mask is None
        and request.key_mask is None
        and request.bias is None
        and not request.dropout
        and len(request.q) == 4
        and request.q[-1] == request.v[-1]
        and all(request.q + request.k)
    )


def _flexed(plan: Plan, c: Scores, request: Request, why: str) -> Plan:
    dtype = _kernel_dtype(plan, request)
    steps = [f"kernel: FlexAttention, compiled, in {dtype}, for {why}"]
    if plan.support.restricts:
        skipped = (
            "no block is skipped, as positions are arrays"
            if _arrays(request)
            else "blocks that no query sees are skipped"
        )
        steps.append(f"blocks of {FLEX_LEAST} by {FLEX_LEAST}: {skipped}")
    steps.append(
        "traced calls, torch.func, dispatch modes, gradients of gradients, and a bias or "
        "parameter that requires a gradient: blocks of our own"
    )
    return plan.chosen(replace(c, choice=Flexed(plan.text, dtype)), *steps)


def _kernel_dtype(plan: Plan, request: Request) -> str:
    """Return the dtype in which a CUDA kernel reads transformed queries and keys."""
    # Rows that may leave the range of 16 bits are read in the accumulation dtype. So are those of
    # a pullback, which computes the weights again and must get the same.
    narrow = plan.fits(request.dtype) and not (request.vjp or request.weights)
    return request.dtype if narrow else plan.accumulate


def _not_fused(plan: Plan, c: Scores, request: Request) -> str:
    """Return what no fused kernel computes of a plan; empty if one computes the plan."""
    if c.weight != "log" or c.expression is not None:
        return "weights that are no exp of an inner product"
    if request.dropout and not request.native_dropout:
        return "dropout, which no kernel of a library draws from pdcore's stream"
    if _window(plan) and (why := _no_blocks(plan, request)):
        return why
    if plan.pools and plan.support.causal:
        return "pooled keys under causal"
    if plan.pools and plan.prefix:
        return "prefix statistics of pooled keys"
    if plan.pools and request.mask is not None:
        return "a mask over pooled keys"
    if (plan.support.restricts or plan.prefix) and _arrays(request):
        return "positions that are arrays"
    if device.kind(request.device) == "cpu":
        return ""
    return "float64 on this device" if request.dtype == "float64" else _off_the_grid(request)


def _scale_of_terms(c: Scores, request: Request) -> float | None:
    """Return tau of a plan that `.terms` runs: tau s and terms, on the CPU; otherwise None."""
    cpu = device.kind(request.device) == "cpu"
    if not cpu or c.weight != "log" or not c.places or _arrays(request) or request.dropout:
        return None
    return linear_scale(c)


def _window(plan: Plan) -> bool:
    """Check whether keys are hidden otherwise than by causal."""
    support = plan.support
    return support.left != math.inf or (support.right != math.inf and not support.causal)


def _no_blocks(plan: Plan, request: Request) -> str:
    """Return why `.windows` does not run a plan with a window; empty if it does."""
    if device.kind(request.device) != "cpu":
        return "a window"
    if plan.pools:
        return "a window over pooled keys"
    names = [name for name in ("mask", "bias") if getattr(request, name) is not None]
    return f"a window with a {names[0]}" if names else ""


def _off_the_grid(request: Request) -> str:
    """Return why no grid of PyTorch's CUDA kernels holds a call; empty if one does."""
    *lead, heads, _, _ = request.q
    if max(math.prod(lead), heads) <= GRID_MOST:
        return ""
    return f"more than {GRID_MOST:,} sequences or heads, the most blocks of a grid along y and z"


def _not_flex(c: Scores, request: Request) -> str:
    """Return why FlexAttention does not run a call; empty if it does."""
    if why := device.without_flex(request.device):
        return why
    if why := _off_the_grid(request):
        return why
    if c.weight != "log":
        return "weights that are no exp of scores, or have a sign"
    if request.dtype == "float64":
        return "its kernels have no float64"
    if request.dropout:
        return "it drops no weights"
    if request.vjp or request.weights:
        return "attention_vjp and attention_weights compute weights again, by blocks"
    if max(request.q[-1], request.v[-1]) > FLEX_MOST:
        return f"more than {FLEX_MOST} features"
    if min(request.q[-2], request.k[-2]) < FLEX_LEAST:
        return f"fewer than {FLEX_LEAST} queries or keys, a block of it"
    return ""


def _arrays(request: Request) -> bool:
    """Check whether the positions of queries are arrays."""
    return request.offset in ("array", "sequence") or (
        request.offset == "end" and request.key_mask is not None
    )
