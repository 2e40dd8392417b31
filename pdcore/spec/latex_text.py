"""Numbers, names and indices as LaTeX text."""

from __future__ import annotations

import re

__all__ = [
    "escape",
    "latex_number",
    "mask_note",
    "parameter_declaration",
    "ranges",
    "shifted",
    "tidy_numbers",
    "wrapped",
]


def latex_number(x: float) -> str:
    """Write a number as LaTeX mathematics, powers of ten included."""
    mantissa, _, exponent = f"{x:g}".partition("e")
    if not exponent:
        return mantissa
    power = f"10^{{{int(exponent)}}}"
    return power if mantissa == "1" else rf"{mantissa} \cdot {power}"


def parameter_declaration(name: str, shapes: tuple[tuple[str | int, ...], ...]) -> str:
    """Write the name of a parameter with its shapes."""
    forms = [", ".join("H_q" if n == "Hq" else str(n) for n in shape) for shape in shapes]
    written = r" \text{ or } ".join(f"({form})" for form in forms)
    return rf"\texttt{{{escape(name)}}} \text{{ of shape }} {written}"


def tidy_numbers(text: str) -> str:
    """Write 1e-05 as a power of ten, since TeX would set "e" as a letter, and "- -2" as "+ 2"."""

    def power(match: re.Match[str]) -> str:
        factor = "" if match[1] == "1" else rf"{match[1]} \cdot "
        return rf"{factor}10^{{{int(match[2])}}}"

    text = re.sub(r"(?<![\w\\.])(\d+(?:\.\d+)?)e([+-]?\d+)", power, text)
    return re.sub(r"- -(?=[\d.])", "+ ", text)


def shifted(name: str, by: int) -> str:
    """Write ``name + by``."""
    return name if not by else f"{name} {'+' if by > 0 else '-'} {abs(by)}"


def ranges(indices: tuple[int, ...]) -> str:
    """Write ascending indices as ranges, such as ``0, 2--5``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(f"{run[0]}--{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def wrapped(words: str, width: int = 64) -> list[str]:
    """Return the lines of a spec string, broken between words and escaped."""
    lines = [""]
    for word in words.split("+"):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines[-1] += "+"
            lines.append(word)
        else:
            lines[-1] += f"+{word}" if lines[-1] else word
    return [escape(line) for line in lines]


def escape(text: str) -> str:
    """Escape underscores."""
    return text.replace("_", r"\_")


def mask_note(pooled: bool) -> str:
    """Write that a mask of the call may remove keys from a set, or pooled keys."""
    return (
        r" \quad \text{(less those with a real key that a mask of the call denies)}"
        if pooled
        else r" \quad \text{(less those that a mask of the call denies)}"
    )
