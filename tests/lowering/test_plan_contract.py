"""The plan contract: the properties that blocks, shards, decoding and tracing rely on."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nightly import examples
from reference_cases import (
    INF,
    Array,
    Case,
    PlainNumpy,
    assert_close,
    check_forward,
    normal_case,
    run,
)
from strategies import SUPPORTS, cases, specs, values

from pdcore.backend import Operands
from pdcore.lowering import Features, Fold, Plan, Rows, Scores, Signature, lower
from pdcore.spec import (
    AttentionSpec,
    FeatureMap,
    KeySet,
    Moments,
    Statistics,
    Support,
    Visibility,
    parse,
    prefix_states,
    reduce_axis,
)

# --- a plan is data -------------------------------------------------------------------------------

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
    if spec != other:
        assert lower(spec, signature) != lower(other, second)


def test_one_plan_serves_every_length() -> None:
    assert set(Signature._fields) == {"dim", "heads", "dtype", "masked"}
    plan = normal_case("bn+sh(1,2)").plan()
    for n, m in ((1, 1), (3, 17), (30, 2)):
        case = normal_case("bn+sh(1,2)", n=n, m=m)
        check_forward(case, *run(PlainNumpy(), case, plan=plan))


# --- statistics are a mergeable state -------------------------------------------------------------


def blocks_of(keys: Array, cuts: list[int]) -> list[slice]:
    edges = [0, *sorted(min(c, keys.shape[-2]) for c in cuts), keys.shape[-2]]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def merged(statistics: Statistics, states: list[Any], xp: Any = np) -> Any:
    total = states[0]
    for state in states[1:]:
        total = statistics.merge(total, state, xp=xp)
    return total


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


# --- support --------------------------------------------------------------------------------------


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


# --- contractions merge over key blocks -----------------------------------------------------------


class Recording(PlainNumpy):
    """A backend that records the arguments and results of its contractions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Operands, tuple[Any, Any]]] = []

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        result = super().scores(c, o)
        self.calls.append((c, o, result))
        return result

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        result = super().features(c, o)
        self.calls.append((c, o, result))
        return result


def cut_keys(o: Operands, first: int, last: int) -> Operands:
    """Return the operands of a shard that holds only the keys ``first:last``."""
    seen = o.visibility
    begin, end = first * seen.scale, min(last * seen.scale, seen.length)
    cut = slice(begin, end)
    mask = seen.mask if seen.mask is None or seen.mask.shape[-1] == 1 else seen.mask[..., cut]
    bias = o.bias if o.bias is None or o.bias.shape[-1] == 1 else o.bias[..., first:last]
    return o._replace(
        k=o.k[..., first:last, :],
        v=o.v[..., first:last, :],
        bias=bias,
        key_bias=None if o.key_bias is None else o.key_bias[..., first:last],
        visibility=dataclasses.replace(
            seen,
            length=end - begin,
            offset=seen.offset - begin,
            mask=mask,
            key_mask=None if seen.key_mask is None else seen.key_mask[..., first:last],
            real=None if seen.real is None else seen.real[..., cut],
        ),
    )


