"""Defects of statistics and of convolutions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.lowering import Plan, Recentre
from pdcore.spec import Convolution

from .changed_inputs import ChangedInputs, edited
from .registry import Unmutated, planted


@planted("statistics::convolution_is_computed[conv1d-float32-keys=12]")
class FilterTurnedRound(ChangedInputs):
    """A convolution with the filter reversed, as in mathematics."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        def reverse(params: dict[str, Any]) -> dict[str, Any]:
            return {n: np.flip(p, axis=tuple(range(1, p.ndim - 1))) for n, p in params.items()}

        convolves = isinstance(plan.spec.normalization, Convolution)
        return plan, edited(inputs, params=reverse) if convolves else inputs


_AWAY = "bfloat16-rows=40-keys=64-dim=32-value_dim=32-draw=away"


@planted(f"statistics::recentring_costs_no_digits_far_from_zero[bn(with_std=false)-{_AWAY}]")
class ConstantOfUnroundedQueries(ChangedInputs):
    """A kernel for keys as they are that adds to lse the row constant of queries as they were."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        if str(inputs.q.dtype) != "bfloat16":
            return plan, inputs
        steps = tuple(
            OwnKeys(step, inputs.q.dtype) if isinstance(step, Recentre) else step
            for step in plan.transforms
        )
        return replace(plan, transforms=steps), inputs


@planted(
    f"statistics::recentring_costs_no_digits_far_from_zero[bn(with_std=false)+h(sum,sink=5)-{_AWAY}]"
)
class UnroundedQueriesBehindASink(ConstantOfUnroundedQueries):
    """The same, where a sink lets the error of lse into out."""


class OwnKeys:
    """`Recentre` with c = 0 for a kernel that reads queries in 16 bits."""

    def __init__(self, step: Recentre, dtype: Any) -> None:
        self.step, self.dtype = step, dtype

    def __call__(self, rows: Any, state: Any, params: Any, *, xp: Any) -> Any:
        origin = np.zeros_like(rows.k[..., :1, :])
        rows, pullback = self.step.about(origin, rows, state, params, xp=xp)
        return rows._replace(q=rows.q.astype(self.dtype).astype(rows.q.dtype)), pullback


class ChangedMoments(Unmutated):
    """A backend that changes its moments after it has computed them."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        raise NotImplementedError

    def statistics(self, summary: Any, keys: Any, mask: Any) -> Any:
        final = super().statistics(summary, keys, mask)
        return self.moments(dict(final), keys, mask) if "var" in final else final


@planted("statistics::variance_is_biased[bn-float32-keys=2]")
class UnbiasedVariance(ChangedMoments):
    """A variance that divides by n - 1, as many libraries do by default."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        n = final["n"]
        return final | {"var": final["var"] * n / np.where(n > 1, n - 1, 1)}


@planted("statistics::eps_is_that_of_the_spec[bn-float32-dim=2-draw=constant]")
class OtherEps(ChangedMoments):
    """An eps of 1e-3 where the specification says 1e-5."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        return final | {"var": final["var"] + (1e-3 - 1e-5)}


@planted("statistics::variance_needs_two_passes[bn-float32-keys=200-draw=far]")
class OnePassVariance(ChangedMoments):
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
    """Moments over all keys, including padding."""

    def statistics(self, summary: Any, keys: Any, mask: Any) -> Any:
        if summary.scope == "prefix" or mask is None:
            return super().statistics(summary, keys, mask)
        return super().statistics(summary, np.nan_to_num(keys), None)


@planted("statistics::statistics_are_those_of_the_keys[bn-float32-rows=3-keys=50]")
class StatisticsOfQueries(ChangedInputs):
    """Queries normalized by the moments of the queries."""

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
        normalized = (q - q.mean(-2, keepdims=True)) / (q.std(-2, keepdims=True) + 1e-6)
        return plan, inputs._replace(q=(normalized * sd + mean).astype(q.dtype))


@planted("statistics::statistics_are_per_sequence[bn(statistics=batch)-float32-lead=3]")
class BatchStatisticsPerSequence(Unmutated):
    """statistics=batch computed for each sequence."""

    def statistics(self, summary: Any, keys: Any, mask: Any) -> Any:
        return super().statistics(
            replace(summary, scope="sequence") if summary.scope == "batch" else summary, keys, mask
        )


@planted("kernels::overflow_is_visible[bn-float32-draw=vast]")
class InfiniteVariance(ChangedMoments):
    """A variance that overflows to inf, so that division by it makes all weights equal."""

    def moments(self, final: dict[str, Any], keys: Any, mask: Any) -> dict[str, Any]:
        return final | {"var": np.where(np.isnan(final["var"]), np.inf, final["var"])}


@planted("kernels::overflow_is_visible[bn+sh(1,2)-float32-draw=vast]")
class ZerosOnOverflow(Unmutated):
    """Zeros in place of NaN, as of a row that sees no key."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        lost = np.isnan(out).any(-1)
        level = None if level is None else np.where(lost, -np.inf, level).astype(level.dtype)
        return np.where(lost[..., None], 0, out).astype(out.dtype), level
