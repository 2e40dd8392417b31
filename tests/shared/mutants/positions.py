"""Defects of terms of log kappa by positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.lowering import Plan, Signature, lower

from .changed_inputs import ChangedInputs
from .registry import Unmutated, planted


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


@planted("positions::tables_are_read_by_distance_and_label[relative(3)-float32-heads=4-rows=11]")
class TableOfTheOtherDirection(ChangedInputs):
    """A table of p_i - p_j in place of p_j - p_i."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        params = dict(inputs.params)
        if str(plan.spec) != "softmax+relative(reach=3)" or inputs.q.shape[1] != 4:
            return plan, inputs
        params["relative"] = params["relative"][:, ::-1]
        return plan, inputs._replace(params=params)


@planted("positions::tables_are_read_by_distance_and_label[labels(3)-float32-heads=4-rows=11]")
class LabelsOfTheOtherSide(ChangedInputs):
    """A table by key and query, its axes exchanged."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        params = dict(inputs.params)
        if str(plan.spec) != "softmax+labels(count=3)" or inputs.q.shape[1] != 4:
            return plan, inputs
        params["influence"] = np.swapaxes(params["influence"], -1, -2)
        return plan, inputs._replace(params=params)


@planted(
    "positions::entries_of_minus_infinity_remove_keys[relative(2)+h(count)-float32-rows=11-draw=removed]"
)
class RemovedKeysAreCounted(ChangedInputs):
    """h(count) that counts the keys which an entry of -inf removes."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        c = plan.contraction
        return replace(plan, contraction=replace(c, removing=())), inputs


@planted("positions::gradient_of_tables[labels(3)-float64-heads=4-rows=11]")
class TableGradientOfFewLabels(Unmutated):
    """The gradient of a table without the last label of queries."""

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        out, lse, pullback = super().attention_vjp(plan, inputs)

        def vjp(*cotangents: Any) -> Any:
            gradients = dict(pullback(*cotangents))
            if str(plan.spec) == "softmax+labels(count=3)" and inputs.q.dtype == np.float64:
                gradients["influence"][:, -1] = 0.0
            return gradients

        return out, lse, vjp
