"""A cache of transformers that carries the state of decoders in place of keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from pdcore import BoundAttention, Decoder, UnsupportedError, decoder

__all__ = ["DecoderCache", "DecoderLayer", "layer_of"]

#: The room of a state that grows, at first.
FIRST = 256
#: Arguments of a call that a decoder does not take, with what to do.
_REFUSED = {
    "mask": "a mask (B, 1, N, M) does not tell padding from positions; pass a mask (B, M)",
    "bias": "pass a mask (B, M) of booleans or whole numbers, and no bias of positions",
    "dropout": "a decoder drops no weights; use model.eval() or a DynamicCache",
    "weights": "a decoder has none; leave output_attentions out, or use a DynamicCache",
    "segments": "packed sequences have no cache; pass use_cache=False",
    "group": "a decoder does not run in shards; register the attention without group",
}


class DecoderCache(Cache):  # type: ignore[misc]
    """A cache for models whose attention is one of `register`: ``past_key_values=DecoderCache()``.

    Each layer carries the state of a `pdcore.decoder`: sums for features, so that a token costs the
    same after any number of others; moments of prefix statistics, and the open pooling window,
    which are not computed again; keys and values otherwise. Beams and assisted decoding work as
    with a `transformers.DynamicCache`.

    Parameters
    ----------
    capacity : int, optional
        The most positions of a sequence, for which there is room from the start. Every array then
        keeps its shape and, without gradients, its memory, so that one compiled program serves all
        later calls. By default the room for keys and values is doubled whenever it is full.
    undo : int
        How many of the last positions `crop` can take back, at least as many as an assistant
        proposes; a state of nothing but keys and values can be cut anywhere.

    Raises
    ------
    UnsupportedError
        In a layer, for a spec that `pdcore.decoder` refuses, another mask than (B, M), dropout,
        and `output_attentions`.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM
    >>> model.generate(ids, past_key_values=DecoderCache())  # doctest: +SKIP
    """

    def __init__(self, capacity: int | None = None, *, undo: int = 0) -> None:
        super().__init__(layer_class_to_replicate=lambda: DecoderLayer(capacity, undo))


class DecoderLayer(CacheLayerMixin):  # type: ignore[misc]
    """The state of one layer of a `DecoderCache`.

    Attributes
    ----------
    decoder : Decoder or None
        None before the first call.
    state : dict of str to tensor
    length : int or integer tensor ()
        The number of positions, those of padding included; a tensor if there is a capacity.
    """

    is_sliding = False

    def __init__(self, capacity: int | None, undo: int) -> None:
        super().__init__()
        self.capacity, self.undo = capacity, undo
        self.reset()

    def reset(self) -> None:
        """Forget all positions."""
        self.decoder: Decoder | None = None
        self.state: dict[str, Any] = {}
        self.length: Any = 0
        self.is_initialized = False
        self._made_for: Any = None
        self._pending = False
        # The positions since the last one of padding, which a crop may take back.
        self._real: Any = 0

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` may take positions back."""
        return True

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Wait for the first call of the attention, which knows the spec."""
        if self.capacity is not None and not self.is_initialized:
            # Tensors, since a program would be compiled for each number.
            self.length, self._real = torch.zeros(2, dtype=torch.int64, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Pass new keys and values on to the attention, which advances the state."""
        if self._pending:
            raise UnsupportedError(
                "DecoderCache: the attention of a layer did not read it; it needs an attention "
                "that pdcore_adapters.transformers.register has registered: "
                "model.set_attn_implementation(name)"
            )
        self.lazy_initialization(key_states, value_states)
        self._pending = True
        self.length += key_states.shape[-2]
        key_states = key_states[...]  # the caller's own tensor gets no attribute
        key_states.decoder_layer = self
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of positions after the next call, or the capacity, and 0."""
        return self.length + query_length if self.capacity is None else self.capacity, 0

    def keys_of(self, mask: Any) -> Any:
        """Return the number of keys of the mask (B, 1, N, M) of the present call."""
        # The mask of the first call may be older than the layer, which is made when it is needed.
        if self.decoder is None and mask is not None:
            return mask.shape[-1]
        return self.get_mask_sizes(0)[0]

    def get_seq_length(self) -> Any:
        """Return the number of positions."""
        return self.length

    def get_max_length(self) -> int:
        """Return the capacity, or -1."""
        return -1 if self.capacity is None else self.capacity

    def attend(
        self,
        bound: BoundAttention,
        q: Any,
        k: Any,
        v: Any,
        arguments: Mapping[str, Any],
        where: str,
    ) -> Any:
        """Compute the rows of new positions (B, Hq, N, Dv), and advance the state."""
        for name, advice in _REFUSED.items():
            if arguments.get(name) is not None:
                raise UnsupportedError(f"{where}: DecoderCache: got {name}; {advice}")
        params = arguments.get("params", {})
        made_for = (bound, *params.values())
        if self.decoder is None:
            self.decoder, self._made_for = (
                decoder(bound.spec, params=params, backend=bound.choice),
                made_for,
            )
            self._start(k, v)
        elif [*map(id, made_for)] != [*map(id, self._made_for)]:
            raise UnsupportedError(
                f"{where}: DecoderCache: the attention of the layer changed to {bound.spec}, and "
                f"the state is that of {self._made_for[0].spec}; begin with a new cache"
            )
        real = self._real_rows(arguments.get("key_mask"), q)
        self._grow()
        in_place = not torch.is_grad_enabled()
        out, state = self.decoder.extend(self.state, q, k, v, lengths=real, in_place=in_place)
        if in_place and self.capacity is not None:
            for name, x in state.items():
                if x is not self.state[name]:
                    self.state[name].copy_(x)
        else:
            self.state = state
        self._pending = False
        return out

    def _real_rows(self, key_mask: Any, q: Any) -> Any:
        """Return which of the new positions are real, (B, N); None for all."""
        rows, real = q.shape[-2], None
        if key_mask is not None:
            index = torch.arange(rows, device=q.device) + (self.length - rows)
            real = key_mask[:, index.clamp(max=key_mask.shape[-1] - 1)]
            if not torch.compiler.is_compiling() and bool(real.all()):
                real = None
        if real is None:
            self._real += rows
        elif isinstance(self._real, int):
            self._real = 0
        else:
            self._real.add_(rows).mul_(real.all())
        return real

    def _start(self, k: Any, v: Any) -> None:
        assert self.decoder is not None
        sizes = (k.shape[0], k.shape[1], k.shape[-1], v.shape[-1])
        capacity = self.capacity
        if capacity is None and self.decoder.grows():
            capacity = FIRST
        self.state = self.decoder.init(*sizes, capacity, undo=self.undo, like=k)
        self._room = capacity

    def _grow(self) -> None:
        """Double the room if it is too small, unless there is a capacity."""
        if self.capacity is not None or self._room is None or self.length <= self._room:
            return
        assert self.decoder is not None
        self._room = max(2 * self._room, self.length)
        self.state = self.decoder.resize(self.state, self._room)

    def reorder_cache(self, beam_idx: Any) -> None:
        """Continue other sequences of the batch, see `Decoder.reorder`."""
        if self.decoder is not None:
            index = beam_idx.to(self.state["lengths"].device)
            self.state = self.decoder.reorder(self.state, index)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep some sequences of the batch."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence of the batch."""
        if self.decoder is not None:
            lengths = self.state["lengths"]
            index = torch.arange(lengths.shape[0], device=lengths.device)
            self.reorder_cache(index.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` positions back, see `Decoder.truncate`."""
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: got {tokens_to_remove}, expected a number of positions to take "
                "back, as a negative number"
            )
        count = -tokens_to_remove
        if not count or self.decoder is None:
            return
        if count > self._real:
            raise UnsupportedError(
                f"tokens_to_remove: got {tokens_to_remove}, which takes positions of padding back; "
                f"expected at least -{int(self._real)}"
            )
        lengths = self.state["lengths"] - count
        in_place = not torch.is_grad_enabled()
        self.state = self.decoder.truncate(self.state, lengths, in_place=in_place)
        self.length -= count
        self._real -= count

    def offload(self) -> None:
        """Refuse: a state stays on its device."""
        raise UnsupportedError("DecoderCache: offloading is not supported; pass offloading=False")


def layer_of(key: Any) -> DecoderLayer | None:
    """Return the layer of a `DecoderCache` from which the attention gets its keys, or None."""
    return getattr(key, "decoder_layer", None)
