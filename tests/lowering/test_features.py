"""The contraction by features is exact, and wrong variants fail the same check."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Array, PlainNumpy, cotangents, normal_case
from rewrite_cases import caught, exact, forward_only, padded, spread, with_transform

from pdcore.backend import feature_contraction
from pdcore.lowering import FeatureRows, Features, Rows, Scores, Signature, lower
from pdcore.spec import Visibility, parse

FEATURES = [
    "linear",
    "relu+h(count)",
    "random_features(6,1)+h(one)",
    "linear+bn(eps=0.3)+sh(1,2)",
    "linear+causal",
    "random_features(6,1)+causal+sh(2,3)",
    "relu+causal+h(one)",
]


@pytest.mark.parametrize("text", FEATURES)
def test_features_are_scores_of_their_products(text: str) -> None:
    case = spread(normal_case(text))
    exact(case)
    exact(padded(case))
    plan = case.plan()
    c = plan.contraction
    assert isinstance(c, Features)
    scores = Scores("log_features" if c.log else "features")
    exact(padded(case), replace(plan, contraction=scores))
    caught(case, replace(plan, contraction=Scores("log")))  # exp(phi.phi)
    other = replace(c, log=not c.log)
    caught(case, replace(plan, contraction=other))


@pytest.mark.parametrize("text", ["linear", "random_features(6,1)+h(count)", "relu+causal"])
def test_masked_features_run_as_scores(text: str) -> None:
    case = spread(normal_case(text))
    mask = np.random.default_rng(3).random((5, 7)) < 0.6
    case = replace(case, call={**case.call, "mask": mask})
    plan = case.plan()
    assert isinstance(plan.contraction, Scores)
    exact(case)
    without = lower(case.spec, Signature(3, 2, "float64", masked=False))
    assert isinstance(without.contraction, Features)
    caught(case, without)


@pytest.mark.parametrize(
    "text",
    [
        "linear+sparse(2,1)",
        "linear+sparse(inf,1)",
        "random_features(6,1)+sparse(3,inf)",
        "relu+causal+sparse(3,3)",
    ],
)
def test_features_in_a_window_run_as_scores(text: str) -> None:
    case = spread(normal_case(text, n=9, m=9))
    plan = case.plan()
    assert isinstance(plan.contraction, Scores)
    exact(case)
    log_domain = plan.contraction.weight == "log_features"
    caught(case, replace(plan, contraction=Features(plan.spec.kernel, log=log_domain)))


def test_a_window_to_the_right_of_causal_is_no_window() -> None:
    plan = lower(parse("linear+causal+sparse(inf,4)"), Signature(3, 2, "float64"))
    assert isinstance(plan.contraction, Features)
    exact(normal_case("linear+causal+sparse(inf,4)", n=9, m=9))


LONG_CAUSAL = ["linear+causal", "random_features(6,1)+causal+h(count)", "relu+causal+sh(1,3)"]


@pytest.mark.parametrize("offset", [0, 40, -30, "array", "end"])
@pytest.mark.parametrize("text", LONG_CAUSAL)
@pytest.mark.sampled(3)
def test_causal_features_over_several_chunks(text: str, offset: Any) -> None:
    case = spread(normal_case(text, n=150, m=170))
    if offset == "array":
        offset = np.asarray([3, -70])
    exact(padded(replace(case, call={**case.call, "offset": offset})))


def both_gradients(text: str, offset: Any) -> list[dict[str, Array]]:
    """Compute the gradients of a contraction by features, and of the same by scores."""
    case = padded(spread(normal_case(text, n=190, m=170)))
    case = replace(case, call={**case.call, "offset": offset})
    plan = case.plan()
    assert isinstance(plan.contraction, Features)
    weight = "log_features" if plan.contraction.log else "features"
    grads = []
    with np.errstate(all="ignore"):
        for variant in (plan, replace(plan, contraction=Scores(weight))):
            _, lse, vjp = PlainNumpy().attention_vjp(variant, case.inputs())
            grads.append(vjp(*cotangents(case, lse)))
    return grads


@pytest.mark.parametrize("offset", [0, 40, -30, "array", "end"])
@pytest.mark.parametrize("text", LONG_CAUSAL)
@pytest.mark.sampled(3)
def test_causal_gradients_over_several_chunks(
    text: str, offset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = np.asarray([3, -70]) if offset == "array" else offset
    got, want = both_gradients(text, offset)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=0, atol=1e-11 * np.max(np.abs(x)))
    # All rows of a window see the same pooled keys, so a chunk of keys meets many chunks of rows.
    true = feature_contraction.prefix_contract

    def narrow(*arguments: Any, **options: Any) -> Any:
        return true(*arguments, **{**options, "step": 1})

    monkeypatch.setattr(feature_contraction, "prefix_contract", narrow)
    wrong, _ = both_gradients(text, offset)
    same = all(np.allclose(wrong[n], x, rtol=0, atol=1e-6) for n, x in want.items())
    assert same != ("sh(" in text)


@pytest.mark.parametrize("text", LONG_CAUSAL)
def test_a_state_of_one_chunk_too_many_is_caught(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = spread(normal_case(text, n=150, m=170))
    true = feature_contraction._running

    def inclusive(*arguments: Any) -> Any:
        states, tops = true(*arguments)
        later = [
            None if x is None else np.concat([x[..., 1:, :, :], x[..., -1:, :, :]], axis=-3)
            for x in (states, tops)
        ]
        return tuple(later)

    monkeypatch.setattr(feature_contraction, "_running", inclusive)
    caught(case)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize(
    "text", ["linear+causal", "random_features(6,1)+causal", "causal+bn(eps=0.3,statistics=prefix)"]
)
def test_prefixes_off_by_one_are_caught(
    text: str, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = spread(normal_case(text, n=7, m=7))
    true, true_first = Visibility.prefix_counts, Visibility.first_prefix

    def moved(self: Visibility, start: int, stop: int, ahead: int = 0) -> Any:
        return np.clip(true(self, start, stop, ahead) + shift, 0, self.keys)

    def moved_first(self: Visibility, row: int) -> Any:
        first = true_first(self, row)
        return None if first is None else max(0, min(first + shift, self.keys))

    exact(case)
    monkeypatch.setattr(Visibility, "prefix_counts", moved)
    monkeypatch.setattr(Visibility, "first_prefix", moved_first)
    caught(case)


@dataclass(frozen=True)
class DefectiveFeatures:
    inner: FeatureRows
    defect: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        right, _ = self.inner(rows, state, params, xp=xp)
        if self.defect == "queries alone":
            return forward_only(right._replace(k=rows.k))
        return forward_only(right._replace(q=right.q + 1e-6))


@pytest.mark.parametrize("text", ["linear", "relu", "random_features(3,1)"])
def test_feature_maps_on_one_side_are_caught(text: str) -> None:
    case = spread(normal_case(text))
    inner = case.plan().transforms[-1]
    assert isinstance(inner, FeatureRows)
    at = len(case.plan().transforms) - 1
    caught(case, with_transform(case, DefectiveFeatures(inner, "queries alone"), at))
    caught(case, with_transform(case, DefectiveFeatures(inner, "queries off by 1e-6"), at))
