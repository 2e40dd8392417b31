"""Backends read plans: neither specs, nor the classes of kernels and normalizations."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import pdcore_backends
from pdcore import spec
from pdcore.spec.kernels import Kernel
from pdcore.spec.normalizations.base import Normalization

[ROOT] = map(Path, pdcore_backends.__path__)
FILES = sorted(ROOT.rglob("*.py"))
#: Names of `pdcore.spec` that describe a spec rather than a plan.
FORBIDDEN = {
    "AttentionSpec",
    "as_spec",
    "parse",
    *(
        name
        for name, value in vars(spec).items()
        if inspect.isclass(value) and issubclass(value, (Kernel, Normalization))
    ),
}


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="spec" | "normalization"):
                yield f"line {node.lineno}: {ast.unparse(node)}"
            case ast.ImportFrom(module=str(module)) if module.startswith("pdcore"):
                names = {alias.name for alias in node.names} & FORBIDDEN
                if names:
                    yield f"line {node.lineno}: imports {', '.join(sorted(names))}"


def test_the_names_are_found() -> None:
    assert {"Batch", "Elu", "Exponential", "FeatureMap", "Identity", "Normalization"} <= FORBIDDEN


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_backend_reads_no_spec(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "text",
    [
        "causal = plan.spec.support.causal",
        "word = request.spec.kernel.word",
        "if isinstance(step.normalization, own): pass",
        "from pdcore.spec import Batch, Moments",
        "from pdcore.extend import FeatureMap",
    ],
)
def test_what_the_check_is_for(text: str) -> None:
    assert list(offences(ast.parse(text)))
