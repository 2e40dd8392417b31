"""Defects of pullbacks that work in blocks, and of pullbacks as functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pdcore.lowering import Plan

from .backward import ChangedGradients
from .registry import Unmutated, planted

#: The size of the blocks of these defects.
BLOCK = 64
#: The rows or keys that are added up before they are rounded to 16 bits.
STEP = 4


def last_block_dropped(
    name: str, condition: Callable[[Plan, Any], bool] = lambda plan, inputs: True
) -> Any:
    """Return a backend whose gradient of an array lacks the rows of its last block, after one."""

    class LastBlockDropped(ChangedGradients):
        def gradients(self, plan: Plan, inputs: Any, gradients: dict[str, Any]) -> dict[str, Any]:
            d = gradients[name]
            first = (d.shape[-2] - 1) // BLOCK * BLOCK
            if first > 0 and condition(plan, inputs):
                kept = np.arange(d.shape[-2]) < first
                gradients[name] = np.where(kept[:, None], d, np.zeros_like(d))
            return gradients

    return LastBlockDropped


PLAIN = "lead=1-heads=4-rows=130-keys=260-dim=16-value_dim=16"


@planted(f"blocks::groups_add_up_over_blocks[softmax-float32-{PLAIN}]")
class LastKeysHaveNoGradient(last_block_dropped("k")):  # type: ignore[misc]
    """d/dk without the last block of keys."""


@planted(f"blocks::groups_add_up_over_blocks[softmax-float32-{PLAIN}]")
class LastRowsHaveNoGradient(last_block_dropped("q")):  # type: ignore[misc]
    """d/dq without the last block of rows."""


@planted(f"blocks::groups_add_up_over_blocks[softmax-float32-{PLAIN}]")
class LastBlockOfGroups(
    last_block_dropped("v", lambda p, i: i.q.shape[-3] > i.k.shape[-3])  # type: ignore[misc]
):
    """d/dv of grouped heads without the last block of keys."""


@planted(f"blocks::pools_over_blocks[sh(1,2)-float32-{PLAIN}]")
class LastBlockOfPools(last_block_dropped("k", lambda p, i: p.spec.heads.largest > 1)):  # type: ignore[misc]
    """d/dk of scaled heads without the last block of keys."""


@planted(
    "blocks::prefixes_over_blocks[causal+bn(statistics=prefix)-float32-lead=1-heads=1-key_heads=1-"
    "rows=150-keys=150-dim=4-value_dim=4]"
)
class LastBlockOfPrefixes(
    last_block_dropped("k", lambda p, i: p.summary is not None and p.summary.scope == "prefix")  # type: ignore[misc]
):
    """d/dk of prefix statistics without the last block of keys."""


@planted("blocks::support_over_blocks[causal-float32-lead=1-rows=260-keys=260-dim=16-value_dim=16]")
class LastCausalBlock(last_block_dropped("k", lambda p, i: p.spec.support.causal)):  # type: ignore[misc]
    """d/dk of causal support without the last block of keys."""


@planted(
    "blocks::support_over_blocks[sparse(150,3)-float32-lead=1-rows=260-keys=260-dim=16-"
    "value_dim=16]"
)
class LongWindow(
    last_block_dropped(  # type: ignore[misc]
        "k", lambda p, i: not p.spec.support.causal and 2 * BLOCK < p.spec.support.left < 1000
    )
):
    """d/dk of windows over more than two blocks without the last block of keys."""


@planted(
    "blocks::support_over_blocks[sparse(20,7)-float32-lead=1-rows=260-keys=260-dim=16-value_dim=16]"
)
class RowsOfWindows(
    last_block_dropped("q", lambda p, i: not p.spec.support.causal and p.spec.support.left < 1000)  # type: ignore[misc]
):
    """d/dq of windows without the last block of rows."""


@planted(
    "blocks::pools_over_blocks[bn+sh(1,4)-float32-lead=1-heads=4-rows=130-keys=260-dim=16-value_dim=16]"
)
class LastBlockOfPooledStatistics(
    last_block_dropped("k", lambda p, i: p.summary is not None and p.spec.heads.largest > 1)  # type: ignore[misc]
):
    """d/dk of normalized, pooled keys without the last block of keys."""


class ChangedPullback(Unmutated):
    """A backend that calls its pullback in a wrong way."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        raise NotImplementedError

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        out, level, vjp = super().attention_vjp(plan, inputs)
        calls = 0

        def changed(d_out: Any, d_lse: Any = None) -> Any:
            nonlocal calls
            calls += 1
            return self.pull(inputs, vjp, calls, d_out, d_lse)

        return out, level, changed


SMALLEST = "gradients::gradient_of_each_kernel[softmax-float32]"


@planted(SMALLEST)
class PullbackOfOneCall(ChangedPullback):
    """A pullback that works once: its buffers are gone at the second call."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        return vjp(d_out * (calls == 1), d_lse)


@planted(SMALLEST)
class MissingCotangentIsOne(ChangedPullback):
    """A pullback that takes a missing d_lse for ones."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        level = np.ones(d_out.shape[:-1], np.result_type(d_out.dtype, np.float32))
        return vjp(d_out, level if d_lse is None else d_lse)


