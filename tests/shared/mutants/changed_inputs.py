"""The base of mutants that change their inputs."""

from __future__ import annotations

from typing import Any

from pdcore.lowering import Plan

from .registry import Unmutated


def edited(inputs: Any, **functions: Any) -> Any:
    """Return inputs changed by functions, by name; inputs that are None stay so."""
    return inputs._replace(
        **{
            name: function(getattr(inputs, name))
            for name, function in functions.items()
            if getattr(inputs, name) is not None
        }
    )


class ChangedInputs(Unmutated):
    """A backend that changes its inputs, or the plan, and then computes right."""

    def change(self, plan: Plan, inputs: Any) -> tuple[Plan, Any]:
        raise NotImplementedError

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        return super().attention(*self.change(plan, inputs), lse=lse)

    def attention_vjp(self, plan: Plan, inputs: Any) -> Any:
        return super().attention_vjp(*self.change(plan, inputs))

    def attention_weights(self, plan: Plan, inputs: Any) -> Any:
        return super().attention_weights(*self.change(plan, inputs))
