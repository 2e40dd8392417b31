"""Attention-Conv1D and Attention-Conv2D: keys convolved along their sequence, or over a grid."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, check_forward, check_gradients, cotangents, normal_case

import pdcore
from pdcore.errors import SpecError, UnsupportedError
from pdcore.plugins import registry as plugins
from pdcore.reference import reference_attention
from pdcore.spec import convolve, parse

SPECS = (
    "conv1d",
    "conv1d(size=4)+linear",
    "conv1d(size=1)+h(count)",
    "conv1d(size=9)+gaussian(0.2)",
    "conv1d(size=2)+sh(2,3)",
    "conv1d(size=3,padding=causal)+causal",
    "conv1d(size=4,padding=causal)+causal+sh(1,2)",
    "conv1d(allow_leak=true)+causal",
    "conv1d+sparse(2,1)",
    "conv2d(3,4)",
    "conv2d(4,3,size=2)+linear",
    "conv2d(2,3,size=4)+gaussian(0.2)+sh(2,2)",
    "conv2d(1,12,allow_leak=true)+causal",
)


def case_of(text: str, kind: int, m: int = 12) -> Case:
    case = normal_case(text, seed=4, m=m)
    if kind == 0:
        return case
    real = np.random.default_rng(kind).random(case.k.shape[:-3] + case.k.shape[-2:-1]) < 0.7
    return replace(case, call={**case.call, "key_mask": real})


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("text", SPECS)
def test_numpy(text: str, kind: int) -> None:
    case = case_of(text, kind)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    d_out, d_lse = cotangents(case, lse)
    assert check_gradients(case, vjp(d_out, d_lse), d_out, d_lse)


# --- the definition, by other means ---------------------------------------------------------------


def attend(case: Case, keys: Any) -> Any:
    """Compute plain attention with other keys."""
    return pdcore.attention(case.q, keys, case.v)


@pytest.mark.parametrize("padding", ["same", "causal"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_convolution_is_attention_to_convolved_keys(size: int, padding: str) -> None:
    case = normal_case(f"conv1d(size={size},padding={padding})", m=8)
    weight = case.call["params"]["weight"]
    keys = np.empty_like(case.k)
    # `np.convolve` reverses its second argument; its full result starts before the first key.
    own = 0 if padding == "causal" else size - 1 - (size - 1) // 2
    for at in np.ndindex(2, 2, 3):
        b, h, d = at
        full = np.convolve(case.k[b, h, :, d], weight[h, ::-1, d])
        keys[b, h, :, d] = full[own : own + 8]
    got = pdcore.attention(*case.qkv, case.spec, **case.call)
    np.testing.assert_allclose(got, attend(case, keys), rtol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_grid_is_convolved_down_and_across(size: int) -> None:
    case = normal_case(f"conv2d(3,5,size={size})", m=15)
    weight, back = case.call["params"]["weight"], (size - 1) // 2
    grid = np.pad(
        case.k.reshape(2, 2, 3, 5, 3),
        ((0, 0), (0, 0), (back, size - 1 - back), (back, size - 1 - back), (0, 0)),
    )
    views = np.lib.stride_tricks.sliding_window_view(grid, (size, size), axis=(2, 3))
    keys = np.einsum("bhrcdut,hutd->bhrcd", views, weight).reshape(case.k.shape)
    got = pdcore.attention(*case.qkv, case.spec, **case.call)
    np.testing.assert_allclose(got, attend(case, keys), rtol=1e-12)


def test_a_filter_of_one_middle_tap_leaves_the_keys() -> None:
    for text, size, middle in (
        ("conv1d(size=5)", (5,), (2,)),
        ("conv1d(size=4,padding=causal)", (4,), (3,)),
        ("conv2d(3,4)", (3, 3), (1, 1)),
    ):
        case = normal_case(text, m=12)
        weight = np.zeros((2, *size, 3))
        weight[(slice(None), *middle)] = 1.0
        got = pdcore.attention(*case.qkv, text, params={"weight": weight})
        np.testing.assert_array_equal(got, attend(case, case.k), err_msg=text)


def test_without_weights_it_is_a_moving_mean() -> None:
    case = normal_case("conv1d", m=6)
    padded = np.pad(case.k, ((0, 0), (0, 0), (1, 1), (0, 0)))
    mean = (padded[..., :-2, :] + padded[..., 1:-1, :] + padded[..., 2:, :]) / 3
    np.testing.assert_allclose(
        pdcore.attention(*case.qkv, "conv1d"), attend(case, mean), rtol=1e-12
    )
    case = normal_case("conv2d(1,6)", m=6)
    np.testing.assert_allclose(
        pdcore.attention(*case.qkv, "conv2d(1,6)"), attend(case, mean / 3), rtol=1e-12
    )


def test_head_scaling_is_a_moving_mean_of_every_sth_point() -> None:
    case = normal_case("conv1d(size=3)", m=12)
    middle = slice(1, None, 3)
    keys = convolve(case.k, np.full((2, 3, 3), 1 / 3), (1,), xp=np)[..., middle, :]
    values = convolve(case.v, np.full((2, 3, 2), 1 / 3), (1,), xp=np)[..., middle, :]
    np.testing.assert_allclose(
        pdcore.attention(*case.qkv, "sh(3,3)"), pdcore.attention(case.q, keys, values), rtol=1e-12
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_default_is_not_rounded_to_the_dtype(dtype: str) -> None:
    case = normal_case("conv1d").cast(np.dtype(dtype))
    given = {"weight": np.full((2, 3, 3), 1 / 3, np.float32)}
    np.testing.assert_array_equal(
        pdcore.attention(*case.qkv, "conv1d"), pdcore.attention(*case.qkv, "conv1d", params=given)
    )


# --- padding, positions and leaks -----------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_absent(side: str) -> None:
    case = normal_case("conv1d(size=5)", m=9)
    real = np.ones((2, 9), bool)
    kept = slice(3, None) if side == "left" else slice(None, -3)
    real[:, : 3 if side == "left" else 0] = False
    real[:, 9 if side == "left" else -3 :] = False
    k = np.where(real[:, None, :, None], case.k, np.nan)
    got = pdcore.attention(case.q, k, case.v, case.spec, key_mask=real, **case.call)
    want = pdcore.attention(
        case.q, case.k[..., kept, :], case.v[..., kept, :], case.spec, **case.call
    )
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_masked_keys_keep_their_positions() -> None:
    case = normal_case("conv1d", m=7)
    real = np.ones((2, 7), bool)
    real[:, 3] = False
    zeros = np.where(real[:, None, :, None], case.k, 0.0)
    weight = case.call["params"]["weight"]
    keys = convolve(zeros, weight, (1,), xp=np)
    got = pdcore.attention(*case.qkv, case.spec, key_mask=real, **case.call)
    np.testing.assert_allclose(
        got, pdcore.attention(case.q, keys, case.v, key_mask=real), rtol=1e-12
    )


@pytest.mark.parametrize("rest", ["", "+sh(1,2)", "+linear", "+sparse(3,inf)"])
def test_decoding_step_by_step_is_exact(rest: str) -> None:
    case = normal_case(f"conv1d(size=3,padding=causal)+causal{rest}", n=9, m=9)
    whole = pdcore.attention(*case.qkv, case.spec, **case.call)
    for m in range(1, 10):
        part = pdcore.attention(
            case.q[..., :m, :], case.k[..., :m, :], case.v[..., :m, :], case.spec, **case.call
        )
        np.testing.assert_allclose(part, whole[..., :m, :], rtol=1e-12)
    # With allow_leak=true, results do depend on later keys.
    leaky = parse(str(case.spec).replace("padding=causal", "allow_leak=true"))
    short = (x[..., :8, :] for x in case.qkv)
    apart = (
        pdcore.attention(*short, leaky, **case.call)
        - pdcore.attention(*case.qkv, leaky, **case.call)[..., :8, :]
    )
    assert np.abs(apart).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("causal+conv1d", "conv1d is computed from keys that causal hides, so the future leaks"),
        ("causal+conv1d", "leaks: use padding=causal, or permit it with allow_leak=true"),
        ("conv1d(2)+sparse(4,0)", "a window without keys ahead hides, so the future leaks"),
        ("causal+conv2d(2,2)", "so the future leaks: permit it with allow_leak=true"),
    ],
)
def test_a_filter_that_looks_ahead_is_refused_under_causal(text: str, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["causal+conv1d(1)", "causal+conv2d(2,2,1)", "causal+conv1d(5,causal)", "conv1d(5)"]
)
def test_a_filter_that_does_not_look_ahead_is_allowed_under_causal(text: str) -> None:
    spec = parse(text)
    assert parse(str(spec)) == spec == pickle.loads(pickle.dumps(spec))  # noqa: S301


# --- words, shapes, plans -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["conv1d", "conv2d(3,4)"])
def test_words_come_in_by_the_hook(text: str) -> None:
    plugins.discover()
    assert text.partition("(")[0] in plugins._words
    spec = parse(f"linear+{text}")
    assert parse(str(spec)) == spec
    assert r"\tilde{k}_j" in spec.latex()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("conv1d(0)", "conv1d: size is 0, expected a whole number >= 1"),
        ("conv1d(size=2.5)", "conv1d: size is 2.5, expected int"),
        ("conv1d(padding=valid)", "conv1d: padding is 'valid'; known: "),
        ("conv1d(3,3)", "conv1d: padding is 3, expected str"),
        ("conv2d(4)", "conv2d: width must be given: conv2d(width=...)"),
        ("conv2d(0,4)", "conv2d: height is 0, expected a whole number >= 1"),
        ("conv2d(4,4,size=-1)", "conv2d: size is -1, expected a whole number >= 1"),
        ("conv1d+bn", "both set the normalization"),
    ],
)
def test_wrong_arguments(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert says in str(caught.value)


def test_keys_that_do_not_fill_the_grid_are_refused() -> None:
    for run in (pdcore.attention, reference_attention, pdcore.explain):
        for text, m, says in (
            ("conv2d(3,4)", 11, "k: got 11 keys in a head, expected 3 x 4 = 12"),
            ("conv2d(3,4)+sh(2,2)", 12, "k: got 6 keys in a head, expected 3 x 4 = 12"),
            ("conv2d(3,4)+sh(1,2)", 12, "k: got 6 keys in a head"),
            ("conv2d(3,4)+sh(1,2)", 12, "that the keys fill (12 keys, pooled by 2)"),
            ("conv2d(3,4)", 11, "the grid of conv2d: give it the height and width that the keys"),
        ):
            with pytest.raises(ValueError, match=re.escape(says)):
                run(*normal_case(text, m=m).qkv, text)


def test_weights_of_another_shape_are_refused() -> None:
    case = normal_case("conv1d")
    with pytest.raises(ValueError, match=r"params\['weight'\]: got shape \(2, 4, 3\).*\(2, 3, 3\)"):
        pdcore.attention(*case.qkv, "conv1d", params={"weight": np.ones((2, 4, 3))})


@pytest.mark.parametrize("m", [0, 1, 2])
def test_few_keys(m: int) -> None:
    case = normal_case("conv1d(size=5)", m=m)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    for x in vjp(np.ones_like(out)).values():
        assert np.isfinite(x).all()


def test_a_plan_says_what_is_convolved() -> None:
    steps = pdcore.explain(*normal_case("conv1d").qkv, "conv1d").plan.steps
    assert "convolve: keys by conv1d, zeros beyond them; queries as they are" in steps
    assert steps[-1].endswith("q'.k'")


# --- the hook -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halved(pdcore.Normalization):
    """T(k) = k / 2, T(q) = q; the pullback of the keys is left out."""

    word = "halved"

    def apply(self, x: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x

    def apply_vjp(
        self, x: Any, state: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
        return cotangent, {}, {}

    def apply_keys(self, keys: Any, state: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return 0.5 * keys

    def latex(self) -> str:
        return "x"


def test_a_user_normalization_may_transform_keys_otherwise() -> None:
    case = normal_case(pdcore.AttentionSpec(normalization=Halved()))
    out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True)
    check_forward(case, out, lse)
    np.testing.assert_allclose(out, attend(case, 0.5 * case.k), rtol=1e-12)


def test_apply_vjp_is_not_used_for_apply_keys() -> None:
    case = normal_case(pdcore.AttentionSpec(normalization=Halved()))
    assert not Halved().has_vjp
    with pytest.raises(UnsupportedError, match="halved has no apply_vjp"):
        pdcore.attention_vjp(*case.qkv, case.spec, backend="numpy")
