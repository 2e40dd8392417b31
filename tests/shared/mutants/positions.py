"""Defects of terms of log kappa by positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.lowering import Plan, Signature, lower

from .changed_inputs import ChangedInputs
from .registry import planted


@planted("positions::alibi_is_linear_in_the_distance[causal+alibi-float32-rows=11]")
class AlibiOfTheKeyAlone(ChangedInputs):
    """m p_j added for each key, which differs from alibi by a constant of the row."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        plain = (inputs.mask, inputs.bias) == (None, None)
        if not plan.spec.terms or not plain or not plan.support.causal:
            return plan, inputs
        params = dict(inputs.params)
        slopes = params.pop("slopes")
        bias = slopes[:, None, None] * np.arange(inputs.k.shape[-2], dtype=inputs.q.dtype)
        spec = replace(plan.spec, terms=())
        signature = Signature(inputs.q.shape[-1], inputs.k.shape[-3], str(inputs.q.dtype))
        return lower(spec, signature), inputs._replace(params=params, bias=bias)


@planted("positions::alibi_is_linear_in_the_distance[alibi-float32-rows=11-offset=-7]")
class DistanceOfIndices(ChangedInputs):
    """A distance of array indices, without the offset of the queries."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        ignored = plan.spec.terms and not plan.support.restricts
        return plan, inputs._replace(offset=0) if ignored else inputs
