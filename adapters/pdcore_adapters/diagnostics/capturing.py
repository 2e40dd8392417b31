"""`capture`, which records the calls of the attention layers of a model."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from pdcore import AttentionSpec, BoundAttention, UnsupportedError
from pdcore.extend import Inputs

from ..watching import WATCHERS
from .distances import ROWS, HeadDistances, of_call
from .rows import check_rows, some_rows

__all__ = ["Capture", "LayerCall", "capture"]

#: What is kept of a call beside q, k and v; with the group of its shards weights are refused.
_ARGUMENTS = ("mask", "key_mask", "bias", "offset", "params", "segments", "labels", "group")
#: The largest number of weights that are computed at once, 128 MiB in float64.
LIMIT = 1 << 24


@dataclass(frozen=True, repr=False)
class LayerCall:
    """One call of a layer.

    Attributes
    ----------
    layer : str
        The name of the layer in the model.
    attend : BoundAttention
        The attention that ran.
    inputs : Inputs
        The arguments without dropout; q, k and v are (*B, H, N, D).
    out : array (*B, H, N, Dv)
        The outputs of the heads, with dropout in training.
    """

    layer: str
    attend: BoundAttention
    inputs: Inputs
    out: Any

    @property
    def spec(self) -> AttentionSpec:
        """The attention that ran."""
        return self.attend.spec

    def __repr__(self) -> str:
        return f"<call of {self.layer}: {self.spec}, q {tuple(self.inputs.q.shape)}>"

    def weights(self, rows: slice = slice(None), limit: int = LIMIT) -> Any:
        """Compute the weights of some queries, before dropout.

        Parameters
        ----------
        rows : slice
            The queries, all by default.
        limit : int
            The largest number of weights.

        Returns
        -------
        array (*B, H, rows, M)

        Raises
        ------
        TypeError, ValueError
            For rows that are none, and for more weights than `limit`.
        UnsupportedError
            For a part of the queries of packed sequences.
        """
        q, k = self.inputs.q, self.inputs.k
        rows = check_rows(rows, q.shape[-2])
        each = k.shape[-2]
        for size in q.shape[:-2]:
            each *= size
        count = each * (rows.stop - rows.start)
        if count > limit:
            raise ValueError(
                f"rows: got {rows.stop - rows.start} queries of {self.layer}, {count} weights, "
                f"expected at most limit={limit}: pass a slice of {max(limit // each, 1)} queries, "
                "or a larger limit"
            )
        return self.attend.weights(some_rows(self.inputs, rows))

    def distances(self, query_mask: Any = None, rows: int = ROWS) -> HeadDistances:
        """Compute the distances of the heads, without dropout, as `head_distances` does."""
        return of_call(self.attend, self.inputs, query_mask, rows)


@dataclass
class Capture:
    """What `capture` recorded.

    Attributes
    ----------
    calls : list of LayerCall
        In the order of the calls.
    left : dict of str to str
        The attention layers of which nothing was recorded, each with the reason; filled at exit.
    """

    calls: list[LayerCall] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that were recorded."""
        return tuple(dict.fromkeys(call.layer for call in self.calls))

    def of(self, layer: str) -> list[LayerCall]:
        """Return the calls of a layer.

        Raises
        ------
        KeyError
            For a name of which nothing was recorded.
        """
        found = [call for call in self.calls if call.layer == layer]
        if not found:
            why = self.left.get(layer, f"expected one of {', '.join(self.layers) or 'none'}")
            raise KeyError(f"layer: got {layer!r}, of which nothing was recorded: {why}")
        return found

    def weights(
        self, layer: str, rows: slice = slice(None), *, call: int = -1, limit: int = LIMIT
    ) -> Any:
        """Compute the weights of a call of a layer, by default its last; see `LayerCall`."""
        return self.of(layer)[call].weights(rows, limit)