def merge(parts: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merge (out, L) of disjoint key blocks."""
    with np.errstate(invalid="ignore"):
        level = np.logaddexp.reduce([part[1] for part in parts], axis=0)
    out = np.zeros_like(parts[0][0])
    for value, lse in parts:
        share = np.where(lse > -INF, np.exp(lse - np.where(level > -INF, level, 0.0)), 0.0)
        out = out + share[..., None] * value
    return out, level


@examples(150)
@given(cases(smallest=1), st.integers(1, 8))
def test_contractions_merge_over_blocks_of_keys(case: Case, size: int) -> None:
    backend = Recording()
    with np.errstate(all="ignore"):
        run(backend, case)
        for c, o, (out, level) in backend.calls:
            contract = PlainNumpy().scores if isinstance(c, Scores) else PlainNumpy().features
            edges = range(0, o.k.shape[-2], size)
            parts = [contract(c, cut_keys(o, a, min(a + size, o.k.shape[-2]))) for a in edges]
            again, total = merge(parts)
            scale = np.max(np.abs(np.where(np.isfinite(o.v), o.v, 0.0)), initial=1.0)
            assert_close(again, out, scale, 1e-11, "out")
            finite = np.where(np.isfinite(level), level, 0.0)
            assert_close(total, level, 1.0 + np.abs(finite), 1e-11, "L")


@examples(100)
@given(cases(smallest=1), st.integers(1, 8))
def test_contractions_fall_apart_into_blocks_of_queries(case: Case, size: int) -> None:
    backend = Recording()
    with np.errstate(all="ignore"):
        run(backend, case)
        for c, o, (out, level) in backend.calls:
            contract = PlainNumpy().scores if isinstance(c, Scores) else PlainNumpy().features
            seen = o.visibility
            for a in range(0, seen.rows, size):
                rows = slice(a, min(a + size, seen.rows))

                def own(x: Any, rows: slice = rows) -> Any:
                    return x if x is None or x.shape[-2] == 1 else x[..., rows, :]

                part = o._replace(
                    q=o.q[..., rows, :],
                    bias=own(o.bias),
                    visibility=dataclasses.replace(
                        seen, rows=rows.stop - a, offset=seen.offset + a, mask=own(seen.mask)
                    ),
                )
                got = contract(c, part)
                scale = np.max(np.abs(np.where(np.isfinite(o.v), o.v, 0.0)), initial=1.0)
                assert_close(got[0], out[..., rows, :], scale, 1e-11, "out")
                want = level[..., rows]
                scale = 1.0 + np.abs(np.where(np.isfinite(want), want, 0.0))
                assert_close(got[1], want, scale, 1e-11, "L")


@dataclass(frozen=True)
class SignedRows(FeatureMap):
    word = "signed_rows"
    signed = True

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x

    def latex(self) -> str:
        return "x"


@pytest.mark.parametrize("text", ["", "causal", "sparse(2,1)"])
def test_signed_contractions_add_over_blocks_of_keys(text: str) -> None:
    support = parse(text).support if text else Support()
    case = normal_case(AttentionSpec(SignedRows(), "one", support=support), n=6, m=8)
    backend = Recording()
    run(backend, case)
    [(c, o, (out, level))] = backend.calls
    assert not level.any()
    contract = PlainNumpy().scores if isinstance(c, Scores) else PlainNumpy().features
    parts = [contract(c, cut_keys(o, a, a + 2)) for a in range(0, 8, 2)]
    assert_close(sum(p[0] for p in parts), out, np.max(np.abs(out)))


# --- shards and decoding, on the four steps alone -------------------------------------------------


def sharded(case: Case, plan: Plan, cuts: list[slice]) -> tuple[Array, Array]:
    """Run Attention-BN on shards of the keys, which exchange statistics and (out, lse) only."""
    assert plan.summary is not None
    fold, stats = plan.transforms[0], plan.summary.statistics
    states = [stats.of(case.k[..., at, :], None, xp=np) for at in cuts]
    state = stats.finalize(merged(stats, states), xp=np)
    heads, group = case.k.shape[-3], case.q.shape[-3] // case.k.shape[-3]
    q = case.q.reshape(*case.q.shape[:-3], heads, -1, case.q.shape[-1])
    parts = []
    for at in cuts:
        rows, _ = fold(Rows(q, case.k[..., at, :]), state, {}, xp=np)
        seen = Visibility(
            case.spec.support,
            np,
            case.q.shape[-2],
            at.stop - at.start,
            1,
            -at.start,
            None,
            None,
            None,
            None,
        )
        queries = rows.q.reshape(*q.shape[:-2], group, -1, q.shape[-1])
        o = Operands(queries, rows.k, case.v[..., at, :], None, None, {}, seen)
        out, level = PlainNumpy().scores(plan.contraction, o)  # type: ignore[arg-type]
        parts.append((out, level + rows.row_constant.reshape(level.shape)))
    out, level = merge(parts)
    return out.reshape(*case.q.shape[:-1], -1), level.reshape(case.q.shape[:-1])


@pytest.mark.parametrize("text", ["bn(beta=0.5)", "bn(allow_leak=true)+causal", "bn+sparse(3,2)"])
def test_shards_of_the_sequence(text: str) -> None:
    case = normal_case(text, n=11, m=11)
    cuts = [slice(0, 4), slice(4, 5), slice(5, 11)]
    plan = case.plan()
    check_forward(case, *sharded(case, plan, cuts))
    # With the statistics of the last shard alone, the result is wrong.
    assert plan.summary is not None

    class Local(Moments):
        def merge(self, a: Any, b: Any, *, xp: Any) -> Any:
            return b

    wrong = replace(plan, summary=replace(plan.summary, statistics=Local()))
    with pytest.raises(AssertionError, match="out"):
        check_forward(case, *sharded(case, wrong, cuts))


def test_decoding_updates_the_state_of_one_key_at_a_time() -> None:
    case = normal_case("causal+bn(statistics=prefix,beta=0.5,eps=0.1)", n=9, m=9)
    out, lse = case.reference()
    plan = case.plan()
    fold = plan.transforms[0]
    assert isinstance(fold, Fold)
    assert plan.summary is not None
    stats = plan.summary.statistics
    state = stats.zero(stats.of(case.k[..., :1, :], None, xp=np), xp=np)
    for p in range(9):
        state = stats.merge(state, stats.of(case.k[..., p : p + 1, :], None, xp=np), xp=np)
        final = stats.finalize(state, xp=np)
        q = case.q[..., p : p + 1, :].reshape(2, 2, 2, 3)
        rows, _ = fold(Rows(q, case.k[..., : p + 1, :]), final, {}, xp=np)
        seen = Visibility(case.spec.support, np, 1, p + 1, 1, p, None, None, None, None)
        o = Operands(rows.q[..., :, None, :], rows.k, case.v[..., : p + 1, :], None, None, {}, seen)
        got, level = PlainNumpy().scores(plan.contraction, o)  # type: ignore[arg-type]
        level = level + rows.row_constant[..., None]
        np.testing.assert_allclose(got.reshape(2, 4, 2), out[..., p, :], rtol=0, atol=1e-13)
        np.testing.assert_allclose(level.reshape(2, 4), lse[..., p], rtol=0, atol=1e-12)


def test_the_state_of_a_window_of_pooled_keys_is_that_of_its_keys() -> None:
    # With head scaling, the statistics count one key for each window.
    case = normal_case("bn(eps=0.1)+sh(2,3)", m=7)
    seen: list[int] = []

    class Counting(Moments):
        def finalize(self, state: Any, *, xp: Any) -> Any:
            seen.append(int(state["n"].max()))
            return super().finalize(state, xp=xp)

    plan = case.plan()
    assert plan.summary is not None
    counting: Plan = replace(plan, summary=replace(plan.summary, statistics=Counting()))
    check_forward(case, *run(PlainNumpy(), case, plan=counting))
    assert seen == [math.ceil(7 / 2), math.ceil(7 / 3)]
