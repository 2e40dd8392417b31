"""The laws of decoding with carried state, on the backend of a module's fixture ``name``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.extend import reference_attention
from pdcore.plugins import registry as plugins
from pdcore_conformance.frameworks import framework

Array = np.ndarray[Any, Any]
LENGTH = 17
#: Specs of every kind of state, and of kinds together.
SPECS = (
    "causal",
    "causal+bn(statistics=prefix)",
    "causal+bn(statistics=prefix,with_std=false)",
    "causal+polynomial+bn(statistics=prefix)",
    "causal+linear",
    "causal+relu",
    "causal+random_features(16)",
    "causal+linear+sparse(4,0)",
    "causal+sparse(5,0)",
    "sparse(5,0)+bn(statistics=prefix)",
    "causal+sh(1,2)",
    "causal+sh(2,2,pool=first)",
    "causal+bn(statistics=prefix)+sh(1,3)",
    "causal+sh(3,2)+sparse(7,0)+bn(statistics=prefix)",
    "causal+linear+sh(1,2)",
    "causal+conv1d(padding=causal)",
    "causal+conv1d(4,padding=causal)+sh(1,2)+linear",
    "causal+gaussian(0.3)",
    "causal+cosine",
    "causal+alibi",
    "causal+relative(3)+sparse(6,0)",
    "causal+h(sum,sink=0.5)+bn(statistics=prefix)",
    "causal+h(count)+bn(statistics=prefix)+sh(1,2)",
    "causal+bn(statistics=running)+linear",
)
#: One spec for each array of a state.
FEW = (
    "causal",
    "causal+linear",
    "causal+bn(statistics=prefix)+sh(1,3)",
    "causal+random_features(16)+sh(1,2)",
    "causal+sparse(5,0)+conv1d(padding=causal)",
)
SPLITS = ((17,), (1,) * 17, (5, 0, 1, 1, 3, 7), (2, 15))


class Case:
    """Arrays of 2 sequences, 4 query heads and 2 key heads, and the rows of one call."""

    def __init__(self, name: str, spec: str, seed: int = 0, length: int = LENGTH) -> None:
        rng = np.random.default_rng(seed)
        self.name, self.library = name, framework(plugins.registered()[name].library)
        self.q = rng.standard_normal((2, 4, length, 8))
        self.k, self.v = (
            rng.standard_normal((2, 2, length, 8)),
            rng.standard_normal((2, 2, length, 6)),
        )
        self.k += rng.standard_normal((2, 1, 8))
        self.spec, params = spec, {}
        if "running" in spec:
            params = {"mean": rng.standard_normal((2, 8)), "var": rng.uniform(0.5, 2, (2, 8))}
        self.out, self.lse = reference_attention(
            self.q, self.k, self.v, spec, params=params, return_lse=True
        )
        given = {n: self.array(x) for n, x in params.items()}
        self.decoder = pdcore.decoder(spec, params=given, backend=name)

    def array(self, x: Array) -> Any:
        return self.library.asarray(np.ascontiguousarray(x))

    def numpy(self, x: Any) -> Array:
        return np.asarray(self.library.asnumpy(x))

    def init(self, capacity: int | None = 24, undo: int = 0, batch: Any = 2) -> dict[str, Any]:
        like = self.array(self.k)
        return self.decoder.init(batch, 2, 8, 6, capacity, undo=undo, like=like)

    def rows(self, starts: Any, stop: int) -> tuple[Any, ...]:
        """Return `stop` rows from a place of each sequence."""
        starts = np.broadcast_to(starts, (2,))
        cut = [np.stack([x[b, :, s : s + stop] for b, s in enumerate(starts)]) for x in self.qkv]
        return tuple(map(self.array, cut))

    @property
    def qkv(self) -> tuple[Array, Array, Array]:
        return self.q, self.k, self.v

    def check(self, out: Any, starts: Any, lse: Any = None) -> None:
        """Compare rows with those of one call, to 1e-12 of the largest."""
        out = self.numpy(out)
        for b, start in enumerate(np.broadcast_to(starts, (2,))):
            where = slice(start, start + out.shape[2])
            close(out[b], self.out[b, :, where])
            if lse is not None:
                close(self.numpy(lse)[b], self.lse[b, :, where])


def close(got: Array, expected: Array, tolerance: float = 1e-12) -> None:
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    largest = max(1.0, np.abs(expected[finite]).max(initial=0))
    np.testing.assert_allclose(
        got[finite] / largest, expected[finite] / largest, rtol=0, atol=tolerance
    )


@contextmanager
def float64(name: str) -> Iterator[None]:
    with framework(plugins.registered()[name].library).precision("float64"):
        yield


@pytest.mark.sampled(4)
@pytest.mark.parametrize("spec", SPECS)
def test_any_split_gives_the_rows_of_one_call(name: str, spec: str) -> None:
    with float64(name):
        case = Case(name, spec)
        for split in SPLITS:
            for in_place in (False, True) if name in ("numpy", "torch") else (False,):
                state, at = case.init(), 0
                for count in split:
                    (out, lse), state = case.decoder.extend(
                        state, *case.rows(at, count), return_lse=True, in_place=in_place
                    )
                    case.check(out, at, lse)
                    at += count
                assert case.numpy(state["lengths"]).tolist() == [17, 17]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("spec", SPECS)
def test_sequences_of_different_lengths_in_one_batch(name: str, spec: str) -> None:
    with float64(name):
        case = Case(name, spec)
        lengths = np.array([9, 4])
        junk = [np.array(case.numpy(x)) for x in case.rows(0, 10)]
        for x in junk:
            x[0, :, 9:], x[1, :, 4:] = np.nan, np.inf  # padding
        state = case.init()
        arrays = [case.array(x) for x in junk]
        (out, lse), state = case.decoder.extend(
            state, *arrays, lengths=case.array(lengths), return_lse=True
        )
        out, lse = case.numpy(out), case.numpy(lse)
        for b, n in enumerate(lengths):
            close(out[b, :, :n], case.out[b, :, :n])
            close(lse[b, :, :n], case.lse[b, :, :n])
            assert not out[b, :, n:].any()
            assert np.isneginf(lse[b, :, n:]).all()
        for count in (1, 1, 3, 1):
            out, state = case.decoder.extend(state, *case.rows(lengths, count))
            case.check(out, lengths)
            lengths = lengths + count


@pytest.mark.parametrize("spec", FEW)
def test_a_prompt_with_padding_on_the_left_is_compacted(name: str, spec: str) -> None:
    with float64(name):
        case = Case(name, spec)
        real = np.arange(10) >= np.array([[3], [6]])
        padded = []
        for x in case.qkv:
            y = np.full((*x.shape[:2], 10, x.shape[-1]), np.nan)
            y[0, :, 3:], y[1, :, 6:] = x[0, :, :7], x[1, :, :4]
            padded.append(case.array(y))
        out, state = case.decoder.extend(case.init(), *padded, lengths=case.array(real))
        out = case.numpy(out)
        close(out[0, :, 3:], case.out[0, :, :7])
        close(out[1, :, 6:], case.out[1, :, :4])
        assert not out[0, :, :3].any()
        assert not out[1, :, :6].any()
        out, _ = case.decoder.extend(state, *case.rows([7, 4], 2))
        case.check(out, [7, 4])


@pytest.mark.parametrize("spec", FEW)
def test_truncation_selects_an_earlier_state_bit_for_bit(name: str, spec: str) -> None:
    with float64(name):
        case = Case(name, spec)
        decoder, state = case.decoder, case.init(undo=3)
        _, before = decoder.extend(state, *case.rows(0, 8))
        outlier = [x * 1e6 for x in case.rows(8, 3)]
        _, after = decoder.extend(before, *outlier)
        nothing = [x * float("nan") for x in case.rows(8, 3)]
        _, spoiled = decoder.extend(before, *nothing)
        step = case.rows(8, 1)
        expected, _ = decoder.extend(before, *step)
        for undone in (decoder.truncate(x, 8) for x in (after, spoiled)):
            out, state = decoder.extend(undone, *step)
            np.testing.assert_array_equal(case.numpy(out), case.numpy(expected))
            out, _ = decoder.extend(state, *case.rows(9, 4))
            case.check(out, 9)
        # Some of the positions, and another number of each sequence.
        _, after = decoder.extend(before, *case.rows(8, 3))
        part = decoder.truncate(after, case.array(np.array([10, 9])))
        out, _ = decoder.extend(part, *case.rows([10, 9], 3))
        case.check(out, [10, 9])


def test_no_more_is_taken_back_than_the_state_keeps(name: str) -> None:
    with float64(name):
        case = Case(name, "causal+linear")
        _, state = case.decoder.extend(case.init(undo=2), *case.rows(0, 8))
        with pytest.raises(ValueError, match="takes 3 positions back, expected at most 2"):
            case.decoder.truncate(state, 5)
        state = case.decoder.truncate(state, 7)
        with pytest.raises(ValueError, match="takes 2 positions back, expected at most 1"):
            case.decoder.truncate(state, 5)
        with pytest.raises(ValueError, match="more than the state has"):
            case.decoder.truncate(state, 8)
        plain = Case(name, "causal")
        _, state = plain.decoder.extend(plain.init(), *plain.rows(0, 8))
        out, _ = plain.decoder.extend(plain.decoder.truncate(state, 3), *plain.rows(3, 4))
        plain.check(out, 3)


@pytest.mark.parametrize("spec", FEW)
def test_beams_continue_the_sequences_of_an_index(name: str, spec: str) -> None:
    with float64(name):
        case = Case(name, spec)
        _, state = case.decoder.extend(case.init(), *case.rows(0, 8))
        q, k, v = (x[[1, 0, 1]][:, :, 8:10] for x in case.qkv)
        beams = case.decoder.reorder(state, case.array(np.array([1, 0, 1])))
        out, _ = case.decoder.extend(beams, *map(case.array, (q, k, v)))
        close(case.numpy(out), case.out[[1, 0, 1]][:, :, 8:10])


def test_a_batch_may_have_any_leading_axes(name: str) -> None:
    with float64(name):
        case = Case(name, "causal+bn(statistics=prefix)+sh(1,2)")
        wide = [case.array(x[None]) for x in case.qkv]
        out, _ = case.decoder.extend(case.init(batch=(1, 2)), *wide)
        close(case.numpy(out)[0], case.out)
        single = [case.array(x[0]) for x in case.qkv]
        out, _ = case.decoder.extend(case.init(batch=()), *single)
        close(case.numpy(out), case.out[0])


def test_positions_beyond_the_capacity_are_an_error(name: str) -> None:
    with float64(name):
        case = Case(name, "causal")
        _, state = case.decoder.extend(case.init(capacity=10), *case.rows(0, 9))
        with pytest.raises(ValueError, match=r"got 2 positions .* expected at most \[1, 1\]"):
            case.decoder.extend(state, *case.rows(9, 2))
        with pytest.raises(ValueError, match="keeps every key"):
            case.init(capacity=None)
        for spec in ("causal+linear", "causal+sparse(5,0)"):
            case = Case(name, spec)
            out, _ = case.decoder.extend(case.init(capacity=None), *case.rows(0, 9))
            case.check(out, 0)


@pytest.mark.parametrize("spec", ["causal+linear+sh(1,2)", "causal+sparse(5,0)+sh(1,2)"])
def test_a_state_of_sums_or_a_window_does_not_grow(name: str, spec: str) -> None:
    with float64(name):
        case = Case(name, spec)
        empty = case.init(capacity=None)
        _, state = case.decoder.extend(empty, *case.rows(0, 12))
        for entry, x in empty.items():
            assert tuple(state[entry].shape) == tuple(x.shape)
            sequence_free = {2, 4, 8, 6, 1, 5, 9, 7}  # no axis of 12 positions
            assert set(x.shape) <= sequence_free, (entry, x.shape)
        assert not case.decoder.grows()


def test_room_is_added_to_a_state(name: str) -> None:
    with float64(name):
        case = Case(name, "causal+bn(statistics=prefix)+sh(1,2)")
        _, state = case.decoder.extend(case.init(capacity=8), *case.rows(0, 8))
        out, _ = case.decoder.extend(case.decoder.resize(state, 17), *case.rows(8, 9))
        case.check(out, 8)
        with pytest.raises(ValueError, match="expected at least 8"):
            case.decoder.resize(state, 7)


def test_means_far_from_zero_cost_no_digits(name: str) -> None:
    with float64(name):
        case = Case(name, "causal+bn(statistics=prefix)")
        case.k = 100 + 0.1 * case.k
        case.k[:, :, 0] += 50  # an outlier comes first, and statistics are relative to it
        case.q = 100 + 0.1 * case.q
        whole = reference_attention(case.q, case.k, case.v, case.spec)
        state, rows = case.init(), []
        for at in range(LENGTH):
            out, state = case.decoder.extend(state, *case.rows(at, 1))
            rows.append(case.numpy(out))
        close(np.concatenate(rows, axis=2), whole, 1e-9)


def test_many_single_tokens_keep_the_digits_of_float32(name: str) -> None:
    """Sums are compensated: 8,192 single float32 merges would lose 1e-6 of them."""
    rng = np.random.default_rng(3)
    library = framework(plugins.registered()[name].library)
    count = 8192 if name == "numpy" else 512
    keys = 3 + rng.standard_normal((1, 1, count, 2)).astype("float32")
    decoder = pdcore.decoder("sparse(2,0)+bn(statistics=prefix)", backend=name)
    with library.precision("float32"):
        state = decoder.init(1, 1, 2, 2, None, like=library.asarray(keys))
        for at in range(count):
            x = library.asarray(np.ascontiguousarray(keys[:, :, at : at + 1]))
            _, state = decoder.extend(state, x, x, x)
        first = library.asnumpy(state["first.1"]).astype("float64")
        n = library.asnumpy(state["n.1"]).astype("float64")
        mean, m2 = (
            library.asnumpy(state[f"{x}.1"]).astype("float64")
            + library.asnumpy(state[f"{x}_low.1"]).astype("float64")
            for x in ("mean", "m2")
        )
    exact = keys.astype("float64")
    assert n.item(0) == count
    np.testing.assert_allclose(mean + first, exact.mean(2, keepdims=True), rtol=1e-7)
    np.testing.assert_allclose(m2 / n, exact.var(2, keepdims=True), rtol=2e-7)


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("softmax", "sees keys after"),
        ("sparse(4,1)", "sees keys after"),
        ("bn+sparse(4,1)", "sees keys after"),
        ("causal+bn(allow_leak=true)", "allow_leak=true"),
        ("causal+bn(statistics=batch,allow_leak=true)", "allow_leak=true"),
        ("causal+mixture(2,allow_leak=true)", "allow_leak=true"),
        ("causal+iebn(allow_leak=true)", "allow_leak=true"),
        ("causal+conv1d(allow_leak=true)", "allow_leak=true"),
        ("causal+labels(3)", "labels"),
    ],
)
def test_what_depends_on_the_future_is_refused_by_name(name: str, spec: str, why: str) -> None:
    with pytest.raises(pdcore.UnsupportedError, match=why):
        pdcore.decoder(spec, backend=name)


def test_wrong_arguments_are_explained(name: str) -> None:
    with float64(name):
        case = Case(name, "causal")
        state, (q, k, v) = case.init(), case.rows(0, 3)
        with pytest.raises(TypeError, match="drops no weights"):
            case.decoder.extend(state, q, k, v, dropout=0.1)
        with pytest.raises(ValueError, match="as many positions as q"):
            case.decoder.extend(state, q[:, :, :1, :], k, v)
        with pytest.raises(ValueError, match="expected a state that init"):
            case.decoder.extend({"lengths": state["lengths"]}, q, k, v)
        with pytest.raises(ValueError, match="lengths: got"):
            case.decoder.extend(state, q, k, v, lengths=case.array(np.array([1, 4])))
        with pytest.raises(ValueError, match="one of the batch"):
            case.decoder.extend(case.init(batch=1), q, k, v)
        with pytest.raises(ValueError, match="undo: got -1"):
            case.init(undo=-1)
