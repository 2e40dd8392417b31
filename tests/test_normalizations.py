"""The normalizations of the literature beside the paper's."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from strategies import Case, check_forward, check_gradients, cotangents, normal_case

import pdcore
from pdcore import plugins
from pdcore.errors import SpecError, UnsupportedError
from pdcore.spec import parse

D = 3  # of `normal_case`


def case_of(text: str, kind: int, **sizes: Any) -> Case:
    case = normal_case(text, seed=kind, **sizes)
    if kind == 0:
        return case
    rng = np.random.default_rng(kind)
    real = rng.random(case.k.shape[:-3] + case.k.shape[-2:-1]) < 0.8
    return replace(case, call={**case.call, "key_mask": real})


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "text",
    [
        "iebn",
        "iebn(beta=0.5,eps=0.1)+linear",
        "iebn(eps=0.2)+gaussian(0.2)+sh(2,3)",
        "iebn(allow_leak=true)+causal+h(count)",
    ],
)
def test_numpy(text: str, kind: int) -> None:
    case = case_of(text, kind)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    d_out, d_lse = cotangents(case, lse)
    assert check_gradients(case, vjp(d_out, d_lse), d_out, d_lse)


@pytest.mark.parametrize("word", ["iebn"])
def test_words_come_in_by_the_hook(word: str) -> None:
    plugins.discover()
    assert word in plugins._words
    assert "normalizations" not in plugins.broken
    spec = parse(f"linear+{word}")
    assert parse(str(spec)) == spec == pickle.loads(pickle.dumps(spec))  # noqa: S301
    assert spec.latex()
    with pytest.raises(UnsupportedError, match=rf"{word}.*future leaks"):
        parse(f"{word}+causal")


# --- instance enhancement -------------------------------------------------------------------------


def test_slope_zero_is_batch_normalization_times_a_constant() -> None:
    case = normal_case("iebn")
    shift = case.call["params"]["shift"]
    params = {"slope": np.zeros_like(shift), "shift": shift}
    gate = (1.0 / (1.0 + np.exp(-shift)))[:, None, :]
    mean, var = (f(case.k, axis=-2, keepdims=True) for f in (np.mean, np.var))
    group = case.q.shape[-3] // case.k.shape[-3]

    def transform(x: Any, repeats: int) -> Any:
        m, s, g = (np.repeat(y, repeats, axis=-3) for y in (mean, var, gate))
        return g * (x - m) / np.sqrt(s + 1e-5)

    got = pdcore.attention(*case.qkv, "iebn", params=params)
    want = pdcore.attention(transform(case.q, group), transform(case.k, 1), case.v)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)
    # A gate that is everywhere 1, to the last digit, leaves Attention-BN.
    open_gate = {"slope": np.zeros_like(shift), "shift": np.full_like(shift, 80.0)}
    np.testing.assert_allclose(
        pdcore.attention(*case.qkv, "iebn", params=open_gate),
        pdcore.attention(*case.qkv, "bn"), rtol=1e-12, atol=1e-13,
    )  # fmt: skip


def test_the_instance_is_the_sequence_as_a_head_has_it() -> None:
    case = normal_case("iebn", heads=2)
    whole = pdcore.attention(*case.qkv, case.spec, **case.call)
    group = case.q.shape[-3] // case.k.shape[-3]
    for b in range(case.q.shape[0]):
        for h in range(case.k.shape[-3]):
            params = {name: x[h : h + 1] for name, x in case.call["params"].items()}
            heads = slice(h * group, (h + 1) * group)
            alone = pdcore.attention(
                case.q[b, heads], case.k[b, h : h + 1], case.v[b, h : h + 1], "iebn", params=params
            )
            np.testing.assert_allclose(whole[b, heads], alone, rtol=1e-12)


def test_a_gate_far_out_is_closed_and_has_no_gradient() -> None:
    case = normal_case("iebn")
    params = {n: np.full_like(x, -1e4 if n == "shift" else 0.0)
              for n, x in case.call["params"].items()}  # fmt: skip
    out, _, vjp = pdcore.attention_vjp(*case.qkv, "iebn", params=params)
    mean = np.repeat(case.v.mean(axis=-2, keepdims=True), 2, axis=1)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-13)
    gradients = vjp(np.ones_like(out))
    assert not gradients["slope"].any()
    assert not gradients["q"].any()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("iebn(eps=0)", "iebn: eps is 0.0, expected a finite number > 0"),
        ("iebn(inf)", "iebn: beta is inf, expected a finite number"),
        ("iebn(beta=param)", "iebn: beta is 'param', expected float"),
    ],
)
def test_wrong_arguments(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert says in str(caught.value)


def test_parameters_must_be_given() -> None:
    case = normal_case("iebn")
    with pytest.raises(ValueError, match=r"params: 'shift' is missing.*\(2, 3\)"):
        pdcore.attention(*case.qkv, "iebn", params={"slope": case.call["params"]["slope"]})
