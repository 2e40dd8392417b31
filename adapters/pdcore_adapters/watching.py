"""Where the layers of the adapters tell a `pdcore_adapters.diagnostics.capture` of their calls."""

from __future__ import annotations

from typing import Any, Protocol

from pdcore import BoundAttention, UnsupportedError
from pdcore.extend import Inputs, compiling

__all__ = ["WATCHERS", "Watcher", "tell"]


class Watcher(Protocol):
    """What is told of calls."""

    def add(
        self, layer: Any, attend: BoundAttention, inputs: Inputs, out: Any, layout: str
    ) -> None:
        """Take note of a call of a layer."""


#: Those that are told; empty outside of a capture.
WATCHERS: list[Watcher] = []


def tell(layer: Any, attend: BoundAttention, inputs: Inputs, out: Any, layout: str) -> None:
    """Tell every watcher of a call.

    Parameters
    ----------
    layer : object
        What called: a module of PyTorch, or the attention function of Flax.
    attend : BoundAttention
    inputs : Inputs
        The arguments, in `layout`.
    out : array
        The result, in `layout`.
    layout : {"bhnd", "bnhd"}

    Raises
    ------
    UnsupportedError
        In a call that torch.compile traces while there is a watcher.
    """
    if WATCHERS and compiling():
        raise UnsupportedError(
            f"capture: the call of {type(layer).__name__} is traced by torch.compile, and has no "
            "values to record; call the model without it"
        )
    for watcher in WATCHERS:
        watcher.add(layer, attend, inputs, out, layout)
