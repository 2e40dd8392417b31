"""Backends with one planted defect each, which the conformance suite must catch.

`MUTANTS` lists them; the docstring of each class describes the defect. ``python -m mutants``
runs the suite on them and writes the table of docs/mutants.md.
"""

from __future__ import annotations

from .registry import MUTANTS, Mutant, register

__all__ = ["MUTANTS", "Mutant", "register"]
