"""``layout=``: q, k, v, the result and their gradients as (*B, N, H, D)."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import pytest

import pdcore

RNG = np.random.default_rng(0)
B, HQ, HKV, N, M, D, DV = 2, 4, 2, 3, 5, 6, 7


def swapped(x: Any) -> Any:
    return np.swapaxes(x, -2, -3)


def operands(*lead: int) -> tuple[Any, Any, Any]:
    """Return q, k and v as (*B, N, H, D)."""
    shapes = ((N, HQ, D), (M, HKV, D), (M, HKV, DV))
    q, k, v = (RNG.standard_normal((*lead, *shape)) for shape in shapes)
    return q, k, v


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask": {"mask": RNG.random((HQ, N, M)) < 0.7},
    "key_mask": {"key_mask": np.arange(M) < [[3], [4]]},
    "bias": {"bias": RNG.standard_normal((B, HQ, N, M))},
    "bn": {"spec": "bn(beta=param)", "params": {"beta": np.ones(HKV)}},
    "causal": {"spec": "causal", "offset": "end"},
    "pooled": {"spec": "sh(1,2)"},
    "linear": {"spec": "linear"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_result_is_that_of_swapped_axes(name: str) -> None:
    x, call = operands(B), OPTIONS[name]
    want, level = pdcore.attention(*map(swapped, x), **call, return_lse=True)
    out, lse = pdcore.attention(*x, **call, return_lse=True, layout="bnhd")
    assert out.shape == (B, N, HQ, DV)
    np.testing.assert_array_equal(out, swapped(want))
    np.testing.assert_array_equal(lse, level)
    rest = {n: value for n, value in call.items() if n != "spec"}
    bound = pdcore.bind(call.get("spec", "softmax"))
    np.testing.assert_array_equal(bound(*x, **rest, layout="bnhd"), out)
    np.testing.assert_array_equal(
        pdcore.attention_weights(*x, **call, layout="bnhd"),
        pdcore.attention_weights(*map(swapped, x), **call),
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_have_the_layout_of_their_arrays(name: str) -> None:
    x, call = operands(B), OPTIONS[name]
    _, _, plain = pdcore.attention_vjp(*map(swapped, x), **call)
    out, lse, vjp = pdcore.attention_vjp(*x, **call, layout="bnhd")
    d_out, d_lse = RNG.standard_normal(out.shape), RNG.standard_normal(lse.shape)
    want, got = plain(swapped(d_out), d_lse), vjp(d_out, d_lse)
    assert got.keys() == want.keys()
    for n, gradient in got.items():
        moved = n in ("q", "k", "v")
        np.testing.assert_array_equal(gradient, swapped(want[n]) if moved else want[n])
    with pytest.raises(
        ValueError, match=r"d_out: got shape \(2, 4, 3, 7\), expected \(2, 3, 4, 7\)"
    ):
        vjp(swapped(d_out))


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_leading_axes_are_any(lead: tuple[int, ...]) -> None:
    x = operands(*lead)
    out = pdcore.attention(*x, layout="bnhd")
    assert out.shape == (*lead, N, HQ, DV)
    np.testing.assert_array_equal(out, swapped(pdcore.attention(*map(swapped, x))))


def test_the_default_may_be_said() -> None:
    x = tuple(map(swapped, operands(B)))
    assert pdcore.attention(*x, layout="bhnd").shape == (B, HQ, N, DV)
    # Equal to the default, but another object.
    assert pdcore.attention(*x, layout="".join(("bh", "nd"))).shape == (B, HQ, N, DV)


def test_arrays_without_a_method_for_it() -> None:
    x = [array_api_strict.asarray(a) for a in operands(B)]
    assert not hasattr(x[0], "swapaxes")
    out, _, vjp = pdcore.attention_vjp(*x, layout="bnhd")
    assert out.shape == (B, N, HQ, DV)
    assert vjp(out)["k"].shape == (B, M, HKV, D)


def test_the_arrays_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    from pdcore.plugins import load_backend

    backend, seen = load_backend("numpy"), []
    run = type(backend).attention

    def attention(self: Any, plan: Any, inputs: Any, *, lse: bool) -> Any:
        seen.append(inputs)
        return run(self, plan, inputs, lse=lse)

    monkeypatch.setattr(type(backend), "attention", attention)
    x = operands(B)
    pdcore.attention(*x, layout="bnhd", backend="numpy")
    for taken, array in zip(seen[0][:3], x, strict=True):
        assert np.shares_memory(taken, array)


def test_explain_shows_the_shapes_of_the_caller() -> None:
    explanation = pdcore.explain(*operands(B), layout="bnhd")
    assert "q (2, 3, 4, 6), k (2, 5, 2, 6), v (2, 5, 2, 7), layout bnhd" in str(explanation)
    assert explanation.request.q == (B, HQ, N, D)  # for backends
    assert "layout" not in str(pdcore.explain(*map(swapped, operands(B))))


def test_refusals_show_the_shapes_of_the_caller() -> None:
    with pytest.raises(pdcore.NoBackendError, match=r"q \(2, 3, 4, 6\).*layout bnhd"):
        pdcore.attention(*operands(B), axis_name="rows", layout="bnhd")


@pytest.mark.parametrize("wrong", ["BNHD", "bnhdd", "bshd", "nbhd", "xxxxxxx", ""])
def test_another_layout_is_refused_with_the_two_there_are(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"layout: got .*'bhnd' for .*'bnhd' for") as caught:
        pdcore.attention(*operands(B), layout=wrong)  # type: ignore[arg-type]
    meant = "did you mean 'bnhd'?" if wrong in ("BNHD", "bnhdd", "nbhd") else "bnhd"
    assert meant in str(caught.value)


@pytest.mark.parametrize("wrong", [None, 1, True, ("b", "n", "h", "d")])
def test_a_layout_is_a_string(wrong: Any) -> None:
    x = operands(B)
    for call in (pdcore.attention, pdcore.attention_vjp, pdcore.attention_weights, pdcore.explain):
        with pytest.raises(TypeError, match=r"layout: got .*'bhnd' for"):
            call(*x, layout=wrong)


# --- wrong shapes ---------------------------------------------------------------------------------


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


SHAPES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "axes": (
        "bnhd",
        {"q": ones(N, D)},
        ("q: got shape (3, 6)", "(*batch, length, heads, features)"),
    ),
    "leading axes": (
        "bnhd",
        {"k": ones(3, M, HKV, D)},
        ("got shapes (2, 3, 4, 6), (3, 5, 2, 6)", "(*batch, length, heads, features)"),
    ),
    "v": (
        "bnhd",
        {"v": ones(B, 4, HKV, DV)},
        ("v: got shape (2, 4, 2, 7), expected (5, 2) keys and heads like k (2, 5, 2, 6)",),
    ),
    "features": ("bnhd", {"k": ones(B, M, HKV, 9)}, ("like q (2, 3, 4, 6)",)),
    "heads": (
        "bnhd",
        {"k": ones(B, M, 3, D), "v": ones(B, M, 3, DV)},
        ("q: got 4 heads in (2, 3, 4, 6)", "the 3 heads of k (2, 5, 3, 6)"),
    ),
    "heads of the other layout": (
        "bhnd",
        {"q": ones(B, 7, HQ, D)},
        ("q: got 7 heads in (2, 7, 4, 6)", "(*batch, length, heads, features)", 'layout="bnhd"'),
    ),
    "heads of the default": (
        "bnhd",
        {"q": ones(B, HQ, 7, D), "k": ones(B, HKV, M, D), "v": ones(B, HKV, M, DV)},
        ("q: got 7 heads in (2, 4, 7, 6)", "(*batch, heads, length, features)", 'layout="bhnd"'),
    ),
    "scales": (
        "bhnd",
        {"spec": "sh(1,2)", "q": ones(B, M, HQ, D)},
        ("2 scales", "5 heads of k (2, 5, 2, 6)", 'layout="bnhd"'),
    ),
    "key_mask": (
        "bhnd",
        {"q": ones(B, M, HQ, D), "key_mask": ones(B, M, dtype=bool)},
        ("key_mask: got shape (2, 5), expected (2, 2)", 'layout="bnhd"'),
    ),
    "mask": (
        "bhnd",
        {"q": ones(B, M, HQ, D), "mask": ones(HQ, M, M, dtype=bool)},
        ("mask: got shape (4, 5, 5)", "broadcasts to (2, 5, 4, 2)", 'layout="bnhd"'),
    ),
    "bias": (
        "bhnd",
        {"q": ones(B, M, HQ, D), "bias": ones(HQ, M, M)},
        ("bias: got shape (4, 5, 5)", "broadcasts to (2, 5, 4, 2)", 'layout="bnhd"'),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_errors_show_the_shapes_of_the_caller(name: str) -> None:
    layout, given, says = SHAPES[name]
    x = {"q": ones(B, N, HQ, D), "k": ones(B, M, HKV, D), "v": ones(B, M, HKV, DV)}
    with pytest.raises(ValueError, match="got") as caught:
        pdcore.attention(**{**x, **given}, layout=layout)  # type: ignore[arg-type]
    for text in says:
        assert text in str(caught.value), str(caught.value)


def test_the_other_layout_is_named_only_where_it_fits() -> None:
    x = ones(B, 7, 3, D)
    y = ones(B, 5, 2, D)
    for layout in ("bhnd", "bnhd"):
        with pytest.raises(ValueError, match="heads") as caught:
            pdcore.attention(x, y, y, layout=layout)  # type: ignore[arg-type]
        assert "layout" not in str(caught.value)


def test_the_docstring_names_it_first() -> None:
    assert 'layout="bnhd"' in (pdcore.attention.__doc__ or "").partition("Parameters")[0]
