"""A spec bound to a backend for layers, and the parameters that a layer learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pdcore import AttentionSpec, Batch, UnsupportedError, bind
from pdcore.extend import FeatureMap

__all__ = ["BoundSpec", "Choice", "learned_parameters", "refuse_dropout"]

Choice = str | Sequence[str] | None


class BoundSpec:
    """A spec bound to a backend, as it is and with ``causal`` added.

    Copies and pickles have the spec and the choice of backend, without caches of earlier calls.
    Objects of equal spec and choice are equal, so that JAX gives layers of one spec one structure.

    Attributes
    ----------
    spec : AttentionSpec
    attention, causal : BoundAttention
        The bound spec, without and with ``causal``.
    causal_refusal : str
        The reason why ``causal`` cannot be added, empty if it can.
    bias_refusal : str
        The reason why a float mask cannot be added to log kappa, empty if it can.
    """

    __slots__ = ("attention", "bias_refusal", "causal", "causal_refusal", "spec")

    def __init__(self, spec: str | AttentionSpec, backend: Any) -> None:
        self.attention = bind(spec, backend=backend)
        self.spec = self.attention.spec
        self.causal = self.attention
        self.causal_refusal = ""
        try:
            support = replace(self.spec.support, causal=True)
            # Bound here, since a traced call cannot select a backend.
            self.causal = bind(replace(self.spec, support=support), backend=self.attention.choice)
        except UnsupportedError as error:
            self.causal_refusal = str(error)
        self.bias_refusal = ""
        if not self.spec.kernel.has_log:
            self.bias_refusal = f"{self.spec} has no log kappa to add them to"
        elif self.spec.heads.largest > 1:
            self.bias_refusal = f"{self.spec} pools keys, and a pooled key has no single bias"

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundSpec, (self.spec, self.attention.choice)

    def _identity(self) -> tuple[Any, ...]:
        choice = self.attention.choice
        return self.spec, tuple(choice) if isinstance(choice, list) else choice

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundSpec) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def learned_parameters(spec: AttentionSpec) -> dict[str, float]:
    """Return the parameters that a layer learns, each with its initial value.

    Raises
    ------
    UnsupportedError
        For running statistics, which a layer would have to keep between calls.
    """
    starts = {}
    for p in spec.parameters():
        start = p.default
        if p.name == "beta" and isinstance(spec.normalization, Batch):
            start = 1.0  # the default of a spec without `beta=param`
        elif p.name == "sink" and spec.sink == "param":
            start = 0.0
        if start is None or not p.differentiable:
            raise UnsupportedError(
                f"spec: {spec} takes {p.name!r} from each call, and this layer does not keep it; "
                "use other statistics or pdcore.attention"
            )
        starts[p.name] = start
    return starts


def refuse_dropout(
    spec: AttentionSpec, argument: str, p: Any, advice: str, layer: str = "the layer"
) -> None:
    """Raise for dropout of the weights with a feature map, which computes no weights.

    Parameters
    ----------
    spec : AttentionSpec
    argument : str
        The name of the dropout in the adapted library.
    p : float
        Its value.
    advice : str
        What to pass in its place.
    layer : str
        The layer, for the message.

    Raises
    ------
    UnsupportedError
    """
    if isinstance(spec.kernel, FeatureMap) and p:
        raise UnsupportedError(
            f"{argument}: got {p} for {layer}, and {spec} has no weights to drop in training; "
            f"pass {advice}"
        )
