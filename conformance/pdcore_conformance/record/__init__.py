"""The JSON record of a run: its types, its writing and reading."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pdcore.moved import attribute as _attribute

from .checking import json_schema
from .compact import CompactRecord
from .writing import (
    KIND,
    OUTCOMES,
    SCHEMA,
    Case,
    Environment,
    Figure,
    Gpu,
    Growth,
    Memory,
    MissingPeer,
    Numerics,
    Outcome,
    Ratio,
    Record,
    RecordError,
    Run,
    Speed,
    Verdict,
    load,
    merge,
    new_run,
    revision,
    run_alone,
    save,
    target,
)

__all__ = [
    "KIND",
    "OUTCOMES",
    "SCHEMA",
    "Case",
    "CompactRecord",
    "Environment",
    "Figure",
    "Gpu",
    "Growth",
    "Memory",
    "MissingPeer",
    "Numerics",
    "Outcome",
    "Ratio",
    "Record",
    "RecordError",
    "Run",
    "Speed",
    "Verdict",
    "json_schema",
    "load",
    "merge",
    "new_run",
    "revision",
    "run_alone",
    "save",
    "target",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        return _attribute(__name__, name)  # a name of 0.1
