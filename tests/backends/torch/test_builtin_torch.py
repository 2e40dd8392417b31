"""The built-in backend of PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from builtin_checks import (  # noqa: F401 - collected here too
    test_a_row_whose_scores_overflow_is_right_or_no_number,
    test_both_ways_to_gradients_agree,
    test_eight_threads,
    test_every_dtype_is_within_its_budget,
    test_exchange_with_numpy,
    test_scores_that_overflow_below_are_not_left_out,
)

import pdcore
from pdcore.errors import NoBackendError, UnsupportedError


@pytest.fixture
def name() -> str:
    return "torch"


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("chosen", ["tf32", "bf16"])
def test_torch_refuses_float32_in_less(chosen: str) -> None:
    x = torch.ones(3, 1, 2, 5, 4)
    layer = pdcore.bind("bn")
    layer(*x)  # the backend is selected before the precision changes
    _, _, vjp = pdcore.attention_vjp(*x)
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    reason = f"matrix products on cpu are set to {chosen}, which is not float32"
    with pytest.raises(UnsupportedError, match=reason):
        layer(*x)
    with pytest.raises(UnsupportedError, match=reason):
        vjp(x[0])
    with pytest.raises(NoBackendError, match=reason):
        pdcore.bind("bn")(*x)
    assert any(reason in why for why in pdcore.explain(*x, "bn").reasons["torch"])
    for dtype in (torch.float64, torch.float16):  # not affected by the precision of float32
        assert pdcore.attention(*x.to(dtype), "bn").dtype == dtype
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert layer(*x).shape == (1, 2, 5, 4)


def test_torch_autocast_does_not_reach_inside() -> None:
    x = torch.randn(3, 1, 2, 30, 8)
    want, level, vjp = pdcore.attention_vjp(*x, "gaussian(gamma=0.3)")
    alone = pdcore.attention(*x, "gaussian(gamma=0.3)")
    d = torch.ones_like(want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x[0] @ x[1].mT).dtype == torch.bfloat16
        assert torch.equal(pdcore.attention(*x, "gaussian(gamma=0.3)"), alone)
        again, lse, pull = pdcore.attention_vjp(*x, "gaussian(gamma=0.3)")
        assert torch.equal(again, want)
        assert torch.equal(lse, level)
        weights = pdcore.attention_weights(*x, "gaussian(gamma=0.3)")
        assert torch.equal(pull(d)["k"], vjp(d)["k"])
    assert torch.equal(weights, pdcore.attention_weights(*x, "gaussian(gamma=0.3)"))


def test_torch_vjp_keeps_the_graph() -> None:
    x = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    d = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    by_hand = pdcore.attention_vjp(*x, "bn")[2](d)["q"]
    (native,) = torch.autograd.grad(pdcore.attention(*x, "bn"), x, d, create_graph=True)
    torch.testing.assert_close(by_hand, native[0], rtol=0, atol=1e-13)
    # Both can be differentiated again, with the same result.
    (a,), (b,) = (
        torch.autograd.grad(g.square().sum(), x, retain_graph=True) for g in (by_hand, native[0])
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert a.abs().max() > 0


def test_torch_does_not_cut_gradients_for_others() -> None:
    x = torch.ones(3, 1, 2, 5, 4, requires_grad=True)
    with pytest.raises(UnsupportedError, match="would cut it; detach them"):
        pdcore.attention(*x, backend="numpy")
    beta = torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedError, match="would cut it; detach them"):
        pdcore.attention(*x.detach(), "bn(beta=param)", params={"beta": beta}, backend="numpy")


def test_torch_without_a_cuda_device() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UnsupportedError, match=r"device cuda: PyTorch .* sees no CUDA device"):
        pdcore.attention(*np.ones((3, 1, 2, 5, 4)), backend="torch:cuda")
    with pytest.raises(NoBackendError, match=r"device cuda: PyTorch .* sees no CUDA device"):
        pdcore.attention(*torch.ones(3, 1, 2, 5, 4), device="cuda")


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_traces_a_bound_layer_that_has_run() -> None:
    x = torch.randn(3, 2, 2, 20, 8)
    layer = pdcore.bind("bn+sh(1,2)")
    want = layer(*x)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: layer(q, k, v), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), want)
