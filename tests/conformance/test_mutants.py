"""Every planted defect fails its case, and the backend without a defect passes all of them."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, register
from mutants.__main__ import TABLE, run
from mutants.registry import PARENT

from pdcore.plugins import registry as plugins

#: Defects that are not wrong numbers, and a part of the message of their case.
MESSAGES = {
    "silent_fall_back": "bias=unsupported",
    "work_handed_on": "asks backend numpy",
    "undeclared_refusal": "no gaussian kernel yet",
    "float32_for_float16": "got dtype float32, expected float16",
    "input_changed": "changed its input in place",
    "random_last_bit": "a second call with the same inputs differs",
    "row_depends_on_batch": "alone differs",
    "cotangent_changed": "changed its cotangent in place",
    "read_only_result": "is read-only or broadcast",
    "result_shares_an_input": "shares memory with the argument q",
    "random_for_many_rows": "a second call with the same inputs differs",
    "quadratic_memory": "expected memory of O(N + M)",
    "quadratic_memory_of_gradients": "expected memory of O(N + M)",
    "lse_in_sixteen_bits": "got dtype float16, expected float32",
    "drops_by_the_place_in_a_block": "weights are not as the stream has them",
    "skips": "raises SkipTest",
    "expects_failure": "raises XFailed",
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


def test_there_are_many_defects(caught):
    assert len(MUTANTS) > 90


def test_the_backend_without_a_defect_passes(caught):
    assert caught[PARENT]["bad"] == {}
    assert caught[PARENT]["ran"] == len({mutant.case for mutant in MUTANTS.values()})


def test_every_defect_fails_its_case(caught):
    for name, mutant in MUTANTS.items():
        bad = caught[f"mutant_{name}"]["bad"]
        assert list(bad) == [mutant.case], name
        ratio, message = bad[mutant.case]
        if name == "shared_scratch":
            assert message  # it depends on the inputs of the other thread
        elif name in MESSAGES:
            assert MESSAGES[name] in message, name
        else:
            assert ratio == "inf" or ratio > 1, (name, ratio, message)


def test_the_table_lists_these_mutants(caught):
    rows = [line.split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    listed = {row[0].removeprefix("| "): row for row in rows[1:]}
    assert set(listed) == set(MUTANTS)
    for name, mutant in MUTANTS.items():
        assert " ".join(mutant.cls.__doc__.split()) == listed[name][1]
        assert mutant.case in listed[name][2]
