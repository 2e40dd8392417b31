"""The PyTorch backend: choice of kernel, gradients of gradients, compiler, export, dropout.

The conformance suite checks the backend's numbers.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import pdcore
from pdcore.lowering import Signature, lower
from pdcore.reference import reference_attention
from pdcore.spec import HeadScaling, Moments, Support
from pdcore_backends.torch import blocked, flash, fold, fused

FUSED = "scaled_dot_product_attention (flash)"
OWN = "blocks of our own"


def draw(*shape: int, count: int = 3, dtype: Any = None, grad: bool = False) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=dtype or torch.float32).requires_grad_(grad)
        for _ in range(count)
    ]


def relative(result: Any, wanted: Any) -> float:
    wanted = torch.as_tensor(np.asarray(wanted, dtype=np.float64))
    return float((result.detach().double() - wanted).abs().max() / wanted.abs().max())


# --- which kernel ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "call", "kernel"),
    [
        ("softmax", {}, FUSED),
        ("bn", {"key_mask": torch.ones(1, 6, dtype=torch.bool)}, FUSED),
        ("causal+bn(statistics=prefix)", {}, FUSED),
        ("gaussian(gamma=0.3)+bn", {}, FUSED),
        ("cosine+sh(1,2)", {}, FUSED),
        ("conv1d", {}, FUSED),
        ("conv2d(2,3)+gaussian(gamma=0.3)", {}, FUSED),
        ("causal+conv1d(padding=causal)", {}, FUSED),
        ("mixture", {}, FUSED),
        ("softmax", {"mask": torch.ones(6, 6, dtype=torch.bool)}, FUSED),
        ("softmax(softcap=2.0)", {}, "weights that are no exp of an inner product"),
        ("polynomial(degree=2,coef0=1)", {}, "weights that are no exp of an inner product"),
        ("sparse(2,2)", {}, "a window"),
        ("causal+sh(1,2)", {}, "pooled keys under causal"),
        ("bn(statistics=prefix)+sh(1,2)", {}, "prefix statistics of pooled keys"),
        ("causal", {"offset": torch.tensor([1])}, "positions that are arrays"),
        ("softmax", {"dropout": 0.1}, "dropout"),
    ],
)
def test_explain_says_which_kernel_runs_and_why(spec: str, call: dict, kernel: str) -> None:
    q, k, v = draw(1, 2, 6, 4)
    text = str(pdcore.explain(q, k, v, spec, **call))
    assert "kernel: " in text
    assert kernel in text
    assert (OWN + ", O(N + M) memory" in text) == (kernel != FUSED)


@pytest.mark.parametrize(
    "spec", ["softmax", "bn", "causal", "gaussian(gamma=0.3)", "bn+sh(1,2)", "conv1d"]
)
def test_the_fused_kernel_runs_where_explain_says_so(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("not the fused kernel")

    monkeypatch.setattr(blocked, "scores", never)
    q, k, v = draw(1, 2, 6, 4, grad=True)
    pdcore.attention(q, k, v, spec).sum().backward()
    with torch.no_grad():
        pdcore.attention(q, k, v, spec, return_lse=True)
    monkeypatch.setattr(flash, "_forward", never)
    with pytest.raises(AssertionError, match="not the fused kernel"):
        pdcore.attention(q, k, v, spec)


def test_the_plain_call_is_the_frameworks_own() -> None:
    q, k, v = draw(2, 3, 50, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(pdcore.attention(q, k, v), wanted)


@pytest.mark.parametrize("offset", [-3, 0, 2, 9, 40, "end"])
def test_causal_at_any_offset(offset: Any) -> None:
    q, k, v = (x.double() for x in draw(1, 2, 10, 4))
    wanted = reference_attention(
        *(x.numpy() for x in (q[..., :7, :], k, v)), "causal", offset=offset
    )
    assert relative(pdcore.attention(q[..., :7, :], k, v, "causal", offset=offset), wanted) < 1e-14


def test_a_bias_with_a_gradient_gets_one() -> None:
    q, k, v = draw(1, 2, 5, 4, dtype=torch.float64)
    bias = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: pdcore.attention(q, k, v, bias=b), (bias,))


def test_strided_inputs_are_no_reason_for_another_kernel() -> None:
    q, k, v = (x.transpose(-1, -2) for x in draw(1, 2, 4, 6))
    wanted = reference_attention(*(x.double().numpy() for x in (q, k, v)), "softmax")
    assert relative(pdcore.attention(q, k, v), wanted) < 1e-6


def test_prefixes_of_pooled_keys_are_counted_in_windows() -> None:
    q, k, v = draw(1, 2, 7, 4, dtype=torch.float64)
    spec = "bn(statistics=prefix)+sh(2,1)"
    wanted = reference_attention(*(x.numpy() for x in (q, k, v)), spec)
    assert relative(pdcore.attention(q, k, v, spec), wanted) < 1e-12


@pytest.mark.parametrize("spec", ["linear", "causal+linear"])
def test_small_features_neither_overflow_nor_lose_their_gradient(spec: str) -> None:
    q, k, v = draw(1, 1, 3, 2)
    arrays = [x.requires_grad_() for x in (q - 70.0, k, v)]
    exact = [x.detach().double().requires_grad_() for x in arrays]
    grads = torch.autograd.grad(pdcore.attention(*arrays, spec).sum(), arrays)
    wanted = torch.autograd.grad(reference_attention(*exact, spec).sum(), exact)
    for ours, grad in zip(grads, wanted, strict=True):
        assert torch.allclose(ours.double(), grad, rtol=1e-3, atol=1e-6)
    smallest = pdcore.attention(q - 95.0, k, v, spec)
    assert smallest.abs().max() <= 1.01 * v.abs().max()


def test_a_key_bias_beyond_float16_is_no_nan() -> None:
    q, k, v = draw(1, 1, 6, 8, dtype=torch.float16)
    k = torch.cat([k[:, :, :5], torch.full_like(k[:, :, :1], 200.0)], -2)
    spec = "gaussian(gamma=0.3)"
    wanted = reference_attention(*(x.double().numpy() for x in (q, k, v)), spec)
    assert relative(pdcore.attention(q, k, v, spec), wanted) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_pooled_keys_are_taken_before_rounding(dtype: Any) -> None:
    q, k, v = draw(1, 2, 64, 8, dtype=torch.float64)
    k = k.unflatten(2, (32, 2))
    k = (k + 8.0 - k.mean(-2, keepdim=True) + 0.02 * q[:, :, :32, None]).flatten(2, 3)
    q, k, v = (x.to(dtype) for x in (8.0 + 0.02 * q.roll(1, 2), k, v))
    spec = "bn+sh(2,2)"
    wanted = reference_attention(*(x.double().numpy() for x in (q, k, v)), spec)
    exact = torch.as_tensor(np.asarray(wanted))
    # A call with the log-sum-exp computes in float32 and rounds only the result.
    rounding = (pdcore.attention(q, k, v, spec, return_lse=True)[0].double() - exact).abs().max()
    error = (pdcore.attention(q, k, v, spec).double() - exact).abs().max()
    assert error <= 8 * rounding


def test_a_default_device_is_not_asked() -> None:
    q, k, v = draw(2, 2, 6, 4)
    key_mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    for spec in ("softmax", "causal", "bn", "linear", "sparse(2,2)"):
        wanted = pdcore.attention(q, k, v, spec, key_mask=key_mask, return_lse=True)
        with torch.device("meta"):
            result = pdcore.attention(q, k, v, spec, key_mask=key_mask, return_lse=True)
        for a, b in zip(result, wanted, strict=True):
            assert torch.equal(a, b)
    with torch.device("meta"):
        assert pdcore.attention(q, k, v, dropout=0.5).device == q.device


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", ["normal", "far", "outlier", "masked"])
def test_prefix_moments_are_those_of_every_prefix(length: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    k = rng.standard_normal((2, 3, length, 4))
    real = None
    if kind == "far":
        k = 100 + 0.1 * k
    if kind == "outlier":
        k[..., 0, :] = 1e4
    if kind == "masked":
        real = rng.random((2, 1, length)) > 0.4
        real[0, :, :70] = False
    narrow = torch.tensor(k, dtype=torch.float32)
    n, mean, var = fold.prefix_moments(narrow, None if real is None else torch.tensor(real))
    exact = narrow.double().numpy()
    for row in range(length):
        for b in range(2):
            kept = np.ones(row + 1, bool) if real is None else real[b, 0, : row + 1]
            keys = exact[b, :, : row + 1][:, kept]
            assert n[b, 0, row, 0] == keys.shape[1]
            if not keys.shape[1]:
                continue
            wanted = keys.var(axis=1)
            scale = np.abs(keys).max() * 2e-6
            assert np.abs(mean[b, :, row].numpy() - keys.mean(axis=1)).max() <= scale
            # The error of rounding keys to float32, and 1e-4 of the variance.
            assert np.all(np.abs(var[b, :, row].numpy() - wanted) <= 1e-4 * wanted + scale**2)


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fold_has_the_gradient_of_its_plain_form(
    over_batch: bool, split: bool, masked: bool
) -> None:
    q = draw(2, 2, 3, 5, 4, count=1, dtype=torch.float64, grad=True)[0]
    k = draw(2, 2, 7, 4, count=1, dtype=torch.float64, grad=True)[0]
    beta = torch.tensor([[[0.5]], [[1.5]]], dtype=torch.float64, requires_grad=True)
    real = torch.rand(2, 1, 7, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None

    def of(function: Any) -> list[Any]:
        folded, keys = function()
        weight = torch.linspace(-1, 1, folded.numel(), dtype=torch.float64).reshape(folded.shape)
        # As in a call: padding is not seen, and terms constant along a row cancel.
        seen = torch.ones(2, 1, 7, 1) if real is None else real[..., None].double()
        mean = (keys * seen).sum(-2, keepdim=True) / seen.sum(-2, keepdim=True)
        scores = folded @ ((keys - mean) * seen)[:, :, None].mT
        total = (weight * folded).sum() + (scores**2).sum()
        return [total, *torch.autograd.grad(total, (q, k, beta))]

    options = {"eps": 1e-5, "split": split, "over_batch": over_batch}

    def kept() -> Any:
        # As in a call: padding is zero.
        return k if real is None else torch.where(real[..., None], k, 0.0)

    folded = of(lambda: fold.fold(q, kept(), real, beta, **options))
    plain = of(lambda: fold._plain(q, kept(), real, beta, 1e-5, split, over_batch))
    for a, b in zip(folded, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 130])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_the_fold_by_chunks_is_its_plain_form(length: int, masked: bool, closed: bool) -> None:
    q = draw(2, 2, 3, length, 4, count=1, dtype=torch.float64, grad=True)[0]
    k = (draw(2, 2, length, 4, count=1, dtype=torch.float64)[0] + 50).requires_grad_()
    beta = torch.tensor([[[0.5]], [[1.5]]], dtype=torch.float64, requires_grad=True)
    real = None
    if masked:
        real = torch.rand(2, 1, length, generator=torch.Generator().manual_seed(1)) > 0.5
        real[0, :, :40] = False

    def of(function: Any) -> list[Any]:
        kept = k if real is None else torch.where(real[..., None], k, 0.0)
        folded, keys, alive = function(q, kept, real, beta, 0, eps=1e-2, closed=closed)
        if alive is not None:
            folded = torch.where(alive[:, :, None, :, None], folded, 0.0)
        weight = torch.linspace(-1, 1, folded.numel(), dtype=torch.float64).reshape(folded.shape)
        total = (weight * folded).sum() + (keys.detach() * keys).sum()
        return [folded, keys, *torch.autograd.grad(total, (q, k, beta))]

    for a, b in zip(of(fold.fold_prefix), of(fold._prefix_plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def test_a_mean_far_from_zero_costs_the_fold_by_chunks_no_digits() -> None:
    q, k = (x[0] for x in (draw(1, 1, 1, 300, 8, count=1), draw(1, 1, 300, 8, count=1)))
    k = 100 + 0.1 * k
    k[:, :, 0] = 100.0
    folded, exact = (
        fold.fold_prefix(q.to(kind), k.to(kind), None, 1.0, 0, eps=1e-5, closed=True)[0]
        for kind in (torch.float32, torch.float64)
    )
    error = (folded - exact).abs().amax(-1) / exact.abs().amax(-1).clamp_min(1e-9)
    assert error.max() <= 1e-6


# --- gradients ------------------------------------------------------------------------------------

SPECS = [
    "softmax",
    "causal",
    "bn",
    "bn(statistics=batch)",
    "bn+sh(1,2)",
    "gaussian(gamma=0.3)",
    "cosine",
    "causal+bn(statistics=prefix)",
    "sparse(2,1)",
    "softmax(softcap=2.0)",
    "causal+linear",
    "softmax+h(count)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_and_gradients_of_gradients(spec: str) -> None:
    q, k, v = draw(1, 2, 5, 3, dtype=torch.float64, grad=True)
    layer = pdcore.bind(spec)
    assert torch.autograd.gradcheck(lambda *x: layer(*x), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: layer(*x), (q, k, v), atol=1e-4)


@pytest.mark.parametrize("spec", ["softmax", "causal", "bn"])
def test_the_log_sum_exp_has_gradients(spec: str) -> None:
    q, k, v = draw(1, 2, 5, 3, dtype=torch.float64, grad=True)
    layer = pdcore.bind(spec)
    assert torch.autograd.gradcheck(lambda *x: layer(*x, return_lse=True), (q, k, v))


@pytest.mark.parametrize("spec", ["bn", "linear+bn", "sparse(2,2)+bn"])
@pytest.mark.parametrize("lse", [False, True])
def test_running_statistics_are_constants(spec: str, lse: bool) -> None:
    q, k, v = draw(1, 2, 5, 3)
    params = {
        "mean": torch.zeros(2, 3, requires_grad=True),
        "var": torch.ones(2, 3, requires_grad=True),
    }
    spec = spec.replace("bn", "bn(statistics=running)")
    out = pdcore.attention(q, k, v, spec, params=params, return_lse=lse)
    assert not (out[0] if lse else out).requires_grad


def test_grouped_heads_and_padding_have_gradients() -> None:
    q = draw(2, 4, 5, 3, count=1, dtype=torch.float64, grad=True)[0]
    k, v = draw(2, 2, 6, 3, count=2, dtype=torch.float64, grad=True)
    key_mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    for spec in ("softmax", "bn"):
        function = partial(pdcore.bind(spec), key_mask=key_mask)
        assert torch.autograd.gradcheck(function, (q, k, v))
        assert torch.autograd.gradgradcheck(function, (q, k, v), atol=1e-4)


@pytest.mark.parametrize("spec", ["sparse(20,20)", "softmax(softcap=2.0)"])
def test_blocks_keep_nothing_of_the_weights(spec: str) -> None:
    q, k, v = draw(1, 1, 600, 4, grad=True)
    sizes: list[int] = []

    def note(x: Any) -> Any:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        pdcore.attention(q, k, v, spec)
    assert max(sizes) <= q.numel()


# --- dropout --------------------------------------------------------------------------------------


def test_dropout_is_drawn_anew_and_follows_the_seed() -> None:
    q, k, v = draw(1, 2, 40, 8)
    torch.manual_seed(3)
    first, second = (pdcore.attention(q, k, v, dropout=0.5) for _ in range(2))
    torch.manual_seed(3)
    again = pdcore.attention(q, k, v, dropout=0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("spec", ["softmax", "causal+bn(statistics=prefix)", "sparse(300,9)"])
def test_dropout_has_the_mean_of_the_whole(spec: str) -> None:
    q, k, v = draw(1, 1, 30, 4)
    torch.manual_seed(0)
    drawn = torch.stack([pdcore.attention(q, k, v, spec, dropout=0.4) for _ in range(400)])
    error = (drawn.mean(0) - pdcore.attention(q, k, v, spec)).abs()
    assert torch.all(error <= 5 * drawn.std(0) / 20 + 1e-5)


def test_dropout_has_the_gradient_of_what_it_drew() -> None:
    q, k, v = draw(1, 2, 5, 3, dtype=torch.float64, grad=True)

    def same_draw(*x: Any) -> Any:
        torch.manual_seed(7)
        return pdcore.attention(*x, dropout=0.5)

    assert torch.autograd.gradcheck(same_draw, (q, k, v))


@pytest.mark.parametrize("number", [np.float64, float, int])
def test_every_dropout_is_looked_at(number: Any) -> None:
    q, k, v = draw(1, 2, 5, 3)
    layer = pdcore.bind("softmax")
    whole = layer(q, k, v, dropout=number(0))
    assert not torch.equal(layer(q, k, v, dropout=np.float64(0.5)), whole)
    with pytest.raises(ValueError, match="dropout: got"):
        layer(q, k, v, dropout=number(1))


def test_dropout_of_features_is_refused() -> None:
    q, k, v = draw(1, 2, 5, 3)
    with pytest.raises(pdcore.NoBackendError, match="has no weights to drop"):
        pdcore.attention(q, k, v, "linear", dropout=0.1)


# --- the compiler ---------------------------------------------------------------------------------

TRACED = [
    *SPECS,
    "random_features(count=8)",
    "polynomial(degree=2,coef0=1)",
    "gaussian(gamma=0.3)+sparse(3,3)",
]
#: Specs with a second program for lengths that are whole chunks, or whole pooling windows.
CHUNKED = ("causal+bn(statistics=prefix)", "causal+linear", "bn+sh(1,2)")


@pytest.mark.parametrize("spec", TRACED)
def test_a_layer_that_never_ran_is_one_graph_for_all_lengths(spec: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    layer = pdcore.bind(spec)
    compiled = torch.compile(
        lambda q, k, v: layer(2.0 * q, k, v), backend=counter, fullgraph=True, dynamic=True
    )
    for length in (100, 37, 81, 70):
        q, k, v = draw(1, 2, length, 8)
        wanted = layer(2.0 * q, k, v)
        assert torch.allclose(compiled(q, k, v), wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= (2 if spec in CHUNKED else 1)


def test_a_filter_of_as_many_taps_as_features_compiles() -> None:
    # Equal sizes may share a symbol where sizes are dynamic.
    q, k, v = draw(1, 2, 6, 3)
    weight, layer = torch.randn(2, 3, 3), pdcore.bind("conv1d")
    compiled = torch.compile(
        lambda *x: layer(*x[:3], params={"weight": x[3]}),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    want = layer(q, k, v, params={"weight": weight})
    assert relative(compiled(q, k, v, weight), want) < 1e-6


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,2)", "sparse(4,2)", "softmax(softcap=2.0)"])
def test_compiled_gradients(spec: str) -> None:
    torch.compiler.reset()
    layer = pdcore.bind(spec)
    compiled = torch.compile(lambda *x: layer(*x), backend="aot_eager", fullgraph=True)
    for function in (layer, compiled):
        x = draw(1, 2, 20, 4, grad=True)
        function(*x).square().sum().backward()
        if function is layer:
            wanted = [y.grad for y in x]
    for array, grad in zip(x, wanted, strict=True):
        assert torch.allclose(array.grad, grad, rtol=1e-3, atol=1e-5)


def test_compiled_dropout() -> None:
    torch.compiler.reset()
    layer = pdcore.bind("softmax")
    q, k, _ = draw(1, 2, 30, 30)
    v = torch.eye(30).expand(1, 2, 30, 30)
    compiled = torch.compile(lambda *x: layer(*x, dropout=0.3), backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v)
    share = float((out == 0).float().mean())
    assert 0.25 < share < 0.35
    whole = layer(q, k, v)
    assert torch.allclose(out[out != 0], whole[out != 0] / 0.7, rtol=1e-4)
    assert not torch.equal(out, compiled(q, k, v))


def test_a_wrong_shape_is_an_error_while_tracing_too() -> None:
    torch.compiler.reset()
    layer = pdcore.bind("softmax")
    compiled = torch.compile(lambda *x: layer(*x), backend="eager", fullgraph=True)
    q, k, v = draw(1, 2, 6, 4)
    with pytest.raises(Exception, match="v: got shape"):
        compiled(q, k, v[..., :5, :])


def test_a_named_backend_of_another_library_is_refused_while_tracing() -> None:
    torch.compiler.reset()
    layer = pdcore.bind("softmax", backend="numpy")
    compiled = torch.compile(lambda *x: layer(*x), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot hand PyTorch tensors to numpy"):
        compiled(*draw(1, 2, 6, 4))


@pytest.mark.parametrize("spec", ["bn", "causal+sparse(4,0)"])
def test_export_keeps_the_length_open(spec: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = pdcore.bind(spec)

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return self.attention(q, k, v)

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = tuple({2: length} for _ in range(3))
    program = torch.export.export(Layer(), tuple(draw(1, 2, 40, 8)), dynamic_shapes=shapes)
    q, k, v = draw(1, 2, 55, 8)
    assert torch.allclose(program.module()(q, k, v), pdcore.attention(q, k, v, spec), atol=1e-5)


OPERANDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "key_bias": {"key_bias": (1, 2, 7)},
    "bias": {"bias": (1, 1, 1, 5, 7)},
    "mask": {"mask": True},
    "positions": {"positions": torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64)},
}


@pytest.mark.parametrize("case", OPERANDS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_the_operator_keeps_the_contract_of_operators(case: str) -> None:
    options = OPERANDS[case]
    q, k, v = draw(1, 2, 1, 5, 4, count=1, grad=True) + draw(1, 2, 7, 4, count=2, grad=True)
    more = {
        n: torch.randn(options[n], requires_grad=True) for n in ("key_bias", "bias") if n in options
    }
    plan = lower(pdcore.parse("softmax(softcap=2.0)+sparse(3,3)"), Signature(4, 2, "float32")).text
    arguments = (
        q,
        k,
        v,
        more.get("key_bias"),
        more.get("bias"),
        [],
        None,
        None,
        torch.rand(1, 1, 1, 5, 7) > 0.3 if options.get("mask") else None,
        options.get("positions"),
        None,
        0,
        7,
        1,
        0.0,
        plan,
    )
    torch.library.opcheck(torch.ops.pdcore.scores.default, arguments)


# --- a normalization of one's own -----------------------------------------------------------------


@dataclass(frozen=True)
class Recentre(pdcore.Normalization):
    """T(x) = x - mu."""

    allow_leak: bool = False
    word = "recentre"

    def statistics_state(self) -> Moments:
        return Moments()

    def apply(self, x: Any, state: Any, *, xp: Any, params: Any) -> Any:
        return x - state["mean"]

    def latex(self) -> str:
        return r"x - \mu"


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({}, 9),
        ({"heads": HeadScaling((1, 2))}, 8),
        ({"support": Support(causal=True), "normalization": Recentre(allow_leak=True)}, 9),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_normalization_of_ones_own_runs_by_fused_kernels(
    more: dict[str, Any], keys: int, dtype: Any
) -> None:
    spec = pdcore.AttentionSpec(**{"normalization": Recentre(), **more})
    [q] = draw(1, 4, 9, 8, count=1, dtype=dtype, grad=True)
    k, v = draw(1, 2, keys, 8, count=2, dtype=dtype, grad=True)
    fused_ = "kernel: scaled_dot_product_attention" in str(pdcore.explain(q, k, v, spec))
    assert fused_ == (dtype == torch.float32)
    out = pdcore.attention(q, k, v, spec)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = reference_attention(*wide, spec)
    tight = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.double(), wanted, rtol=tight, atol=tight)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, want in zip(grads, torch.autograd.grad(wanted.sum(), wide), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=tight, atol=10 * tight)


# --- the rest of the framework --------------------------------------------------------------------


def test_autocast_changes_nothing() -> None:
    q, k, v = draw(1, 2, 30, 8)
    for spec in ("softmax", "bn", "linear", "sparse(4,4)"):
        wanted = pdcore.attention(q, k, v, spec)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = pdcore.attention(q, k, v, spec)
        assert result.dtype == torch.float32
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_stays_16_bit(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    attend = fused.attend
    monkeypatch.setattr(
        fused,
        "attend",
        lambda q, k, v, *a, **n: (seen.append(k.dtype), attend(q, k, v, *a, **n))[1],
    )
    x = draw(1, 2, 6, 4, dtype=dtype)
    pdcore.attention(*x, "bn")
    assert seen == [dtype]


def test_a_bound_layer_is_copied_and_pickled() -> None:
    layer = pdcore.bind("bn", backend="torch")
    x = draw(1, 2, 6, 4)
    wanted = layer(*x)
    again = pickle.loads(pickle.dumps(layer))  # noqa: S301 - pickled in the same expression
    assert again.spec == layer.spec
    assert torch.equal(again(*x), wanted)
