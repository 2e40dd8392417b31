"""Which backend runs a call: validation, selection, binding, explanation."""

from __future__ import annotations

from .explanation import Explanation, explain_request
from .selection import choose, reasons, resolve, select, use_backend
from .tracing import TracedSelections, concrete_size, make_traced_selector
from .validation import FLOATS, check_cotangent, finite_dropout, parameter_shape, validate

__all__ = [
    "Explanation",
    "FLOATS",
    "TracedSelections",
    "check_cotangent",
    "choose",
    "explain_request",
    "finite_dropout",
    "concrete_size",
    "parameter_shape",
    "reasons",
    "resolve",
    "select",
    "make_traced_selector",
    "use_backend",
    "validate",
]
