"""Attention over a sequence in shards: ``group``, the ranks of `torch.distributed`."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pdcore.extend import (
    Inputs,
    Operands,
    Plan,
    Request,
    Scores,
    ShardedSteps,
    plan_of_shard,
    score_contraction,
    told,
)

from . import namespace as xp
from .choice import Fused, chosen
from .flash import biased, pull_back_on_cpu, with_cotangents
from .fused import causal_rows, hidden_keys
from .impl import TorchBackend
from .kernels import widened
from .ring import Pairs, around
from .shards import RankedShards

__all__ = ["attention", "chosen_in_shards"]


def attention(plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
    """Run a plan on this rank's part of a sequence, see `Backend.attention`."""
    backend = _backend(inputs.group)
    plan = plan_of_shard(plan, inputs, backend.shards)
    return backend.attention(plan, inputs._replace(group=None), lse=lse)


def chosen_in_shards(plan: Plan, request: Request) -> Plan:
    """Choose the kernel of the pairs of shards of a plan, and state what they exchange."""
    c = chosen(plan, request).contraction
    if isinstance(c, Scores):
        choice = replace(c.choice, whole=False) if isinstance(c.choice, Fused) else None
        plan = replace(plan, contraction=replace(c, choice=choice))
    return told(plan, request, "keys are sent to the ranks whose queries see them")


class ShardedTorchBackend(ShardedSteps, TorchBackend):
    """Runs plans on this rank's part of a sequence."""

    shards: RankedShards

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores with the keys of all ranks."""
        if not (o.q.numel() and o.k.numel()):  # on every rank, whose arrays have equal shapes
            return score_contraction.scores(c, o, xp=xp)
        return around(Pairs(self.shards, super().scores, self._pull_back), c, o)

    def _pull_back(
        self, c: Scores, o: Operands, out: Tensor, level: Tensor, d_out: Tensor, d_level: Tensor
    ) -> dict[str, Any]:
        grads = _by_fused_kernel(c, o, out, level, d_out, d_level)
        return self.scores_vjp(c, o, out, level, d_out, d_level) if grads is None else grads


def _by_fused_kernel(
    c: Scores, o: Operands, out: Tensor, level: Tensor, d_out: Tensor, d_level: Tensor
) -> dict[str, Any] | None:
    """Pull back by the CPU kernel, which reads out and L of all keys; None where it cannot."""
    seen, choice = o.visibility, c.choice
    if not isinstance(choice, Fused) or choice.window is not None or o.q.device.type != "cpu":
        return None
    causal = causal_rows(c, seen)
    if causal is None:
        return None
    q, out, d_out = (x.flatten(-4, -3) for x in (o.q, out, d_out))
    q, k, v, out, d_out = (x.reshape(-1, *x.shape[-3:]) for x in (q, o.k, o.v, out, d_out))
    level, d_level = (x.reshape(q.shape[:-1]) for x in (level, d_level))
    none = level == -torch.inf  # the kernel sees only hidden keys in such a row
    level, d_level = level.masked_fill(none, 0.0), d_level.masked_fill(none, 0.0)
    dim, value_dim = q.shape[-1], v.shape[-1]
    if o.key_bias is not None:
        q, k = biased(q, k, o.key_bias.reshape(k.shape[:-1]) / c.scale, q.dtype)
    width = max(q.shape[-1], value_dim)
    q, k, v, out, d_out = (widened(x, width) for x in (q, k, v, out, d_out))
    mask = None if seen.key_mask is None else hidden_keys(seen.key_mask, q)
    q, k, v, out, d_out = with_cotangents(q, k, v, out, d_out, d_level)
    dq, dk, dv = pull_back_on_cpu(
        d_out, q, k, v, out, level, 0.0, causal, attn_mask=mask, scale=c.scale
    )
    grads = {
        "q": dq[..., :dim].reshape(o.q.shape),
        "k": dk[..., :dim].reshape(o.k.shape),
        "v": dv[..., :value_dim].reshape(o.v.shape),
    }
    if o.key_bias is not None:
        grads["key_bias"] = (dk[..., dim] / c.scale).reshape(o.key_bias.shape)
    return grads


@lru_cache(maxsize=8)
def _backend(group: Any) -> ShardedTorchBackend:
    return ShardedTorchBackend(RankedShards(group))
