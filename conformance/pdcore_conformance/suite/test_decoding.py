"""Decoding with a carried state gives the rows of one call, for every way to cut it into steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pdcore import Decoder, decoder
from pdcore.extend import ArrayBackend

from ..judge.budget import judge
from ..judge.calls import Arrays, Call
from ..judge.judging import each
from ..judge.subject import Subject

SMALL = Call(rows=13, keys=13)
SPECS = (
    "causal",
    "causal+linear",
    "causal+random_features(count=16)",
    "causal+gaussian(gamma=0.3)",
    "causal+bn(statistics=prefix)",
    "causal+bn(statistics=prefix,with_std=false)",
    "causal+softmax(softcap=2)+bn(eps=0.1,statistics=prefix)",
    "causal+bn(statistics=running)",
    "causal+sparse(3,inf)",
    "causal+sparse(4,inf)+bn(statistics=prefix)",
    "causal+sh(2,3,pool=first)",
    "causal+bn(statistics=prefix)+sh(1,3)",
    "causal+linear+sh(1,4)",
    "causal+conv1d(padding=causal)+sh(1,3)",
    "causal+h(count)",
    "causal+alibi",
)
CALLS = [
    *(SMALL.but(spec=text, dtype=d) for d in ("float32", "float64") for text in SPECS),
    *(SMALL.but(spec=text, dtype="bfloat16") for text in SPECS[:6:2]),
    SMALL.but(spec="causal+bn(statistics=prefix)", draw="far"),
    SMALL.but(spec="causal+bn(statistics=prefix)", draw="outlier"),
    SMALL.but(spec="causal+bn(statistics=prefix)", heads=4, lead=(1, 2)),
]
SPLITS = ((13,), (1,) * 13, (4, 0, 1, 7, 1))


class Steps:
    """A decoder on the backend under test, and the arrays of a call."""

    def __init__(self, subject: Subject, call: Call, operands: tuple[Any, ...]) -> None:
        self.subject, self.call = subject, call
        *self.qkv, options = operands
        self.decoder: Decoder = decoder(
            call.spec, params=options.get("params"), backend=subject.name
        )

    def init(self, undo: int = 0) -> dict[str, Any]:
        """Return the state of no positions."""
        q, k, v = self.qkv
        sizes = (tuple(q.shape[:-3]), k.shape[-3], k.shape[-1], v.shape[-1])
        return self.decoder.init(*sizes, 2 * self.call.rows, undo=undo, like=k)

    def extend(
        self, state: dict[str, Any], start: int, stop: int, **more: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the results of positions start to stop as NumPy arrays, and the next state."""
        rows = [x[..., start:stop, :] for x in self.qkv]
        (out, lse), state = self.decoder.extend(state, *rows, return_lse=True, **more)
        back = self.subject.back
        return {"out": back(out), "lse": back(lse, "lse")}, state


@contextmanager
def steps(call: Call, subject: Subject, arrays: Arrays) -> Iterator[Steps | None]:
    """Yield a decoder on the backend; None, after a check that it refuses, where it has none."""
    missing = subject.unclaimed([*call.features(lse=True), "key_mask", "offset"])
    if missing:
        subject.judge(call)
        yield None
        return
    with subject.watched(arrays) as operands:
        if not isinstance(subject.backend, ArrayBackend):
            subject.refuses(["offset"], lambda: Steps(subject, call, operands).init(), call)
            yield None
            return
        yield Steps(subject, call, operands)


@each(CALLS)
def test_splits_give_the_rows_of_one_call(call: Call, subject: Subject) -> None:
    """One token at a time, or any number, gives the rows of the whole sequence."""
    arrays = call.arrays()
    with steps(call, subject, arrays) as run:
        if run is None:
            return
        whole = subject.expected(call, arrays)
        for split in SPLITS:
            state, at, parts = run.init(), 0, []
            for count in split:
                part, state = run.extend(state, at, at + count)
                parts.append(part)
                at += count
            joined = {
                "out": np.concatenate([part["out"] for part in parts], axis=-2),
                "lse": np.concatenate([part["lse"] for part in parts], axis=-1),
            }
            subject.evidence.add(judge(joined, whole), f"split {split}")


TRUNCATED = [SMALL.but(spec=text, dtype="float64") for text in SPECS]


@each(TRUNCATED)
def test_truncation_takes_positions_back(call: Call, subject: Subject) -> None:
    """After drafts that are taken back, outlying ones too, rows are the same to the last bit."""
    arrays = call.arrays()
    with steps(call, subject, arrays) as run:
        if run is None:
            return
        whole = subject.expected(call, arrays)
        first, before = run.extend(run.init(undo=3), 0, 6)
        drafts = [1e6 * x[..., 6:9, :] for x in run.qkv]
        _, after = run.decoder.extend(before, *drafts)
        rest, _ = run.extend(run.decoder.truncate(after, 6), 6, call.rows)
        plain, _ = run.extend(before, 6, call.rows)
        for name in plain:
            np.testing.assert_array_equal(rest[name], plain[name])
        joined = {
            "out": np.concatenate([first["out"], rest["out"]], axis=-2),
            "lse": np.concatenate([first["lse"], rest["lse"]], axis=-1),
        }
        subject.evidence.add(judge(joined, whole))


RAGGED = [SMALL.but(spec=text) for text in SPECS]


@each(RAGGED)
def test_each_sequence_has_its_own_length(call: Call, subject: Subject) -> None:
    """Sequences of different lengths decode in one batch; what padding holds has no effect."""
    arrays = call.arrays()
    with steps(call, subject, arrays) as run:
        if run is None:
            return
        whole = subject.expected(call, arrays)
        low = {name: whole.low[name].copy() for name in ("out", "lse")}
        lead = arrays.q.shape[:-3]
        counts = np.full(lead, 7)
        counts.flat[0] = 4
        lengths = run.subject.there(counts.astype("int32"))
        part, state = run.extend(run.init(), 0, 7, lengths=lengths)
        for index in np.ndindex(*lead):
            n = counts[index]
            low["out"][index][:, :n] = part["out"][index][:, :n]
            low["lse"][index][:, :n] = part["lse"][index][:, :n]
        for _ in range(3):
            at = counts[..., None, None, None]
            arrays_at = (np.take_along_axis(x, at, axis=-2) for x in (arrays.q, arrays.k, arrays.v))
            rows = [run.subject.there(np.ascontiguousarray(x)) for x in arrays_at]
            (out, lse), state = run.decoder.extend(state, *rows, return_lse=True)
            out, lse = run.subject.back(out), run.subject.back(lse, "lse")
            for index in np.ndindex(*lead):
                low["out"][index][:, counts[index]] = out[index][:, 0]
                low["lse"][index][:, counts[index]] = lse[index][:, 0]
            counts = counts + 1
        subject.evidence.add(judge(low, whole))
