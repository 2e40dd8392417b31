"""Defects at shapes that models have, and in forms of masks, biases and offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pdcore.lowering import Plan

from .changed_inputs import ChangedInputs, edited
from .registry import Unmutated, planted


def off_where(condition: Callable[[Plan, Any], bool]) -> Any:
    """Return a backend whose values are 5 % too large in the calls of a condition."""

    class OffWhere(ChangedInputs):
        def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
            if not condition(plan, inputs):
                return plan, inputs
            return plan, edited(inputs, v=lambda v: (1.05 * v.astype("float64")).astype(v.dtype))

    return OffWhere


def decodes(inputs: Any) -> bool:
    return inputs.q.shape[-2] == 1 and inputs.k.shape[-2] > 1


def group(inputs: Any) -> int:
    return inputs.q.shape[-3] // inputs.k.shape[-3]


@planted("models::heads_are_wide[softmax-float32-lead=1-rows=65-keys=257-dim=128-value_dim=128]")
class WideHeadsOverBlocks(off_where(lambda p, i: i.q.shape[-1] == 128 and i.k.shape[-2] > 11)):  # type: ignore[misc]
    """A kernel for 128 features that is wrong beyond its first few keys."""


@planted("models::heads_are_wide[softmax-float32-lead=1-rows=65-keys=257-dim=256-value_dim=256]")
class WidestHeads(off_where(lambda p, i: i.q.shape[-1] == 256)):  # type: ignore[misc]
    """A kernel that is wrong for 256 features."""


@planted(
    "models::many_query_heads_share_a_key_head[softmax-float32-lead=1-heads=16-rows=33-keys=70-"
    "dim=64-value_dim=64]"
)
class EightQueriesAKeyHead(off_where(lambda p, i: group(i) >= 8)):  # type: ignore[misc]
    """A kernel that is wrong for 8 query heads a key head."""


@planted("models::sequences_are_many[softmax-float32-lead=8-rows=11]")
class SequencesModuloSeven(Unmutated):
    """Sequences taken by their index modulo 7."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        if out.ndim < 4 or out.shape[0] <= 7:
            return out, level
        index = np.arange(out.shape[0]) % 7
        return out[index], None if level is None else level[index]


@planted(
    "models::one_query_is_decoded[causal-float32-lead=3-heads=8-rows=1-keys=70-dim=64-"
    "value_dim=64-offset=end]"
)
class GroupedDecoding(off_where(lambda p, i: decodes(i) and group(i) > 1)):  # type: ignore[misc]
    """A kernel for one query that is wrong for grouped heads."""


@planted(
    "models::one_query_is_decoded[causal-float32-lead=1-heads=8-rows=1-keys=2049-dim=16-offset=end]"
)
class LongDecoding(off_where(lambda p, i: decodes(i) and i.k.shape[-2] > 2048)):  # type: ignore[misc]
    """A kernel for one query that is wrong for more than 2,048 keys."""


@planted(
    "models::lengths_are_one_more_than_blocks[softmax-float32-lead=1-rows=129-keys=129-dim=16-"
    "value_dim=16]"
)
class OneRowBeyondABlock(off_where(lambda p, i: i.q.shape[-2] > 1 and i.q.shape[-2] % 128 == 1)):  # type: ignore[misc]
    """A last block of one row that is wrong."""


@planted(
    "models::lengths_are_one_more_than_blocks[softmax-float32-lead=1-rows=385-keys=641-dim=16-"
    "value_dim=16]"
)
class OneKeyBeyondABlock(off_where(lambda p, i: i.k.shape[-2] > 257 and i.k.shape[-2] % 128 == 1)):  # type: ignore[misc]
    """A last block of one key that is wrong after more than two blocks."""


@planted(
    "models::many_query_heads_share_a_key_head[sh(1,1,2,2)-float32-lead=1-heads=4-key_heads=4-"
    "rows=33-keys=130-dim=64-value_dim=64]"
)
class RepeatedScales(off_where(lambda p, i: p.spec.heads.scales == (1, 1, 2, 2))):  # type: ignore[misc]
    """Head scaling that is wrong where a scale is there twice."""


@planted("models::pooled_statistics_of_many_keys[bn+sh(1,2)-float32-rows=65-keys=65-dim=16]")
class StatisticsOfManyPools(
    off_where(
        lambda p, i: p.summary is not None and p.spec.heads.largest > 1 and i.k.shape[-2] > 64
    )  # type: ignore[misc]
):
    """Statistics of pooled keys that are wrong beyond 64 keys."""


@planted("models::prefixes_are_long[causal+bn(statistics=prefix)-float32-lead=1-rows=257-keys=257]")
class ChunkCarryLost(Unmutated):
    """Prefix statistics without the keys of earlier chunks of 256."""

    def prefix_states(self, stats: Any, keys: Any, mask: Any) -> Any:
        size, parts = 256, []
        for first in range(0, max(keys.shape[-2], 1), size):
            real = None if mask is None else mask[..., first : first + size]
            parts.append(super().prefix_states(stats, keys[..., first : first + size, :], real))
        return {name: np.concatenate([p[name] for p in parts], -2) for name in parts[0]}


