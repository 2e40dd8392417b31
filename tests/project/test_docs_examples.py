"""Every Python example of the README and of docs/ runs, and every public name is in one.

The fenced blocks marked ``python`` of one page are one program, run from top to bottom in an empty
folder. A block marked ``python torch``, ``python transformers``, ``python jax``,
``python jax_adapters`` or ``python svr`` runs in the tests of that framework, with the plain blocks
of its page.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pdcore

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FRAMEWORKS = ("torch", "transformers", "jax", "jax_adapters", "svr")
# At the start of a line: an indented block could not keep its line numbers, and is refused below.
FENCE = re.compile(r"^```python *(?P<needs>[^\n]*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def program(page: Path, framework: str | None) -> str | None:
    """Return the page's blocks that run with `framework`, each line where it is in the page.

    None if no block of the page calls for this framework (or, without one, if it has no block).
    """
    text = page.read_text(encoding="utf-8")
    lines = [""] * (text.count("\n") + 1)
    wanted = False
    blocks = list(FENCE.finditer(text))
    if len(blocks) != text.count("```py"):
        raise ValueError(f"{page}: a Python block that is indented, or not marked ``python``")
    for block in blocks:
        needs = block["needs"].strip() or None
        if needs is not None and needs not in FRAMEWORKS:
            raise ValueError(f"{page}: a python block marked {needs!r}; known: {FRAMEWORKS}")
        wanted = wanted or needs == framework
        if needs in (None, framework):
            first = text.count("\n", 0, block.start("code"))
            code = block["code"].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n" if wanted else None


def cases():
    for page in PAGES:
        for framework in (None, *FRAMEWORKS):
            if program(page, framework) is None:
                continue
            marks = [getattr(pytest.mark, framework)] if framework else []
            name = page.relative_to(ROOT).as_posix() + (f"-{framework}" if framework else "")
            yield pytest.param(page, framework, marks=marks, id=name)


@pytest.mark.parametrize(("page", "framework"), list(cases()))
def test_examples_run(page, framework, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = compile(program(page, framework), str(page), "exec")
    exec(code, {"__name__": "__main__"})


def names_used() -> set[str]:
    """Return every name and attribute in the examples of the pages and of pdcore's docstrings."""
    used = set()
    for page in PAGES:
        for framework in (None, *FRAMEWORKS):
            for node in ast.walk(ast.parse(program(page, framework) or "")):
                if isinstance(node, ast.Attribute):
                    used.add(node.attr)
                elif isinstance(node, ast.Name):
                    used.add(node.id)
    for name in pdcore.__all__:
        lines = (getattr(pdcore, name).__doc__ or "").splitlines()
        example = "\n".join(line for line in lines if line.lstrip().startswith((">>>", "...")))
        if re.search(rf"\b{re.escape(name)}\b", example):
            used.add(name)
    return used


def test_every_public_name_is_in_an_example():
    public = {name for name in pdcore.__all__ if not name.startswith("_")}
    assert not public - names_used()
