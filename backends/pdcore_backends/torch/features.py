"""The contraction by features on PyTorch: whole products, or one batch of chunks under causal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pdcore.extend import FeatureRows, Features, Operands, Plan, Pullback, Rows, compiling

from .flash import recorded, transformed

__all__ = ["chosen_features", "features"]


#: Rows and keys of a chunk.
CHUNK = 64


def features(c: Features, o: Operands) -> tuple[Tensor, Tensor] | None:
    """Contract by features, see `feature_contraction.features`.

    Returns
    -------
    (out, L) or None
        None for log features, and under causal unless row i stands at key i.
    """
    seen = o.visibility
    causal = seen.support.ahead == 0
    if c.log or not all(o.q.shape) or not all(o.k.shape) or not o.v.shape[-1]:
        return None
    aligned = seen.static and seen.offset == 0 and seen.scale == 1
    if causal and not (aligned and seen.rows == seen.keys):
        return None
    k, v = o.k[..., None, :, :], o.v[..., None, :, :]
    if seen.key_mask is not None:
        k = torch.where(seen.key_mask[..., None, :, None], k, 0.0)
    weighted, total = _causal(o.q, k, v) if causal else _whole(o.q, k, v)
    if c.signed:
        return weighted, torch.zeros_like(total[..., 0])
    none = total == 0
    # A quotient, because 1 / total, or its square in the gradient, overflows for small totals.
    out = weighted / torch.where(none, torch.inf, total)
    return out, torch.where(none, -torch.inf, torch.log(torch.where(none, 1.0, total)))[..., 0]


def chosen_features(plan: Plan) -> Plan:
    """Choose this backend's own feature maps where they are faster than those of the plan."""
    transforms = tuple(
        replace(step, choice=elu_rows)
        if isinstance(step, FeatureRows) and step.phi == "elu"
        else step
        for step in plan.transforms
    )
    return replace(plan, transforms=transforms)


def elu_rows(rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
    """Apply elu + 1, whose pullback reads only the result, see `transforms.FeatureRows`."""
    q, k = _elu(rows.q), _elu(rows.k)

    def pullback(d: Rows) -> Any:
        return Rows(d.q * q.clamp_max(1.0), d.k * k.clamp_max(1.0)), {}, {}

    return rows._replace(q=q, k=k), pullback


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
    # Sums over the sequence are products with ones, which are faster, see `.fold`.
    one = torch.ones(1, k.shape[-2], dtype=k.dtype, device=k.device)
    return q @ (k.mT @ v), q @ (one @ k).mT


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
