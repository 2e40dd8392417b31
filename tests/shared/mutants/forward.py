"""Defects of the forward computation, and of what a backend declares."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.lowering import Fold, Plan, Scores, Signature, lower
from pdcore.plugins import registry as plugins
from pdcore.spec import Convolution, HeadScaling

from .registry import Unmutated, planted


def edited(inputs: Any, **functions: Any) -> Any:
    """Change some of the inputs by functions, where they are given."""
    return inputs._replace(
        **{
            name: function(getattr(inputs, name))
            for name, function in functions.items()
            if getattr(inputs, name) is not None
        }
    )


class Inputs(Unmutated):
    """A backend that changes its inputs before it runs a plan; what is left of it is right."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        raise NotImplementedError

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        return super().attention(*self.change(plan, inputs), lse=lse)

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        return super().attention_vjp(*self.change(plan, inputs))

    def attention_weights(self, plan: Plan, inputs: Any) -> Any:
        return super().attention_weights(*self.change(plan, inputs))


def contraction(plan: Plan, **changes: Any) -> Plan:
    """Change the contraction of a plan by scores."""
    if not isinstance(plan.contraction, Scores):
        return plan
    return replace(plan, contraction=replace(plan.contraction, **changes))


@planted("kernels::kernel_is_computed[softmax-float32]")
class ScaleOffByOnePercent(Inputs):
    """A scale that is 1 % too large."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, q=lambda q: (1.01 * q.astype("float64")).astype(q.dtype))


@planted("kernels::kernel_is_computed[softmax-float32]")
class ReducedPrecisionProducts(Inputs):
    """Matrix products in TF32, with 10 bits of mantissa, for float32."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        def cut(x: Any) -> Any:
            if x.dtype != np.float32:
                return x
            return (x.view(np.int32) & np.int32(-(2**13))).view(np.float32)

        return plan, edited(inputs, q=lambda q: cut(np.array(q)), k=lambda k: cut(np.array(k)))


@planted("shapes::lengths_are_any[softmax-float32-lead=1-rows=65-keys=257]")
class LastKeyDropped(Unmutated):
    """A loop over key blocks that stops one key too early."""

    def scores(self, c: Any, o: Any) -> Any:
        if o.k.shape[-2] < 2:
            return super().scores(c, o)
        hidden = np.arange(o.k.shape[-2]) < o.k.shape[-2] - 1
        seen = o.visibility.key_mask
        mask = np.broadcast_to(hidden, o.k.shape[:-1]) if seen is None else seen & hidden
        return super().scores(c, o._replace(visibility=replace(o.visibility, key_mask=mask)))


@planted("statistics::convolution_is_computed[conv1d-float32-keys=12]")
class FilterTurnedRound(Inputs):
    """A convolution as in mathematics, with the first tap on the last key."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        def turned(params: dict[str, Any]) -> dict[str, Any]:
            return {n: np.flip(p, axis=tuple(range(1, p.ndim - 1))) for n, p in params.items()}

        convolves = isinstance(plan.spec.normalization, Convolution)
        return plan, edited(inputs, params=turned) if convolves else inputs


class Moments(Unmutated):
    """A backend whose moments are changed after they were taken."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        raise NotImplementedError

    def statistics(self, summary: Any, keys: Any, mask: Any) -> Any:
        final = super().statistics(summary, keys, mask)
        return self.moments(dict(final), keys, mask) if "var" in final else final


@planted("statistics::variance_is_biased[bn-float32-keys=2]")
class UnbiasedVariance(Moments):
    """A variance that divides by n - 1, as many libraries do by default."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        n = final["n"]
        return final | {"var": final["var"] * n / np.where(n > 1, n - 1, 1)}


@planted("statistics::eps_is_that_of_the_spec[bn-float32-dim=2-draw=constant]")
class OtherEps(Moments):
    """An eps of 1e-3 where the specification says 1e-5."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        return final | {"var": final["var"] + (1e-3 - 1e-5)}


