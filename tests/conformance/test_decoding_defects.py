"""Defects of carried state, planted in the code that all backends share: the suite catches each."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pdcore.decoding import groups, statistics
from pdcore_conformance.runner.conforming import conform

SIZES = "rows=13-keys=13"
PREFIX = "causal+bn(statistics=prefix)"
SPLITS = "decoding::splits_give_the_rows_of_one_call"
TRUNCATION = "decoding::truncation_takes_positions_back"
LENGTHS = "decoding::each_sequence_has_its_own_length"


def by_squares(a: Any, b: Any, xp: Any) -> Any:
    """Moments as differences of sums of squares, of keys that are relative to no point."""
    n = a["n"] + b["n"]
    mean = (a["n"] * a["mean"] + b["n"] * b["mean"]) / xp.where(n > 0, n, xp.ones_like(n))
    squares = sum(x["m2"] + x["n"] * x["mean"] ** 2 for x in (a, b))
    low = xp.zeros_like(mean)
    return {"n": n, "mean": mean, "mean_low": low, "m2": squares - n * mean**2, "m2_low": low}


def wider(*arguments: Any) -> Any:
    """Windows of one key more."""
    return [replace(g, left=g.left + 1) for g in OF(*arguments)]


def zero(old: Any, k: Any, at: Any, count: Any, xp: Any) -> Any:
    """Zero in place of the first key."""
    return xp.zeros_like(old)


def first_of_the_call(old: Any, k: Any, at: Any, count: Any, xp: Any) -> Any:
    """The first key of each call in place of that of the sequence."""
    return k[..., :1, :] if k.shape[-2] else old


def not_selected(self: Any, state: Any, *arguments: Any) -> Any:
    """Sums that a truncation leaves as they are."""
    new = TRUNCATED(self, state, *arguments)
    return {n: state[n] if n.startswith(("sums", "top")) else x for n, x in new.items()}


def last_rows(old: Any, new: Any, count: Any, xp: Any) -> Any:
    """The last rows of a call, of padding too."""
    return xp.concat([old, new], axis=-2)[..., new.shape[-2] :, :]


OF, TRUNCATED = groups.HeadGroup.of, groups.HeadGroup.truncated
DEFECTS: dict[str, Any] = {
    "moments_by_subtraction": (
        ((statistics, "merged", by_squares), (groups, "first_key", zero)),
        f"{SPLITS}[{PREFIX}-float32-{SIZES}-draw=far]",
    ),
    "window_off_by_one": (
        ((groups.HeadGroup, "of", staticmethod(wider)),),
        f"{SPLITS}[causal+sparse(3,inf)-float32-{SIZES}]",
    ),
    "first_key_of_the_call": (
        ((groups, "first_key", first_of_the_call),),
        f"{SPLITS}[{PREFIX}-float32-{SIZES}]",
    ),
    "sums_not_selected": (
        ((groups.HeadGroup, "truncated", not_selected),),
        f"{TRUNCATION}[causal+linear-float64-{SIZES}]",
    ),
    "padding_in_the_taps": (
        ((groups, "kept", last_rows),),
        f"{LENGTHS}[causal+conv1d(padding=causal)+sh(1,3)-float32-{SIZES}]",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_suite_catches_a_defect(monkeypatch: pytest.MonkeyPatch, defect: str) -> None:
    plants, case = DEFECTS[defect]
    for plant in plants:
        monkeypatch.setattr(*plant)
    run, _ = conform("numpy", cases=[case])
    assert run is not None
    assert [c["outcome"] for c in run["cases"]] == ["failed"]


def test_the_cases_pass_without_a_defect() -> None:
    run, _ = conform("numpy", cases=[case for _, case in DEFECTS.values()])
    assert run is not None
    assert {c["outcome"] for c in run["cases"]} == {"passed"}
