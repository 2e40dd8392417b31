"""The plan contract: statistics are a mergeable state."""

from __future__ import annotations

import itertools
from typing import Any

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merging import merged
from reference_cases import Array, assert_close
from strategies import values

from pdcore.spec import KeySet, Moments, prefix_states, reduce_axis


def blocks_of(keys: Array, cuts: list[int]) -> list[slice]:
    edges = [0, *sorted(min(c, keys.shape[-2]) for c in cuts), keys.shape[-2]]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


@st.composite
def keys_and_masks(draw: st.DrawFn) -> tuple[Array, Array | None]:
    lead = draw(st.sampled_from([(), (2,), (2, 2)]))
    heads, m, d = draw(st.integers(1, 2)), draw(st.integers(0, 9)), draw(st.integers(1, 3))
    keys = draw(values((*lead, heads, m, d)))
    if draw(st.booleans()):
        return keys, None
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return keys, rng.random((*lead, 1, m, 1)) < 0.6


def true_moments(keys: Array, mask: Array | None) -> tuple[Array, Array, Array]:
    """Compute count, mean and variance in longdouble, 0 where there are no keys."""
    real = np.broadcast_to(True if mask is None else mask, keys.shape)
    wide = keys.astype(np.longdouble)
    n = real.sum(axis=-2, keepdims=True)
    count = np.maximum(n, 1)
    mean = np.where(real, wide, 0).sum(axis=-2, keepdims=True) / count
    var = np.where(real, (wide - mean) ** 2, 0).sum(axis=-2, keepdims=True) / count
    return n[..., :1], mean.astype(np.float64), var.astype(np.float64)


def same_moments(final: Any, keys: Array, mask: Array | None) -> None:
    n, mean, var = true_moments(keys, mask)
    np.testing.assert_array_equal(np.asarray(final["n"]), n)
    assert_close(final["mean"], mean, 1.0 + np.abs(mean), what="mean")
    assert_close(final["var"], var, 1.0 + np.abs(var), what="var")


@given(keys_and_masks(), st.lists(st.integers(0, 9), max_size=3))
def test_moments_of_blocks_merge_to_moments_of_the_whole(
    drawn: tuple[Array, Array | None], cuts: list[int]
) -> None:
    keys, mask = drawn
    stats = Moments()
    states = [
        stats.of(keys[..., at, :], None if mask is None else mask[..., at, :], xp=np)
        for at in blocks_of(keys, cuts)
    ]
    same_moments(stats.finalize(merged(stats, states), xp=np), keys, mask)
    same_moments(stats.finalize(stats.of(keys, mask, xp=np), xp=np), keys, mask)
    backwards = merged(stats, states[::-1])
    same_moments(stats.finalize(backwards, xp=np), keys, mask)


@given(keys_and_masks())
def test_merging_is_associative_with_a_neutral_element(drawn: tuple[Array, Array | None]) -> None:
    keys, mask = drawn
    stats = Moments()
    a, b, c = (
        stats.of(keys[..., at, :], None if mask is None else mask[..., at, :], xp=np)
        for at in (slice(0, 2), slice(2, 3), slice(3, None))
    )
    left = stats.merge(stats.merge(a, b, xp=np), c, xp=np)
    right = stats.merge(a, stats.merge(b, c, xp=np), xp=np)
    for name, x in left.items():
        assert_close(right[name], x, 1.0 + np.abs(x), what=name)
    zero = stats.zero(a, xp=np)
    for pair in ((zero, a), (a, zero)):
        for name, x in stats.merge(*pair, xp=np).items():
            np.testing.assert_array_equal(x, a[name])


@given(keys_and_masks())
def test_a_prefix_scan_gives_the_moments_of_every_prefix(
    drawn: tuple[Array, Array | None],
) -> None:
    keys, mask = drawn
    stats = Moments()
    final = stats.finalize(prefix_states(stats, keys, mask, xp=np), xp=np)
    assert final["mean"].shape == (*keys.shape[:-2], keys.shape[-2] + 1, keys.shape[-1])
    for c in range(keys.shape[-2] + 1):
        row = {name: x[..., c : c + 1, :] for name, x in final.items()}
        same_moments(row, keys[..., :c, :], None if mask is None else mask[..., :c, :])


def test_a_later_key_does_not_disturb_an_earlier_prefix() -> None:
    keys = np.random.default_rng(0).normal(size=(1, 33, 2))
    stats = Moments()
    calm = prefix_states(stats, keys, None, xp=np)
    keys[:, 20] = np.nan
    loud = prefix_states(stats, keys, None, xp=np)
    for name, x in calm.items():
        np.testing.assert_array_equal(loud[name][:, :21], x[:, :21])
    assert np.isnan(loud["mean"][:, 21:]).all()


@pytest.mark.parametrize("shape", [(1,), (2,), (3,), (5,), (8,), (3, 4), (2, 5)])
def test_states_reduce_over_leading_axes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    keys, mask = rng.normal(size=(*shape, 2, 6, 3)), rng.random((*shape, 1, 6, 1)) < 0.7
    stats = Moments()
    state = stats.of(keys, mask, xp=np)
    for axis in range(len(shape)):
        state = reduce_axis(stats, state, axis, xp=np)
    flat = np.moveaxis(keys.reshape(-1, 2, 6, 3), 0, 1).reshape(2, -1, 3)
    real = np.moveaxis(np.broadcast_to(mask, (*shape, 2, 6, 1)).reshape(-1, 2, 6, 1), 0, 1)
    final = {n: x.reshape(x.shape[len(shape) :]) for n, x in stats.finalize(state, xp=np).items()}
    same_moments(final, flat, real.reshape(2, -1, 1))


@given(keys_and_masks(), st.lists(st.integers(0, 9), max_size=3))
def test_key_sets_concatenate(drawn: tuple[Array, Array | None], cuts: list[int]) -> None:
    keys, mask = drawn
    stats = KeySet()
    states = [
        stats.of(keys[..., at, :], None if mask is None else mask[..., at, :], xp=np)
        for at in blocks_of(keys, cuts)
    ]
    final = stats.finalize(merged(stats, states), xp=np)
    np.testing.assert_array_equal(final["keys"], keys)
    real = np.broadcast_to(True if mask is None else mask, (*keys.shape[:-1], 1))
    np.testing.assert_array_equal(final["mask"], real)
    zero = stats.zero(final, xp=np)
    np.testing.assert_array_equal(stats.merge(zero, final, xp=np)["keys"], keys)


@given(keys_and_masks())
def test_moments_on_array_api_strict(drawn: tuple[Array, Array | None]) -> None:
    xp = array_api_strict
    keys, mask = drawn
    given_mask = None if mask is None else xp.asarray(mask)
    stats = Moments()
    same_moments(stats.finalize(stats.of(xp.asarray(keys), given_mask, xp=xp), xp=xp), keys, mask)
    rows = stats.finalize(prefix_states(stats, xp.asarray(keys), given_mask, xp=xp), xp=xp)
    last = {name: x[..., -1:, :] for name, x in rows.items()}
    same_moments(last, keys, mask)


def test_statistics_are_equal_by_what_they_hold() -> None:
    class Weighted(Moments):
        def __init__(self, power: float) -> None:
            self.power = power

    assert Moments() == Moments()
    assert Weighted(2.0) == Weighted(2.0) != Weighted(3.0)
    assert Moments() != KeySet()
    assert Weighted(2.0) != Moments()
    assert len({Moments(), Moments(), KeySet(), Weighted(1.0), Weighted(1.0)}) == 3