@planted("statistics::variance_needs_two_passes[bn-float32-keys=200-draw=far]")
class OnePassVariance(Moments):
    """E[x^2] - E[x]^2, which has no correct digit far from 0."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        if (
            final["n"].shape[-2] != 1
            or mask is not None
            or final["mean"].shape[:-3] != keys.shape[:-3]
        ):
            return final
        square = (keys * keys).mean(-2, keepdims=True) if keys.shape[-2] else final["var"]
        return final | {"var": np.maximum(square - final["mean"] ** 2, 0)}


@planted("statistics::padding_is_no_part_of_statistics[bn-float32-key_mask=right]")
class StatisticsOverPadding(Unmutated):
    """Moments over all keys, padding included."""

    def statistics(self, summary: Any, keys: Any, mask: Any) -> Any:
        if summary.scope == "prefix" or mask is None:
            return super().statistics(summary, keys, mask)
        return super().statistics(summary, np.nan_to_num(keys), None)


@planted("statistics::statistics_are_those_of_the_keys[bn-float32-rows=3-keys=50]")
class StatisticsOfQueries(Inputs):
    """Queries normalised by their own moments."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        q, k = inputs.q, inputs.k
        if (
            plan.summary is None
            or plan.summary.scope != "sequence"
            or not q.shape[-2]
            or not k.shape[-2]
            or inputs.key_mask is not None
        ):
            return plan, inputs
        group = q.shape[-3] // k.shape[-3]
        mean, sd = (
            np.repeat(f(k.astype("float64"), -2, keepdims=True), group, -3)
            for f in (np.mean, np.std)
        )
        own = (q - q.mean(-2, keepdims=True)) / (q.std(-2, keepdims=True) + 1e-6)
        return plan, inputs._replace(q=(own * sd + mean).astype(q.dtype))


@planted("statistics::statistics_are_per_sequence[bn(statistics=batch)-float32-lead=3]")
class BatchStatisticsPerSequence(Unmutated):
    """statistics=batch that forgets the batch."""

    def statistics(self, summary: Any, keys: Any, mask: Any) -> Any:
        return super().statistics(
            replace(summary, scope="sequence") if summary.scope == "batch" else summary, keys, mask
        )


@planted("heads::padding_is_no_part_of_a_pool[sh(2,3)-float32-keys=12-key_mask=holes]")
class PooledPadding(Unmutated):
    """A pooled mean in which masked keys count, as if they were zeros."""

    def pool(self, kind: str, x: Any, weights: Any) -> Any:
        if kind != "mean":
            return super().pool(kind, x, weights)
        return super().pool(kind, np.nan_to_num(x), np.ones_like(weights))


def seen(**changes: Any) -> Any:
    """Make `scores` and `features` that see other keys by position."""

    class Seen(Unmutated):
        def _moved(self, o: Any) -> Any:
            visibility = o.visibility
            if not visibility.support.restricts or not visibility.static:
                return o
            changed = {n: change(visibility) for n, change in changes.items()}
            return o._replace(visibility=replace(visibility, **changed))

        def scores(self, c: Any, o: Any) -> Any:
            return super().scores(c, self._moved(o))

        def features(self, c: Any, o: Any) -> Any:
            return super().features(c, self._moved(o))

    return Seen


@planted("heads::pooled_key_is_visible_only_as_a_whole[causal+sh(2,3)-float32-rows=12-keys=12]")
class PooledKeyVisibleTooEarly(seen(offset=lambda v: v.offset + v.scale - 1)):  # type: ignore[misc]
    """Under causal a pooled key is seen as soon as its first key is."""


@planted("support::causal_includes_the_present[causal-float32-rows=11]")
class CausalOffByOne(seen(offset=lambda v: v.offset - 1)):  # type: ignore[misc]
    """Causal without the present."""


@planted("support::causal_is_upper_left[causal-float32-rows=4-keys=9]")
class LowerRight(seen(offset=lambda v: v.offset + v.length - v.rows)):  # type: ignore[misc]
    """The causal triangle in the other corner, where N and M differ."""


@planted("support::window_reaches_left_and_right[sparse(2,1)-float32-rows=11]")
class WindowShortOnTheLeft(
    seen(support=lambda v: replace(v.support, left=max(v.support.left - 1, 0)))  # type: ignore[misc]
):
    """A window that ends one key too early on the left."""


@planted("heads::short_window_straddles_the_present[causal+sh(2,4)-float32-rows=11]")
class ShortWindowEndsAtM(Unmutated):
    """The short last window taken to end at M, so that the last rows of causal see it."""

    def scores(self, c: Any, o: Any) -> Any:
        v = o.visibility
        if v.scale == 1 or v.length % v.scale == 0 or v.support.ahead != 0 or not v.static:
            return super().scores(c, o)
        # The last window is whole from position M - 1 on, not from its nominal end.
        whole = [super().scores(c, o)]
        rows = np.arange(v.rows) + v.offset >= v.length - 1
        wide = replace(v, offset=v.offset + v.scale - v.length % v.scale)
        whole.append(super().scores(c, o._replace(visibility=wide)))
        (out, level), (out2, level2) = whole
        return np.where(rows[:, None], out2, out), np.where(rows, level2, level)


