"""What is run less of by day: `PDCORE_TESTS=nightly` has all of it."""

from __future__ import annotations

import os

from hypothesis import settings

__all__ = ["NIGHTLY", "examples"]

NIGHTLY = os.environ.get("PDCORE_TESTS") == "nightly"


def examples(count: int) -> settings:
    """Have Hypothesis draw so many examples at night, and a third of them by day."""
    return settings(max_examples=count if NIGHTLY else count // 3)
