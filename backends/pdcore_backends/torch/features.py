"""The contraction by features on PyTorch: whole products, or one batch of chunks under causal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pdcore.extend import (
    FeatureRows,
    Features,
    Operands,
    Plan,
    Pullback,
    Rows,
    ScaledRows,
    compiling,
    largest_entry,
    largest_key,
    overflow_as_nan,
)

from . import namespace as xp_
from .flash import recorded, transformed

__all__ = ["chosen_features", "features"]


#: Rows and keys of a chunk.
CHUNK = 64
#: Rows of a block of elu + 1.
ROWS = 1024


def features(c: Features, o: Operands) -> tuple[Tensor, Tensor | None] | None:
    """Contract by features, see `feature_contraction.features`.

    Returns
    -------
    (out, L) or None
        None for log features under causal or in a trace, and under causal unless row i stands at
        key i. L is None where it is not read.
    """
    seen = o.visibility
    causal = seen.support.ahead == 0
    if not all(o.q.shape) or not all(o.k.shape) or not o.v.shape[-1]:
        return None
    if c.log and (causal or compiling() or transformed()):
        return None
    aligned = seen.static and seen.offset == 0 and seen.scale == 1
    if causal and not (aligned and seen.rows == seen.keys):
        return None
    q, k, v = o.q, o.k[..., None, :, :], o.v[..., None, :, :]
    if seen.key_mask is not None:
        k = torch.where(seen.key_mask[..., None, :, None], k, -torch.inf if c.log else 0.0)
    shift = None
    if c.log:
        q, k, shift = _below_one(q, k)
    weighted, total = _causal(q, k, v) if causal else _whole(q, k, v)
    if c.signed:
        return weighted, torch.zeros_like(total[..., 0])
    none = None
    if not _positive(total):
        total = overflow_as_nan(total, xp_)
        none = total == 0
        # A quotient, as 1 / total, or its square in the gradient, overflows for small totals.
        total = torch.where(none, torch.inf, total)
    if compiling() or transformed() or recorded(weighted, total):
        weighted = weighted / total
    else:
        weighted /= total
    if not o.level:
        return weighted, None
    level = torch.log(total)
    level = level if shift is None else shift + level
    return weighted, (level if none is None else torch.where(none, -torch.inf, level))[..., 0]


def _positive(x: Tensor) -> bool:
    """Check whether all entries are positive and finite, where values are read cheaply."""
    if not _readable(x):
        return False
    least, most = (float(end) for end in x.aminmax())
    return 0.0 < least <= most < math.inf


def _below_one(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn log features into features of at most 1, see `feature_contraction.shifted_features`.

    Returns
    -------
    q, k, shift : Tensor
        The features, and what was subtracted from the log of each row, (*B, H, G, N, 1).
    """
    top = k.detach().amax(-2, keepdim=True)
    top = torch.where(top == -torch.inf, 0.0, top)
    q = q + top
    shift = q.detach().amax(-1, keepdim=True)
    if recorded(q, k):
        return torch.exp(q - shift), torch.exp(k - top), shift
    return q.sub_(shift).exp_(), (k - top).exp_(), shift


def chosen_features(plan: Plan) -> Plan:
    """Choose this backend's own feature maps where they are faster than those of the plan."""
    last = plan.transforms[-1] if plan.transforms else None
    choices: dict[str, type[EluRows | ReluRows]] = {"elu": EluRows, "relu": ReluRows}
    if not isinstance(last, FeatureRows) or last.phi not in choices:
        return plan
    before = tuple(step for step in plan.transforms[:-1] if not isinstance(step, ScaledRows))
    choice = choices[last.phi](last.kernel)
    return replace(plan, transforms=(*before, replace(last, choice=choice)))


