"""Statistics of plans are exact, and wrong variants fail the same check."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Array, Case, PlainNumpy, normal_case
from rewrite_cases import caught, exact, padded, spread, within_budget

from pdcore.lowering import Summary
from pdcore.spec import Moments, Statistics


class DefectiveStatistics(PlainNumpy):
    """A backend whose statistics have one defect."""

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.defect = defect
        self.unpooled: dict[int, Array] = {}

    def pool(self, kind: str, x: Any, weights: Any) -> Any:
        self.unpooled[x.shape[-1]] = x
        return super().pool(kind, x, weights)

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        match self.defect:
            case "padding counted":
                mask = None
            case "over the keys before pooling":
                keys = self.unpooled.get(keys.shape[-1], keys)
            case "weighted by the length of the window":
                if self.unpooled:
                    counts = np.asarray([2, 2, 2, 1])
                    keys = np.repeat(keys, counts, axis=-2)
        final = dict(super().statistics(summary, keys, mask))
        match self.defect:
            case "one position early":
                final = {
                    n: np.concat([x[..., :1, :], x[..., :-1, :]], axis=-2) for n, x in final.items()
                }
            case "one position late":
                final = {
                    n: np.concat([x[..., 1:, :], x[..., -1:, :]], axis=-2) for n, x in final.items()
                }
            case "of the whole sequence":
                final = {n: np.broadcast_to(x[..., -1:, :], x.shape) for n, x in final.items()}
            case "of another head":
                final = {n: np.flip(x, axis=-3) for n, x in final.items()}
        return final


STATISTICS_DEFECTS = {
    "padding counted": [
        "bn(eps=0.3)",
        "bn(eps=0.3,statistics=batch)",
        "bn(eps=0.3,statistics=prefix)",
        "linear+bn(eps=0.3)",
    ],
    "over the keys before pooling": ["bn(eps=0.3)+sh(2,1)", "gaussian(0.3)+bn(eps=0.3)+sh(1,2)"],
    "weighted by the length of the window": ["bn(eps=0.3)+sh(2,2)"],
    "one position early": ["causal+bn(eps=0.3,statistics=prefix)"],
    "one position late": ["causal+bn(eps=0.3,statistics=prefix)"],
    "of the whole sequence": ["causal+bn(eps=0.3,statistics=prefix)"],
    "of another head": ["bn(eps=0.3)", "bn(eps=0.3,statistics=prefix)"],
}


@pytest.mark.parametrize(
    ("defect", "text"), [(d, t) for d, texts in STATISTICS_DEFECTS.items() for t in texts]
)
def test_statistics(defect: str, text: str) -> None:
    case = spread(normal_case(text))
    if defect == "padding counted":
        case = padded(case)
    exact(case, backend=DefectiveStatistics("none"))
    caught(case, backend=DefectiveStatistics(defect))


@pytest.mark.parametrize("text", ["bn(eps=0.3,statistics=batch)", "linear+bn(statistics=batch)"])
def test_batch_statistics_are_over_all_sequences(text: str) -> None:
    case = padded(spread(normal_case(text, lead=(2, 3))))
    exact(case)
    plan = case.plan()
    assert plan.summary is not None
    caught(case, replace(plan, summary=Summary(plan.summary.statistics, "sequence")))


class OnePass(Moments):
    """Moments with the variance computed as E[x^2] - E[x]^2."""

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: Any = None) -> Any:
        return sums_of_squares(self, keys, mask, xp.zeros_like(keys[..., :1, :]))


class ShiftedByTheFirstKey(Moments):
    """Moments with sums of x - x_0: good for a large mean, but x_0 may be an outlier."""

    def of(self, keys: Any, mask: Any, *, xp: Any, previous: Any = None) -> Any:
        return sums_of_squares(self, keys, mask, keys[..., :1, :])


def sums_of_squares(statistics: Moments, keys: Array, mask: Any, shift: Array) -> dict[str, Array]:
    state = Moments.of(statistics, keys, mask, xp=np)
    moved = keys - shift if mask is None else np.where(mask, keys - shift, np.float32(0.0))
    total = np.sum(moved, axis=-2, keepdims=True)
    return {**state, "m2": np.sum(moved * moved, axis=-2, keepdims=True) - total**2 / state["n"]}


def offset_keys(n: int = 512) -> Case:
    return normal_case("bn", n=8, m=n, d=8, mean=100.0, sd=0.1, dtype=np.float32)


def outlying_first_key() -> Case:
    """Return a case whose first key is at least 1e4 from the others."""
    case = normal_case("bn", n=8, m=512, d=8, dtype=np.float32)
    case.k[..., 0, :] = 1e4 * np.arange(1, 9)
    return case


def variance_error(statistics: Statistics, keys: Array, mask: Any = None) -> float:
    """Compute the largest relative error of the variance in float32."""
    state = statistics.of(keys, mask, xp=np)
    var = statistics.finalize(state, xp=np)["var"]
    where = True if mask is None else np.broadcast_to(mask, keys.shape)
    true = np.var(keys.astype(np.float64), axis=-2, keepdims=True, where=where)
    return float(np.max(np.abs(var - true) / true))


def test_the_variance_is_taken_in_two_passes() -> None:
    offset, outlier = offset_keys().k, outlying_first_key().k
    padding = np.arange(512)[:, None] > 0  # the outlier stands in padding
    two_passes, one_pass, shifted = Moments(), OnePass(), ShiftedByTheFirstKey()
    assert variance_error(two_passes, offset) < 1e-5
    assert variance_error(two_passes, outlier) < 1e-5
    assert variance_error(two_passes, outlier, padding) < 1e-5
    assert variance_error(one_pass, offset) > 0.1
    assert variance_error(shifted, offset) < 1e-3
    assert variance_error(shifted, outlier, padding) > 0.1


@pytest.mark.parametrize("make", [offset_keys, outlying_first_key])
def test_float32_statistics_stay_within_the_budget(make: Callable[[], Case]) -> None:
    assert within_budget(make()) <= 1.0


def test_one_pass_variance_leaves_the_budget() -> None:
    case = offset_keys()
    plan = case.plan()
    assert within_budget(case, replace(plan, summary=Summary(OnePass(), "sequence"))) > 10.0
