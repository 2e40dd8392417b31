"""The contraction by scores by cuDNN, for plans of which cuDNN has the same definition.

cuDNN is called by `jax.nn.dot_product_attention`. Plans that cuDNN defines differently run by
blocks: rows that a mask leaves without keys, a causal triangle that does not start at the first
query and key, and calls for the log-sum-exp, of which cuDNN has no gradient.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pdcore.extend import Operands, Scores

__all__ = ["cudnn_scores"]


def cudnn_scores(c: Scores, o: Operands) -> tuple[Any, Any] | None:
    """Contract by scores, see `score_contraction.scores`.

    Parameters
    ----------
    c : Scores
        The contraction, whose choice is `.choice.ByCudnn`.
    o : Operands
        The operands.

    Returns
    -------
    (out, L) or None
        L is NaN, because no step reads it. None for causal rows at an offset other than 0.
    """
    visibility = o.visibility
    if c.choice.causal and not (visibility.static and visibility.offset == 0):
        return None
    *lead, heads, group, rows, dim = o.q.shape
    dtype = jnp.dtype(c.choice.dtype)

    def reordered(x: Any, count: int) -> Any:
        x = jnp.reshape(x, (-1, count, *x.shape[-2:]))
        return jnp.swapaxes(x, 1, 2).astype(dtype)

    result = _attend(
        reordered(o.q, heads * group),
        reordered(o.k, heads),
        reordered(o.v, heads),
        scale=c.scale,
        is_causal=c.choice.causal,
    )
    out = jnp.reshape(jnp.swapaxes(result, 1, 2), (*lead, heads, group, rows, dim))
    out = out.astype(o.q.dtype)
    return out, jnp.full(out.shape[:-1], jnp.nan, out.dtype)


def _attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)
