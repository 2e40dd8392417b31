"""Dropout on PyTorch: the laws, seeds that its generator draws, and compiled calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dropout_laws import DropoutLaws
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

import pdcore
from pdcore_backends.torch import namespace


class TestOnTorch(DropoutLaws):
    xp, words = namespace, "int64"

    def array(self, x):
        return torch.from_numpy(np.ascontiguousarray(x))

    def seeds(self, seed):
        return [torch.tensor(seed), torch.tensor([seed, 0], dtype=torch.uint32)]


def test_without_a_seed_the_generator_draws_one():
    x = torch.randn(1, 2, 9, 4)
    torch.manual_seed(0)
    first, second = (pdcore.attention(x, x, x, dropout=0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(pdcore.attention(x, x, x, dropout=0.5), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,2)", "causal+alibi"])
def test_compiled_calls_drop_the_same(spec):
    layer = pdcore.bind(spec)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, seed: layer(q, k, v, dropout=0.3, seed=seed),
        backend=counter,
        fullgraph=True,
    )
    for length in (6, 8, 9, 12):
        x = [torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3)]
        seed = torch.tensor(2**40 + length)
        results = []
        for function in (compiled, lambda q, k, v, s: layer(q, k, v, dropout=0.3, seed=s)):
            out = function(*x, seed)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    # One for the first length, and one for all; two for pooled keys, see docs/backends.md.
    assert counter.frame_count <= (3 if "sh" in spec else 2)


def test_native_dropout_is_that_of_pytorchs_function():
    q, k, v = torch.randn(3, 2, 4, 9, 8)
    key_mask = torch.arange(9) < torch.tensor([[9], [5]])
    real = {"key_mask": key_mask}
    for spec, call, given in (
        ("softmax", {}, {}),
        ("causal", {}, {"is_causal": True}),
        ("softmax", real, {"attn_mask": key_mask[:, None, None]}),
    ):
        torch.manual_seed(0)
        expected = functional.scaled_dot_product_attention(q, k, v, dropout_p=0.4, **given)
        torch.manual_seed(0)
        out = pdcore.attention(q, k, v, spec, dropout=0.4, seed="native", **call)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,2)", "gaussian(0.3)", "causal+cosine"])
def test_native_dropout_drops_weights_and_their_gradients(spec):
    rows, p = 40, 0.3
    q, k = torch.randn(2, 3, 2, rows, 8)
    units = torch.eye(rows).expand(3, 2, -1, -1).clone().requires_grad_()
    whole = pdcore.attention(q, k, units, spec).detach()
    out = pdcore.attention(q, k, units, spec, dropout=p, seed="native")
    kept = out != 0
    torch.testing.assert_close(out, torch.where(kept, whole / (1 - p), 0.0))
    seen = whole != 0
    share = kept[seen].double().mean().item()
    assert abs(share - (1 - p)) < 5 * (p * (1 - p) / seen.sum().item()) ** 0.5 * 2**0.5
    cotangent = torch.randn_like(out)
    (slope,) = torch.autograd.grad(out, units, cotangent)
    torch.testing.assert_close(slope, out.detach().mT @ cotangent, rtol=1e-4, atol=1e-5)


def test_native_dropout_is_compiled():
    layer = pdcore.bind("causal+bn(statistics=prefix)")
    run = torch.compile(
        lambda q, k, v: layer(q, k, v, dropout=0.3, seed="native"),
        backend="aot_eager",
        fullgraph=True,
    )
    for length in (6, 8, 9):
        x = torch.randn(3, 1, 2, length, 4)
        results = []
        for function in (run, lambda q, k, v: layer(q, k, v, dropout=0.3, seed="native")):
            torch.manual_seed(1)
            results.append(function(*x))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("spec", "options", "reason"),
    [
        ("sparse(2,2)", {}, "drops no weights for a window"),
        ("alibi", {}, "drops no weights for weights that are no exp of an inner product"),
        ("causal+sh(1,2)", {}, "drops no weights for pooled keys under causal"),
        ("h(count)", {}, "drops no weights for the log-sum-exp"),
        ("softmax", {"return_lse": True}, "drops no weights for the log-sum-exp"),
        ("linear", {}, "linear has no weights to drop"),
        ("softmax", {"backend": "numpy"}, "no kernel of the library drops weights; give a number"),
    ],
)
def test_native_dropout_is_refused_where_the_kernel_does_not_drop(spec, options, reason):
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(pdcore.UnsupportedError, match=reason):
        pdcore.attention(
            x, x, x, spec, **{"backend": "torch", **options}, dropout=0.5, seed="native"
        )


def test_native_dropout_never_becomes_that_of_the_stream():
    x, bias = torch.randn(1, 2, 6, 4), torch.randn(6, 6, requires_grad=True)
    for call in (
        lambda x: pdcore.attention(x, x, x, bias=bias, dropout=0.5, seed="native"),
        lambda x: pdcore.attention(x, x[:, :, :0], x[:, :, :0], dropout=0.5, seed="native"),
        torch.func.vmap(lambda x: pdcore.attention(x, x, x, dropout=0.5, seed="native")),
    ):
        with pytest.raises(pdcore.UnsupportedError, match="seed: got 'native', and PyTorch's"):
            call(x)
    plain = pdcore.attention(x, x, x, seed="native")
    torch.testing.assert_close(plain, pdcore.attention(x, x, x))
