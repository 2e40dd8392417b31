"""The operands of one block of a contraction by scores, and the products on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pdcore.extend import (
    Operands,
    Scores,
    Visibility,
    all_of,
    log_kappa,
    log_weight,
    tables,
)

from .blocks import Arrays
from .namespace import NAMESPACE as xp

__all__ = [
    "BlockVisibility",
    "along_rows",
    "block_inputs",
    "block_logits",
    "block_operands",
    "block_values",
    "features_first",
    "keys_first",
    "product",
    "rows_by_keys",
    "visible_only",
    "weights_by_values",
]

# A derivative is traced after the call, outside its context of precision.
_IN_FULL = lax.Precision.HIGHEST


class BlockVisibility(NamedTuple):
    """The visible keys of a block, with the interface of `Visibility`."""

    position: Visibility | None
    key_mask: Any
    mask: Any
    rows: int = 1
    transposed: bool = False
    whole: Visibility | None = None
    together: Any = None

    def place(self, name: str, start: int, stop: int, first: int, last: int) -> Any:
        """Return a place of the block, see `Visibility.place`; the bounds are ignored."""
        assert self.whole is not None
        return self.whole.place(name, 0, self.whole.rows, 0, self.whole.keys)

    def oriented(self, x: Any) -> Any:
        """Return an array (..., rows, keys) with the axes of the scores."""
        return keys_first(x, self.rows) if self.transposed else x

    def block(self, start: int, stop: int, first: int, last: int) -> Any:
        """Return which queries see which keys, see `Visibility.block`; the bounds are ignored."""
        parts = []
        if self.position is not None:
            v = self.position
            parts.append(v.by_position(0, v.rows, 0, v.keys))
        if self.key_mask is not None:
            parts.append(self.key_mask)
        if self.mask is not None:
            parts.append(self.mask)
        if self.together is not None:
            parts.append(self.together)
        seen = all_of(parts)
        return keys_first(seen, self.rows) if self.transposed and seen is not None else seen


def block_operands(
    cut: Arrays, visibility: Visibility, whole: bool, *, transposed: bool = False
) -> Operands:
    """Return the operands of a block; the key bias is added to `bias`.

    With `transposed` the axis of keys is before those of rows in masks and biases, and in what
    `BlockVisibility.oriented` returns.
    """
    prefix = "value "
    values = {n.removeprefix(prefix): x for n, x in cut.items() if n.startswith(prefix)}
    rows = 1 + cut["q"].ndim - cut["k"].ndim
    key_bias, key_mask, key_runs = (
        None if (x := cut.get(name)) is None else along_rows(x, rows)
        for name in ("key_bias", "key_mask", "key_runs")
    )
    if "q_labels" in cut:
        labels = cut["q_labels"], along_rows(cut["k_labels"], rows)[..., 0, :]
        visibility = replace(visibility, labels=labels)
    together = None if key_runs is None else cut["runs"][..., None] == key_runs
    bias = cut.get("bias")
    if key_bias is not None:
        bias = key_bias if bias is None else key_bias + bias
    seen: Any = BlockVisibility(
        None if whole else visibility,
        key_mask,
        cut.get("mask"),
        rows,
        transposed,
        visibility,
        together,
    )
    if transposed:
        bias = None if bias is None else keys_first(bias, rows)
    return Operands(cut["q"], cut["k"], cut["v"], None, bias, values, seen)


def along_rows(x: Any, rows: int) -> Any:
    """Add axes of rows, and of groups if there are any, to an array (..., M) of keys."""
    return jnp.expand_dims(x, tuple(range(-1 - rows, -1)))


def keys_first(x: Any, rows: int) -> Any:
    """Return an array with the axis of keys before those of rows."""
    if x.ndim <= rows:  # the array is the same for all groups
        x = x[None]
    return jnp.moveaxis(x, -1, -1 - rows)


def features_first(x: Any, rows: int) -> Any:
    """Return an array with the axis of features before those of rows, in memory too for one head.

    Inside a conditional, batched products of arrays that were transposed in memory crash XLA's CPU
    compiler (jaxlib 0.10.2): "Check failed: IsMonotonicWithDim0Major".
    """
    turned = jnp.moveaxis(x, -1, -1 - rows)
    return turned if x.ndim > 1 + rows else lax.optimization_barrier(turned)


def block_inputs(c: Scores, s: Any, o: Operands) -> Any:
    """Return the inputs of the expression of log kappa in a block."""
    return log_kappa.inputs(c, s, o, (0, 0, 0, 0), xp=xp)


def block_values(c: Scores, name: str, value: Any, o: Operands) -> list[tuple[Any, Any]]:
    """Return what a parameter of log kappa is in a block: its entries, or itself, each with it."""
    assert c.expression is not None
    entries = [e for e in c.expression.entries if e.table == name]
    if not entries:
        return [(name, o.visibility.oriented(value))]
    places = log_kappa.places_of(c, o, (0, 0, 0, 0), value.dtype, xp=xp)
    return [
        (e, o.visibility.oriented(tables.entry_values(e, value, places, xp=xp))) for e in entries
    ]


def block_logits(c: Scores, s: Any, o: Operands) -> Any:
    """Compute the log weights of a block from its inner products `s`."""
    return log_weight(c, s, o, 0, s.shape[-2], 0, s.shape[-1], xp=xp)


def visible_only(x: Any, o: Operands) -> Any:
    """Return the entries of a block, 0 where the key is hidden."""
    seen = o.visibility.block(0, 0, 0, 0)
    return x if seen is None else jnp.where(seen, x, 0.0)


def rows_by_keys(q: Any, k: Any) -> Any:
    """Compute rows ([G,] R, D) times keys (M, D): one product for all G heads of a key head."""
    if q.ndim == k.ndim:
        return product(q, k, -1, -1)
    return jnp.einsum("...grd,...md->...grm", q, k, precision=_IN_FULL)


def weights_by_values(p: Any, v: Any) -> Any:
    """Compute weights ([G,] R, M) times values (M, D)."""
    if p.ndim == v.ndim:
        return product(p, v, -1, -2)
    return jnp.einsum("...grm,...md->...grd", p, v, precision=_IN_FULL)


def product(a: Any, b: Any, axis: int, other: int) -> Any:
    """Contract an axis of a matrix `a` with one of `b`; einsum may order the axes worse."""
    lead = tuple(range(a.ndim - 2))
    contracted = (axis % a.ndim,), (other % b.ndim,)
    return lax.dot_general(a, b, (contracted, (lead, lead)), precision=_IN_FULL)
