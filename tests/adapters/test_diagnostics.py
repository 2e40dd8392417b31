"""Test distances of heads, rows of weights and pages on NumPy and array-api-strict."""

from __future__ import annotations

import re
import tracemalloc
from itertools import combinations
from types import SimpleNamespace

import array_api_strict
import numpy as np
import pytest

import pdcore
from pdcore.extend import Inputs
from pdcore_adapters.diagnostics import (
    Capture,
    LayerCall,
    capture,
    head_distance,
    head_distances,
    plot_distances,
    plot_maps,
    write_page,
)
from pdcore_adapters.diagnostics import distances as module

SPECS = ("softmax", "bn", "causal+bn(statistics=prefix)", "sh(1,2,1,2)", "causal+alibi", "linear")


def arrays(n=13, m=13, heads=4, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return draw((2, heads, n, 5)), draw((2, heads, m, 5)), draw((2, heads, m, 3))


def call_of(q, k, v, spec, **others):
    return LayerCall("layer", pdcore.bind(spec), Inputs(q, k, v, **others), None)


def pairs(x):
    return [np.sqrt(((a - b) ** 2).sum()) for a, b in combinations(x, 2)]


def expected(maps, outs):
    """Return the three measures of one sequence by their formulas."""
    apart = np.mean(pairs(outs))
    return np.mean(pairs(maps)), apart, apart / np.mean([np.sqrt((o**2).sum()) for o in outs])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("library", ["numpy", "strict"])
@pytest.mark.parametrize("rows", [1, 4, 128])
def test_distances_are_the_formulas(spec, library, rows):
    q, k, v = arrays()
    maps = pdcore.attention_weights(q, k, v, spec)
    outs = pdcore.attention(q, k, v, spec)
    want = np.array([expected(*one) for one in zip(maps, outs, strict=True)]).T
    xp = np if library == "numpy" else array_api_strict
    found = head_distances(*map(xp.asarray, (q, k, v)), spec, rows=rows)
    for name, figures in zip(("maps", "outputs", "relative"), want, strict=True):
        np.testing.assert_allclose(getattr(found, name), figures, rtol=1e-12)
    np.testing.assert_allclose(head_distance(xp.asarray(maps)), want[0], rtol=1e-13)
    assert found.mean() == pytest.approx(
        dict(zip(("maps", "outputs", "relative"), want.mean(1), strict=True))
    )


def test_equal_heads_are_at_distance_0():
    q, k, v = (np.repeat(x[:, :1], 3, axis=1) for x in arrays())
    assert not any(head_distances(q, k, v).mean().values())


def test_queries_that_do_not_count_change_nothing():
    q, k, v = arrays()
    real = np.arange(13) < np.array([[9], [13]])
    other = q.copy()
    other[0, :, 9:] = 7.0
    for rows in (5, 128):
        found = head_distances(other, k, v, query_mask=real, rows=rows)
        short = head_distances(q[:1, :, :9], k[:1], v[:1])
        for name in ("maps", "outputs", "relative"):
            assert getattr(found, name)[0] == pytest.approx(getattr(short, name)[0])
    assert head_distances(q, k, v).maps[0] != pytest.approx(found.maps[0])


@pytest.mark.parametrize("spec", SPECS[:4])
def test_rows_are_those_of_all_weights(spec):
    q, k, v = arrays(n=6)
    draw = np.random.default_rng(1)
    last = np.array([9, 13])
    kinds = [
        {"offset": 5},
        {"offset": np.array([3, 4])},
        {"offset": "end"},
        {"offset": "end", "key_mask": np.arange(13) < last[:, None]},
        {"mask": draw.random((2, 1, 6, 13)) < 0.8},
    ]
    if not spec.startswith("sh"):
        kinds.append({"bias": draw.standard_normal((6, 13))})
    for others in kinds:
        whole = pdcore.attention_weights(q, k, v, spec, **others)
        call = call_of(q, k, v, spec, **others)
        np.testing.assert_allclose(call.weights(), whole, rtol=1e-12, atol=1e-15)
        for rows in (slice(0, 2), slice(2, 5), slice(-1, None)):
            np.testing.assert_allclose(
                call.weights(rows), whole[..., rows, :], rtol=1e-12, atol=1e-15
            )


def test_rows_keep_their_labels():
    q, k, v = arrays()
    draw = np.random.default_rng(2)
    labels, influence = draw.integers(0, 3, (2, 13)), draw.standard_normal((4, 3, 3))
    others = {"labels": labels, "params": {"influence": influence}}
    whole = pdcore.attention_weights(q, k, v, "labels(3)", **others)
    part = call_of(q, k, v, "labels(3)", **others).weights(slice(4, 9))
    np.testing.assert_allclose(part, whole[..., 4:9, :], rtol=1e-12)


def peak(n):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, n, 4))
    head_distances(q, k, v, rows=16)  # what is imported and cached at the first call
    tracemalloc.start()
    head_distances(q, k, v, rows=16)
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return found


