"""Every Python example of the README and of docs/ runs, and every public name is in one."""

from __future__ import annotations

import ast
import re

import pytest
from page_examples import FRAMEWORKS, PAGES, pages, program, run_page

import pdcore


@pytest.mark.parametrize("page", pages(None))
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, None)


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
