"""Masks of transformers as their parts, which tell padding from causality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from pdcore import UnsupportedError

from .check import own_attention

__all__ = ["LayerMask", "Parts", "Pattern", "build_mask"]


class Pattern(NamedTuple):
    """The positions that the queries of a layer see; fields as in `pdcore.Support`."""

    causal: bool = False
    left: float = math.inf
    right: float = math.inf


class Parts(NamedTuple):
    """The parts of a mask (B, 1, N, M).

    Attributes
    ----------
    pattern : Pattern
    key_mask : bool tensor (B, M) or None
        True for a real key.
    offset : int or integer tensor ()
        The position of the first query among these M keys.
    dropped : bool
        Whether the cache has dropped keys before these M keys.
    segments : integer tensor (B, N) or None
        The ids of packed sequences.
    """

    pattern: Pattern
    key_mask: Any
    offset: Any
    dropped: bool
    segments: Any = None


#: Operations on scores and a mask of numbers, which a boolean mask would spoil.
_ARITHMETIC = frozenset({"add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "baddbmm"})


class LayerMask(torch.Tensor):  # type: ignore[misc]
    """A boolean mask (B, 1, N, M) that is stored as its parts.

    Every operation, except reading shape, dtype and device, uses the full mask, which is built when
    it is first needed, and returns a plain tensor. So models that slice or combine masks work
    unchanged, but specs with statistics or pooled keys refuse such a mask.

    Arithmetic is refused: it is that of a model which adds the mask to scores of its own.

    Attributes
    ----------
    parts : Parts
    model : str
        The model type of the config that the mask was built for.
    """

    parts: Parts
    model: str
    _full: Callable[[], Any]
    _built: Any

    @staticmethod
    def __new__(
        cls, shape: Sequence[int], device: Any, parts: Parts, model: str, full: Callable[[], Any]
    ) -> LayerMask:
        """Create a mask from its parts; `full` is a function that builds the full mask."""
        mask: LayerMask = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=torch.bool, device=device
        )
        mask.parts, mask.model = parts, model
        mask._full, mask._built = full, None
        return mask

    def full(self) -> Any:
        """Build the mask as a plain tensor (B, 1, N, M)."""
        if self._built is None:
            self._built = self._full()
        return self._built

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LayerMask({tuple(self.shape)}, {self.parts.pattern}, offset={self.parts.offset})"

    # Makes results of operations plain tensors, not instances of this class without its parts.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Activation checkpointing detaches the tensors that it stores.
        if func is torch.ops.aten.detach.default:
            mask = args[0]
            return cls(mask.shape, mask.device, mask.parts, mask.model, mask.full)
        kwargs = kwargs or {}
        name, dtype = func.overloadpacket.__name__, kwargs.get("dtype")
        # A mask of what to fill is True where a query may not attend.
        fills = name in ("masked_fill", "masked_fill_") and type(args[1]) is cls
        if fills or name in _ARITHMETIC or (dtype and dtype.is_floating_point):
            model = next(x.model for x in (*args, *kwargs.values()) if type(x) is cls)
            raise UnsupportedError(_own_attention_message(model, f"{func} was called on its mask"))
        args, kwargs = tree_map(lambda x: x.full() if type(x) is cls else x, (args, kwargs))
        return func(*args, **kwargs)


def build_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    *,
    use_vmap: bool = False,
    device: Any = "cpu",
    config: Any = None,
    **others: Any,
) -> Any:
    """Build the mask of layers of one pattern, as `transformers.masking_utils.sdpa_mask` does.

    The result is never None, even if nothing is masked: without a mask, the attention would have
    to guess the pattern.

    Returns
    -------
    LayerMask or bool tensor (B, 1, N, M)
        A tensor for patterns other than causal, sliding, bidirectional and packed ones; and under
        `torch.compile`, where the tensor has the attribute ``parts`` too.

    Raises
    ------
    UnsupportedError
        For a model whose layers attend by themselves, and would take the mask for numbers.
    """
    model = getattr(config, "model_type", None) or type(config).__name__
    if own := _own_attention(type(config).__module__):
        raise UnsupportedError(_own_attention_message(model, f"its layers are {own}"))
    # A copy: a static cache increments its tensor in place before the attention is computed.
    offset = q_offset.reshape(()).clone() if isinstance(q_offset, torch.Tensor) else q_offset

    def full() -> Any:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            device=device,
        )

    pattern, segments = _recognise_pattern(mask_function)
    if pattern is None:
        return full()
    # This pads the mask to the length of a static cache, whose last entries are not written yet.
    key_mask = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if key_mask is not None:
        key_mask = key_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
    parts = Parts(pattern, key_mask, offset - kv_offset, kv_offset > 0, segments)
    if torch.compiler.is_compiling():
        # The compiler cannot trace a `LayerMask`, and leaves out a full mask that no layer reads.
        mask = full()
        mask.parts = parts
        return mask
    # Checked once per forward pass, to save every layer a mask that hides nothing.
    if key_mask is not None and bool(key_mask.all()):
        parts = parts._replace(key_mask=None)
    return LayerMask((batch_size, 1, q_length, kv_length), device, parts, model, full)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _own_attention(module: str) -> str:
    return ", ".join(own_attention(module))


def _own_attention_message(model: str, reason: str) -> str:
    return (
        f"{model}: computes its attention itself and never calls pdcore: {reason}; use 'eager' for "
        "this model, and pdcore_adapters.transformers.check(model) to see its layers"
    )


def _recognise_pattern(mask_function: Any) -> tuple[Pattern | None, Any]:
    """Return the pattern of a mask function of transformers, None if it is not known, and segments.

    Mask functions are closures, recognised by the names of the functions that create them. A
    closure of any other name, as in another release, is not known.
    """
    if mask_function is causal_mask_function:
        return Pattern(causal=True), None
    if mask_function is bidirectional_mask_function:
        return Pattern(), None
    if torch.compiler.is_compiling():
        return None, None  # the compiler does not tell the closure of a function
    code = getattr(mask_function, "__code__", None)
    if getattr(mask_function, "__module__", None) != sdpa_mask.__module__ or code is None:
        return None, None
    cells = (cell.cell_contents for cell in mask_function.__closure__ or ())
    enclosed = dict(zip(code.co_freevars, cells, strict=True))
    match mask_function.__qualname__.partition(".")[0], enclosed:
        case "and_masks", {"mask_functions": parts}:
            patterns, ids = zip(*(_recognise_pattern(part) for part in parts), strict=True)
            known = [pattern for pattern in patterns if pattern is not None]
            packed = [segments for segments in ids if segments is not None]
            if len(known) < len(patterns) or len(packed) > 1:
                return None, None
            causal, left, right = zip(*known, strict=True)
            return Pattern(any(causal), min(left), min(right)), packed[0] if packed else None
        case "packed_sequence_mask_function", {"packed_sequence_mask": segments}:
            return Pattern(), segments
        case "remap_positions_for_packed_sequence", {"mask_function": inner}:
            # Positions ascend by 1 in a sequence, and patterns compare positions only.
            return _recognise_pattern(inner)
        case "sliding_window_overlay", {"sliding_window": int(width)}:
            # The width counts the key at the query's position.
            return Pattern(left=width - 1), None
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(width)}:
            return Pattern(left=width, right=width), None
    return None, None
