"""How a bound layer finds its backend while the compiler of PyTorch traces it.

A trace can follow neither locks nor registries, and lengths may be symbols in it. Here is what it
takes for a constant instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backend import Request
from ..errors import UnsupportedError
from ..spec import AttentionSpec
from . import selection

__all__ = ["Traced", "fixed", "settler"]

#: Stands for a length that is not known while a call is traced.
SYMBOLIC = 2


class Traced:
    """What was found out about calls while they were traced, each an attribute by its name."""


def fixed(size: int) -> int:
    """Make a symbolic size a number: what is traced then holds for this size only."""
    return len(range(size))


def settler(
    spec: AttentionSpec, choice: Any, device: str | None, traced: Traced
) -> Callable[..., str]:
    """Make the function that chooses a backend while a call is traced.

    The compiler of PyTorch runs it as it is, at the time of tracing, and takes what it gives for
    a constant: that is what the mark says. It gives the name of its entry in `traced`.
    """
    names: dict[Request, str] = {}

    def settle(
        dtype: str,
        place: str,
        ndim: int,
        query_heads: int,
        key_heads: int,
        dim: int,
        value_dim: int,
        given: tuple[int | None, ...],
        offset: str,
        lse: bool,
        vjp: bool,
        weights: bool,
        dropped: bool,
        axis_name: str | None,
    ) -> str:

        if device is not None and device != place:
            raise UnsupportedError(
                f"device {device!r}: a traced call cannot move arrays from {place}; move them "
                "before, or leave device out"
            )
        lead = (SYMBOLIC,) * (ndim - 3)
        mask, key_mask, bias = (None if n is None else (SYMBOLIC,) * n for n in given)
        request = Request(
            spec,
            "torch",
            dtype.removeprefix("torch."),
            place,
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
        )
        chosen = selection.choose(request, choice)
        if chosen.backend.info.library != "torch":
            raise UnsupportedError(
                f"backend {chosen.backend.info.name}: a traced call cannot hand PyTorch tensors "
                f"to {chosen.backend.info.library}; call it outside the compiled function"
            )
        # The compiler keeps no objects that it is given, but it reads those of an object.
        token = names.setdefault(request, f"call_{len(names)}")
        plan = chosen.backend.fuse(request.lower(), request)
        setattr(traced, token, (chosen.backend, plan))
        return token

    settle._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return settle
