"""The covering array of the suite: what it covers, and what the record says of it."""

from __future__ import annotations

from itertools import combinations

import pytest

from pdcore.backend import FEATURES
from pdcore_conformance.judge import user_axes
from pdcore_conformance.judge.combinations import AXES, TRIPLES, Combinations, build_call
from pdcore_conformance.judge.subject import CORE
from pdcore_conformance.runner.conforming import conform, list_cases


@pytest.fixture(scope="module")
def whole() -> Combinations:
    # Not at import: the words would be known to the tests of other modules.
    user_axes.register()
    return Combinations(frozenset(FEATURES))


def test_every_allowed_combination_is_in_a_row(whole: Combinations) -> None:
    pairs, all_pairs, triples, all_triples = whole.covered(whole.rows)
    assert (pairs, triples) == (all_pairs, all_triples)
    missing = {target for target in whole.targets if not any(row.has(target) for row in whole.rows)}
    assert not missing
    assert all_pairs > 2500
    assert all_triples > 900
    assert len(whole.rows) < all_pairs / 5


def test_a_row_less_covers_less(whole: Combinations) -> None:
    pairs, _, triples, _ = whole.covered(whole.rows)
    fewer = whole.covered(whole.rows[:-1])
    assert fewer[0] + fewer[2] < pairs + triples


def test_the_rows_follow_from_the_seed(whole: Combinations) -> None:
    again = Combinations(frozenset(FEATURES))
    assert [row.call.label for row in again.rows] == [row.call.label for row in whole.rows]
    assert Combinations(frozenset(FEATURES), 1).rows != whole.rows


def test_every_value_is_allowed_beside_the_defaults(whole: Combinations) -> None:
    groups = {axis for group in (*combinations(AXES, 2), *TRIPLES) for axis in group}
    assert groups == set(AXES)
    singles = {pair for target in whole.targets for pair in target}
    assert singles == {(axis, i) for axis, values in AXES.items() for i in range(len(values) + 1)}


def test_rows_need_only_what_is_declared(whole: Combinations) -> None:
    core = Combinations(CORE)
    assert core.rows
    assert all(set(row.call.features()) <= CORE for row in core.rows)
    assert {row.through for row in core.rows} == {"forward"}


def test_what_makes_no_sense_is_not_built(whole: Combinations) -> None:
    assert build_call(("linear", {"bias": "full"})) is None
    assert build_call(("sh(1,2)", {"heads": 8, "key_heads": 1})) is None
    assert build_call(("h(one)", "bn(eps=0.1,statistics=prefix)")) is None


def test_the_record_counts_what_passed() -> None:
    names = [name for name in list_cases("numpy", level="core") if "combination[" in name]
    run, code = conform("numpy", level="core", cases=names)
    assert run is not None
    assert code == 0
    pairs, all_pairs = run["coverage"]["pairs"]
    assert pairs == all_pairs
    half, _ = conform("numpy", level="core", cases=names[::2])
    assert half is not None
    assert half["coverage"]["pairs"][0] < all_pairs
