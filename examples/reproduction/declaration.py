"""The declaration of the file of results: what `reproduction.results` checks a file against.

Keys that are not declared here may be there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

__all__ = ["CELLS", "File"]

_Positive = Annotated[float, Meta(gt=0)]
_Positives = Annotated[list[_Positive], Meta(min_length=1)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class _Digest(TypedDict):
    digest: Any


class File(TypedDict):
    """The whole file; its cells are declared by kind."""

    kind: str
    schema: Literal[1]
    created: str
    updated: str
    commits: list[str]
    protocol: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    data: dict[str, _Digest]
    cells: dict[str, dict[str, Any]]


class _Distances(TypedDict):
    maps: _Positives
    outputs: _Positives
    relative: _Positives


class _Training(TypedDict):
    epoch: _Positive
    epochs: _Positive
    validation_accuracy: _Share
    test_accuracy: _Share
    seconds: _Positive
    untrained: _Distances
    trained: _Distances


class _Tuning(TypedDict):
    loss: _Positive
    accuracy: _Share
    seconds: _Positive


class _Memory(TypedDict):
    mib: _Positive | None


class _Operations(TypedDict):
    attention: _Positive
    model: _Positive


class _Time(TypedDict):
    seconds: dict[str, _Positives]


#: The figures of a cell, by the first word of its name.
CELLS = {
    "tune": _Tuning,
    "train": _Training,
    "memory": _Memory,
    "flops": _Operations,
    "time": _Time,
}
