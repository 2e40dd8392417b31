"""Normalizations of the literature: instance enhancement and mixtures."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, check_forward, check_gradients, cotangents, normal_case

import pdcore
from pdcore.errors import SpecError, UnsupportedError
from pdcore.plugins import registry as plugins
from pdcore.reference import reference_attention
from pdcore.spec import GaussianMixture, Mixture, parse
from pdcore_conformance.judge.gradients import constants, gradients

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
        "iebn(beta=param,eps=0.1)+sh(1,2)",
        "iebn(eps=0.2)+gaussian(0.2)+sh(2,3)",
        "iebn(allow_leak=true)+causal+h(count)",
        "mixture(components=1,eps=0.1)",
    ],
)
def test_numpy(text: str, kind: int) -> None:
    case = case_of(text, kind)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    d_out, d_lse = cotangents(case, lse)
    assert check_gradients(case, vjp(d_out, d_lse), d_out, d_lse)


@pytest.mark.parametrize("word", ["iebn", "mixture"])
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
    # A gate of exactly 1 leaves Attention-BN.
    open_gate = {"slope": np.zeros_like(shift), "shift": np.full_like(shift, 80.0)}
    np.testing.assert_allclose(
        pdcore.attention(*case.qkv, "iebn", params=open_gate),
        pdcore.attention(*case.qkv, "bn"),
        rtol=1e-12,
        atol=1e-13,
    )


def test_the_instance_is_one_sequence_in_one_head() -> None:
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
    params = {
        n: np.full_like(x, -1e4 if n == "shift" else 0.0) for n, x in case.call["params"].items()
    }
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
        ("iebn(beta=pram)", "iebn: beta is 'pram', expected a number or 'param'"),
        ("mixture(beta=param)", "mixture: beta is 'param', expected float"),
        ("mixture(0)", "mixture: components is 0, expected a whole number >= 1"),
        ("mixture(steps=0)", "mixture: steps is 0, expected a whole number >= 1"),
        ("mixture(seed=-1)", "mixture: seed is -1, expected a whole number >= 0"),
        ("mixture(eps=-1)", "mixture: eps is -1.0, expected a finite number > 0"),
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


# --- mixtures -------------------------------------------------------------------------------------

MIXTURES = (
    "mixture",
    "mixture(components=3,steps=1,beta=0.5,eps=0.1)+linear",
    "mixture(2,steps=4,seed=3,eps=0.1)+gaussian(0.2)+sh(2,3)",
    "mixture(allow_leak=true)+causal+h(count)",
)


def modes(text: str, kind: int, m: int = 24) -> Case:
    """Draw keys of two modes."""
    case = case_of(text, kind, m=m)
    case.k[..., ::2, :] += 3.0
    return case


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("text", MIXTURES)
def test_a_mixture_and_its_gradient_are_those_of_the_reference(text: str, kind: int) -> None:
    # Not compared with finite differences, which would include the steps that are constants.
    case = modes(text, kind)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    d_out, d_lse = cotangents(case, lse)
    fixed = {name: constants(x) for name, x in case.call.items()}

    def function(x: Any) -> Any:
        return reference_attention(x["q"], x["k"], x["v"], case.spec, return_lse=True, **fixed)

    _, want = gradients(function, dict(zip("qkv", case.qkv, strict=True)), (d_out, d_lse))
    for name, x in vjp(d_out, d_lse).items():
        np.testing.assert_allclose(x, want[name], rtol=0, atol=1e-10 * np.abs(want[name]).max())


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("rest", ["", "+linear", "+gaussian(0.3)+sh(1,3)"])
def test_one_component_is_batch_normalization(rest: str, kind: int) -> None:
    case = case_of(f"mixture(components=1,beta=0.5){rest}", kind, m=12)
    results = []
    for text in (case.spec, f"bn(beta=0.5){rest}"):
        out, lse, vjp = pdcore.attention_vjp(*case.qkv, text, **case.call)
        reference = reference_attention(*case.qkv, text, **case.call)
        results.append({"out": out, "lse": lse, "reference": reference, **vjp(np.ones_like(out))})
    for name, x in results[0].items():
        np.testing.assert_allclose(x, results[1][name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_the_last_step_is_differentiated_and_no_step_before() -> None:
    keys = modes("mixture", 0).k
    stats, rng = GaussianMixture(2, 3, 0, 1e-5), np.random.default_rng(1)
    states: list[Any] = [None]
    for _ in range(stats.rounds):
        states.append(stats.finalize(stats.of(keys, None, xp=np, previous=states[-1]), xp=np))
    final, before = states[-1], states[-2]
    cotangent = {n: rng.standard_normal(final[n].shape) for n in ("mean", "var", "weight")}
    direction, step = rng.standard_normal(keys.shape), 1e-6

    def last(at: Any) -> float:
        state = stats.finalize(stats.of(at, None, xp=np, previous=before), xp=np)
        return sum(float(np.sum(d * state[n])) for n, d in cotangent.items())

    slope = (last(keys + step * direction) - last(keys - step * direction)) / (2 * step)
    got = stats.vjp(keys, None, final, cotangent, xp=np)
    np.testing.assert_allclose(np.sum(got * direction), slope, rtol=1e-6)


def test_merged_blocks_give_the_mixture_of_all_keys() -> None:
    keys = modes("mixture", 0).k
    real = np.random.default_rng(3).random((2, 1, 24, 1)) < 0.7
    stats = GaussianMixture(3, 2, 0, 1e-5)
    whole: Any = None
    blocks: Any = None
    for _ in range(stats.rounds):
        whole = stats.finalize(stats.of(keys, real, xp=np, previous=whole), xp=np)
        parts = [
            stats.of(keys[..., at, :], real[..., at, :], xp=np, previous=blocks)
            for at in (slice(0, 7), slice(7, 24))
        ]
        merged = stats.merge(stats.zero(parts[0], xp=np), parts[0], xp=np)
        blocks = stats.finalize(stats.merge(merged, parts[1], xp=np), xp=np)
    for name, x in whole.items():
        np.testing.assert_allclose(blocks[name], x, rtol=1e-10, atol=1e-12, err_msg=name)


def test_the_modes_of_the_keys_are_found() -> None:
    rng = np.random.default_rng(0)
    keys = 0.1 * rng.standard_normal((1, 1, 60, 2))
    keys[..., :20, :] += [5.0, -5.0]
    stats = Mixture(seed=4).statistics_state()
    state: Any = None
    for _ in range(stats.rounds):
        state = stats.finalize(stats.of(keys, None, xp=np, previous=state), xp=np)
    order = np.argsort(state["weight"][0, 0, :, 0])
    np.testing.assert_allclose(state["weight"][0, 0, order, 0], [20.0, 40.0], rtol=1e-6)
    np.testing.assert_allclose(
        state["mean"][0, 0, order], [keys[0, 0, :20].mean(0), keys[0, 0, 20:].mean(0)], rtol=1e-6
    )
    for x in (keys[0, 0, :20], keys[0, 0, 20:]):  # each is normalised by its own statistics
        got = Mixture(seed=4).apply(x[None, None], state, xp=np, params={})[0, 0]
        np.testing.assert_allclose(got, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=1e-5)


def test_the_seed_decides_the_start() -> None:
    case = modes("mixture(3,steps=1)", 0)
    by_seed = [
        pdcore.attention(*case.qkv, f"mixture(3,steps=1,seed={seed})") for seed in (0, 0, 1, 2, 3)
    ]
    np.testing.assert_array_equal(by_seed[0], by_seed[1])
    assert any(np.abs(by_seed[0] - other).max() > 1e-3 for other in by_seed[2:])


@pytest.mark.parametrize("m", [0, 1, 2])
def test_more_components_than_keys(m: int) -> None:
    case = normal_case("mixture(components=4,eps=0.1)", m=m)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    check_forward(case, out, lse)
    for x in vjp(np.ones_like(out)).values():
        assert np.isfinite(x).all()
