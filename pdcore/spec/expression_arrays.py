"""The operations of an `Expression` on arrays."""

from __future__ import annotations

from typing import Any

__all__ = ["apply_operation"]


def apply_operation(op: str, args: list[Any], like: Any, xp: Any) -> Any:
    """Apply an operation by its name; `like` is an array of the dtype of the result."""
    if op in ("where", "maximum"):
        # Unlike + and *, these two functions do not take Python floats.
        args = [xp.full_like(like, a) if isinstance(a, float) else a for a in args]
        return xp.where(*args) if op == "where" else xp.maximum(*args)
    a, *rest = args
    if op == "log" and not isinstance(a, float):
        # Both branches are finite, so that automatic differentiation computes the derivative 0
        # of a kernel that is 0 there, and not 0 times infinity.
        zero = a == 0
        inner = xp.log(xp.where(zero, xp.ones_like(a), a))
        return xp.where(zero, xp.full_like(a, -xp.inf), inner)
    if not rest:
        return getattr(xp, op)(a)
    b = rest[0]
    match op:
        case "add":
            return a + b
        case "sub":
            return a - b
        case "mul":
            return a * b
        case "div":
            return a / b
        case "pow":
            return a**b
        case "lt":
            return a < b
        case "le":
            return a <= b
        case "gt":
            return a > b
    return a >= b
