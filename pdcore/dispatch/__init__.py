"""Which backend runs a call: validation, selection, binding, explanation."""

from __future__ import annotations

from .arguments import explains_arguments, wrong_arguments
from .binding import NO_DROPOUT, NO_PARAMS, BoundAttention, Choice
from .cache import cached_bind
from .explanation import Explanation, explain_request
from .layout import HEADS_FIRST, Layout, heads_first
from .segments import ranges, segments_from_cu_seqlens, segments_from_lengths
from .selection import choose, reasons, resolve, select, use_backend
from .signatures import signature
from .validation import (
    FLOATS,
    check_cotangent,
    finite_dropout,
    parameter_shape,
    validate,
)

__all__ = [
    # arguments
    "explains_arguments",
    "wrong_arguments",
    # binding
    "BoundAttention",
    "Choice",
    "NO_DROPOUT",
    "NO_PARAMS",
    # cache
    "cached_bind",
    # layout
    "HEADS_FIRST",
    "Layout",
    "heads_first",
    # segments
    "ranges",
    "segments_from_cu_seqlens",
    "segments_from_lengths",
    # selection
    "choose",
    "reasons",
    "resolve",
    "select",
    "use_backend",
    # signatures
    "signature",
    # validation
    "FLOATS",
    "check_cotangent",
    "finite_dropout",
    "parameter_shape",
    "validate",
    # explanation
    "Explanation",
    "explain_request",
]
