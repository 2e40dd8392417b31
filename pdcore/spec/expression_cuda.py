"""An `Expression` as CUDA C++ source text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from .expression import Expression

__all__ = ["INFIX", "cuda_source"]

#: Operations written between their operands, in CUDA C++ as in Python.
INFIX = {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "div": "/",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
}
#: The CUDA function of an operation, without the suffix of its float variant.
_CUDA_CALLS = {
    "exp": "exp",
    "log": "log",
    "tanh": "tanh",
    "abs": "fabs",
    "maximum": "fmax",
    "pow": "pow",
}


def cuda_source(e: Expression, suffix: str) -> str:
    """Return CUDA C++ text of an expression; `suffix` is ``"f"`` for float, empty for double."""
    if e.op == "input":
        return str(e.value)
    if e.op == "const":
        value = float(e.value)  # type: ignore[arg-type]
        if math.isinf(value):
            infinity = (
                "__int_as_float(0x7f800000)"
                if suffix
                else ("__longlong_as_double(0x7ff0000000000000LL)")
            )
            return infinity if value > 0 else f"(-{infinity})"
        text = f"{value!r}{suffix}"
        return f"({text})" if value < 0 else text
    if e.op == "entry":
        raise UnsupportedError(
            f"{e}: an entry has CUDA text only in a kernel that knows where its table lies"
        )
    args = [cuda_source(a, suffix) for a in e.args]
    if e.op == "where":
        return f"({args[0]} ? {args[1]} : {args[2]})"
    if e.op == "pow" and e.args[1].value == 2.0:
        return f"({args[0]} * {args[0]})"  # exact, and faster than `pow` of a negative base
    if e.op in INFIX:
        return f"({args[0]} {INFIX[e.op]} {args[1]})"
    return f"{_CUDA_CALLS[e.op]}{suffix}({', '.join(args)})"
