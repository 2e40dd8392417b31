"""Defects of gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdcore.lowering import Plan

from .registry import Unmutated, planted


class Pulled(Unmutated):
    """A backend whose gradients are changed after they were computed."""

    def gradients(self, plan: Plan, inputs: Any, found: dict[str, Any]) -> dict[str, Any]:
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
    """Moments taken for constants in the backward pass."""

    def statistics_vjp(self, summary: Any, keys: Any, *rest: Any) -> Any:
        return np.zeros_like(keys)


@planted("gradients::lse_is_differentiated[softmax-float64]")
class LseCotangentDropped(Unmutated):
    """A backward that forgets the cotangent of lse."""

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        out, level, vjp = super().attention_vjp(plan, inputs)
        return out, level, lambda d_out, d_lse=None: vjp(d_out, None)


@planted("gradients::heads_of_a_group_add_up[softmax-float32-heads=4]")
class GroupNotSummed(Pulled):
    """d/dv of the mean instead of the sum over the query heads of a group."""

    def gradients(self, plan: Plan, inputs: Any, found: dict[str, Any]) -> dict[str, Any]:
        group = inputs.q.shape[-3] // inputs.k.shape[-3]
        return found | {"k": found["k"] / group, "v": found["v"] / group}


@planted("gradients::bias_is_differentiated[softmax-float32-bias=keys]")
class BiasGradientNotReduced(Pulled):
    """A bias gradient that takes one row instead of the sum over the broadcast ones."""

    def gradients(self, plan: Plan, inputs: Any, found: dict[str, Any]) -> dict[str, Any]:
        if inputs.bias is not None and inputs.bias.ndim > 1 and inputs.bias.shape[-2] == 1:
            found["bias"] = found["bias"] / max(inputs.q.shape[-2], 1)
        return found


@planted("gradients::padding_has_zero_gradient[softmax-float32-key_mask=right]")
class PaddingHasGradient(Pulled):
    """A gradient that leaks into padding."""

    def gradients(self, plan: Plan, inputs: Any, found: dict[str, Any]) -> dict[str, Any]:
        if inputs.key_mask is not None and inputs.k.shape[-2]:
            padding = ~inputs.key_mask[..., None, :, None]
            found["v"] = np.where(padding, found["v"] + 1e-2, found["v"]).astype(found["v"].dtype)
        return found
