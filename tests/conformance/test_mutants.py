"""Every planted defect is caught, by the case that tells what it is; what is right is not."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, register
from mutants.__main__ import TABLE, run
from mutants.registry import PARENT

from pdcore.plugins import registry as plugins

#: Defects that are not of numbers, and what is said of them.
SAID = {
    "silent_fall_back": "bias=unsupported",
    "work_handed_on": "asks backend numpy",
    "undeclared_refusal": "no gaussian kernel yet",
    "float32_for_float16": "got dtype float32, expected float16",
    "input_changed": "changed its input in place",
    "random_last_bit": "a second call with the same inputs differs",
    "row_depends_on_batch": "alone differs",
}


@pytest.fixture(scope="module")
def caught():
    names = set(plugins.registered())
    register()
    try:
        runs = [(f"mutant_{name}", [mutant.case]) for name, mutant in MUTANTS.items()]
        runs.append((PARENT, sorted({mutant.case for mutant in MUTANTS.values()})))
        yield run(runs)
    finally:
        for name in set(plugins.registered()) - names:
            plugins.unregister_backend(name)


def test_there_are_many(caught):
    assert len(MUTANTS) > 40


def test_what_is_right_passes(caught):
    assert caught[PARENT]["bad"] == {}
    assert caught[PARENT]["ran"] == len({mutant.case for mutant in MUTANTS.values()})


def test_every_defect_is_caught_by_the_case_that_tells(caught):
    for name, mutant in MUTANTS.items():
        bad = caught[f"mutant_{name}"]["bad"]
        assert list(bad) == [mutant.case], name
        ratio, message = bad[mutant.case]
        if name == "shared_scratch":
            assert message  # whatever the other thread's inputs lead to
        elif name in SAID:
            assert SAID[name] in message, name
        else:
            assert ratio == "inf" or ratio > 1, (name, ratio, message)


def test_the_table_is_of_these_mutants(caught):
    rows = [line.split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    listed = {row[0].removeprefix("| "): row for row in rows[1:]}
    assert set(listed) == set(MUTANTS)
    for name, mutant in MUTANTS.items():
        assert " ".join(mutant.cls.__doc__.split()) == listed[name][1]
        assert mutant.case in listed[name][2]
