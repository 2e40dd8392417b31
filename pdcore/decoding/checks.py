"""Checks of the arguments of a decoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..arrays import compiling, device_name, dtype_name, host_values, library_of

__all__ = [
    "check_capacity",
    "check_counts",
    "check_lengths",
    "check_state",
    "checked_sizes",
    "entries",
    "values_at_hand",
]


def values_at_hand(x: Any, backend: Any) -> list[int] | None:
    """Return the integers of an array in the memory of the CPU; None if traced, or elsewhere."""
    if device_name(x, backend.info.library) != "cpu":
        return None
    if x.ndim == 1 and hasattr(x, "tolist") and not compiling():
        try:
            values: list[int] = x.tolist()
        except (TypeError, RuntimeError):  # what tracers of JAX and of PyTorch raise
            return None
        return values
    array = host_values(x)
    return None if array is None else array.reshape(-1).tolist()


def checked_sizes(
    batch: int | tuple[int, ...], key_heads: int, dim: int, value_dim: int, undo: int
) -> tuple[int, ...]:
    """Check the sizes of a state, and return the leading axes."""
    lead = batch if isinstance(batch, tuple) else (batch,)
    if not all(_whole(size, 0) for size in lead):
        raise ValueError(
            f"batch: got {batch!r}, expected a number of sequences, or a tuple of leading axes"
        )
    sizes = {"key_heads": (key_heads, 1), "dim": (dim, 1), "value_dim": (value_dim, 0)}
    for name, (value, least) in {**sizes, "undo": (undo, 0)}.items():
        if not _whole(value, least):
            raise ValueError(f"{name}: got {value!r}, expected a whole number >= {least}")
    return lead


def check_capacity(capacity: int | None) -> None:
    """Check a capacity, from which positions are counted in 32 bits."""
    if capacity is not None and not (_whole(capacity, 1) and capacity <= 2**30):
        raise ValueError(
            f"capacity: got {capacity!r}, expected a whole number from 1 to 2**30, or None"
        )


def check_state(state: Mapping[str, Any], names: set[str], q: Any) -> None:
    """Check that a state is one of the decoder, for arrays like q."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got {type(state).__name__}, expected what init returned")
    lead = tuple(q.shape[:-3])
    if entries(state) != names:
        raise ValueError(
            f"state: got the entries {', '.join(sorted(state))}, expected a state that init or "
            "extend of this decoder returned"
        )
    if tuple(state["lengths"].shape) != lead:
        raise ValueError(
            f"state: got one of the batch {tuple(state['lengths'].shape)}, expected {lead} like q "
            f"{tuple(q.shape)}"
        )


def entries(state: Iterable[str]) -> set[str]:
    """Return the names of a state without those parts that depend on how it was created."""
    return {name.removeprefix("last_") for name in state} - {"undo"}


def check_lengths(
    lengths: Any, q: Any, library: str, expected: tuple[int, ...] | None = None
) -> None:
    """Check the library, dtype and shape of ``lengths``."""
    lead = tuple(q.shape[:-3]) if expected is None else expected
    other = library_of(lengths, "lengths")
    if other != library:
        raise TypeError(f"lengths: got an array of {other}, expected {library} like q")
    shape, dtype = tuple(lengths.shape), dtype_name(lengths)
    mask = expected is None and dtype == "bool"
    if mask and shape != (*lead, q.shape[-2]):
        raise ValueError(
            f"lengths: got a mask of shape {shape}, expected {(*lead, q.shape[-2])}, True for a "
            "real position"
        )
    if not mask and (shape != lead or not dtype.startswith(("int", "uint"))):
        raise ValueError(
            f"lengths: got {dtype} of shape {shape}, expected integers {lead}, one for each "
            "sequence" + ("" if expected else f", or bool {(*lead, q.shape[-2])}")
        )


def check_counts(added: list[int], rows: int, room: list[int], lengths: list[int]) -> None:
    """Check new positions against those that arrays have, and against the capacity."""
    if not all(0 <= count <= rows for count in added):
        raise ValueError(f"lengths: got {added}, expected from 0 to {rows}, the positions of q")
    if any(count > left for count, left in zip(added, room, strict=True)):
        raise ValueError(
            f"q: got {max(added)} positions after {lengths}, expected at most {room}, which the "
            "capacity of the state leaves; call init with a larger one"
        )


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least