@planted("support::mask_is_true_where_a_query_may_attend[softmax-float32-mask=sequences]")
class MaskOfSequencesOfTheFirst(ChangedInputs):
    """A mask (B, 1, N, M) of which each sequence reads the first."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        mask = inputs.mask
        if mask is None or mask.ndim < 4 or mask.shape[-3] != 1 or not mask.size:
            return plan, inputs
        return plan, inputs._replace(mask=np.broadcast_to(mask[:1], mask.shape).copy())


@planted("support::mask_is_true_where_a_query_may_attend[softmax-float32-mask=rows]")
class MaskOfRowsDropped(ChangedInputs):
    """A mask (N, 1) that is not broadcast, but dropped."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        dropped = inputs.mask is not None and inputs.mask.shape[-1] == 1 < inputs.k.shape[-2]
        return plan, inputs._replace(mask=None) if dropped else inputs


def read_as_contiguous(x: Any) -> Any:
    """Return what a kernel reads that takes an array for contiguous, from its first element."""
    if x.flags.c_contiguous or not x.size or 0 in x.strides or min(x.strides) < 0:
        return x
    strides, step = [], x.itemsize
    for size in reversed(x.shape):
        strides.insert(0, step)
        step *= size
    return np.lib.stride_tricks.as_strided(x, x.shape, strides).copy()


@planted("support::mask_is_true_where_a_query_may_attend[softmax-float32-mask=strided]")
class MaskReadAsContiguous(ChangedInputs):
    """A mask that is read as if it were contiguous."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, mask=read_as_contiguous)


@planted("bias::bias_may_lie_anywhere_in_memory[softmax-float32-bias=strided]")
class BiasReadAsContiguous(ChangedInputs):
    """A bias that is read as if it were contiguous."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, bias=read_as_contiguous)


def first_along(axis: int, condition: Callable[[Any], bool]) -> Any:
    """Return a backend that reads the first entry of a bias along an axis for all others."""

    class FirstAlong(ChangedInputs):
        def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
            def first(bias: Any) -> Any:
                if bias.ndim < -axis or not bias.size or not condition(bias):
                    return bias
                return np.repeat(np.take(bias, [0], axis), bias.shape[axis], axis)

            return plan, edited(inputs, bias=first)

    return FirstAlong


@planted("bias::bias_is_broadcast[softmax-float32-lead=3-heads=4-bias=batch]")
class BiasOfAllSequences(first_along(-3, lambda b: b.ndim > 3 and b.shape[0] == 1)):  # type: ignore[misc]
    """A bias (1, H, N, M) of which each head reads the first."""


@planted("bias::bias_is_broadcast[softmax-float32-lead=3-heads=4-bias=heads]")
class BiasOfHeads(first_along(-3, lambda b: b.ndim == 3)):  # type: ignore[misc]
    """A bias (H, N, M) of which each head reads the first."""


@planted("bias::bias_is_broadcast[softmax-float32-lead=3-heads=4-bias=sequences]")
class BiasOfSequences(first_along(-4, lambda b: b.shape[-3] == 1)):  # type: ignore[misc]
    """A bias (B, 1, N, M) of which each sequence reads the first."""


@planted(
    "support::offset_has_any_integer_dtype[causal-float32-rows=40-keys=260-offset=sequence-"
    "offset_dtype=int8]"
)
class PositionsInInt8(ChangedInputs):
    """Positions of queries in int8, the dtype of an offset, which overflow."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        if not isinstance(inputs.offset, np.ndarray):
            return plan, inputs
        rows = max(inputs.q.shape[-2] - 1, 0)
        last = (inputs.offset + rows).astype("int8").astype("int64")
        return plan, inputs._replace(offset=last - rows)


@planted(
    "support::offset_has_any_integer_dtype[causal-float32-rows=40-keys=260-offset=sequence-"
    "offset_dtype=uint8]"
)
class UnsignedOffset(ChangedInputs):
    """An unsigned offset that is read as a signed one of its size."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        if not isinstance(inputs.offset, np.ndarray) or inputs.offset.dtype.kind != "u":
            return plan, inputs
        signed = inputs.offset.astype(inputs.offset.dtype.str.replace("u", "i"))
        return plan, inputs._replace(offset=signed.astype("int64"))


class ChangedWeights(Unmutated):
    """A backend that returns weights 5 % too large in the calls of `condition`."""

    condition: Callable[[Plan, Any], bool]

    def attention_weights(self, plan: Plan, inputs: Any) -> Any:
        weights = super().attention_weights(plan, inputs)
        return (1.05 * weights).astype(weights.dtype) if self.condition(plan, inputs) else weights


@planted("weights::weights_of_long_sequences[softmax-float32-lead=1-rows=65-keys=130-dim=16]")
class LongWeights(ChangedWeights):
    """Weights that are wrong beyond 64 keys."""

    condition = staticmethod(lambda plan, inputs: inputs.k.shape[-2] > 64)


@planted(
    "weights::weights_of_long_sequences[softmax-float32-lead=1-heads=8-rows=129-keys=257-dim=16]"
)
class GroupedWeights(ChangedWeights):
    """Weights that are wrong for grouped heads beyond 64 keys."""

    condition = staticmethod(lambda plan, inputs: group(inputs) > 1 and inputs.k.shape[-2] > 64)


@planted("weights::weights_of_long_sequences[causal-float32-lead=1-rows=65-keys=130-dim=16]")
class CausalWeights(ChangedWeights):
    """Causal weights that are wrong beyond 64 keys."""

    condition = staticmethod(
        lambda plan, inputs: plan.spec.support.causal and inputs.k.shape[-2] > 64
    )
