"""Translate what is not C++ in CUDA sources: declarations of shared memory, names of kernels."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["kernel_names", "shared_alignment", "translate"]

_HIDDEN = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
_SHARED = re.compile(r"(?P<extern>\bextern\s+)?\b__shared__\b(?P<declaration>[^;{}]*);")
_KERNEL = re.compile(
    r"extern\s+\"C\"\s+__global__\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
    r"void\s+(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\s*\("
)
_ALIGNED = re.compile(r"(?:__align__|alignas)\s*\(\s*(\d+)\s*\)")


def _without_hidden(code: str) -> str:
    """Replace comments and literals by spaces; every other character keeps its position."""
    return _HIDDEN.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), code)


def _split(declaration: str) -> list[str]:
    """Split at the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(declaration):
        depth += (character in "(<[") - (character in ")>]")
        if character == "," and not depth:
            parts.append(declaration[start:i])
            start = i + 1
    return [*parts, declaration[start:]]


def _variables(declaration: str) -> list[tuple[str, str, str]]:
    """Return type, name and extent (``[32][33]`` or empty) of each declared variable."""
    first, *others = _split(declaration)
    match = re.fullmatch(
        r"(?P<type>.*[\s>*)])(?P<name>\w+)\s*(?P<extent>(?:\[.*\])?)\s*", first, re.S
    )
    if match is None:
        raise ValueError(f"__shared__{declaration}; is not understood: expected TYPE NAME[SIZE]")
    variables = [(match["type"], match["name"], match["extent"])]
    for other in others:
        further = re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])?)\s*", other, re.S)
        if further is None:
            raise ValueError(f"__shared__{declaration}; is not understood: declare {other} apart")
        variables.append((match["type"], further[1], further[2]))
    return variables


def _dynamic(declaration: str) -> str:
    [(kind, name, extent)] = _variables(declaration)
    if re.sub(r"\s", "", extent) != "[]":
        raise ValueError(
            f"extern __shared__{declaration}; expected an array without size, {name}[]"
        )
    aligned = _ALIGNED.search(kind)
    alignment = aligned[1] if aligned else "1"
    plain = _ALIGNED.sub("", kind).strip()
    return f"{plain}* const {name} = cuda_on_cpu::dynamic_shared_as<{plain}>({alignment})"


def _static(declaration: str, number: int) -> str:
    statements = []
    for i, (kind, name, extent) in enumerate(_variables(declaration)):
        struct = f"cuda_on_cpu_shared_{number}_{i}"
        statements.append(f"struct {struct} {{ {kind} value{extent}; }}")
        statements.append(f"auto& {name} = cuda_on_cpu::static_shared_as<{struct}>().value")
    return "; ".join(statements)


def translate(code: str) -> str:
    """Replace declarations of shared memory by C++; every line keeps its number."""
    result, end = [], 0
    for number, match in enumerate(_SHARED.finditer(_without_hidden(code))):
        declaration = code[match.start("declaration") : match.end("declaration")]
        statement = _dynamic(declaration) if match["extern"] else _static(declaration, number)
        lines = "\n" * (match[0].count("\n") - statement.count("\n"))
        result += [code[end : match.start()], statement, ";", lines]
        end = match.end()
    return "".join([*result, code[end:]])


def shared_alignment(code: str) -> int:
    """Return the greatest alignment of the declarations of dynamic shared memory."""
    alignments = [16]
    for match in _SHARED.finditer(_without_hidden(code)):
        if match["extern"]:
            alignments += map(int, _ALIGNED.findall(match["declaration"]))
    return max(alignments)


def kernel_names(code: str, expressions: Sequence[str]) -> list[str]:
    """Return the names of kernels: the name expressions, and those declared `extern "C"`."""
    hidden = _without_hidden(code)
    # The literal "C" is replaced by spaces as well, so search in the original text.
    plain = [m[1] for m in _KERNEL.finditer(code) if hidden[m.start(1)] != " "]
    return list(dict.fromkeys([*expressions, *plain]))