@contextmanager
def capture(model: Any, *, copy: bool = False) -> Iterator[Capture]:
    """Record the calls of the attention layers of a model, while the context is entered.

    Parameters
    ----------
    model : torch.nn.Module, flax.nnx.Module or flax.linen.Module
        With layers of `pdcore_adapters`, or an attention registered with transformers.
    copy : bool
        Copy arrays; else the record refers to them, which memory allows and an operation in
        place, such as that of a static cache, changes.

    Yields
    ------
    Capture
        Without gradients, and only of calls from this thread. No weights are computed.

    Raises
    ------
    TypeError
        For another kind of model.
    UnsupportedError
        For a compiled model, and for calls that are traced, as by `torch.compile` and `jax.jit`.
    """
    with ExitStack() as stack:
        names, candidates = _layers(model, stack)
        record = Capture()
        watcher = _Watcher(record, names, copy, threading.get_ident())
        WATCHERS.append(watcher)
        try:
            yield record
        finally:
            WATCHERS.remove(watcher)
        for name, why in candidates().items():
            if name not in record.layers:
                record.left[name] = why


@dataclass(eq=False)
class _Watcher:
    """Adds calls to a record."""

    record: Capture
    #: Returns the name of what called, None outside of the model.
    names: Callable[[Any], str | None]
    copy: bool
    thread: int

    def add(
        self, layer: Any, attend: BoundAttention, inputs: Inputs, out: Any, layout: str
    ) -> None:
        if threading.get_ident() != self.thread or (name := self.names(layer)) is None:
            return
        jax = sys.modules.get("jax")
        if jax is not None and isinstance(out, jax.core.Tracer):
            raise UnsupportedError(
                f"capture: the call of {name} is traced by jax.jit or another "
                "transformation, and has no values to record; call the model without it"
            )
        heads_first = layout == "bhnd"
        q, k, v, out = (
            self._kept(x if heads_first else x.swapaxes(-3, -2)) for x in (*inputs[:3], out)
        )
        others = {name: self._kept(getattr(inputs, name)) for name in _ARGUMENTS}
        self.record.calls.append(LayerCall(name, attend, Inputs(q, k, v, **others), out))

    def _kept(self, x: Any) -> Any:
        if isinstance(x, dict):
            return {name: self._kept(value) for name, value in x.items()}
        if isinstance(x, tuple | list):
            return tuple(self._kept(value) for value in x)
        if not hasattr(x, "dtype"):
            return x
        x = x.detach() if hasattr(x, "detach") else x
        return (x.clone() if hasattr(x, "clone") else x.copy()) if self.copy else x


_Layers = tuple[Callable[[Any], str | None], Callable[[], dict[str, str]]]


def _layers(model: Any, stack: ExitStack) -> _Layers:
    """Return what names the layers of a model, and what says why one has no call."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(model, torch.nn.Module):
        return _torch_layers(model)
    if "flax" in sys.modules:
        from flax import linen, nnx

        from .flax_layers import linen_layers, nnx_layers

        if isinstance(model, nnx.Module):
            return nnx_layers(model)
        if isinstance(model, linen.Module):
            return linen_layers(stack)
    raise TypeError(
        f"model: got {type(model).__name__}, expected a torch.nn.Module, a flax.nnx.Module or a "
        "flax.linen.Module"
    )


def _torch_layers(model: Any) -> _Layers:
    modules = dict(model.named_modules())
    for name, module in modules.items():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if compiled or hasattr(module, "_orig_mod"):
            raise UnsupportedError(
                f"model: {name or type(module).__name__} is compiled by torch.compile, which "
                "runs no Python that could record; pass the model before it was compiled"
            )
    names = {id(module): name or type(module).__name__ for name, module in modules.items()}

    def left() -> dict[str, str]:
        kinds = {
            name: type(m).__name__ for name, m in modules.items() if "Attention" in type(m).__name__
        }
        return {
            name or kind: f"{kind}: it was not called, or its attention is not pdcore's"
            for name, kind in kinds.items()
            if not any(
                other != name and other.startswith(f"{name}." if name else "") for other in kinds
            )
        }

    return (lambda module: names.get(id(module))), left
