"""Defects of kernels, pooling, visibility and weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.lowering import Fold, Plan, Signature, lower
from pdcore.spec import HeadScaling

from .changed_inputs import ChangedInputs, edited
from .registry import Unmutated, planted


@planted("kernels::kernel_is_computed[softmax-float32]")
class ScaleOffByOnePercent(ChangedInputs):
    """A scale that is 1 % too large."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, q=lambda q: (1.01 * q.astype("float64")).astype(q.dtype))


@planted("kernels::kernel_is_computed[softmax-float32]")
class ReducedPrecisionProducts(ChangedInputs):
    """Matrix products in TF32, with 10 bits of mantissa, for float32."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        def truncate(x: Any) -> Any:
            if x.dtype != np.float32:
                return x
            return (x.view(np.int32) & np.int32(-(2**13))).view(np.float32)

        return plan, edited(
            inputs, q=lambda q: truncate(np.array(q)), k=lambda k: truncate(np.array(k))
        )


@planted("shapes::lengths_are_any[softmax-float32-lead=1-rows=65-keys=257]")
class LastKeyDropped(Unmutated):
    """A loop over key blocks that stops one key too early."""

    def scores(self, c: Any, o: Any) -> Any:
        if o.k.shape[-2] < 2:
            return super().scores(c, o)
        hidden = np.arange(o.k.shape[-2]) < o.k.shape[-2] - 1
        real = o.visibility.key_mask
        mask = np.broadcast_to(hidden, o.k.shape[:-1]) if real is None else real & hidden
        return super().scores(c, o._replace(visibility=replace(o.visibility, key_mask=mask)))


@planted("heads::padding_is_no_part_of_a_pool[sh(2,3)-float32-keys=12-key_mask=holes]")
class PooledPadding(Unmutated):
    """A pooled mean that counts masked keys as zeros."""

    def pool(self, kind: str, x: Any, weights: Any) -> Any:
        if kind != "mean":
            return super().pool(kind, x, weights)
        return super().pool(kind, np.nan_to_num(x), np.ones_like(weights))


@planted("heads::long_windows_are_summed_in_float32[sh(1,700)-float16-rows=5-keys=2100-draw=far]")
class PooledInSixteenBits(Unmutated):
    """Sums over a window in the dtype of the call."""

    def call(self, plan: Plan, inputs: Any, *, level: bool = True) -> Any:
        call = super().call(plan, inputs, level=level)
        self.narrow = call.dtype
        return call

    def pool(self, kind: str, x: Any, weights: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore"):
            pooled, pullback = super().pool(kind, x.astype(self.narrow), weights)
        return pooled.astype(x.dtype), pullback


def visibility_changed(**changes: Any) -> Any:
    """Return a backend that changes which keys a query sees by position."""

    class VisibilityChanged(Unmutated):
        def _changed(self, o: Any) -> Any:
            visibility = o.visibility
            if not visibility.support.restricts or not visibility.static:
                return o
            changed = {n: change(visibility) for n, change in changes.items()}
            return o._replace(visibility=replace(visibility, **changed))

        def scores(self, c: Any, o: Any) -> Any:
            return super().scores(c, self._changed(o))

        def features(self, c: Any, o: Any) -> Any:
            return super().features(c, self._changed(o))

    return VisibilityChanged


@planted("heads::pooled_key_is_visible_only_as_a_whole[causal+sh(2,3)-float32-rows=12-keys=12]")
class PooledKeyVisibleTooEarly(visibility_changed(offset=lambda v: v.offset + v.scale - 1)):  # type: ignore[misc]
    """Under causal a pooled key is seen as soon as its first key is."""


@planted("support::causal_includes_the_present[causal-float32-rows=11]")
class CausalOffByOne(visibility_changed(offset=lambda v: v.offset - 1)):  # type: ignore[misc]
    """Causal support that hides the key at the position of the query."""


@planted("support::causal_is_upper_left[causal-float32-rows=4-keys=9]")
class LowerRight(visibility_changed(offset=lambda v: v.offset + v.length - v.rows)):  # type: ignore[misc]
    """A causal triangle in the lower right corner, where N and M differ."""


@planted("support::window_reaches_left_and_right[sparse(2,1)-float32-rows=11]")
class WindowShortOnTheLeft(
    visibility_changed(support=lambda v: replace(v.support, left=max(v.support.left - 1, 0)))  # type: ignore[misc]
):
    """A window that ends one key too early on the left."""


@planted("heads::short_window_straddles_the_present[causal+sh(2,4)-float32-rows=11]")
class ShortWindowEndsAtM(Unmutated):
    """A short last window that ends at M, so that the last causal rows see it."""

    def scores(self, c: Any, o: Any) -> Any:
        v = o.visibility
        if v.scale == 1 or v.length % v.scale == 0 or v.support.ahead != 0 or not v.static:
            return super().scores(c, o)
        # The last window is seen from position M - 1 on, not from its nominal end.
        results = [super().scores(c, o)]
        rows = np.arange(v.rows) + v.offset >= v.length - 1
        wide = replace(v, offset=v.offset + v.scale - v.length % v.scale)
        results.append(super().scores(c, o._replace(visibility=wide)))
        (out, level), (out2, level2) = results
        return np.where(rows[:, None], out2, out), np.where(rows, level2, level)


@planted("shapes::query_heads_repeat_key_heads[softmax-float32-heads=4]")
class GroupsTiled(ChangedInputs):
    """Query head i that uses key head i % Hkv: `tile` in place of `repeat`."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        heads, keys = inputs.q.shape[-3], inputs.k.shape[-3]
        if heads == keys or plan.groups != plan.groups[:1]:
            return plan, inputs
        order = np.arange(heads) % keys
        sorted_by_key = np.argsort(order, kind="stable")
        return plan, inputs._replace(q=inputs.q[..., sorted_by_key, :, :])

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        heads, keys = inputs.q.shape[-3], inputs.k.shape[-3]
        if heads == keys or plan.groups != plan.groups[:1]:
            return out, level
        back = np.argsort(np.argsort(np.arange(heads) % keys, kind="stable"))
        return out[..., back, :, :], None if level is None else level[..., back, :]


