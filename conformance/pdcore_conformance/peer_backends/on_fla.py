"""The reference implementations of flash-linear-attention, which are PyTorch without Triton."""

from __future__ import annotations

from typing import Any

from array_api_compat import torch as xp
from fla.ops.attn.naive import naive_parallel_attn
from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

from pdcore.extend import Exponential, FeatureMap, Request

from . import PEERS
from .base import Asked, PeerBackend, by_row

__all__ = ["FlaNaive"]


class FlaNaive(PeerBackend):
    """`naive_parallel_attn`, and `naive_recurrent_linear_attn` with ``normalize=True``."""

    info = PEERS["fla_naive"]
    packages = ("fla-core",)

    def limits(self, request: Request) -> list[str]:
        """Return why the functions do not take a call."""
        reasons = []
        if request.q[-2] != request.k[-2]:
            reasons.append(f"{request.q[-2]} queries and {request.k[-2]} keys: takes equal numbers")
        if isinstance(request.spec.kernel, FeatureMap):
            if not request.spec.support.causal:
                reasons.append("the linear attention of fla is causal")
            if request.q[-3] != request.k[-3]:
                reasons.append("the linear attention of fla has as many key heads as query heads")
        return reasons

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the function of the kernel."""
        q, k, v = asked[:3]
        plain = isinstance(asked.spec.kernel, Exponential)
        if not plain:
            q, k = asked.features(xp)
        q, k, v = (by_row(x, xp) for x in (q, k, v))
        if plain:
            out, _ = naive_parallel_attn(q, k, v, scale=asked.scale, causal=asked.causal)
        else:
            out, _ = naive_recurrent_linear_attn(q, k, v, scale=1.0, normalize=True)
        return by_row(out, xp), None
