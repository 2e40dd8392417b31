"""Which kernel runs a plan by scores: PyTorch's own attention, FlexAttention, or our blocks.

The choice follows from the plan and the call without its values, and is a step of the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pdcore.extend import (
    Batch,
    Conv1d,
    Conv2d,
    Cosine,
    Exponential,
    Fold,
    Gaussian,
    Group,
    Identity,
    InstanceEnhanced,
    Plan,
    Request,
    Scores,
)

from . import device
from .blocked import Blocked
from .flex import Flexed
from .operators import described

__all__ = ["Fused", "chosen"]

#: FlexAttention's block: it skips none of a shorter call, and is compiled for seconds.
FLEX_LEAST = 128
#: Features beyond which its tiles leave the shared memory of a multiprocessor.
FLEX_MOST = 256


@dataclass(frozen=True)
class Fused(Scores):
    """A contraction by scores that `scaled_dot_product_attention` computes.

    Attributes
    ----------
    short : bool
        Whether the whole call may go by `.direct`.
    plain : bool
        Whether `.direct.plain` computes it.
    grouped : bool
        Whether query heads share key heads.
    causal : bool
        Whether keys after a row's own position are hidden.
    runs : tuple of (int, int, int)
        Which heads of which group follow one another in the result: group, start, stop.
    plan : str
        See `.operators.described`.
    dtype : str
        Of the queries, keys and values that its kernel reads where `.direct` does not run it.
    """

    short: bool = False
    plain: bool = False
    grouped: bool = False
    causal: bool = False
    runs: tuple[tuple[int, int, int], ...] = ()
    plan: str = ""
    dtype: str = "float32"


def chosen(plan: Plan, request: Request) -> Plan:
    """Choose the kernel of a plan by scores, and say so in its steps."""
    c = plan.contraction
    if not isinstance(c, Scores):
        return plan
    text = described(
        str(plan.spec), request.q[-1], request.k[-3], request.dtype, request.mask is not None
    )
    why = _not_fused(plan, c, request)
    if not why:
        return _fused(plan, c, request, text)
    limit = _not_flex(c, request)
    if not limit:
        return _flexed(plan, c, request, text, why)
    step = f"kernel: blocks of our own, O(N + M) memory, for {why}; not FlexAttention: {limit}"
    return replace(plan, contraction=c.run_as(Blocked, plan=text), steps=(*plan.steps, step))


def _fused(plan: Plan, c: Scores, request: Request, text: str) -> Plan:
    spec, kind = plan.spec, device.kind(request.device)
    short = not (request.lse or request.vjp or request.weights) and plan.normaliser == "sum"
    plain = not plan.transforms and len(plan.groups) == 1 and plan.groups[0].scale == 1
    contraction = c.run_as(
        Fused,
        short=short,
        causal=spec.support.causal,
        runs=_runs(plan.groups),
        plan=text,
        dtype=plan.accumulate if kind == "cpu" else _read(plan, request),
        plain=short
        and plain
        and request.key_mask is None
        and len(request.q) == 4
        and request.mask is None
        and request.bias is None
        and not spec.support.causal
        and request.q[-1] == request.v[-1]
        and kind == "cpu"
        and all(request.q + request.k),
        grouped=request.q[-3] != request.k[-3],
    )
    name = "scaled_dot_product_attention" + (
        " (flash)" if kind == "cpu" else " (cuDNN, flash or memory-efficient)"
    )
    steps = [*plan.steps, f"kernel: {name}"]
    if kind == "cuda" and not short:
        flash = contraction.dtype != "float32" and request.key_mask is None
        steps.append(
            f"here {'flash' if flash else 'memory-efficient'}, in {contraction.dtype}, as "
            "the log-sum-exp is asked for or needed"
        )
    if kind == "cuda" and short and _folds(plan):
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
    if spec.support.causal:
        steps.append(
            "causal rows at another offset than 0 that see some keys only: blocks of our own"
        )
    return replace(plan, contraction=contraction, steps=tuple(steps))


def _flexed(plan: Plan, c: Scores, request: Request, text: str, why: str) -> Plan:
    dtype = _read(plan, request)
    steps = [*plan.steps, f"kernel: FlexAttention, compiled, in {dtype}, for {why}"]
    if plan.spec.support.restricts:
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
    return replace(plan, contraction=c.run_as(Flexed, plan=text, dtype=dtype), steps=tuple(steps))


def _folds(plan: Plan) -> bool:
    """Whether all that happens to queries and keys is a fold of statistics of a sequence."""
    first = plan.transforms[0] if len(plan.transforms) == 1 else None
    return isinstance(first, Fold) and first.batch.statistics == "sequence"


def _read(plan: Plan, request: Request) -> str:
    """Give the dtype in which a kernel of CUDA reads transformed queries and keys."""
    normalization = plan.spec.normalization
    known = isinstance(normalization, Identity) or (
        isinstance(normalization, Batch) and normalization.statistics != "prefix"
    )
    # What others give may leave the range of 16 bit, and pullbacks compute the weights again.
    return request.dtype if known and not (request.vjp or request.weights) else plan.accumulate


def _runs(groups: tuple[Group, ...]) -> tuple[tuple[int, int, int], ...]:
    """Say how the heads of groups, each in order, are put in the order of all heads."""
    place = {head: (g, i) for g, group in enumerate(groups) for i, head in enumerate(group.heads)}
    found: list[tuple[int, int, int]] = []
    for head in sorted(place):
        group, index = place[head]
        if found and found[-1][0] == group and found[-1][2] == index:
            found[-1] = (group, found[-1][1], index + 1)
        else:
            found.append((group, index, index + 1))
    return tuple(found)


def _not_fused(plan: Plan, c: Scores, request: Request) -> str:
    """Say what no fused kernel computes, nothing if one computes the plan."""
    spec, support = plan.spec, plan.spec.support
    if c.weight != "log" or c.expression is not None:
        return "weights that are no exp of an inner product"
    if not isinstance(spec.kernel, (Exponential, Gaussian, Cosine)):
        return "a kernel of a plugin"
    if not isinstance(spec.normalization, (Identity, Batch)):
        if type(spec.normalization) not in (Conv1d, Conv2d, InstanceEnhanced):
            return f"the normalization {spec.normalization.word}"
        if request.dtype == "float16":
            return f"{spec.normalization.word}, which may leave the range of float16"
    if request.dropout:
        return "dropout"
    if support.left != math.inf or (support.right != math.inf and not support.causal):
        return "a window"
    scaled = any(group.scale > 1 for group in plan.groups)
    if scaled and support.causal:
        return "pooled keys under causal"
    if scaled and spec.prefix:
        return "prefix statistics of pooled keys"
    if scaled and request.mask is not None:
        return "a mask over pooled keys"
    if (support.causal or spec.prefix) and _arrays(request):
        return "positions that are arrays"
    if request.dtype == "float64" and device.kind(request.device) != "cpu":
        return "float64 on this device"
    return ""


def _not_flex(c: Scores, request: Request) -> str:
    """Say why FlexAttention does not run a call, nothing if it does."""
    if why := device.without_flex(request.device):
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
    """Whether the positions of queries are arrays."""
    return request.offset in ("array", "sequence") or (
        request.offset == "end" and request.key_mask is not None
    )
