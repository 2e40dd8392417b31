"""The contraction by scores by cuDNN, where it computes exactly what a plan says.

`jax.nn.dot_product_attention` hands it over. What it would compute in another sense goes by
blocks: rows that a mask leaves without keys, a causal triangle that does not start at the first
query and key, a wanted log-sum-exp, whose gradient it does not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from pdcore.extend import Batch, Gaussian, Identity, Operands, Plan, Request, Scores

from .device import find

__all__ = ["ByCudnn", "cudnn_scores", "unfit"]

#: Features up to which it runs on every device that it knows, and what divides their number.
MOST, UNIT = 128, 8


@dataclass(frozen=True)
class ByCudnn(Scores):
    """A contraction by scores that cuDNN computes.

    Attributes
    ----------
    dtype : str
        Of the queries, keys and values that it reads.
    causal : bool
        Whether keys after a row's own position are hidden.
    """

    dtype: str = "bfloat16"
    causal: bool = False


def unfit(plan: Plan, c: Scores, request: Request) -> str:
    """Say why cuDNN does not run a call; nothing if it does."""
    spec, support = plan.spec, plan.spec.support
    why = _missing(request.device)
    if why:
        return why
    if request.dtype not in ("float16", "bfloat16"):
        return f"it has no {request.dtype}"
    if c.weight != "log" or c.expression is not None or isinstance(spec.kernel, Gaussian):
        return "weights that are no exp of an inner product"
    if request.axis_name is not None:
        return "shards merge by the log-sum-exp"
    if not isinstance(spec.normalization, (Identity, Batch)) or spec.prefix:
        return "transformed queries and keys that 16 bit may not hold"
    if request.lse or request.vjp or request.weights or plan.normaliser != "sum":
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
    dim = request.q[-1]
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


def cudnn_scores(c: ByCudnn, o: Operands) -> tuple[Any, Any] | None:
    """Contract by scores, see `score_contraction.scores`.

    Parameters
    ----------
    c : ByCudnn
        The contraction.
    o : Operands
        What it reads.

    Returns
    -------
    (out, L) or None
        L is NaN, as nothing reads it. None for causal rows at another offset than 0.
    """
    seen = o.visibility
    if c.causal and not (seen.static and seen.offset == 0):
        return None
    *lead, heads, group, rows, dim = o.q.shape
    dtype = jnp.dtype(c.dtype)

    def laid(x: Any, count: int) -> Any:
        x = jnp.reshape(x, (-1, count, *x.shape[-2:]))
        return jnp.swapaxes(x, 1, 2).astype(dtype)

    found = _attend(
        laid(o.q, heads * group),
        laid(o.k, heads),
        laid(o.v, heads),
        scale=c.scale,
        is_causal=c.causal,
    )
    out = jnp.reshape(jnp.swapaxes(found, 1, 2), (*lead, heads, group, rows, dim))
    out = out.astype(o.q.dtype)
    return out, jnp.full(out.shape[:-1], jnp.nan, out.dtype)


def _attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)
