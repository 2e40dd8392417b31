"""Gradients of the PyTorch backend, gradients of gradients, and dropout."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch_cases import SPECS, draw

import pdcore


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
