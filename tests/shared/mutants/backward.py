"""Defects of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdcore.lowering import Plan

from .registry import Unmutated, planted


class ChangedGradients(Unmutated):
    """A backend that changes its gradients after it has computed them."""

    def gradients(self, plan: Plan, inputs: Any, gradients: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        out, level, vjp = super().attention_vjp(plan, inputs)
        return (
            out,
            level,
            lambda d_out, d_lse=None: self.gradients(plan, inputs, dict(vjp(d_out, d_lse))),
        )


@planted("gradients::statistics_are_differentiated[bn-float32]")
class StatisticsDetached(Unmutated):
    """Moments treated as constants in the backward pass."""

    def statistics_vjp(self, summary: Any, keys: Any, *rest: Any) -> Any:
        return np.zeros_like(keys)


@planted("gradients::lse_is_differentiated[softmax-float64]")
class LseCotangentDropped(Unmutated):
    """A backward that ignores the cotangent of lse."""

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        out, level, vjp = super().attention_vjp(plan, inputs)
        return out, level, lambda d_out, d_lse=None: vjp(d_out, None)


@planted("gradients::heads_of_a_group_add_up[softmax-float32-heads=4]")
class GroupNotSummed(ChangedGradients):
    """d/dv of the mean instead of the sum over the query heads of a group."""

    def gradients(self, plan: Plan, inputs: Any, gradients: dict[str, Any]) -> dict[str, Any]:
        group = inputs.q.shape[-3] // inputs.k.shape[-3]
        return gradients | {"k": gradients["k"] / group, "v": gradients["v"] / group}


@planted("gradients::bias_is_differentiated[softmax-float32-bias=keys]")
class BiasGradientNotReduced(ChangedGradients):
    """A bias gradient that takes one row instead of the sum over the broadcast ones."""

    def gradients(self, plan: Plan, inputs: Any, gradients: dict[str, Any]) -> dict[str, Any]:
        if inputs.bias is not None and inputs.bias.ndim > 1 and inputs.bias.shape[-2] == 1:
            gradients["bias"] = gradients["bias"] / max(inputs.q.shape[-2], 1)
        return gradients


@planted("gradients::padding_has_zero_gradient[softmax-float32-key_mask=right]")
class PaddingHasGradient(ChangedGradients):
    """A gradient of padding that is not 0."""

    def gradients(self, plan: Plan, inputs: Any, gradients: dict[str, Any]) -> dict[str, Any]:
        if inputs.key_mask is not None and inputs.k.shape[-2]:
            padding = ~inputs.key_mask[..., None, :, None]
            d_v = gradients["v"]
            gradients["v"] = np.where(padding, d_v + 1e-2, d_v).astype(d_v.dtype)
        return gradients
