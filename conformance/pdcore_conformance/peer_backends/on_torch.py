"""PyTorch's attentions: `scaled_dot_product_attention`, `MultiheadAttention`, FlexAttention."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pdcore.extend import Request, UnsupportedError

from . import PEERS
from .base import Asked, PeerBackend

__all__ = ["Flex", "Multihead", "Sdpa", "sdpa"]


def sdpa(kernel: str | None, asked: Asked) -> Any:
    """Call `scaled_dot_product_attention`, by a kernel of `SDPBackend` or PyTorch's choice."""
    mask, causal = asked.bias_or_mask(torch), asked.causal
    with _restricted(kernel):
        return functional.scaled_dot_product_attention(
            asked.q,
            asked.k,
            asked.v,
            attn_mask=mask,
            is_causal=causal,
            scale=asked.scale,
            enable_gqa=asked.q.shape[1] != asked.k.shape[1],
        )


@contextmanager
def _restricted(kernel: str | None) -> Iterator[None]:
    if kernel is None:
        yield
        return
    with sdpa_kernel(getattr(SDPBackend, kernel)):
        yield


class Sdpa(PeerBackend):
    """`torch.nn.functional.scaled_dot_product_attention`, by the kernel that PyTorch chooses."""

    info = PEERS["torch_sdpa"]
    kernel: ClassVar[str | None] = None

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the function, with ``is_causal`` where there is no mask, which excludes it."""
        if asked.causal and (asked.mask is not None or asked.bias is not None):
            asked = _causal_as_mask(asked)
        if self.kernel is None:
            return sdpa(None, asked), None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns of each kernel that it does not use
            try:
                return sdpa(self.kernel, asked), None
            except RuntimeError as error:
                if "No available kernel" not in str(error) and "No viable" not in str(error):
                    raise
                raise UnsupportedError(
                    f"backend {self.info.name}: PyTorch has no {self.kernel} kernel for this call: "
                    f"{error}"
                ) from error


class SdpaMath(Sdpa):
    """The kernel ``MATH``."""

    info = PEERS["torch_sdpa_math"]
    kernel = "MATH"


class SdpaFlash(Sdpa):
    """The kernel ``FLASH_ATTENTION``."""

    info = PEERS["torch_sdpa_flash"]
    kernel = "FLASH_ATTENTION"

    def limits(self, request: Request) -> list[str]:
        """Return why the kernel does not take a call."""
        return _equal_features(request)


class SdpaEfficient(Sdpa):
    """The kernel ``EFFICIENT_ATTENTION``."""

    info = PEERS["torch_sdpa_efficient"]
    kernel = "EFFICIENT_ATTENTION"


class SdpaCudnn(Sdpa):
    """The kernel ``CUDNN_ATTENTION``."""

    info = PEERS["torch_sdpa_cudnn"]
    kernel = "CUDNN_ATTENTION"


def _equal_features(request: Request) -> list[str]:
    if request.q[-1] == request.v[-1]:
        return []
    return [f"{request.q[-1]} features and {request.v[-1]} columns of values: takes equal numbers"]


def _causal_as_mask(asked: Asked) -> Asked:
    rows, keys = asked.q.shape[-2], asked.k.shape[-2]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=asked.q.device).tril()
    mask = seen[None, None] if asked.mask is None else asked.mask & seen
    return asked._replace(causal=False, mask=mask)


class Multihead(PeerBackend):
    """`torch.nn.MultiheadAttention` whose projections are identities."""

    info = PEERS["torch_multihead"]
    arguments = frozenset({"causal", "key_mask"})

    def limits(self, request: Request) -> list[str]:
        """Return why the layer does not take a call."""
        scale = getattr(request.spec.kernel, "scale", None)
        return _equal_features(request) + (
            [] if scale is None else [f"scale {scale}: the layer's is 1/sqrt(D)"]
        )

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the layer, whose masks are True for what is hidden."""
        if asked.causal:
            asked = _causal_as_mask(asked)  # `is_causal` is a hint that asks for the mask too
        batch, heads, rows, dim = asked.q.shape
        keys = asked.k.shape[-2]
        q, k, v = (x.transpose(1, 2).reshape(batch, -1, heads * dim) for x in asked[:3])
        mask = asked.bias_or_mask(torch)
        if mask is not None:
            mask = mask.expand(batch, heads, rows, keys).reshape(-1, rows, keys)
            mask = ~mask if mask.dtype == torch.bool else mask
        padding = None if asked.key_mask is None else ~asked.key_mask
        if padding is not None and mask is not None and mask.dtype != torch.bool:
            # The layer warns of masks of two dtypes; this is the cast that its message asks for.
            padding = torch.zeros_like(padding, dtype=mask.dtype).masked_fill(padding, -math.inf)
        layer = _identity_layer(heads, heads * dim, q.dtype, q.device)
        out, _ = layer(q, k, v, key_padding_mask=padding, attn_mask=mask, need_weights=False)
        return out.reshape(batch, rows, heads, dim).transpose(1, 2), None


@lru_cache(maxsize=16)
def _identity_layer(heads: int, width: int, dtype: Any, device: Any) -> Any:
    layer = torch.nn.MultiheadAttention(
        width, heads, bias=False, batch_first=True, dtype=dtype, device=device
    )
    one = torch.eye(width, dtype=dtype, device=device)
    for name, matrix in (("in_proj_weight", one.repeat(3, 1)), ("out_proj.weight", one)):
        layer.get_parameter(name).data = matrix
    return layer.requires_grad_(False).eval()


class Flex(PeerBackend):
    """`flex_attention`, not compiled: on the CPU its own eager implementation."""

    info = PEERS["torch_flex"]
    arguments = frozenset({"causal", "window"})

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the function, with what hides a key and the bias in its ``score_mod``."""
        # Here, as it imports PyTorch's compiler, which takes seconds.
        from torch.nn.attention.flex_attention import AuxRequest, flex_attention

        arguments = {
            "score_mod": _score_mod(asked),
            "scale": asked.scale,
            "enable_gqa": asked.q.shape[1] != asked.k.shape[1],
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns that the function is not compiled
            if not asked.lse:
                return flex_attention(asked.q, asked.k, asked.v, **arguments), None
            out, aux = flex_attention(
                asked.q, asked.k, asked.v, return_aux=AuxRequest(lse=True), **arguments
            )
        return out, aux.lse


def _score_mod(asked: Asked) -> Callable[..., Any] | None:
    """Return the function of FlexAttention that caps, adds and hides scores."""
    left, right = asked.window or (math.inf, math.inf)
    if asked.causal:
        right = min(right, 0)

    def modified(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if asked.softcap is not None:
            score = asked.softcap * torch.tanh(score / asked.softcap)
        if asked.bias is not None:
            score = score + _at(asked.bias, b, h, i, j)
        if asked.mask is not None:
            score = torch.where(_at(asked.mask, b, h, i, j), score, -math.inf)
        if left != math.inf:
            score = torch.where(i - j <= int(left), score, -math.inf)
        if right != math.inf:
            score = torch.where(j - i <= int(right), score, -math.inf)
        return score

    plain = asked.softcap is None and asked.bias is None and asked.mask is None
    return None if plain and left == right == math.inf else modified


def _at(x: Any, *index: Any) -> Any:
    """Return the entry of an array for an index into the array that it broadcasts to."""
    return x[
        tuple(i if n != 1 else torch.zeros_like(i) for i, n in zip(index, x.shape, strict=True))
    ]
