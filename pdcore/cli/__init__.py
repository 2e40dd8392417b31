"""The console script ``pdcore``."""

from __future__ import annotations
