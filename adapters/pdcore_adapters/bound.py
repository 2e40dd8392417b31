"""A spec bound to a backend for layers, and the parameters that a layer learns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from pdcore import AttentionSpec, Decoder, Parameter, UnsupportedError, bind, decoder
from pdcore.extend import FeatureMap, parameter_shape

__all__ = [
    "MOMENTUM",
    "BoundSpec",
    "Choice",
    "Drop",
    "check_drop",
    "check_running",
    "kept_arrays",
    "new_arrays",
    "refuse_dropout",
]

Choice = str | Sequence[str] | None
#: What the dropout of a layer drops in training: weights, or outputs.
Drop = Literal["weights", "output"]

#: The weight of a batch's statistics in running ones, as in `torch.nn.BatchNorm1d`.
MOMENTUM = 0.1


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
    hiding_refusal : str
        The reason why a mask may not hide all later keys, empty if it may.
    training : BoundSpec
        What a layer computes in training: with statistics of the batch in place of running ones,
        unless they would leak the future.
    bias_refusal : str
        The reason why a float mask cannot be added to log kappa, empty if it can.
    """

    __slots__ = (
        "_decoder",
        "attention",
        "bias_refusal",
        "causal",
        "causal_refusal",
        "hiding_refusal",
        "spec",
        "training",
    )

    def __init__(self, spec: str | AttentionSpec, backend: Any) -> None:
        self.attention = bind(spec, backend=backend)
        self.spec = self.attention.spec
        self.causal = self.attention
        self.causal_refusal = ""
        self._decoder: Decoder | None = None
        try:
            support = replace(self.spec.support, causal=True)
            # Bound here, since a traced call cannot select a backend.
            self.causal = bind(replace(self.spec, support=support), backend=self.attention.choice)
        except UnsupportedError as error:
            self.causal_refusal = str(error)
        self.hiding_refusal = self.causal_refusal
        self.training = self
        trained = _in_training(self.spec)
        if trained != self.spec:
            self.training = BoundSpec(trained, self.attention.choice)
            self.training.hiding_refusal = (
                f"in training, {self.spec} has the statistics of the batch, in which the future "
                "leaks; with causal in the spec, a layer trains with its running statistics"
            ) * bool(self.training.causal_refusal)
            self.training.causal_refusal = self.causal_refusal
            if not self.causal_refusal:
                of_causal = _in_training(self.causal.spec)
                self.training.causal = bind(of_causal, backend=self.attention.choice)
        self.bias_refusal = ""
        if not self.spec.kernel.has_log:
            self.bias_refusal = f"{self.spec} has no log kappa to add them to"
        elif self.spec.heads.largest > 1:
            self.bias_refusal = f"{self.spec} pools keys, and a pooled key has no single bias"

    def decoder(self, params: Mapping[str, Any]) -> Decoder:
        """Return the decoder of `causal`; without parameters, the same one for all calls."""
        if self.causal_refusal:
            raise UnsupportedError(f"decode: {self.causal_refusal}")
        spec, choice = self.causal.spec, self.causal.choice
        if params:
            return decoder(spec, params=params, backend=choice)
        if self._decoder is None:
            self._decoder = decoder(spec, backend=choice)
        return self._decoder

    def __reduce__(self) -> tuple[Any, ...]:
        return BoundSpec, (self.spec, self.attention.choice)

    def _identity(self) -> tuple[Any, ...]:
        choice = self.attention.choice
        return self.spec, tuple(choice) if isinstance(choice, list) else choice

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BoundSpec) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def _in_training(spec: AttentionSpec) -> AttentionSpec:
    """Return the spec with which a layer of a spec trains."""
    normalization = spec.normalization.training
    leaks = spec.support.ahead == 0 and normalization.leaks
    return spec if leaks else replace(spec, normalization=normalization)


def kept_arrays(spec: AttentionSpec) -> list[Parameter]:
    """Return the parameters that a layer keeps, learned ones and buffers.

    Their `default` is what they have in a new layer.

    Raises
    ------
    UnsupportedError
        For a parameter whose declaration has neither a start nor a default.
    """
    kept = []
    for p in spec.parameters():
        start = p.default if p.start is None else p.start
        if start is None:
            raise UnsupportedError(
                f"spec: {spec} takes {p.name!r} from each call, and its declaration has no value "
                "with which a layer would begin; declare it with start= or default=, or use "
                "pdcore.attention"
            )
        kept.append(replace(p, default=start))
    return kept


def new_arrays(
    spec: AttentionSpec, sizes: tuple[int, int, int], *, xp: Any, dtype: Any, **where: Any
) -> dict[Parameter, Any]:
    """Return the arrays that a new layer keeps.

    Parameters
    ----------
    spec : AttentionSpec
    sizes : tuple of int
        The numbers of key heads, features and query heads.
    xp : namespace
        The array-API namespace of the layer.
    dtype : dtype
        That of the layer. Values that differ along the heads are not rounded to 16 bits, as those
        of a call are not.
    **where
        The device.
    """
    arrays = {}
    for p in kept_arrays(spec):
        wide = xp.result_type(dtype, xp.float32) if callable(p.default) else dtype
        arrays[p] = p.filled(parameter_shape(p.shapes[0], *sizes), xp=xp, dtype=wide, **where)
    return arrays


def check_running(spec: AttentionSpec, momentum: float | None, **others: Any) -> None:
    """Check the arguments of a layer that are about running statistics.

    Parameters
    ----------
    spec : AttentionSpec
    momentum : float or None
        The weight of a batch in the running statistics.
    **others
        Other such arguments by name, which are None by default.

    Raises
    ------
    TypeError, ValueError
        For a momentum other than None or a number from 0 to 1, and for an argument that is not
        the default, if the spec has no running statistics.
    """
    number = isinstance(momentum, int | float) and not isinstance(momentum, bool)
    if momentum is not None and not number:
        raise TypeError(
            f"momentum: got {type(momentum).__name__}, expected a number from 0 to 1, or None"
        )
    if momentum is not None and not 0 <= momentum <= 1:
        raise ValueError(f"momentum: got {momentum!r}, expected a number from 0 to 1, or None")
    if any(p.running for p in spec.parameters()):
        return
    changed = {name: x for name, x in others.items() if x is not None}
    changed |= {"momentum": momentum} if momentum != MOMENTUM else {}
    for name, x in changed.items():
        raise ValueError(
            f"{name}: got {x!r}, and {spec} has no running statistics; leave it out, or use "
            "bn(statistics=running)"
        )


def check_drop(drop: object) -> None:
    """Raise a ValueError unless `drop` is one of `Drop`."""
    if drop not in ("weights", "output"):
        raise ValueError(f"drop: got {drop!r}, expected 'weights' or 'output'")


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
