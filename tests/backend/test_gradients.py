"""`attention_vjp`: against differences, axis by axis; where there is no derivative; its memory."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from reference_cases import (
    INF,
    Array,
    Case,
    Strict,
    check_forward,
    check_gradients,
    cotangents,
    normal_case,
)

import pdcore
from pdcore.spec import parse


def pull(case: Case, d_out: Array, d_lse: Array | None = None) -> dict[str, Array]:
    return pdcore.attention_vjp(*case.qkv, case.spec, **case.call)[2](d_out, d_lse)


def ones(case: Case) -> Array:
    return np.ones((*case.q.shape[:-1], case.v.shape[-1]), case.q.dtype)


# --- axis by axis ---------------------------------------------------------------------------------

KERNELS = [
    "softmax",
    "softmax(scale=0.7,softcap=1.5)",
    "gaussian(gamma=0.3)",
    "cosine(scale=2)",
    "polynomial(degree=4,coef0=0.5)",
    "linear",
    "relu",
    "random_features(6,1)",
]
NORMALIZATIONS = [
    "",
    "bn(beta=param,eps=0.3)",
    "bn(beta=0.5,eps=0.3,statistics=batch)",
    "bn(beta=param,statistics=running)",
    "bn(beta=param,eps=0.3,statistics=prefix)",
]
NORMALISERS = ["h(sum)", "h(count)", "h(one)"]
HEADS = ["", "sh(1,3)", "sh(2,2,pool=first)"]
SUPPORTS = ["", "causal", "sparse(3,2)"]


def combined() -> list[str]:
    """Every pair of kernel, normalization and normaliser; heads and supports in turn."""
    found = []
    rest = itertools.cycle(itertools.product(HEADS, SUPPORTS))
    for kernel, normalization, h in itertools.product(KERNELS, NORMALIZATIONS, NORMALISERS):
        if "prefix" in normalization and kernel != "softmax":
            continue
        heads, support = next(rest)
        if support == "causal" and "eps" in normalization and "prefix" not in normalization:
            normalization = normalization[:-1] + ",allow_leak=true)"
        found.append("+".join(w for w in (kernel, normalization, h, heads, support) if w))
    return found


def dressed(text: str, seed: int) -> Case:
    """Draw a call with the masks, the bias and the offset that the spec has a place for."""
    case = normal_case(text, seed=seed, n=5, m=8)
    rng = np.random.default_rng(seed)
    call = dict(case.call)
    if seed % 2:
        call["key_mask"] = rng.random((2, 8)) < 0.8
    if seed % 3 == 1:
        call["mask"] = rng.random((4, 5, 8)) < 0.8
    if case.spec.kernel.has_log and case.spec.heads.largest == 1:
        shape = [(8,), (5, 1), (4, 5, 8), (2, 1, 5, 8), (2, 4, 1, 1)][seed % 5]
        call["bias"] = np.where(rng.random(shape) < 0.1, -INF, rng.normal(size=shape))
    call["offset"] = [0, 3, "end", np.asarray([1, 4])][seed % 4]
    return replace(case, call=call)


@pytest.mark.parametrize(("seed", "text"), list(enumerate(combined())))
@pytest.mark.sampled(5)  # shares no factor with the lengths of the axes
def test_every_axis(seed: int, text: str) -> None:
    # relu has kinks: where a difference straddles one, the next draw has to do.
    assert any(agrees(text, seed + 60 * attempt) for attempt in range(4 if "relu" in text else 1))


def agrees(text: str, seed: int) -> bool:
    case = dressed(text, seed)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    check_forward(case, out, lse)
    d_out, d_lse = cotangents(case, lse, seed)
    gradients = vjp(d_out, d_lse)
    smooth = check_gradients(case, gradients, d_out, d_lse, seed)
    xp = array_api_strict
    with np.errstate(all="ignore"):
        _, _, again = Strict().attention_vjp(case.plan(), case.inputs(xp.asarray))
        strict = again(xp.asarray(d_out), xp.asarray(d_lse))
    assert strict.keys() == gradients.keys()
    scale = max(np.max(np.abs(x), initial=0.0) for x in gradients.values())
    for name, x in gradients.items():
        np.testing.assert_allclose(np.asarray(strict[name]), x, rtol=0, atol=1e-11 * scale)
    return smooth


ENTRYWISE = [
    "softmax",
    "bn(beta=param,eps=0.3)+sh(2,1)",
    "causal+bn(statistics=prefix,eps=0.3)",
    "linear+causal",
    "gaussian(gamma=0.3)+h(count)",
]


@pytest.mark.parametrize("text", ENTRYWISE)
def test_every_entry(text: str) -> None:
    """Each entry of each gradient by itself: none hides behind another in a sum."""
    case = normal_case(text, lead=(), heads=2, group=1, n=3, m=4, d=2, dv=1)
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    d_out, d_lse = cotangents(case, lse)
    gradients = vjp(d_out, d_lse)
    wide = case.cast(np.longdouble)
    finite = np.isfinite(lse)

    def objective(arrays: dict[str, Array]) -> Any:
        out, level = wide.replaced(arrays).reference()
        return np.sum(out * d_out) + np.sum(np.where(finite, level, 0.0) * d_lse)

    for name, x in case.differentiable.items():
        for at in np.ndindex(x.shape):
            slopes = []
            for step in (1e-3, 2e-3):
                moved = [x.astype(np.longdouble) for _ in range(2)]
                moved[0][at] += step
                moved[1][at] -= step
                slopes.append(
                    (objective({name: moved[0]}) - objective({name: moved[1]})) / step / 2
                )
            want = float((4 * slopes[0] - slopes[1]) / 3)
            assert gradients[name][at] == pytest.approx(want, rel=1e-7, abs=1e-9), (name, at)


def test_a_gradient_that_is_wrong_is_caught() -> None:
    case = normal_case("bn(beta=param,eps=0.3)")
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    d_out, d_lse = cotangents(case, lse)
    gradients = vjp(d_out, d_lse)
    for name, x in gradients.items():
        for wrong in (1.001 * x, np.zeros_like(x), -x):
            with pytest.raises(AssertionError, match=f"gradient of {name}"):
                check_gradients(case, {**gradients, name: wrong}, d_out, d_lse)
    # The statistics taken for constants, which is what most implementations of batch norm risk.
    state = {"mean": case.k.mean(axis=-2), "var": case.k.var(axis=-2)}
    shape = {n: x[0] for n, x in state.items()}
    one = replace(case, q=case.q[:1], k=case.k[:1], v=case.v[:1])
    frozen = replace(
        one,
        spec=parse("bn(beta=param,eps=0.3,statistics=running)"),
        call={"params": {**shape, "beta": case.call["params"]["beta"]}},
    )
    got = pull(frozen, d_out[:1], d_lse[:1])
    np.testing.assert_allclose(got["q"], gradients["q"][:1], rtol=0, atol=1e-12)
    with pytest.raises(AssertionError, match="gradient of k"):
        check_gradients(
            one, {**pull(one, d_out[:1], d_lse[:1]), "k": got["k"]}, d_out[:1], d_lse[:1]
        )


# --- cotangents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["softmax", "linear+causal", "sh(1,2)+bn", "polynomial+h(count)"])
def test_a_missing_cotangent_of_lse_is_zero(text: str) -> None:
    case = normal_case(text)
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    d_out = ones(case)
    for name, x in vjp(d_out).items():
        np.testing.assert_array_equal(vjp(d_out, np.zeros_like(lse))[name], x)


@pytest.mark.parametrize("h", ["count", "one"])
@pytest.mark.parametrize("kernel", ["softmax", "linear", "relu+causal", "sh(1,2)+gaussian(0.3)"])
def test_the_lse_of_count_and_one_is_constant(kernel: str, h: str) -> None:
    case = normal_case(f"{kernel}+h({h})")
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    for name, x in vjp(np.zeros_like(ones(case)), np.ones_like(lse)).items():
        assert not x.any(), name


def test_the_gradient_of_lse_is_the_mean_key() -> None:
    case = normal_case("softmax(scale=1)", group=1)
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    weights = pdcore.attention_weights(*case.qkv, case.spec)
    got = vjp(np.zeros_like(ones(case)), np.ones_like(lse))
    np.testing.assert_allclose(got["q"], weights @ case.k, atol=1e-13)
    assert not got["v"].any()


def test_running_statistics_have_no_gradient() -> None:
    case = normal_case("bn(statistics=running,beta=param)")
    got = pull(case, ones(case))
    assert set(got) == {"q", "k", "v", "beta", "mean", "var"}
    assert not got["mean"].any()
    assert not got["var"].any()
    assert got["beta"].any()


def test_cotangents_are_not_written_to() -> None:
    for text in ("softmax", "bn+sh(1,2)", "linear+causal", "causal+bn(statistics=prefix)+h(count)"):
        case = normal_case(text, n=70, m=70)
        _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
        d_out, d_lse = cotangents(case, lse)
        d_out.setflags(write=False)
        d_lse.setflags(write=False)
        first, second = vjp(d_out, d_lse), vjp(d_out, d_lse)
        for name, x in first.items():
            np.testing.assert_array_equal(second[name], x)
            x[...] = np.nan  # results belong to the caller
        third = vjp(d_out, d_lse)
        for name, x in second.items():
            np.testing.assert_array_equal(third[name], x)


BIASES = [
    (),
    (1,),
    (7,),
    (5, 7),
    (5, 1),
    (1, 7),
    (4, 5, 7),
    (4, 1, 1),
    (1, 5, 7),
    (2, 4, 5, 7),
    (2, 1, 1, 7),
    (1, 1, 1, 1),
]


@pytest.mark.parametrize("shape", BIASES)
def test_the_gradient_of_a_bias_has_its_shape(shape: tuple[int, ...]) -> None:
    bias = np.random.default_rng(0).normal(size=shape)
    case = replace(normal_case("softmax+causal"), call={"bias": bias})
    full = replace(case, call={"bias": np.broadcast_to(bias, (2, 4, 5, 7)).copy()})
    _, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec, **case.call)
    d_out, d_lse = cotangents(case, lse)
    got, want = vjp(d_out, d_lse)["bias"], pull(full, d_out, d_lse)["bias"]
    assert got.shape == shape
    shape = (1,) * (4 - len(shape)) + shape
    axes = tuple(i for i in range(4) if shape[i] == 1)
    np.testing.assert_allclose(got.reshape(shape), want.sum(axis=axes, keepdims=True), atol=1e-13)


@pytest.mark.parametrize("bias", [np.float32, np.float16])
def test_gradients_have_the_dtypes_of_their_arrays(bias: Any) -> None:
    case = normal_case("bn(beta=param)", dtype=np.float16)
    params = {"beta": case.call["params"]["beta"].astype(np.float32)}
    case = replace(case, call={"params": params, "bias": np.zeros((5, 7), bias)})
    got = pull(case, ones(case))
    assert {n: x.dtype.name for n, x in got.items()} == {
        "q": "float16",
        "k": "float16",
        "v": "float16",
        "beta": "float32",
        "bias": np.dtype(bias).name,
    }


# --- where kappa has no logarithm, a vector no direction, a variance no keys ----------------------


def test_polynomial_at_base_zero() -> None:
    # kappa = s^2 with s = 0 for the first key: its gradient is 2 s = 0, that of log kappa is not.
    q, k = np.asarray([[[1.0, 0.0]]]), np.asarray([[[0.0, 2.0], [1.0, 0.0]]])
    v = np.asarray([[[5.0], [1.0]]])
    spec = "polynomial(degree=2,coef0=0,scale=1)"
    _, _, vjp = pdcore.attention_vjp(q, k, v, spec)
    got = vjp(np.ones((1, 1, 1)), np.ones((1, 1)))
    for name, x in got.items():
        assert np.isfinite(x).all(), name
    np.testing.assert_array_equal(got["k"][0, 0], 0.0)
    np.testing.assert_allclose(got["k"][0, 1], [2.0, 0.0])  # of lse alone: 2 / s times q
    alone = pdcore.attention_vjp(q, k[:, :1], v[:, :1], spec)[2](
        np.ones((1, 1, 1)), np.ones((1, 1))
    )
    for name, x in alone.items():
        assert not x.any(), name


@pytest.mark.parametrize("h", ["sum", "one"])
def test_relu_at_zero(h: str) -> None:
    case = normal_case(f"relu+h({h})")
    case.q[..., 0] = 0.0
    case.k[..., 1] = 0.0
    got = pull(case, ones(case))
    assert not got["q"][..., 0].any()
    assert not got["k"][..., 1].any()
    assert all(np.isfinite(x).all() for x in got.values())
    assert got["q"].any()


def test_cosine_at_a_zero_vector() -> None:
    case = normal_case("cosine(scale=2)")
    case.q[:, :, 2] = 0.0
    case.k[:, :, 4] = 0.0
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    check_forward(case, out, lse)
    got = vjp(ones(case), np.ones_like(lse))
    assert not got["q"][:, :, 2].any()
    assert not got["k"][:, :, 4].any()
    assert got["v"][:, :, 4].any()
    assert all(np.isfinite(x).all() for x in got.values())


@pytest.mark.parametrize(
    "text",
    [
        "bn",
        "bn(statistics=batch)",
        "linear+bn",
        "bn+sh(1,2)",
        "gaussian(0.3)+bn",
        "causal+bn(statistics=prefix)",
    ],
)
def test_a_variance_over_no_keys(text: str) -> None:
    case = normal_case(text)
    real = np.ones((2, 7), dtype=bool)
    real[0] = False
    nobody = replace(case, call={"key_mask": real})
    out, lse, vjp = pdcore.attention_vjp(*nobody.qkv, nobody.spec, **nobody.call)
    assert not out[0].any()
    for name, x in vjp(ones(case), np.ones_like(lse)).items():
        assert np.isfinite(x).all(), name
        if "batch" not in text or name != "q":
            assert not x[0].any(), name


@pytest.mark.parametrize(
    "text", ["bn", "bn(statistics=batch,beta=0.5)", "linear+bn", "causal+bn(statistics=prefix)"]
)
def test_a_variance_of_zero(text: str) -> None:
    case = normal_case(text)
    case.k[...] = case.k[:, :, :1]
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    assert np.isfinite(out).all()
    for name, x in vjp(ones(case), np.where(lse > -INF, 1.0, 0.0)).items():
        assert np.isfinite(x).all(), name


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "bn",
        "linear",
        "linear+causal",
        "sh(1,2)",
        "causal+bn(statistics=prefix)",
        "random_features(4,1)+causal",
        "polynomial+h(count)",
        "bn(statistics=batch)",
    ],
)
@pytest.mark.parametrize(("n", "m"), [(0, 7), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(text: str, n: int, m: int) -> None:
    case = normal_case(text, n=n, m=m)
    out, lse, vjp = pdcore.attention_vjp(*case.qkv, case.spec)
    assert out.shape == (2, 4, n, 2)
    assert not out.any()
    for name, x in vjp(ones(case), np.ones_like(lse)).items():
        assert x.shape == getattr(case, name).shape
        assert not x.any(), name


# --- memory ---------------------------------------------------------------------------------------

N = 4096
LONG = [
    "softmax",
    "bn",
    "causal+bn(statistics=prefix)",
    "linear",
    "linear+causal",
    "sh(2)",
    "gaussian(gamma=0.1)+h(count)",
    "causal+h(one)",
    "random_features(8)+causal",
    "sparse(100,100)",
    "softmax(softcap=2)",
]


@pytest.mark.parametrize("text", LONG)
@pytest.mark.sampled(3)
def test_no_array_of_all_pairs_is_kept(text: str) -> None:
    case = normal_case(text, lead=(), heads=1, group=1, n=N, m=N, d=16, dv=16, dtype=np.float32)
    d_out = ones(case)
    pdcore.attention(*case.qkv, case.spec)  # the threads have their buffers
    gc.collect()
    peaks = []
    for backward in (False, True):
        tracemalloc.start()
        if backward:
            pull(case, d_out)
        else:
            pdcore.attention(*case.qkv, case.spec)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    pairs = 4 * N * N
    assert peaks[0] < pairs / 4, f"{peaks[0] / 2**20:.1f} MiB forward"
    assert peaks[1] < pairs / 2, f"{peaks[1] / 2**20:.1f} MiB forward and backward"
