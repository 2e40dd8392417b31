"""The contraction by scores by cuDNN, for plans of which cuDNN has the same definition.

cuDNN is called by `jax.nn.dot_product_attention`. Plans that cuDNN defines differently run by
blocks: rows that a mask leaves without keys, a causal triangle that does not start at the first
query and key, and calls for the log-sum-exp, of which cuDNN has no gradient.

cuDNN's gradient computes exp(0 - L) for the rest of a tile that queries or keys do not fill, which
overflows for a log-sum-exp L below -88.7 and makes the gradient NaN. Few plans bound L from below,
so cuDNN computes the gradients of whole tiles only; those of other calls are computed by blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pdcore.extend import Operands, Scores

from .namespace import in_full

__all__ = ["TILE", "cudnn_scores"]

#: The queries and keys of a tile.
TILE = 128


def cudnn_scores(
    c: Scores, o: Operands, by_blocks: Callable[[Operands], tuple[Any, Any]]
) -> tuple[Any, Any] | None:
    """Contract by scores, see `score_contraction.scores`.

    Parameters
    ----------
    c : Scores
        The contraction, whose choice is `.choice.ByCudnn`.
    o : Operands
        The operands.
    by_blocks : callable
        ``by_blocks(o)`` contracts by blocks.

    Returns
    -------
    (out, L) or None
        L is NaN, because no step reads it. None for causal rows at an offset other than 0.
    """
    visibility = o.visibility
    if c.choice.causal and not (visibility.static and visibility.offset == 0):
        return None

    def run(q: Any, k: Any, v: Any) -> Any:
        return _run(c, q, k, v)

    if any(n % TILE for n in (o.q.shape[-2], o.k.shape[-2])):

        def derived(q: Any, k: Any, v: Any) -> Any:
            return by_blocks(o._replace(q=q, k=k, v=v))[0]

        run = _with_gradient_of(derived, run)
    out = run(o.q, o.k, o.v)
    return out, jnp.full(out.shape[:-1], jnp.nan, out.dtype)


def _with_gradient_of(derived: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with the gradient of `derived`, which runs in its place if one is computed."""
    both = jax.custom_vjp(run)

    @in_full()
    def forward(*arrays: Any) -> Any:
        return jax.vjp(derived, *arrays)

    @in_full()
    def backward(pull: Any, d_out: Any) -> Any:
        return pull(d_out)

    both.defvjp(forward, backward)
    result: Callable[..., Any] = both
    return result


def _run(c: Scores, q: Any, k: Any, v: Any) -> Any:
    """Contract by cuDNN, in the shape of q (*B, H, G, N, D)."""
    *lead, heads, group, rows, dim = q.shape
    dtype = jnp.dtype(c.choice.dtype)

    def reordered(x: Any, count: int) -> Any:
        x = jnp.reshape(x, (-1, count, *x.shape[-2:]))
        return jnp.swapaxes(x, 1, 2).astype(dtype)

    result = _attend(
        reordered(q, heads * group),
        reordered(k, heads),
        reordered(v, heads),
        scale=c.scale,
        is_causal=c.choice.causal,
    )
    out = jnp.reshape(jnp.swapaxes(result, 1, 2), (*lead, heads, group, rows, dim))
    return out.astype(q.dtype)


def _attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **options)
