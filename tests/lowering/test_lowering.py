"""The rewrites of heads and normalisers are exact, and `Plan.steps` describes a plan."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference_cases import INF, PlainNumpy, check_forward, normal_case, run
from rewrite_cases import caught, exact, padded, spread

from pdcore.lowering import Group, Signature, lower
from pdcore.spec import HeadScaling, Visibility, parse

SCALED = [
    "sh(1,2,1)",
    "sh(3,1,2)+h(count)",
    "linear+sh(2,1,2)+causal",
    "bn(eps=0.3)+sh(2,3,2)",
    "sh(2,1,3,pool=first)+sparse(4,4)",
]


@pytest.mark.parametrize("text", SCALED)
def test_heads_of_equal_scale_run_as_one_call(text: str) -> None:
    case = spread(normal_case(text, heads=3, m=8, n=8))
    exact(case)
    exact(padded(case))
    plan = case.plan()
    assert sorted(h for g in plan.groups for h in g.heads) == [0, 1, 2]
    assert len({g.scale for g in plan.groups}) == len(plan.groups)
    # Each head gets the scale of the next head.
    scales = case.spec.heads.scales
    wrong = tuple(Group(g.scale, tuple((h + 1) % 3 for h in g.heads)) for g in plan.groups)
    assert any(scales[h] != g.scale for g in wrong for h in g.heads)
    caught(case, replace(plan, groups=wrong))
    # Heads of a group joined in the wrong order. Exchanging two heads in `groups` would not do, as
    # `join` undoes the permutation, so exchange the keys of two heads.
    if any(len(g.heads) > 1 for g in plan.groups):
        (first, second), *_ = [g.heads for g in plan.groups if len(g.heads) > 1]
        order = list(range(3))
        order[first], order[second] = second, first
        mixed = replace(case, k=case.k[:, order], v=case.v[:, order])
        out, lse = run(PlainNumpy(), mixed)
        with pytest.raises(AssertionError):
            check_forward(case, out, lse)


@pytest.mark.parametrize("text", ["sh(half=2)", "bn(eps=0.3)+sh(half=3,pool=first)"])
@pytest.mark.parametrize("defect", ["the first half", "one more head", "every second head"])
def test_half_scales_the_last_half(text: str, defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for heads in (1, 2, 3, 5):
        exact(padded(spread(normal_case(text, heads=heads, m=8, n=8))))

    def wrong(self: HeadScaling, heads: int) -> HeadScaling:
        last = {
            "the first half": range(heads // 2),
            "one more head": range(heads // 2, heads),
            "every second head": range(1, heads, 2),
        }[defect]
        scales = tuple(self.half or 1 if h in last else 1 for h in range(heads))
        return HeadScaling(scales, self.pool)

    monkeypatch.setattr(HeadScaling, "for_heads", wrong)
    caught(padded(spread(normal_case(text, heads=3, m=8, n=8))))


def test_query_heads_share_key_heads_in_blocks() -> None:
    case = spread(normal_case("softmax", heads=2, group=3))
    exact(case)
    strided = [0, 2, 4, 1, 3, 5]  # query head i with key head i % 2
    out, lse = run(PlainNumpy(), replace(case, q=case.q[:, strided]))
    back = np.argsort(strided)
    with pytest.raises(AssertionError, match="out"):
        check_forward(case, out[:, back], lse[:, back])


class DefectivePool(PlainNumpy):
    """A backend whose pooling has one defect."""

    def __init__(self, defect: str) -> None:
        super().__init__()
        self.defect = defect

    def pool(self, kind: str, x: Any, weights: Any) -> Any:
        scale = weights.shape[-1]
        if self.defect == "divided by the scale":
            weights = np.where(weights > 0, 1.0 / scale, 0.0)
        if self.defect == "sums":
            weights = np.where(weights > 0, 1.0, 0.0)
        if self.defect == "last window dropped":
            weights = np.concat([weights[..., :-1, :], 0.0 * weights[..., -1:, :]], axis=-2)
        if self.defect == "the other pool":
            first = np.cumsum(weights > 0, axis=-1) * (weights > 0) == 1
            if (np.sum(weights > 0, axis=-1) > 1).any():
                weights = np.where(first, 1.0, 0.0)
        return super().pool(kind, x, weights)


@pytest.mark.parametrize(
    "defect", ["divided by the scale", "sums", "last window dropped", "the other pool"]
)
@pytest.mark.parametrize("text", ["sh(1,3)", "bn(eps=0.3)+sh(3,3)", "linear+sh(2,3)"])
def test_pooling(text: str, defect: str) -> None:
    case = padded(spread(normal_case(text, m=8)))
    exact(case, backend=DefectivePool("none"))
    caught(case, backend=DefectivePool(defect))


def test_the_pool_of_the_plan() -> None:
    case = padded(spread(normal_case("sh(1,3)")))
    caught(case, replace(case.plan(), pool="first"))
    case = padded(spread(normal_case("sh(1,3,pool=first)")))
    exact(case)
    caught(case, replace(case.plan(), pool="mean"))


@pytest.mark.parametrize(
    "text", ["sh(2,3)+causal", "sh(2,1)+sparse(2,1)", "linear+sh(2,3)+causal+h(count)"]
)
def test_a_pooled_key_occupies_its_whole_window(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = spread(normal_case(text, n=8, m=8))
    exact(case)
    by_position, prefix_counts = Visibility.by_position, Visibility.prefix_counts

    def by_first_position(self: Visibility, *block: int) -> Any:
        # A window counts as seen from its first position instead of its last.
        eager = dataclasses.replace(self, offset=self.offset + self.scale - 1)
        return by_position(self, *block) | by_position(eager, *block)

    def early(self: Visibility, start: int, stop: int, ahead: int = 0) -> Any:
        return prefix_counts(self, start, stop, ahead + self.scale - 1)

    monkeypatch.setattr(Visibility, "by_position", by_first_position)
    monkeypatch.setattr(Visibility, "prefix_counts", early)
    monkeypatch.setattr(Visibility, "key_range", lambda self, start, stop: (0, self.keys))
    monkeypatch.setattr(Visibility, "whole", lambda self, *block: False)
    caught(case)


def test_a_mask_must_allow_every_real_key_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    case = padded(spread(normal_case("sh(2,3)", m=8)))
    mask = np.random.default_rng(2).random((5, 8)) < 0.6
    case = replace(case, call={**case.call, "mask": mask})
    exact(case)
    true = Visibility.by_mask
    monkeypatch.setattr(
        Visibility, "by_mask", lambda self, *b: true(dataclasses.replace(self, real=None), *b)
    )
    caught(case)  # padding that the mask forbids now hides its window


COUNTED = [
    "softmax+causal",
    "gaussian(gamma=0.3)+sparse(2,1)",
    "linear+causal",
    "sh(1,2)",
    "bn(eps=0.3)",
]


@pytest.mark.parametrize("text", COUNTED)
def test_the_count_is_that_of_the_visible_keys(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = padded(spread(normal_case(text + "+h(count)")))
    exact(case)

    def everyone(self: Visibility, bias: Any = None, terms: Any = None) -> Any:
        return np.full((self.rows,), self.length)

    monkeypatch.setattr(Visibility, "counts", everyone)
    caught(case)


@pytest.mark.parametrize("text", COUNTED)
def test_normalisers_are_not_exchanged(text: str) -> None:
    for h in ("sum", "count", "one"):
        case = padded(spread(normal_case(f"{text}+h({h})")))
        exact(case)
        for other in {"sum", "count", "one"} - {h}:
            caught(case, replace(case.plan(), normaliser=other))


def test_a_bias_of_minus_infinity_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = spread(normal_case("softmax+h(count)"))
    bias = np.random.default_rng(4).normal(size=(4, 5, 7))
    bias[..., 2] = -INF
    case = replace(case, call={"bias": bias})
    exact(case)
    true = Visibility.counts
    monkeypatch.setattr(Visibility, "counts", lambda self, bias=None, terms=None: true(self))
    caught(case)


STEPS = {
    "bn": [
        "statistics: moments over the real keys of the sequence",
        "fold:",
        "sigma^2",
        "goes to L",
        "scores: log kappa = 0.5 q'.k'",
    ],
    "bn(statistics=batch)": ["of all sequences of the call"],
    "causal+bn(statistics=prefix)": ["up to each position", "c = the first real key"],
    "sh(1,2)": ["heads [1]: keys and values pooled (mean) over windows of 2"],
    "gaussian(0.3)+h(count)": ["gaussian:", "row constant", "h(count): out exp(L - log n)"],
    "cosine+h(one)": ["cosine: unit rows", "h(one): out exp(L)"],
    "linear+bn": ["normalize: queries and keys by bn", "features:", "O(N + M)"],
    "linear+causal": ["by prefix sums over chunks"],
    "linear+sparse(1,1)": ["features under a window run as scores", "O(N M)"],
    "polynomial": ["log kappa = (2.0 * log(abs(", "with s = q'.k'"],
}


@pytest.mark.parametrize("text", STEPS)
def test_the_steps_are_told(text: str) -> None:
    plan = lower(parse(text), Signature(4, 2, "float32"))
    steps = "\n".join(plan.steps)
    for part in STEPS[text]:
        assert part in steps, steps
    assert "sigma^2" not in "\n".join(lower(parse("bn"), Signature(4, 2, "float16")).steps)


def test_lowering_needs_one_scale_for_each_head() -> None:
    with pytest.raises(ValueError, match=r"3 scales.*one for each of the 2 heads of k"):
        lower(parse("sh(1,2,3)"), Signature(4, 2, "float64"))