def test_no_array_of_all_weights():
    n = 2048
    assert peak(n) < 8 * n * n  # one head's map in float64; all weights are twice that
    assert peak(2 * n) < 3 * peak(n)


def test_a_planted_defect_is_caught(monkeypatch):
    """Rows that forget their position give other distances than the formula."""
    q, k, v = arrays()
    right = head_distances(q, k, v, "causal", rows=4).maps
    true = module.some_rows
    monkeypatch.setattr(module, "some_rows", lambda call, rows: true(call, rows)._replace(offset=0))
    assert not np.allclose(head_distances(q, k, v, "causal", rows=4).maps, right)


def test_errors_teach():
    q, k, v = arrays()
    with pytest.raises(ValueError, match=r"q: got shape \(2, 1, 13, 5\).*two or more heads"):
        head_distances(q[:, :1], k[:, :1], v[:, :1])
    with pytest.raises(ValueError, match=r"x: got shape \(3, 3\)"):
        head_distance(np.ones((3, 3)))
    with pytest.raises(ValueError, match="rows: got 0, expected 1 or more"):
        head_distances(q, k, v, rows=0)
    with pytest.raises(TypeError, match="rows: got float"):
        head_distances(q, k, v, rows=2.0)
    with pytest.raises(ValueError, match=r"query_mask: got shape \(13,\)"):
        head_distances(q, k, v, query_mask=np.ones(13, bool))
    call = call_of(q, k, v, "softmax")
    with pytest.raises(ValueError, match="limit=200: pass a slice of 1 queries"):
        call.weights(limit=200)
    assert call.weights(slice(0, 1), limit=200).shape == (2, 4, 1, 13)
    with pytest.raises(TypeError, match="rows: got int, expected a slice of the 13 queries"):
        call.weights(3)
    with pytest.raises(ValueError, match=r"rows: got .* one or more of the 13 queries"):
        call.weights(slice(5, 5))
    packed = call_of(q, k, v, "causal", segments=np.zeros((2, 13), int))
    with pytest.raises(pdcore.UnsupportedError, match="rows: got a part of the queries of packed"):
        packed.weights(slice(0, 3))
    with pytest.raises(TypeError, match="model: got SimpleNamespace"), capture(SimpleNamespace()):
        pass


def test_pictures():
    maps = pdcore.attention_weights(*arrays(), "causal")
    figure = plot_maps(maps[0], "a layer", queries=list("abcdefghijklm"))
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == [f"head {i}" for i in (1, 2, 3, 4)]
    np.testing.assert_array_equal(panels[2].images[0].get_array(), maps[0, 2])
    assert panels[0].images[0].norm.vmax == maps[0].max()
    with pytest.raises(ValueError, match=r"weights: got shape .2, 4, 13, 13., .* one sequence"):
        plot_maps(maps)
    with pytest.raises(ValueError, match="keys: got 1 labels, expected 13"):
        plot_maps(maps[0], keys=["a"])
    with pytest.raises(ValueError, match="weights: got values from -1"):
        plot_maps(-np.ones((1, 2, 2)))


def test_picture_of_distances():
    layers = {spec: head_distances(*arrays(), spec) for spec in ("softmax", "bn", "linear")}
    figure = plot_distances(layers, "a model")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(layers)
    for ax, name in zip(figure.axes, ("maps", "outputs", "relative"), strict=True):
        assert ax.get_title().startswith(f"{name}: ")
        medians = [line.get_xdata()[0] for line in ax.lines[5::7]]
        expected = [np.median(getattr(layer, name)) for layer in layers.values()]
        np.testing.assert_allclose(medians, expected)
    with pytest.raises(ValueError, match="distances: got no layer"):
        plot_distances({})


def test_page(tmp_path):
    with pytest.raises(ValueError, match="captured: got a record without calls"):
        write_page(tmp_path / "page.html", Capture(left={"a": "why"}))
    call = call_of(*arrays(), "causal+bn(statistics=prefix)")
    record = Capture([call], {"a<b": "its attention is not pdcore's"})
    page = write_page(tmp_path / "page.html", record).read_text()
    assert page.count("data:image/png") == 5
    assert "a&lt;b" in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for figure in call.distances().mean().values():
        assert f"{figure:.4g}" in page
