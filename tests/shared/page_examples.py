"""Every Python example of the README and of docs/ runs, and every public name is in one.

The fenced blocks marked ``python`` of one page are one program, run from top to bottom in an empty
folder. A block marked ``python torch``, ``python transformers``, ``python jax``,
``python jax_adapters`` or ``python svr`` runs in the tests of that framework, tests/project/, with
the plain blocks of its page.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FRAMEWORKS = ("torch", "transformers", "jax", "jax_adapters", "svr", "aeon")
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


def pages(framework: str | None) -> list[Any]:
    """Return the pages with blocks that run with `framework`, as parameters of a test."""
    return [
        pytest.param(page, id=page.relative_to(ROOT).as_posix())
        for page in PAGES
        if program(page, framework) is not None
    ]


def run_page(page: Path, framework: str | None) -> None:
    """Run the blocks of a page, in the current folder."""
    code = compile(program(page, framework) or "", str(page), "exec")
    exec(code, {"__name__": "__main__"})
