"""What the adapters for layers share: a spec with its causal twin, and what a layer learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pdcore import AttentionSpec, Batch, UnsupportedError, bind

__all__ = ["Bound", "Choice", "learned"]

Choice = str | Sequence[str] | None


class Bound:
    """A spec bound to a backend once, as it is and with ``causal`` added.

    Copies and pickles hold the spec and the choice of backend; what was found out about earlier
    calls is found out again. Two with the same spec and choice are equal, so that layers which
    keep them beside their arrays have one structure.
    """

    __slots__ = ("attention", "causal", "leak", "spec", "unbiased")

    def __init__(self, spec: str | AttentionSpec, backend: Any) -> None:
        self.attention = bind(spec, backend=backend)
        self.spec = self.attention.spec
        self.causal = self.attention
        #: Why the spec must not be causal, "" if it may be.
        self.leak = ""
        try:
            support = replace(self.spec.support, causal=True)
            # Bound here, because nothing may be looked up while a call is traced.
            self.causal = bind(replace(self.spec, support=support), backend=self.attention.choice)
        except UnsupportedError as error:
            self.leak = str(error)
        #: Why a float mask cannot be added to log kappa, "" if it can be.
        self.unbiased = ""
        if not self.spec.kernel.has_log:
            self.unbiased = f"{self.spec} has no log kappa to add them to"
        elif self.spec.heads.largest > 1:
            self.unbiased = f"{self.spec} pools keys, and a pooled key has no single bias"

    def __reduce__(self) -> tuple[Any, ...]:
        return Bound, (self.spec, self.attention.choice)

    def _identity(self) -> tuple[Any, ...]:
        choice = self.attention.choice
        return self.spec, tuple(choice) if isinstance(choice, list) else choice

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bound) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def learned(spec: AttentionSpec) -> dict[str, float]:
    """Give the parameters that a layer learns, each with the value that it starts at.

    Raises
    ------
    UnsupportedError
        For parameters that would have to be kept from call to call: running statistics.
    """
    found = {}
    for p in spec.parameters():
        start = p.default
        if p.name == "beta" and isinstance(spec.normalization, Batch):
            start = 1.0  # what the spec has without `beta=param`
        if start is None or not p.differentiable:
            raise UnsupportedError(
                f"spec: {spec} takes {p.name!r} from each call, and this layer does not keep it; "
                "use other statistics or pdcore.attention"
            )
        found[p.name] = start
    return found