@planted(SMALLEST)
class CotangentReadAsContiguous(ChangedPullback):
    """A pullback that reads d_out as if it were contiguous."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        if not d_out.flags.c_contiguous and d_out.size:
            d_out = d_out.ravel("K").reshape(d_out.shape)
            d_out = np.roll(d_out, 1, -1)
        return vjp(d_out, d_lse)


@planted(SMALLEST)
class CotangentChanged(ChangedPullback):
    """A pullback that scales its cotangent in place."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        gradients = vjp(d_out.copy(), d_lse)
        if d_out.flags.writeable:
            d_out *= np.asarray(0.5, d_out.dtype)
        return gradients


@planted(SMALLEST)
class InputChangedByPullback(ChangedPullback):
    """A pullback that uses the memory of q for its work."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        gradients = vjp(d_out, d_lse)
        if inputs.q.flags.writeable:
            inputs.q[...] = np.asarray(0, inputs.q.dtype)
        return gradients


@planted(
    "blocks::long_sums_in_sixteen_bits[softmax-bfloat16-lead=1-rows=4000-keys=9-dim=4-value_dim=4-"
    "draw=positive]"
)
class GradientInSixteenBits(ChangedPullback):
    """d/dk and d/dv that are added up over the rows in 16 bits."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        rows = d_out.shape[-2]
        if d_out.dtype.itemsize != 2 or rows < 1000:
            return vjp(d_out, d_lse)
        total = dict(vjp(d_out, d_lse))
        for name in ("k", "v"):
            total[name] = np.zeros_like(total[name])
        for first in range(0, rows, STEP):
            block = (np.arange(rows) >= first) & (np.arange(rows) < first + STEP)
            part = vjp(
                d_out * block[:, None].astype(d_out.dtype),
                d_lse if d_lse is None else d_lse * block,
            )
            for name in ("k", "v"):
                total[name] = (total[name] + part[name]).astype(d_out.dtype)
        return total


@planted(
    "blocks::long_results_in_sixteen_bits[softmax-bfloat16-lead=1-keys=4000-dim=4-value_dim=4-"
    "draw=positive]"
)
class ResultInSixteenBits(Unmutated):
    """Results that are added up over the keys in 16 bits."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        keys = inputs.k.shape[-2]
        if out.dtype.itemsize == 2 and keys > 1000:
            weights = self.attention_weights(plan, inputs)
            repeats = inputs.q.shape[-3] // inputs.v.shape[-3]
            values = np.repeat(inputs.v, repeats, -3).astype("float32")
            out = np.zeros_like(out)
            for first in range(0, keys, STEP):
                block = slice(first, first + STEP)
                part = weights[..., block].astype("float32") @ values[..., block, :]
                out = (out + part).astype(out.dtype)
        return out, level


@planted(
    "memory::memory_of_gradients_grows_with_the_length[softmax-float32-lead=1-heads=1-key_heads=1-"
    "rows=4096-keys=8192-value_dim=8]"
)
class QuadraticMemoryOfGradients(ChangedPullback):
    """An array of N times M numbers in each pullback."""

    def pull(self, inputs: Any, vjp: Any, calls: int, d_out: Any, d_lse: Any) -> Any:
        shape = (*d_out.shape[:-1], inputs.k.shape[-2])
        return vjp(d_out + 0 * np.ones(shape, d_out.dtype)[..., :1], d_lse)


def one_of(axis: int, condition: Callable[[Any], bool]) -> Any:
    """Return a backend whose gradient of a broadcast bias is that of one entry, not of all."""

    class OneOf(ChangedGradients):
        def gradients(self, plan: Plan, inputs: Any, gradients: dict[str, Any]) -> dict[str, Any]:
            if inputs.bias is not None and condition(inputs.bias):
                size = inputs.q.shape[0] if axis == 0 else inputs.q.shape[-3]
                gradients["bias"] = gradients["bias"] / max(size, 1)
            return gradients

    return OneOf


OVER_SEQUENCES = "lead=3-rows=20-keys=140-value_dim=8"


@planted(f"blocks::bias_over_blocks[softmax-float32-{OVER_SEQUENCES}-bias=batch]")
class BiasOfSequencesNotSummed(one_of(0, lambda b: b.ndim > 3 and b.shape[0] == 1)):  # type: ignore[misc]
    """d/dbias (1, H, N, M) of one sequence, not summed over all."""


@planted(f"blocks::bias_over_blocks[softmax-float32-{OVER_SEQUENCES}-bias=heads]")
class BiasOfHeadsNotSummed(one_of(0, lambda b: b.ndim == 3)):  # type: ignore[misc]
    """d/dbias (H, N, M) of one sequence, not summed over all."""


@planted(f"blocks::bias_over_blocks[softmax-float32-{OVER_SEQUENCES}-bias=sequences]")
class BiasOfOneHead(one_of(-3, lambda b: b.ndim > 3 and b.shape[-3] == 1)):  # type: ignore[misc]
    """d/dbias (B, 1, N, M) of one head, not summed over all."""
