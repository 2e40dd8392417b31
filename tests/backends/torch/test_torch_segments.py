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
    with pytest.raises((AssertionError, RuntimeError)):  # segments that overlap cannot be cut
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


def test_dropout_is_refused():
    x = torch.randn(1, 2, 8, 4)
    ids = torch.tensor([[0] * 5 + [1] * 3])
    with pytest.raises(pdcore.NoBackendError, match=r"dropout 0\.5: not with segments"):
        pdcore.attention(x, x, x, dropout=0.5, segments=ids)


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

    with pytest.raises((UnsupportedError, NoBackendError), match="segments: the ids are traced"):
        torch.vmap(packed)(x[:, None], ids[:, None])


def test_compiled_calls_take_any_ids():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    beta, bias = torch.full((4,), 0.7, dtype=torch.float64), torch.randn(8, 8, dtype=torch.float64)
    spec = "causal+bn(statistics=prefix,beta=param)"

    def run(q, b, extra, ids):
        params = {"beta": b}
        return pdcore.attention(
            q, q, q, spec, segments=ids, params=params, bias=extra, return_lse=True
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [3, 3, 3, 3, 3, 2, 2, 2]])
    for i in (ids, ids.flip(1)):
        results = []
        for function in (run, compiled):
            leaves = [a.clone().requires_grad_() for a in (x, beta, bias)]
            out, lse = function(*leaves, i)
            loss = (out * x).sum() + lse.masked_fill(torch.isinf(lse), 0.0).sum()
            results.append((out, lse, *torch.autograd.grad(loss, leaves)))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@pytest.mark.parametrize("offset", ["end", 2, torch.tensor(1)])
def test_compiled_offsets_and_pairs(offset):
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 8, 4)
    ids = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[1, 1, 1, 1, 0, 0, 0, -1]])

    def run(q, k, q_ids, k_ids):
        return pdcore.attention(q, k, k, "causal+sh(1,2)", offset=offset, segments=(q_ids, k_ids))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, *ids), run(q, k, *ids))


def test_what_compiled_calls_refuse():
    x, ids = torch.randn(1, 2, 5, 4), torch.zeros(1, 5, dtype=torch.int64)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def dropped(q, i):
        return pdcore.attention(q, q, q, dropout=0.5, segments=i)

    with pytest.raises(Exception, match=r"dropout 0\.5: not with segments"):
        dropped(x, ids)


def test_each_array_is_cut_once_whatever_the_number_of_segments():
    """The gradient of a slice is an array as large as the whole, that of a split is not."""
    x = [torch.randn(1, 2, 40, 8, requires_grad=True) for _ in range(3)]
    lengths = [7, 3, 9, 1, 8, 12]
    ids = pdcore.segments_from_lengths(torch.tensor(lengths))[None]
    bias = torch.zeros(1, 1, 40, 40, requires_grad=True)
    nodes, names = [pdcore.attention(*x, "bn", segments=ids, bias=bias).grad_fn], []
    for node in nodes:
        names.append(node.name())
        nodes += [n for n, _ in node.next_functions if n is not None and n not in nodes]
    assert sum(name.startswith("Split") for name in names) == 4
