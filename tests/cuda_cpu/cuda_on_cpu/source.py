"""Where CUDA's language is not C++: declarations of shared memory, and kernels' names."""

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
    """Blank comments and literals out; every character stays where it is."""
    return _HIDDEN.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), code)


def _split(declaration: str) -> list[str]:
    """Split at the commas that are in no bracket."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(declaration):
        depth += (character in "(<[") - (character in ")>]")
        if character == "," and not depth:
            parts.append(declaration[start:i])
            start = i + 1
    return [*parts, declaration[start:]]


def _variables(declaration: str) -> list[tuple[str, str, str]]:
    """Return type, name and extent (``[32][33]`` or nothing) of what is declared."""
    first, *others = _split(declaration)
    found = re.fullmatch(
        r"(?P<type>.*[\s>*)])(?P<name>\w+)\s*(?P<extent>(?:\[.*\])?)\s*", first, re.S
    )
    if found is None:
        raise ValueError(f"__shared__{declaration}; is not understood: expected TYPE NAME[SIZE]")
    variables = [(found["type"], found["name"], found["extent"])]
    for other in others:
        more = re.fullmatch(r"\s*(\w+)\s*((?:\[.*\])?)\s*", other, re.S)
        if more is None:
            raise ValueError(f"__shared__{declaration}; is not understood: declare {other} apart")
        variables.append((found["type"], more[1], more[2]))
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
    made = []
    for i, (kind, name, extent) in enumerate(_variables(declaration)):
        struct = f"cuda_on_cpu_shared_{number}_{i}"
        made.append(f"struct {struct} {{ {kind} value{extent}; }}")
        made.append(f"auto& {name} = cuda_on_cpu::static_shared_as<{struct}>().value")
    return "; ".join(made)


def translate(code: str) -> str:
    """Turn declarations of shared memory into C++; every line keeps its number."""
    result, end = [], 0
    for number, found in enumerate(_SHARED.finditer(_without_hidden(code))):
        declaration = code[found.start("declaration") : found.end("declaration")]
        made = _dynamic(declaration) if found["extern"] else _static(declaration, number)
        lines = "\n" * (found[0].count("\n") - made.count("\n"))
        result += [code[end : found.start()], made, ";", lines]
        end = found.end()
    return "".join([*result, code[end:]])


def shared_alignment(code: str) -> int:
    """Return the greatest alignment that a declaration of dynamic shared memory asks for."""
    asked = [16]
    for found in _SHARED.finditer(_without_hidden(code)):
        if found["extern"]:
            asked += map(int, _ALIGNED.findall(found["declaration"]))
    return max(asked)


def kernel_names(code: str, expressions: Sequence[str]) -> list[str]:
    """Return the kernels that can be asked for: by expression, or declared `extern "C"`."""
    hidden = _without_hidden(code)
    # The literal "C" is blanked too, so it is looked for in the text itself.
    plain = [m[1] for m in _KERNEL.finditer(code) if hidden[m.start(1)] != " "]
    return list(dict.fromkeys([*expressions, *plain]))
