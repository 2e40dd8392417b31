"""Test that a call cut into pieces computes what the whole call does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pdcore.attention import attention, explain
from pdcore.cli.pieces import ROWS, attend_in_pieces, divide
from pdcore.lowering import Plan, Signature, lower
from pdcore.spec import as_spec

RNG = np.random.default_rng(0)
SPECS = [
    "softmax",
    "causal",
    "sparse(3,inf)",
    "linear",
    "linear+causal",
    "linear+bn",
    "bn",
    "bn(statistics=batch)",
    "bn(beta=param)",
    "h(sum,sink=param)",
    "causal+bn(statistics=prefix)",
    "sh(1,2)",
    "linear+sh(half=3)",
    "linear+sh(1,2)+causal",
    "random_features(8)",
    "gaussian(gamma=0.3)+h(count)",
]


def planned(spec: str, arrays: dict[str, Any]) -> Plan:
    masked = arrays.get("mask") is not None
    q, k = arrays["q"], arrays["k"]
    return lower(as_spec(spec), Signature(q.shape[-1], k.shape[-3], str(q.dtype), masked))


def drawn(*lead: int, heads: int = 2, rows: int = 13, keys: int = 17) -> dict[str, Any]:
    return {
        "q": RNG.standard_normal((*lead, 2 * heads, rows, 4)),
        "k": RNG.standard_normal((*lead, heads, keys, 4)),
        "v": RNG.standard_normal((*lead, heads, keys, 3)),
    }


def check(spec: str, arrays: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("pdcore.cli.pieces.ROWS", 3)
    whole = attention(**arrays, spec=spec, return_lse=True)
    heard: list[float] = []
    parts, count = attend_in_pieces(
        arrays, planned(spec, arrays), lse=True, target=1.0, done=heard.append
    )
    for name, expected in zip(("out", "lse"), whole, strict=True):
        assert parts[name].dtype == expected.dtype
        np.testing.assert_allclose(parts[name], expected, rtol=1e-12, atol=1e-13)
    assert len(heard) == count
    assert heard == sorted(heard)
    assert heard[-1] == pytest.approx(1.0)
    return count


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3)])
def test_pieces_equal_the_whole(
    spec: str, lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = drawn(*lead)
    if "param" in spec:
        params = {"beta": np.array([0.5, 2.0]), "sink": np.array([0.5, 2.0, -1.0, 0.0])}
        arrays["params"] = {name: params[name] for name in params if name in spec}
    assert check(spec, arrays, monkeypatch) > 1


@pytest.mark.parametrize("spec", ["causal", "causal+bn(statistics=prefix)", "linear+causal"])
@pytest.mark.parametrize("offset", ["end", 4, -2, "sequences"])
@pytest.mark.parametrize("padded", [False, True])
def test_positions_move_along(
    spec: str, offset: Any, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = drawn(3)
    arrays["offset"] = np.array([0, 2, 5]) if offset == "sequences" else offset
    if padded:
        arrays["key_mask"] = np.arange(17) < np.array([[17], [9], [0]])
    check(spec, arrays, monkeypatch)


@pytest.mark.parametrize("lead", [1, 3])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("rows", [1, 13])
def test_broadcast_masks_and_biases(
    lead: int, heads: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = drawn(3)
    arrays["mask"] = RNG.random((lead, heads, rows, 17)) < 0.7
    arrays["bias"] = RNG.standard_normal((rows, 17))
    check("softmax", arrays, monkeypatch)
    arrays.pop("bias")
    check("linear", arrays, monkeypatch)


def test_statistics_over_the_batch_are_not_cut_with_it() -> None:
    arrays = drawn(4, rows=2000)
    plan = planned("bn(statistics=batch)", arrays)
    pieces = divide(plan, arrays["q"].shape, arrays["k"].shape, arrays["v"].shape, 1.0)
    assert all(piece.lead is None for piece in pieces)
    assert len(pieces) == -(-2000 // ROWS)


@pytest.mark.parametrize("spec", ["causal+bn(statistics=prefix)", "bn+sh(1,2)", "linear"])
@pytest.mark.parametrize("pair", [False, True])
def test_segments_are_cut_by_sequences_and_heads(
    spec: str, pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = drawn(3, rows=17)
    ids = np.array([[0] * 5 + [1] * 12, [3] * 17, [-1] * 4 + [2] * 13])
    arrays["segments"] = (ids, ids[:, ::-1]) if pair else ids
    assert check(spec, arrays, monkeypatch) > 1


def test_small_calls_stay_whole() -> None:
    arrays = drawn(3)
    assert attend_in_pieces(arrays, planned("softmax", arrays))[1] == 1


def test_features_are_cut_by_heads_not_rows() -> None:
    arrays = drawn(1, heads=5, rows=5000)
    pieces = divide(
        planned("linear", arrays), arrays["q"].shape, arrays["k"].shape, arrays["v"].shape, 1.0
    )
    assert [piece.heads for piece in pieces] == [slice(i, i + 1) for i in range(5)]


def test_empty_calls() -> None:
    arrays = drawn(0)
    outputs, count = attend_in_pieces(arrays, planned("softmax", arrays))
    assert outputs["out"].shape == (0, 4, 13, 3)
    assert count == 1


def test_the_plan_is_the_one_that_explain_shows() -> None:
    arrays = drawn(1)
    shown = explain(**arrays, spec="bn").plan
    assert shown is not None
    assert shown.steps == planned("bn", arrays).steps
