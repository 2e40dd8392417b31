"""Defects of a sink in the normaliser."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.lowering import Plan
from pdcore.spec import Support

from .changed_inputs import ChangedInputs, edited
from .registry import Unmutated, planted


@planted("sinks::sink_is_a_term_of_h[h(sum,sink=param)-float32]")
class SinkInEveryPart(Unmutated):
    """Results over parts of the keys, each with the sink, merged by lse."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        plain = (inputs.mask, inputs.key_mask, inputs.bias, plan.summary) == (None,) * 4
        length = inputs.k.shape[-2]
        if plan.sink is None or not plain or plan.support != Support() or length < 5:
            return super().attention(plan, inputs, lse=lse)
        parts = []
        for first in range(0, length, 4):
            keys, values = (x[..., first : first + 4, :] for x in (inputs.k, inputs.v))
            part = inputs._replace(k=keys, v=values)
            parts.append(super().attention(plan, part, lse=True))
        outs, levels = (np.stack(x) for x in zip(*parts, strict=True))
        level = np.logaddexp.reduce(levels, axis=0)
        out = (np.exp(levels - level)[..., None] * outs).sum(0).astype(inputs.q.dtype)
        return out, level if lse else None


@planted("sinks::sink_is_a_term_of_h[h(sum,sink=param)-float32-heads=6]")
class SinkOfTheKeyHead(ChangedInputs):
    """The sink of the first query head of a group for all of its heads."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        group = inputs.q.shape[-3] // inputs.k.shape[-3]
        if plan.sink != "param" or group == 1:
            return plan, inputs

        def first(params: dict[str, Any]) -> dict[str, Any]:
            return {**params, "sink": np.repeat(params["sink"][::group], group)}

        return plan, edited(inputs, params=first)


@planted("sinks::sink_is_a_term_of_h[h(sum,sink=param)-float32-heads=4-mask=empty]")
class SinkSubtractedFromMinusInfinity(Unmutated):
    """exp(L - L') without a selection where L and s are -inf."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=True)
        if plan.sink is not None:
            out = np.where((level == -np.inf)[..., None], np.nan, out).astype(out.dtype)
        return out, level if lse else None


@planted("sinks::sink_is_differentiated[h(sum,sink=param)-float32-heads=6]")
class SinkGradientOfOutAlone(Unmutated):
    """d/ds without the part of lse."""

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        out, level, vjp = super().attention_vjp(plan, inputs)

        def pull(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            gradients = dict(vjp(d_out, d_lse))
            if "sink" in gradients:
                gradients["sink"] = vjp(d_out, None)["sink"]
            return gradients

        return out, level, pull


@planted("sinks::weights_sum_to_less_than_one[h(sum,sink=param)-float32-heads=6]")
class WeightsWithoutTheSink(Unmutated):
    """Weights that sum to 1."""

    def attention_weights(self, plan: Plan, inputs: Any) -> Any:
        return super().attention_weights(replace(plan, sink=None), inputs)
