"""Which backend runs a call: validation, selection, binding, explanation."""

from __future__ import annotations

from .explanation import Explanation, explain_request
from .selection import choose, reasons, resolve, select, use_backend
from .tracing import Traced, fixed, settler
from .validation import FLOATS, check_cotangent, finite_dropout, parameter_shape, validate

__all__ = [
    "Explanation",
    "FLOATS",
    "Traced",
    "check_cotangent",
    "choose",
    "explain_request",
    "finite_dropout",
    "fixed",
    "parameter_shape",
    "reasons",
    "resolve",
    "select",
    "settler",
    "use_backend",
    "validate",
]