@planted("shapes::query_heads_repeat_key_heads[softmax-float32-heads=4]")
class GroupsTiled(Inputs):
    """Query head i given key head i % Hkv: `tile` where `repeat` is meant."""

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
class MaskInverted(Inputs):
    """True taken for "masked out", as in some frameworks."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, mask=lambda mask: ~mask)


@planted("bias::bias_is_added[softmax-float32-bias=full]")
class BiasDropped(Inputs):
    """A bias that is accepted and forgotten."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        return plan, edited(inputs, bias=np.zeros_like)


@planted("kernels::softcap_is_applied[softmax(softcap=3)-float32-draw=loud]")
class SoftcapDropped(Inputs):
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
    """lse without the term that the fold takes out of every row."""

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
class CosineOfZeroIsNan(Inputs):
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
class EndOfTheArray(Inputs):
    """offset="end" taken for the end of the array, padding or not."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        if isinstance(inputs.offset, str):
            inputs = inputs._replace(offset=inputs.k.shape[-2] - inputs.q.shape[-2])
        return plan, inputs


@planted("refusals::feature[bias]", bias="unsupported")
class SilentFallBack(Unmutated):
    """A bias that is declared unsupported, and run all the same."""

    def refusals(self, request: Any) -> list[str]:
        return [reason for reason in super().refusals(request) if "bias" not in reason]


@planted("behaviour::no_other_backend_is_asked[linear-float32]")
class WorkHandedOn(Unmutated):
    """Feature maps quietly left to another backend."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        if isinstance(plan.contraction, Scores):
            return super().attention(plan, inputs, lse=lse)
        return plugins.load_backend("numpy").attention(plan, inputs, lse=lse)


@planted("refusals::feature[gaussian]")
class UndeclaredRefusal(Unmutated):
    """A kernel that is declared, and refused."""

    def refusals(self, request: Any) -> list[str]:
        gaussian = request.spec.kernel.word == "gaussian"
        return [*super().refusals(request), *(["no gaussian kernel yet"] if gaussian else [])]


@planted("behaviour::results_keep_the_dtype[softmax-float64]")
class Float64InFloat32(Unmutated):
    """float64 computed in float32, and cast back."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        if inputs.q.dtype != np.float64:
            return super().attention(plan, inputs, lse=lse)

        def narrow(x: Any) -> Any:
            floating = getattr(x, "dtype", None) == np.float64
            return x.astype(np.float32) if floating else x

        params = {name: narrow(x) for name, x in inputs.params.items()}
        less = type(inputs)(*map(narrow, inputs))._replace(params=params)
        out, level = super().attention(plan, less, lse=lse)
        return out.astype("float64"), None if level is None else level.astype("float64")


@planted("behaviour::results_keep_the_dtype[softmax-float16]")
class Float32ForFloat16(Unmutated):
    """A float16 call that is answered in float32."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        return (out.astype(np.float32) if out.dtype == np.float16 else out), level


@planted("behaviour::inputs_are_left_alone[bn+sh(1,2)-float32]")
class InputChanged(Unmutated):
    """Keys that are centred in place."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        if plan.summary is not None and inputs.k.flags.writeable:
            inputs.k[...] += np.asarray(1, inputs.k.dtype)
        return super().attention(plan, inputs, lse=lse)


@planted("shapes::lengths_are_any[softmax-float32-lead=1-rows=65-keys=63]")
class LastRowNotWritten(Unmutated):
    """A kernel that leaves the rows of a short last block unwritten."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        rows = out.shape[-2] // 4 * 4 if out.shape[-2] > 60 else out.shape[-2]
        result = np.empty(out.shape, out.dtype)
        result[..., :rows, :] = out[..., :rows, :]
        return result, level


@planted("behaviour::same_call_twice_gives_the_same_bits[softmax-float32]")
class RandomLastBit(Unmutated):
    """Sums in an order that changes from call to call."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        noise = np.random.default_rng().integers(0, 2, out.shape).astype(bool)
        return np.where(noise, np.nextafter(out, np.asarray(9, out.dtype)), out), level


@planted(
    "behaviour::row_does_not_depend_on_its_batch[softmax-float32-lead=5-rows=70-keys=700-"
    "dim=32-value_dim=32]"
)
class RowDependsOnBatch(Unmutated):
    """Another order of sums when there are several sequences."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        if inputs.q.ndim > 3 and inputs.q.shape[0] > 1 and out.dtype.name != "bfloat16":
            out = np.nextafter(out, np.asarray(9, out.dtype))
        return out, level


@planted("weights::weight_of_a_pooled_key_is_spread[sh(2,3)-float32]")
class WeightNotSpread(Unmutated):
    """The weight of a pooled key given to its first key."""

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


@planted("behaviour::eight_threads_share_a_backend")
class SharedScratch(Unmutated):
    """Inputs kept in the backend while it runs: another thread's take their place."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        self.scratch = inputs
        time.sleep(1e-3)
        return super().attention(plan, self.scratch, lse=lse)
