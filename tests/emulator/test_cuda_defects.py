"""Planted defects of CUDA kernels: each is caught by the detectors in the emulator's README."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

if shutil.which("g++") is None:
    pytest.skip("no g++", allow_module_level=True)

from cuda_on_cpu import zoo
from cuda_on_cpu.zoo.__main__ import table
from cuda_on_cpu.zoo.observe import DETECTORS, observe

README = Path(__file__).parents[1] / "cuda_cpu" / "README.md"
#: The detectors of each sanitizer setting.
WAYS = {
    "": {"launch", "check", "result", "schedule"},
    "address": {"address", "undefined"},
    "thread": {"thread"},
}


@pytest.fixture(scope="module")
def listed():
    """Return the detectors by defect, from the table of the README."""
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*) \|$", README.read_text("utf-8"), re.MULTILINE)
    return {
        name: {d for d, mark in zip(DETECTORS, marks.split("|"), strict=True) if mark.strip()}
        for name, marks in rows
    }


@pytest.mark.parametrize("sanitize", WAYS, ids=["plain", "address", "thread"])
def test_detectors_are_those_listed(sanitize, listed):
    observed = observe(sanitize)
    assert {name: set(runs["planted"]) for name, runs in observed.items()} == {
        name: detectors & WAYS[sanitize] for name, detectors in listed.items()
    }
    assert {name: runs["correct"] for name, runs in observed.items() if runs["correct"]} == {}


def test_every_defect_is_caught(listed):
    assert len(zoo.DEFECTS) > 35
    assert set(listed) == set(zoo.DEFECTS)
    assert [name for name, detectors in listed.items() if not detectors] == []
    assert set().union(*listed.values()) == set(DETECTORS)


def test_the_table_lists_these_defects(listed):
    assert table(listed) in README.read_text("utf-8")
