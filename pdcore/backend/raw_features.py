"""Features of a contraction that applies phi itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..lowering import Features, largest_entry, largest_key, scaled
from .operands import Operands

__all__ = ["mapped"]

Pull = Callable[[dict[str, Any]], dict[str, Any]]


def mapped(c: Features, o: Operands, *, xp: Any) -> tuple[Operands, Any, Pull]:
    """Apply phi where `c.raw`, after the scale of features.

    Returns
    -------
    operands : Operands
    constant : array (*B, H, G, N)
        The log of the scale of each row, which is to be added to L.
    pullback : callable
        Pulls the gradients of a contraction back to the rows of `o`.
    """
    if not c.raw:
        return o, xp.zeros_like(o.q[..., 0]), lambda grads: grads
    phi = c.kernel
    q, of_queries = scaled(phi, o.q, largest_entry(o.q, xp=xp), xp=xp)
    k, of_keys = scaled(phi, o.k, largest_key(o.k, o.visibility.key_mask, xp=xp), xp=xp)
    constant = (of_queries.log + of_keys.log[..., None, :, :])[..., 0]

    def pullback(grads: dict[str, Any]) -> dict[str, Any]:
        pulled = {}
        for name, x, of in (("q", q, of_queries), ("k", k, of_keys)):
            dx = phi.features_vjp(x, grads[name], xp=xp, params={})[0]
            pulled[name] = dx if of.divisor is None else dx / of.divisor
        return {**grads, **pulled}

    phi_q, phi_k = (phi.features(x, xp=xp, params={}) for x in (q, k))
    return o._replace(q=phi_q, k=phi_k), constant, pullback
