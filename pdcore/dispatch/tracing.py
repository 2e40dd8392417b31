"""Selection of a backend while ``torch.compile`` traces a bound attention.

The compiler can trace neither locks nor the registry of backends, and lengths may be symbolic.
So the selection is a function that the compiler runs instead of tracing it, and whose result it
treats as a constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Request
from ..errors import UnsupportedError
from ..spec import AttentionSpec
from . import selection

__all__ = ["TracedSelections", "concrete_size", "make_traced_selector"]

#: The length that a request states where lengths are unknown while a call is traced.
SYMBOLIC = 2


class TracedSelections:
    """The backend and plan of each kind of traced call, as attributes ``call_0``, ``call_1``..."""


def concrete_size(size: int) -> int:
    """Convert a symbolic size to a number, which specializes the traced program to that size."""
    return len(range(size))


def make_traced_selector(
    spec: AttentionSpec, choice: Any, device: str | None, traced: TracedSelections
) -> Callable[..., str]:
    """Build the function that selects a backend while a call is traced.

    The function stores backend and plan in `traced` and returns the name of the attribute. It is
    marked as constant for ``torch.compile``, which runs it while tracing and keeps its result.
    """
    names: dict[Request, str] = {}

    def select(
        dtype: str,
        array_device: str,
        ndim: int,
        query_heads: int,
        key_heads: int,
        dim: int,
        value_dim: int,
        ranks: tuple[int | None, ...],
        offset: str,
        lse: bool,
        vjp: bool,
        weights: bool,
        dropped: bool,
        axis_name: str | None,
        layout: str,
        packed: bool,
        native_dropout: bool,
    ) -> str:
        if device is not None and device != array_device:
            raise UnsupportedError(
                f"device {device!r}: a traced call cannot move arrays from {array_device}; move "
                "them before, or leave device out"
            )
        lead = (SYMBOLIC,) * (ndim - 3)
        mask, key_mask, bias = (None if n is None else (SYMBOLIC,) * n for n in ranks)
        request = Request(
            spec.for_heads(key_heads),
            "torch",
            dtype.removeprefix("torch."),
            array_device,
            (*lead, query_heads, SYMBOLIC, dim),
            (*lead, key_heads, SYMBOLIC, dim),
            (*lead, key_heads, SYMBOLIC, value_dim),
            mask,
            key_mask,
            bias,
            offset,
            lse,
            vjp,
            weights,
            0.5 if dropped else 0.0,
            axis_name,
            layout,
            "compiled" if packed else None,
            native_dropout=native_dropout,
        )
        backend = selection.choose(request, choice).backend
        if backend.info.library != "torch":
            raise UnsupportedError(
                f"backend {backend.info.name}: a traced call cannot hand PyTorch tensors "
                f"to {backend.info.library}; call it outside the compiled function"
            )
        # A constant cannot be an arbitrary object, but the traced code may read attributes.
        name = names.setdefault(request, f"call_{len(names)}")
        setattr(traced, name, (backend, backend.fuse(request.lower(), request)))
        return name

    select._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return select