@dataclass(frozen=True)
class ReluRows:
    """max(x, 0) after the scale of features, in one pass where every scale is 1.

    See `transforms.FeatureRows` and `scaled_rows.ScaledRows`.
    """

    kernel: Any

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback."""
        if not self._unscaled(rows):
            scaled, first = ScaledRows(self.kernel)(rows, state, params, xp=xp)
            mapped, second = FeatureRows(self.kernel)(scaled, state, params, xp=xp)
            return mapped, lambda d: first(second(d)[0])
        q, k = (x.clamp_min(0.0) for x in (rows.q, rows.k))

        def pullback(d: Rows) -> Any:
            grads = (torch.where(x == 0, 0.0, dx) for x, dx in ((q, d.q), (k, d.k)))
            return Rows(*grads), {}, {}

        return rows._replace(q=q, k=k), pullback

    def _unscaled(self, rows: Rows) -> bool:
        """Check whether every scale is 1, where values are read cheaply."""
        q, k = rows.q, rows.k
        if not _readable(q, k):
            return False
        largest = largest_key(k, rows.key_mask, xp=xp_), largest_entry(q, xp=xp_)
        return not any(self.kernel.feature_scale(x, xp=xp_).log.any() for x in largest)


@dataclass(frozen=True)
class EluRows:
    """elu + 1 after the scale of features, whose pullback reads only the result.

    See `transforms.FeatureRows` and `scaled_rows.ScaledRows`.
    """

    kernel: Any

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Transform queries and keys, and return them with the pullback."""
        constant = None
        if self._unscaled(rows):
            q, k = _elu_by_blocks(rows.q, None), _elu_by_blocks(rows.k, None)
        else:
            largest = largest_entry(rows.q, xp=xp), largest_key(rows.k, rows.key_mask, xp=xp)
            of_queries, of_keys = (self.kernel.feature_scale(x, xp=xp).shift for x in largest)
            constant = (of_queries + of_keys)[..., 0]
            q, k = _elu_of(rows.q, of_queries), _elu_of(rows.k, of_keys)

        def pullback(d: Rows) -> Any:
            return Rows(d.q * q.clamp_max(1.0), d.k * k.clamp_max(1.0)), {}, {}

        return rows._replace(q=q, k=k, row_constant=constant), pullback

    def _unscaled(self, rows: Rows) -> bool:
        """Check whether no row needs a scale, where values are read cheaply."""
        if rows.key_mask is not None or not _readable(rows.q, rows.k):
            return False
        least = (largest.aminmax()[0] for largest in (rows.k.amax((-2, -1)), rows.q.amax(-1)))
        # A NaN is not at least any number.
        return all(x.item() >= self.kernel.unscaled_from for x in least)


def _elu_of(x: Tensor, shift: Tensor) -> Tensor:
    """Return phi(x - shift)."""
    return _elu_by_blocks(x, shift) if _readable(x) else _elu(x - shift)


def _elu_by_blocks(x: Tensor, shift: Tensor | None) -> Tensor:
    """Return phi(x - shift), where a block of rows stays in the cache between its operations."""
    width = x.shape[-1]
    if x.numel() <= ROWS * width:
        return _elu_plus_one(x if shift is None else x - shift)
    phi = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, to = x.reshape(-1, width), phi.view(-1, width)
    shifts = None
    if shift is not None and shift.any():
        shifts = shift.expand(*x.shape[:-1], 1).reshape(-1, 1)
    for start in range(0, len(to), ROWS):
        at = slice(start, start + ROWS)
        part = rows[at] if shifts is None else torch.sub(rows[at], shifts[at], out=to[at])
        _elu_into(part, to[at])
    return phi


def _readable(*tensors: Tensor) -> bool:
    """Check whether values are read cheaply: on the CPU, and neither traced nor recorded.

    A tensor of a subclass, such as a fake one, may have no values.
    """
    if compiling() or transformed() or recorded(*tensors):
        return False
    return all(type(x) is Tensor and x.device.type == "cpu" and x.numel() for x in tensors)


def _elu(x: Tensor) -> Tensor:
    if compiling() or transformed():
        return torch.where(x < 0, x.clamp_max(0.0).exp(), x + 1.0)
    if recorded(x):
        phi: Tensor = _EluPlusOne.apply(x)
        return phi
    return _elu_plus_one(x)


def _elu_plus_one(x: Tensor) -> Tensor:
    # Not elu(x) + 1, which rounds to 0 where exp(x) is below half of eps.
    return x.clamp_max(0.0).exp_().add_(x.clamp_min(0.0))


def _elu_into(x: Tensor, to: Tensor) -> None:
    """Write elu(x) + 1 to a tensor, which may be x."""
    positive = x.clamp_min(0.0)
    torch.clamp_max(x, 0.0, out=to).exp_().add_(positive)


class _EluPlusOne(torch.autograd.Function):  # type: ignore[misc]
    """phi = elu + 1, with phi' = min(phi, 1): exp(x) = phi < 1 below 0, and 1 above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        phi = _elu_plus_one(x)
        ctx.save_for_backward(phi)
        return phi

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        [phi] = ctx.saved_tensors
        return d[0] * phi.clamp_max(1.0)


def _whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q @ (k.mT @ v), q @ k.sum(-2, keepdim=True).mT


def _causal(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over the keys up to each row's position: q (*B, H, G, N, F), k and v with G = 1."""
    length = q.shape[-2]
    short = -length % CHUNK
    q, k, v = (pad(x, (0, 0, 0, short)).unflatten(-2, (-1, CHUNK)) for x in (q, k, v))
    one = torch.ones(CHUNK, 1, dtype=k.dtype, device=k.device)
    states, sums = _before(k.mT @ v), _before(k.mT @ one)
    weights = (q @ k.mT).tril()
    weighted = torch.matmul(weights, v) + torch.matmul(q, states)
    total = torch.matmul(weights, one) + torch.matmul(q, sums)
    return tuple(x.flatten(-3, -2)[..., :length, :] for x in (weighted, total))


def _before(x: Tensor) -> Tensor:
    """Compute, for each chunk (axis -3), the sum over the chunks before it."""
    return pad(torch.cumsum(x[..., :-1, :, :], -3), (0, 0, 0, 0, 1, 0))