@planted("support::mask_is_true_where_a_query_may_attend[softmax-float32-mask=random]")
class MaskInverted(ChangedInputs):
    """A mask in which True means "masked out", as in some frameworks."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, mask=lambda mask: ~mask)


@planted("bias::bias_is_added[softmax-float32-bias=full]")
class BiasDropped(ChangedInputs):
    """A bias that is accepted and ignored."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, bias=np.zeros_like)


@planted("kernels::softcap_is_applied[softmax(softcap=3)-float32-draw=loud]")
class SoftcapDropped(ChangedInputs):
    """The exponential kernel without its softcap."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        spec = plan.spec
        if getattr(spec.kernel, "softcap", None) is None:
            return plan, inputs
        bare = replace(spec, kernel=replace(spec.kernel, softcap=None))
        signature = Signature(
            inputs.q.shape[-1], inputs.k.shape[-3], str(inputs.q.dtype), inputs.mask is not None
        )
        return lower(bare, signature), inputs


@planted("lse::lse_has_every_row_constant[bn(beta=0.5)-float32]")
class RowConstantForgotten(Unmutated):
    """lse without the constant that the fold subtracts from every row."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        transforms = tuple(
            _WithoutConstant(step) if isinstance(step, Fold) else step for step in plan.transforms
        )
        return super().attention(replace(plan, transforms=transforms), inputs, lse=lse)


class _WithoutConstant:
    def __init__(self, step: Any) -> None:
        self.step = step

    def __call__(self, rows: Any, state: Any, params: Any, *, xp: Any) -> Any:
        folded, pullback = self.step(rows, state, params, xp=xp)
        return folded._replace(row_constant=np.zeros_like(folded.row_constant)), pullback


@planted("statistics::constant_feature_is_finite[bn-float16-draw=constant]")
class FoldedInFloat16(Unmutated):
    """The folded query in float16, which cannot hold (q - mu) / (var + eps)."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        if inputs.q.dtype == np.float16:
            transforms = tuple(
                _Rounded(replace(step, split=False)) if isinstance(step, Fold) else step
                for step in plan.transforms
            )
            plan = replace(plan, transforms=transforms)
        return super().attention(plan, inputs, lse=lse)


class _Rounded:
    def __init__(self, step: Any) -> None:
        self.step = step

    def __call__(self, rows: Any, state: Any, params: Any, *, xp: Any) -> Any:
        folded, pullback = self.step(rows, state, params, xp=xp)
        with np.errstate(over="ignore"):
            q = folded.q.astype(np.float16).astype(folded.q.dtype)
        return folded._replace(q=q), pullback


@planted("support::empty_row_is_zero[softmax-float32-mask=empty]")
class NanOnEmptyRows(Unmutated):
    """0 / 0 in a row that sees no key."""

    def scores(self, c: Any, o: Any) -> Any:
        out, level = super().scores(c, o)
        return np.where((level == -np.inf)[..., None], np.nan, out).astype(out.dtype), level


@planted("kernels::cosine_of_a_zero_vector_is_zero[cosine(scale=2)-float32-draw=zeros]")
class CosineOfZeroIsNan(ChangedInputs):
    """A division by the length of a zero vector."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        if plan.spec.kernel.word != "cosine":
            return plan, inputs
        with np.errstate(all="ignore"):
            return plan, edited(
                inputs, q=lambda q: np.where((q == 0).all(-1, keepdims=True), np.nan, q)
            )


@planted("kernels::normaliser_counts_visible_keys[softmax+h(count)-float32-key_mask=right]")
class PaddingCounted(Unmutated):
    """h(count) that counts masked keys too."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        if plan.spec.normaliser != "count" or inputs.key_mask is None or not inputs.k.shape[-2]:
            return out, level
        real = inputs.key_mask.sum(-1)[..., None, None, None]
        return (out * (real / inputs.k.shape[-2])).astype(out.dtype), level


@planted("support::end_is_the_last_real_key[causal-float32-key_mask=right-offset=end]")
class EndOfTheArray(ChangedInputs):
    """offset="end" that means the end of the array, including padding."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        if isinstance(inputs.offset, str):
            inputs = inputs._replace(offset=inputs.k.shape[-2] - inputs.q.shape[-2])
        return plan, inputs


@planted("weights::weight_of_a_pooled_key_is_spread[sh(2,3)-float32]")
class WeightNotSpread(Unmutated):
    """The weight of a pooled key put on its first key."""

    def attention_weights(self, plan: Plan, inputs: Any) -> Any:
        weights = super().attention_weights(plan, inputs)
        heads: HeadScaling = plan.spec.heads
        if heads.largest == 1 or heads.pool != "mean" or not weights.shape[-1]:
            return weights
        out = weights.copy()
        group = weights.shape[-3] // len(heads.scales)
        for head, scale in enumerate(heads.scales):
            part = out[..., head * group : (head + 1) * group, :, :]
            for first in range(0, part.shape[-1], scale):
                window = part[..., first : first + scale]
                total = window.sum(-1)
                window[...] = 0
                window[..., 0] = total
        return out
