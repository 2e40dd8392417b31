"""Backends with one planted defect each, which the conformance suite has to catch.

`MUTANTS` lists them; each class says what an author might get wrong. ``python -m mutants``
runs the suite on them and writes the table of docs/mutants.md.
"""

from __future__ import annotations

from .registry import MUTANTS, Mutant, register

__all__ = ["MUTANTS", "Mutant", "register"]
