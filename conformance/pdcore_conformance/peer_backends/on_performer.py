"""The linear attention of performer-pytorch."""

from __future__ import annotations

from typing import Any

from array_api_compat import torch as xp
from performer_pytorch import performer_pytorch as performer

from pdcore.extend import Request

from . import PEERS
from .base import Asked, PeerBackend

__all__ = ["Performer", "linear_attention"]


def linear_attention(asked: Asked) -> Any:
    """Call `linear_attention`, or `causal_linear_attention_noncuda` without its eps of 1e-6."""
    q, k = asked.features(xp)
    if asked.causal:
        return performer.causal_linear_attention_noncuda(q, k, asked.v, eps=0.0)
    return performer.linear_attention(q, k, asked.v)


class Performer(PeerBackend):
    """The functions of performer-pytorch that take features."""

    info = PEERS["performer"]
    packages = ("performer-pytorch",)

    def limits(self, request: Request) -> list[str]:
        """Return why the functions do not take a call."""
        rows, keys = request.q[-2], request.k[-2]
        if rows == keys or not request.spec.support.causal:
            return []
        return [f"{rows} queries and {keys} keys: the causal function takes equal numbers"]

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the function."""
        return linear_attention(asked), None
