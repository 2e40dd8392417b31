"""Packed sequences on PyTorch: the laws, automatic differentiation, and calls that are traced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from segment_laws import CALLS, DEFECTS, IDS, SPECS, Q, check_forward, check_gradients, plant

import pdcore
from pdcore.errors import NoBackendError, UnsupportedError


@pytest.mark.sampled(3)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_those_of_the_oracle(spec, call):
    check_forward("torch", spec, call, torch.asarray)


@pytest.mark.parametrize("spec", ["bn", "sh(2,3)+bn", "conv1d(size=4)", "causal+linear"])
def test_gradients_are_those_of_separate_calls(spec):
    check_gradients("torch", spec, torch.asarray)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_breaks_the_laws(monkeypatch, defect):
    plant(monkeypatch, defect)
    with pytest.raises(AssertionError):
        check_forward("torch", "causal+bn(statistics=prefix)", "plain", torch.asarray)


@pytest.mark.parametrize("spec", ["bn", "sh(2,3)+bn(statistics=batch)", "causal+linear"])
def test_automatic_differentiation(spec):
    ids = torch.asarray(IDS)
    x = [torch.asarray(np.nan_to_num(x, nan=0.3)) for x in (Q, Q[:, :2], Q[:, 1:3])]
    out, lse, pull = pdcore.attention_vjp(*x, spec, segments=ids)
    d_out = torch.randn(out.shape, dtype=out.dtype)
    d_lse = torch.ones_like(lse).masked_fill(torch.isinf(lse), 0.0)
    want = pull(d_out, d_lse)
    leaves = [a.clone().requires_grad_() for a in x]
    out, lse = pdcore.attention(*leaves, spec, segments=ids, return_lse=True)
    loss = (out * d_out).sum() + lse.masked_fill(torch.isinf(lse), 0.0).sum()
    for name, g in zip("qkv", torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(g, want[name], rtol=1e-9, atol=1e-10)


def test_padding_and_other_segments_reach_no_gradient():
    q = torch.randn(1, 2, 9, 4, dtype=torch.float64)
    q[:, :, 3] = torch.nan
    q[:, :, 4:] = 1e30
    ids = torch.tensor([[0, 0, 0, -1, 5, 5, 5, 5, 5]])
    leaf = q.clone().requires_grad_()
    out = pdcore.attention(leaf, leaf, leaf, "bn", segments=ids)
    [g] = torch.autograd.grad(out[:, :, :3].sum() ** 2, leaf)
    alone = q[:, :, :3].clone().requires_grad_()
    own = pdcore.attention(alone, alone, alone, "bn")
    [want] = torch.autograd.grad(own.sum() ** 2, alone)
    torch.testing.assert_close(g[:, :, :3], want)
    assert not g[:, :, 3].any()


def test_dropout_is_that_of_the_calls():
    x = torch.randn(1, 2, 8, 4)
    ids = torch.tensor([[0] * 5 + [1] * 3])
    torch.manual_seed(0)
    out = pdcore.attention(x, x, x, dropout=0.5, segments=ids)
    torch.manual_seed(0)
    first = pdcore.attention(x[:, :, :5], x[:, :, :5], x[:, :, :5], dropout=0.5)
    torch.testing.assert_close(out[:, :, :5], first)


def test_ids_of_numpy_and_of_lengths():
    x = torch.randn(1, 2, 8, 4)
    ids = pdcore.segments_from_lengths(torch.tensor([5, 2]), total=8)
    assert isinstance(ids, torch.Tensor)
    out = pdcore.attention(x, x, x, segments=ids[None])
    torch.testing.assert_close(pdcore.attention(x, x, x, segments=ids[None].numpy()), out)


def test_traced_ids_are_refused_by_name():
    x, ids = torch.randn(3, 2, 8, 4), torch.zeros(3, 8, dtype=torch.int64)

    def packed(q, i):
        return pdcore.attention(q, q, q, segments=i, backend="torch")

    with pytest.raises((UnsupportedError, NoBackendError), match="segments: their ids are traced"):
        torch.vmap(packed)(x[:, None], ids[:, None])
