"""Dropout on PyTorch: the laws, seeds that its generator draws, and compiled calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dropout_laws import DropoutLaws

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
    compiled = torch.compile(
        lambda q, k, v, seed: layer(q, k, v, dropout=0.3, seed=seed),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for length in (6, 8):
        x = [torch.randn(1, 2, length, 4, requires_grad=True) for _ in range(3)]
        seed = torch.tensor(2**40 + length)
        results = []
        for function in (compiled, lambda q, k, v, s: layer(q, k, v, dropout=0.3, seed=s)):
            out = function(*x, seed)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
