"""The plan contract: contractions merge over key blocks, shards and decoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from merging import merge, merged
from nightly import examples
from reference_cases import Array, Case, PlainNumpy, assert_close, check_forward, normal_case, run
from strategies import cases

from pdcore.backend import Operands
from pdcore.lowering import Features, Fold, Plan, Rows, Scores
from pdcore.spec import (
    AttentionSpec,
    FeatureMap,
    Moments,
    Polynomial,
    Support,
    Visibility,
    parse,
)

#: log kappa of a polynomial whose base is a rounding error.
LOST = -60.0


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


def but_for_rounding_errors(case: Case, got: Any, want: tuple[Any, Any]) -> tuple[Any, Any]:
    """Replace rows of powers whose base is 0 but for rounding, which differs with the shapes."""
    if not isinstance(case.spec.kernel, Polynomial):
        return got
    lost = (got[1] < LOST) & (want[1] < LOST)
    return np.where(lost[..., None], want[0], got[0]), np.where(lost, want[1], got[1])


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
            again, total = but_for_rounding_errors(case, merge(parts), (out, level))
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
                want = out[..., rows, :], level[..., rows]
                got = but_for_rounding_errors(case, got, want)
                scale = np.max(np.abs(np.where(np.isfinite(o.v), o.v, 0.0)), initial=1.0)
                assert_close(got[0], want[0], scale, 1e-11, "out")
                scale = 1.0 + np.abs(np.where(np.isfinite(want[1]), want[1], 0.0))
                assert_close(got[1], want[1], scale, 1e-11, "L")


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
