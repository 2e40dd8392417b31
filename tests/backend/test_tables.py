"""The laws of relative and labels, on NumPy, against a dense bias of the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore import SpecError, UnsupportedError
from pdcore.backend.tables import entry_sums, entry_values
from pdcore.spec import DISTANCE, Expression

REACH, COUNT = 3, 4


def drawn(rows: int, keys: int, dtype: str = "float64", dim: int = 5) -> Any:
    rng = np.random.default_rng(0)
    shapes = (2, 4, rows, dim), (2, 2, keys, dim), (2, 2, keys, 3)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def by_distance(table: Any, rows: int, keys: int, offset: int) -> Any:
    """Return the dense bias (H, N, M), and the entry that each pair reads."""
    apart = np.arange(keys) - (np.arange(rows)[:, None] + offset)
    entry = np.clip(apart, -REACH, REACH) + REACH
    return table[:, entry], entry


def results(words: str, x: Any, **options: Any) -> dict[str, Any]:
    out, lse, vjp = pdcore.attention_vjp(*x, words, **options)
    rng = np.random.default_rng(1)
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
    return {"out": out, "lse": lse, **vjp(d_out, np.where(np.isinf(lse), 0, d_lse))}


@pytest.mark.parametrize("words", ["softmax", "polynomial", "causal+bn(statistics=prefix,eps=0.3)"])
@pytest.mark.parametrize(("rows", "keys", "offset"), [(7, 9, 0), (1, 9, 8), (70, 4096, 2000)])
def test_relative_equals_the_dense_bias(words: str, rows: int, keys: int, offset: int) -> None:
    x = drawn(rows, keys)
    table = np.random.default_rng(2).normal(size=(4, 2 * REACH + 1))
    bias, entry = by_distance(table, rows, keys, offset)
    wanted = results(words, x, bias=np.broadcast_to(bias, (2, *bias.shape)), offset=offset)
    d = wanted.pop("bias").sum(0)
    wanted["relative"] = np.stack([d[:, entry == e].sum(-1) for e in range(2 * REACH + 1)], -1)
    got = results(f"{words}+relative({REACH})", x, params={"relative": table}, offset=offset)
    assert got.keys() == wanted.keys()
    for name, expected in wanted.items():
        scale = abs(expected[np.isfinite(expected)]).max()
        np.testing.assert_allclose(got[name], expected, rtol=1e-10, atol=1e-11 * scale)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("words", ["softmax", "gaussian(0.3)", "sparse(2,3)+h(count)"])
def test_labels_equal_the_dense_bias(words: str, heads: int) -> None:
    rows, keys = 7, 9
    x, rng = drawn(rows, keys), np.random.default_rng(2)
    table = rng.normal(size=(heads, COUNT, COUNT))
    labels = rng.integers(0, COUNT, (2, rows)), rng.integers(0, COUNT, (2, keys))
    i, j = labels[0][..., :, None], labels[1][..., None, :]
    bias = np.moveaxis(table[:, i, j], 0, 1)
    wanted = results(words, x, bias=np.broadcast_to(bias, (2, 4, rows, keys)))
    d = wanted.pop("bias")
    d = d if heads == 4 else d.sum(1, keepdims=True)
    wanted["influence"] = np.zeros_like(table)
    for a in range(COUNT):
        for b in range(COUNT):
            of_pair = ((i == a) & (j == b))[:, None]
            wanted["influence"][:, a, b] = (d * of_pair).sum((0, -2, -1))
    got = results(f"{words}+labels({COUNT})", x, labels=labels, params={"influence": table})
    for name, expected in wanted.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-10, atol=1e-11, err_msg=name)


def test_gradients_of_all_entries_cancel() -> None:
    # A constant added to all scores changes no weight.
    x = drawn(130, 600)
    for words, options in (
        ("causal+relative(3)", {}),
        ("labels(4)", {"labels": (np.zeros((2, 130), int), np.arange(1200).reshape(2, 600) % 4)}),
    ):
        shape = (4, 4, 4) if "labels" in words else (4, 7)
        [name] = [p.name for p in pdcore.parse(words).parameters()]
        params = {name: np.random.default_rng(3).normal(size=shape)}
        out, _, vjp = pdcore.attention_vjp(*x, words, params=params, offset=470, **options)
        gradient = vjp(np.ones_like(out) * np.arange(3))[name]
        total = gradient.reshape(4, -1).sum(-1)
        assert abs(total).max() < 1e-12 * abs(gradient).sum(), words


def test_entries_keep_their_digits_in_float32() -> None:
    # One running sum of float32 over the million pairs of a head would lose digits.
    x = drawn(128, 8192, "float32", dim=4)

    def gradient(dtype: str) -> Any:
        cast = [a.astype(dtype) for a in x]
        params = {"relative": np.zeros((4, 3), dtype)}
        out, lse, vjp = pdcore.attention_vjp(*cast, "relative(1)", params=params)
        return vjp(np.zeros_like(out), np.ones_like(lse))["relative"]

    np.testing.assert_allclose(gradient("float32"), gradient("float64"), rtol=2e-6)


def test_zeros_are_the_default_of_relative() -> None:
    x = drawn(7, 9)
    np.testing.assert_allclose(
        pdcore.attention(*x, "relative(2)"), pdcore.attention(*x, "softmax"), rtol=1e-12
    )


def test_entries_of_minus_infinity_remove_keys() -> None:
    q, k, v = drawn(6, 8)
    labels = np.zeros((2, 6), int), np.tile([0, 1], (2, 4))
    table = np.array([[[0.5, -np.inf], [0.0, 0.0]]])
    params = {"influence": table}
    for h in ("h(sum)", "h(count)"):
        got = pdcore.attention(q, k, v, f"labels(2)+{h}", labels=labels, params=params)
        kept = pdcore.attention(q, k[:, :, ::2], v[:, :, ::2], h, bias=np.full((1, 1, 1, 4), 0.5))
        np.testing.assert_allclose(got, kept, rtol=1e-12)
    out, _, vjp = pdcore.attention_vjp(q, k, v, "labels(2)", labels=labels, params=params)
    gradient = vjp(np.ones_like(out))
    assert gradient["influence"][0, 0, 1] == 0
    assert not gradient["k"][:, :, 1::2].any()


def test_entries_beyond_the_ends_are_those_of_the_ends() -> None:
    t, d = (Expression("input", (), name) for name in ("t", DISTANCE))
    places = {DISTANCE: np.arange(5.0) - np.arange(4.0)[:, None]}
    table = np.arange(3.0).reshape(1, 1, 1, 3)
    got = entry_values(t[d + 1], table, places, xp=np)
    np.testing.assert_array_equal(got[0, 0], np.clip(places[DISTANCE] + 1, 0, 2))
    sums = entry_sums(t[d + 1], np.ones((1, 1, 4, 5)), places, table.shape, xp=np)
    np.testing.assert_array_equal(sums[0, 0, 0], [(got == e).sum() for e in range(3)])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, r"labels: got none, and softmax\+labels\(count=4\) reads them"),
        (np.zeros((2, 7)), TypeError, "labels: got dtype float64, expected an integer dtype"),
        (np.zeros((2, 8), int), ValueError, r"labels: got shape \(2, 8\), expected \(2, 7\)"),
        (np.full((2, 7), 4), ValueError, "labels: got 4 among those of queries, .* 4 entries"),
        (np.full((2, 7), -1), ValueError, "labels: got -1 among those of queries"),
        ((np.zeros((2, 7), int),), ValueError, "labels: got 1 arrays, expected one, or a pair"),
    ],
)
def test_wrong_labels(labels: Any, error: type[Exception], message: str) -> None:
    params = {"influence": np.zeros((4, 4, 4))}
    with pytest.raises(error, match=message):
        pdcore.attention(*drawn(7, 7), "labels(4)", labels=labels, params=params)


def test_labels_without_a_reader_are_refused() -> None:
    with pytest.raises(ValueError, match="labels: softmax reads none; add labels"):
        pdcore.attention(*drawn(7, 7), labels=np.zeros((2, 7), int))


def test_labels_of_padding_are_not_looked_at() -> None:
    q, k, v = drawn(7, 9)
    real = np.arange(9) < np.array([[9], [6]])
    of_keys = np.where(real, 1, 99)
    params = {"influence": np.arange(16.0).reshape(1, 4, 4)}
    labels = (np.zeros((2, 7), int), of_keys)
    got = pdcore.attention(
        q, k, v, "labels(4)", key_mask=real, labels=labels, params=params, return_lse=True
    )
    for result, plain in zip(
        got, pdcore.attention(q, k, v, key_mask=real, return_lse=True), strict=True
    ):
        np.testing.assert_allclose(result, plain + (result.ndim == 3), rtol=1e-12)
    with pytest.raises(ValueError, match="labels: got 99 among those of keys"):
        pdcore.attention(q, k, v, "labels(4)", labels=labels, params=params)


def test_specs_with_tables() -> None:
    spec = pdcore.parse("labels(4)+relative(2)+causal")
    assert spec.terms == (pdcore.Labels(4), pdcore.Relative(2))
    assert pdcore.parse(str(spec)) == spec
    for text, message in (
        ("relative(-1)", "relative: reach: got -1, expected 0 to"),
        ("labels(0)", "labels: count: got 0, expected 1 to"),
        ("labels", "labels: count must be given"),
        ("relative(2.5)", "relative: reach is 2.5, expected int"),
        ("relative(2)+relative(3)", "both set"),
    ):
        with pytest.raises(SpecError, match=message):
            pdcore.parse(text)
    for text in ("linear+relative(2)", "relu+labels(2)"):
        with pytest.raises(UnsupportedError, match="it is a term of log kappa"):
            pdcore.parse(text)
    with pytest.raises(UnsupportedError, match="relative: a pooled key has no single position"):
        pdcore.parse("relative(2)+sh(1,2)")
