"""The compile gate over programs: every built-in log kappa, and arrays of 16 bits.

A program is a variant of the source text of the kernels. `python tests/cuda/cuda_gate_programs.py`
writes its table of docs/cuda-kernels.md again: the most that the widest instantiations of a program
take.
"""

from __future__ import annotations

import re
from typing import Any

from cuda_gate import (
    ARCHITECTURES,
    FEATURES,
    PAGE,
    STATES,
    TEMPLATES,
    compiled,
    on_two_cores,
    write,
)

import pdcore
from pdcore.lowering import Scores, Signature, lower
from pdcore.spec import Expression
from pdcore_backends.cupy import feature_programs
from pdcore_backends.cupy.feature_programs import FeatureProgram
from pdcore_backends.cupy.programs import COLUMNS, STORED, Program

#: Calls whose log kappa, or weight, is not ``scale * s``.
SPECS = ("softmax(softcap=20)", "polynomial", "linear+sparse(9,2)", "alibi+relative(9)+labels(4)")
#: Every kernel at its widest, where registers are scarcest.
KERNELS = (*(name.format(COLUMNS[-1]) for name in TEMPLATES), "scores_bias", "scores_delta")
OF_FEATURES = (*(name.format(feature_programs.COLUMNS[-1]) for name in FEATURES), *STATES)
_START, _END = (
    "<!-- written by tests/cuda/cuda_gate_programs.py -->\n",
    "<!-- end of programs -->\n",
)
_ROW = re.compile(r"^\| (?P<what>[^|]+) \| (?P<cells>\d+ \| \d+ \| \d+ \| \d+) \|$", re.M)


def lowered(spec: str) -> Scores:
    """Give the contraction of a spec, at 64 features."""
    plan = lower(pdcore.parse(spec), Signature(64, 4, "float32", masked=False))
    assert isinstance(plan.contraction, Scores), spec
    return plan.contraction


def _program(spec: str) -> Program:
    """Return the program of a spec, with the scalars and tables that it declares."""
    shapes: dict[str, Any] = {p.name: p.shapes[0][1:] for p in pdcore.parse(spec).parameters()}
    scalars = tuple(name for name, sizes in shapes.items() if not sizes)
    tables = tuple((name, *(1, *sizes)[-2:]) for name, sizes in shapes.items() if sizes)
    return Program.of(lowered(spec), scalars, {}, tables)


def programs() -> dict[str, Program]:
    """Return the programs other than ``scale * s``, by their names on the page."""
    named = {f"`{spec}`": _program(spec) for spec in SPECS}
    for dtype in ("float16", "bfloat16"):
        stored = tuple((name, dtype) for name in STORED)
        named[f"`softmax`, arrays of {dtype}"] = Program("float", stored=stored)
        named[f"`linear`, arrays of {dtype}"] = FeatureProgram(
            "float", "features", stored=stored, phi="elu"
        )
    for scalar in ("float", "double"):
        named[f"`random_features` in {scalar}"] = FeatureProgram(scalar, "features", log=True)
    return named


def usage(program: Program) -> tuple[int, ...]:
    """Return the most registers by architecture, and the total of bytes spilled."""
    most, spilled = [], 0
    kernels = OF_FEATURES if isinstance(program, FeatureProgram) else KERNELS
    for arch in ARCHITECTURES:
        resources = [compiled(program.text(name), name, arch) for name in kernels]
        most.append(max(registers for registers, *_ in resources))
        spilled += sum(bytes_ for _, bytes_, _ in resources)
    return (*most, spilled)


def measured() -> dict[str, tuple[int, ...]]:
    """Compile every program."""
    known = programs()
    return on_two_cores(lambda name: usage(known[name]), list(known))


def written() -> dict[str, tuple[int, ...]]:
    """Return the table of the page."""
    page = PAGE.read_text(encoding="utf-8").partition(_START)[2].partition(_END)[0]
    return {row["what"]: tuple(map(int, row["cells"].split(" | "))) for row in _ROW.finditer(page)}


def expressions() -> set[Expression]:
    """Return the expressions of all programs."""
    return {p.expression for p in programs().values() if p.expression is not None}


def main() -> None:
    """Write the table of the page."""
    heads = ["program", *(f"registers, {a}" for a in ARCHITECTURES), "bytes spilled"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    lines += [f"| {what} | {' | '.join(map(str, use))} |" for what, use in measured().items()]
    write(_START, _END, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
