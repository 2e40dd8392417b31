"""The plan contract: a plan is data, and its support decides which keys a query sees."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightly import examples
from reference_cases import Array, PlainNumpy, check_forward, normal_case, run
from strategies import SUPPORTS, specs

from pdcore.lowering import Signature, lower
from pdcore.spec import AttentionSpec, Statistics, Support, Visibility

SIGNATURES = st.builds(
    Signature,
    dim=st.integers(1, 64),
    heads=st.just(3),
    dtype=st.sampled_from(["float16", "bfloat16", "float32", "float64"]),
    masked=st.booleans(),
)


def leaves(x: Any) -> list[Any]:
    """List all objects that a plan holds, at any depth."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        parts = [getattr(x, f.name) for f in dataclasses.fields(x)]
    elif isinstance(x, Mapping):
        parts = [*x.keys(), *x.values()]
    elif isinstance(x, (list, tuple, set, frozenset)):
        parts = list(x)
    elif isinstance(x, Statistics):
        parts = list(vars(x).values())
    else:
        return [x]
    return [leaf for part in parts for leaf in leaves(part)]


@given(specs(3), SIGNATURES)
def test_a_plan_is_frozen_data_without_arrays(spec: AttentionSpec, signature: Signature) -> None:
    plan = lower(spec, signature)
    for leaf in leaves(plan):
        assert leaf is None or type(leaf) in (bool, int, float, str), type(leaf)
    again = lower(spec, signature)
    assert plan == again
    assert hash(plan) == hash(again)
    copied = pickle.loads(pickle.dumps(plan))  # noqa: S301
    assert copied == plan
    assert hash(copied) == hash(plan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.pool = "first"  # type: ignore[misc]


@given(specs(3), SIGNATURES)
def test_a_plan_says_what_its_spec_says(spec: AttentionSpec, signature: Signature) -> None:
    plan = lower(spec, signature)
    spec = spec.for_heads(signature.heads)
    assert plan.spec == spec
    assert plan.normaliser == spec.normaliser
    assert plan.pool == spec.heads.pool
    wide = {"float16": "float32", "bfloat16": "float32"}
    assert plan.accumulate == wide.get(signature.dtype, signature.dtype)
    scales = dict(
        pair for group in plan.groups for pair in zip(group.heads, [group.scale] * 3, strict=False)
    )
    assert tuple(scales[h] for h in range(3)) == (spec.heads.scales or (1, 1, 1))
    assert plan.steps
    assert all(isinstance(step, str) for step in plan.steps)


@given(specs(3), SIGNATURES, specs(3), SIGNATURES)
def test_plans_of_different_specs_differ(
    spec: AttentionSpec, signature: Signature, other: AttentionSpec, second: Signature
) -> None:
    if spec.for_heads(signature.heads) != other.for_heads(second.heads):
        assert lower(spec, signature) != lower(other, second)


def test_one_plan_serves_every_length() -> None:
    assert set(Signature._fields) == {"dim", "heads", "dtype", "masked"}
    plan = normal_case("bn+sh(1,2)").plan()
    for n, m in ((1, 1), (3, 17), (30, 2)):
        case = normal_case("bn+sh(1,2)", n=n, m=m)
        check_forward(case, *run(PlainNumpy(), case, plan=plan))


@st.composite
def visibilities(draw: st.DrawFn) -> tuple[Visibility, Array]:
    """Draw a visibility without masks, and the expected boolean array, key by key."""
    support, scale = draw(SUPPORTS), draw(st.integers(1, 4))
    rows, length, offset = (
        draw(st.integers(0, 8)),
        draw(st.integers(0, 11)),
        draw(st.integers(-4, 9)),
    )
    position: Any = offset
    if draw(st.booleans()):
        position = np.reshape(np.asarray([offset, offset + 2]), (2, 1, 1, 1, 1))
    count = -(-length // scale)
    want = np.zeros((2, rows, count), dtype=bool)
    for b in range(2):
        for i in range(rows):
            p = i + offset + (2 * b if position is not offset else 0)
            for j in range(count):
                first, last = j * scale, (j + 1) * scale - 1
                want[b, i, j] = (not support.causal or last <= p) and (
                    p - support.left <= first and last <= p + support.right
                )
    seen = Visibility(support, np, rows, length, scale, position, None, None, None, None)
    return seen, want


@examples(300)
@given(visibilities(), st.integers(0, 8), st.integers(0, 8), st.integers(0, 11), st.integers(0, 11))
def test_visibility_by_position(
    drawn: tuple[Visibility, Array], r0: int, r1: int, k0: int, k1: int
) -> None:
    seen, want = drawn
    (start, stop), (first, last) = (
        sorted((min(r0, seen.rows), min(r1, seen.rows))),
        sorted((min(k0, seen.keys), min(k1, seen.keys))),
    )
    tile = want[:, start:stop, first:last]
    block = seen.block(start, stop, first, last)
    if block is None:
        assert tile.all()
    else:
        full = np.broadcast_to(block, (2, 1, 1, stop - start, last - first))
        np.testing.assert_array_equal(full[:, 0, 0], tile)
    if seen.whole(start, stop, first, last):
        assert tile.all()
    low, high = seen.key_range(start, stop)
    outside = want[:, start:stop].copy()
    outside[..., low:high] = False
    assert not outside.any()
    assert 0 <= low <= high <= seen.keys


@examples(200)
@given(visibilities())
def test_visible_keys_are_counted(drawn: tuple[Visibility, Array]) -> None:
    seen, want = drawn
    counts = np.broadcast_to(seen.counts(), (2, 1, 1, seen.rows))[:, 0, 0]
    np.testing.assert_array_equal(counts, want.sum(axis=-1))
    if seen.support == Support(causal=True):
        prefix = np.broadcast_to(seen.prefix_counts(0, seen.rows)[..., 0], (2, 1, 1, seen.rows))
        np.testing.assert_array_equal(prefix[:, 0, 0], want.sum(axis=-1))
        later = np.broadcast_to(seen.later_rows()[..., 0], (2, 1, 1, seen.keys))
        np.testing.assert_array_equal(later[:, 0, 0], want.sum(axis=-2))


@examples(100)
@given(visibilities(), st.integers(0, 999))
def test_masked_keys_are_counted(drawn: tuple[Visibility, Array], seed: int) -> None:
    seen, want = drawn
    rng = np.random.default_rng(seed)
    real = rng.random((2, seen.length)) < 0.6
    mask = rng.random((2, 1, 1, seen.rows, seen.length)) < 0.7
    spans = [slice(j * seen.scale, (j + 1) * seen.scale) for j in range(seen.keys)]
    some = np.stack([real[:, s].any(axis=-1) for s in spans], axis=-1) if spans else real[:, :0]
    masked = dataclasses.replace(seen, key_mask=some[:, None], real=real, mask=mask)
    for b in range(2):
        for i in range(seen.rows):
            for j, span in enumerate(spans):
                want[b, i, j] &= some[b, j]
                want[b, i, j] &= (mask[b, 0, 0, i, span] | ~real[b, span]).all()
    counts = np.broadcast_to(masked.counts(), (2, 1, 1, seen.rows))
    np.testing.assert_array_equal(counts[:, 0, 0], want.sum(axis=-1))
    block = np.broadcast_to(masked.block(0, seen.rows, 0, seen.keys), (2, 1, 1, *want.shape[1:]))
    np.testing.assert_array_equal(block[:, 0, 0], want)
