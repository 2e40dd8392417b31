"""What the processes of a run on a GPU share: the names of steps, and what a step returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..judge.subject import Evidence

__all__ = ["GROUP", "Found", "NotHere", "Step", "case_of"]

#: The group of these cases in the record.
GROUP = "device"

#: Evidence to judge a step by, and what it found, for the log.
Found = tuple[Evidence | None, dict[str, Any]]
#: From the name of a step.
Step = Callable[[str], Found]


class NotHere(Exception):  # noqa: N818 - no error: the step asks for what the machine lacks
    """A step asks for what the machine does not have."""


def case_of(stage: str, name: str) -> str:
    """Return the id of a step's case in the record."""
    return f"{GROUP}::{stage}[{name}]"
