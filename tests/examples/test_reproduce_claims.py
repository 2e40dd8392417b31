"""Test what `examples/reproduce.py` concludes from planted figures."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
from reproduce import app
from reproduction.findings import findings
from reproduction.protocol import BASELINE, Cell
from reproduction.ranking import (
    critical_difference,
    detectable,
    friedman,
    hierarchical,
    holm,
    mean_ranks,
)
from reproduction.verdict import Estimate, combined, judge, sentence, together
from typer.testing import CliRunner

from pdcore.errors import Exit

scipy_stats = pytest.importorskip("scipy.stats")

SPECS = [BASELINE, "softmax+bn", "softmax+sh(half=2)"]
SIZES = [[128, 16], [512, 16]]
DATA = [*(f"Set{number}" for number in range(8)), "Digits", "MNIST"]


def planted(
    *,
    gain: float = 0.0,
    apart: float = 1.0,
    cost: float = 1.0,
    products: float = 1.0,
    seeds: int = 3,
    spread: float = 0.01,
) -> dict[str, Any]:
    """Return figures in which every spec differs from softmax by these amounts, plus noise."""
    rng = np.random.default_rng(0)

    def about(value: float) -> float:
        return float(value * math.exp(spread * rng.standard_normal()))

    cells: dict[str, Any] = {}
    for place, spec in enumerate(SPECS):
        changed = place > 0
        for seed in range(seeds):
            for data in DATA:
                result = {
                    measure: [about(apart**changed * layer) for layer in (1.0, 2.0)]
                    for measure in ("maps", "outputs", "relative")
                }
                cells[Cell("train", spec, data, seed).name] = {
                    "epoch": 5,
                    "epochs": 6,
                    "validation_accuracy": 0.5,
                    "seconds": 1.0,
                    "test_accuracy": 0.7 + gain * changed + 0.5 * spread * rng.standard_normal(),
                    "trained": result,
                    "untrained": result,
                }
        for length, dim in SIZES:
            for repeat in range(3):
                name = Cell("memory", spec, "", repeat, length, dim).name
                cells[name] = {"mib": about(10.0 * cost**changed)}
            cells[Cell("flops", spec, length=length, dim=dim).name] = {
                "attention": 1000,
                "model": round(2000 * products**changed),
            }
    for length, dim in SIZES:
        cells[Cell("time", length=length, dim=dim).name] = {
            "seconds": {
                spec: [about(0.1 * cost ** (place > 0)) for _ in range(9)]
                for place, spec in enumerate(SPECS)
            }
        }
    protocol = {"specs": SPECS, "sizes": SIZES, "seeds": list(range(seeds)), "repeats": 3}
    return {"protocol": protocol, "cells": cells}


def verdicts(record: dict[str, Any]) -> dict[str, set[str]]:
    """Return the verdicts of each claim as a set; the planted specs differ by noise only."""
    result = findings(record, DATA)
    every: dict[str, set[str]] = {"sentence": {row["verdict"] for row in result["sentences"]}}
    for claim in result["claims"]:
        every.setdefault(claim["claim"], set()).add(claim["verdict"])
    return every


def test_what_is_planted_for_the_claims_is_confirmed() -> None:
    result = verdicts(planted(gain=0.05, apart=1.5, cost=0.8, products=0.9))
    assert result == {key: {"confirmed"} for key in ("sentence", "accuracy", "redundancy", "cost")}


def test_what_is_planted_against_them_is_denied() -> None:
    result = verdicts(planted(gain=-0.05, apart=0.7, cost=1.2, products=1.1))
    assert result == {key: {"denied"} for key in ("sentence", "accuracy", "redundancy", "cost")}


def test_one_part_that_fails_denies_the_sentence() -> None:
    result = verdicts(planted(gain=0.05, apart=1.5, cost=1.2, products=1.1))
    assert result["accuracy"] == result["redundancy"] == {"confirmed"}
    assert result["cost"] == result["sentence"] == {"denied"}


def test_no_difference_is_not_shown() -> None:
    result = verdicts(planted(products=0.9, spread=0.03))
    assert result["accuracy"] == result["redundancy"] == {"not shown"}
    # Operations, which are exact, are fewer; time and memory are not.
    assert result["cost"] == {"in part"}
    assert result["sentence"] == {"not shown"}


def test_equal_operations_are_not_fewer() -> None:
    record = planted(gain=0.05, apart=1.5, cost=0.8)
    assert verdicts(record)["cost"] == {"in part"}
    parts = next(c for c in findings(record, DATA)["claims"] if c["claim"] == "cost")["parts"]
    operations = [part for part in parts if part["what"].startswith("operations")]
    assert [(p["value"], p["verdict"]) for p in operations] == [(1.0, "denied")] * 2


def test_a_system_that_does_not_tell_memory() -> None:
    record = planted(cost=0.8, products=0.9)
    for name, figures in record["cells"].items():
        if name.startswith("memory"):
            figures["mib"] = None
    result = findings(record, DATA)
    assert all(row["mib"] is None and row["memory_ratio"] is None for row in result["cost"])
    claim = next(c for c in result["claims"] if c["claim"] == "cost")
    assert claim["verdict"] == "confirmed"
    assert not any("memory" in part["what"] for part in claim["parts"])


def test_data_sets_that_are_missing_are_named_and_not_counted() -> None:
    record = planted(gain=0.05)
    for name in [n for n in record["cells"] if "MNIST" in n]:
        del record["cells"][name]
    result = findings(record, [name for name in DATA if name != "MNIST"])
    assert set(result["absent"]) == {"MNIST", "CIFAR-10", "ImageNet"}
    assert "MNIST" not in {row["data"] for row in result["accuracy"]}
    assert result["ranks"]["sets"] == len(DATA) - 1


@pytest.mark.parametrize(("gain", "first"), [(0.05, False), (-0.05, True)])
def test_ranks_follow_what_is_planted(gain: float, first: bool) -> None:
    result = findings(planted(gain=gain), DATA)
    order = [row["spec"] for row in result["ranking"]]
    assert (order[0] == BASELINE) is first
    others = [row for row in result["ranking"] if row["spec"] != BASELINE]
    assert {row["better" if gain > 0 else "worse"] for row in others} == {len(DATA)}
    # The smallest p of a two-sided test of ten signed ranks, for both attentions.
    assert [row["holm"] for row in others] == pytest.approx([2 * 2 / 2**10] * 2)
    assert result["ranks"]["friedman"] < 0.01
    assert all(row["detectable"] < abs(gain) for row in others)


def test_the_figures_are_those_of_the_cells() -> None:
    record = planted(gain=0.05, apart=1.5)
    result = findings(record, DATA)
    assert result["level"] == pytest.approx(1 - 0.05 / 2)
    row = next(r for r in result["accuracy"] if (r["data"], r["spec"]) == (DATA[1], SPECS[1]))
    accuracies, other = (
        [record["cells"][Cell("train", s, DATA[1], n).name]["test_accuracy"] for n in range(3)]
        for s in (SPECS[1], BASELINE)
    )
    assert row["mean"] == pytest.approx(np.mean(accuracies))
    assert row["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    # With one group the interval is Student's paired interval.
    paired = scipy_stats.ttest_rel(accuracies, other).confidence_interval(result["level"])
    assert row["difference"] == pytest.approx([np.mean(accuracies) - np.mean(other), *paired])


# --- ranks ------------------------------------------------------------------------------------


def test_the_critical_difference_is_that_of_the_example_of_demsar() -> None:
    # Four classifiers on 14 data sets, section 3.2.2.
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def test_ranks_and_the_test_of_them() -> None:
    accuracies = np.array([[0.9, 0.8, 0.8], [0.7, 0.6, 0.5], [0.4, 0.5, 0.3], [0.2, 0.1, 0.0]])
    result = mean_ranks(accuracies)
    assert result.tolist() == [1.25, 1.875, 2.875]
    sets, k = accuracies.shape
    # Section 3.2.1, with the correction for the one tie, and Iman and Davenport's F.
    chi = 12 * sets / (k * (k + 1)) * ((result**2).sum() - k * (k + 1) ** 2 / 4)
    chi /= 1 - (2**3 - 2) / (sets * k * (k**2 - 1))
    value = (sets - 1) * chi / (sets * (k - 1) - chi)
    expected = scipy_stats.f.sf(value, k - 1, (k - 1) * (sets - 1))
    assert friedman(accuracies) == pytest.approx(expected)
    assert friedman(np.ones((4, 3))) == 1.0
    assert friedman(np.tile([0.9, 0.8, 0.7], (5, 1))) == 0.0


def test_p_values_are_adjusted_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_bootstrap_covers_data_sets_and_seeds() -> None:
    rng = np.random.default_rng(3)
    draws = 1.0 + rng.standard_normal((200, 10, 1)) + rng.standard_normal((200, 10, 5))
    intervals = [hierarchical(x.tolist(), 0.95) for x in draws]
    covered = np.mean([low <= 1.0 <= high for _, low, high in intervals])
    # Of ten data sets a percentile interval covers a little less than its level.
    assert 0.85 <= covered <= 0.99
    # Seeds alone would give a tenth of the width here.
    same = hierarchical([[1.0, 2.0]] * 10, 0.95)
    apart = hierarchical([[float(place)] * 2 for place in range(10)], 0.95)
    assert same.high - same.low < 0.5 < 3.0 < apart.high - apart.low
    assert apart.value == pytest.approx(4.5)


def test_the_smallest_difference_that_could_be_shown_is_shown_so_often() -> None:
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((400, 12, 1))
    spread = float(noise.std())
    least = spread * np.mean([detectable(x.tolist(), 0.95) / x.std(ddof=1) for x in noise])
    shown = [scipy_stats.ttest_1samp((x + least).ravel(), 0.0).pvalue < 0.05 for x in noise]
    assert 0.72 <= np.mean(shown) <= 0.88
    assert detectable([[1.0, 2.0]], 0.95) == math.inf


# --- intervals --------------------------------------------------------------------------------


def test_the_interval_of_two_groups_is_that_of_welch() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(2, 1, 4).tolist(), rng.normal(0, 3, 6).tolist()
    result = combined([a, b], [1.0, -1.0], 0.9)
    theirs = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert result == pytest.approx((np.mean(a) - np.mean(b), theirs.low, theirs.high))


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    scales = np.array([0.5, 1.0, 2.0, 4.0])[:, None]
    draws = 1.0 + scales * rng.standard_normal((1500, 4, 3))
    covered = [
        low <= 1.0 <= high
        for _, low, high in (combined(d.tolist(), [0.25] * 4, 0.95) for d in draws)
    ]
    # Four standard errors; Welch's approximation covers more than its level.
    assert 0.93 <= np.mean(covered) <= 0.995


def test_values_that_are_all_the_same_have_no_interval() -> None:
    assert combined([[0.1, 0.1, 0.1]], [1.0], 0.95) == pytest.approx((0.1, 0.1, 0.1))
    assert combined([[0.0, 0.0]], [1.0], 0.95) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("groups", [[], [[1.0, 2.0], [1.0]]])
def test_a_group_without_a_variance_is_refused(groups: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="two or more in each"):
        combined(groups, [1.0] * len(groups), 0.95)


@pytest.mark.parametrize(
    ("low", "high", "more", "exact", "verdict"),
    [
        (0.1, 0.3, True, False, "confirmed"),
        (0.1, 0.3, False, False, "denied"),
        (-0.3, -0.1, True, False, "denied"),
        (-0.3, -0.1, False, False, "confirmed"),
        (-0.1, 0.1, True, False, "not shown"),
        (0.0, 0.1, True, False, "not shown"),
        (0.0, 0.0, False, True, "denied"),
        (-0.1, -0.1, False, True, "confirmed"),
    ],
)
def test_a_figure_is_judged_by_its_interval(
    low: float, high: float, more: bool, exact: bool, verdict: str
) -> None:
    result = judge(Estimate((low + high) / 2, low, high), 0.0, more=more, exact=exact)
    assert result == verdict


@pytest.mark.parametrize(
    ("parts", "claim", "joined"),
    [
        ("c", "confirmed", "confirmed"),
        ("cc", "confirmed", "confirmed"),
        ("cd", "in part", "denied"),
        ("cn", "in part", "not shown"),
        ("nd", "denied", "denied"),
        ("nn", "not shown", "not shown"),
        ("dd", "denied", "denied"),
        ("pn", "in part", "not shown"),
    ],
)
def test_several_verdicts_come_to_one(parts: str, claim: str, joined: str) -> None:
    words = {"c": "confirmed", "d": "denied", "n": "not shown", "p": "in part"}
    assert together([words[p] for p in parts]) == claim
    assert sentence([words[p] for p in parts]) == joined


# --- the command ------------------------------------------------------------------------------


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == Exit.MISSING
    words = "torch is not installed: pip install 'pdcore[cli,conformance,svr,torch]'"
    assert words in result.stderr.replace("\n", " ")
