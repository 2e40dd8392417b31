"""The fused CUDA kernels of the PyTorch backend, on meta tensors and by CPU kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_cases import draw, error

from pdcore_backends.torch import flash, kernels


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("step", [1, 8])
def test_the_gradient_of_the_log_sum_exp_is_a_feature(
    causal: bool, grouped: bool, step: int
) -> None:
    heads = 2 if grouped else 4
    q, k, v = (draw(1, h, 13, 8, seed=i).double() for i, h in enumerate((4, heads, heads)))
    out, lse = flash.attend_with_lse(q, k, v, scale=0.3, causal=causal)
    d_out, d_lse = draw(*out.shape, seed=4).double(), draw(*lse.shape, seed=5).double()
    wanted = flash._gradients(q, k, v, None, 0.3, causal, out, lse, d_out, d_lse)
    wide = kernels.with_lse(q, k, v, out, d_out, d_lse, step)
    assert {x.shape[-1] for x in wide} == {9 if step == 1 else 16}
    q_, k_, v_, out_, d_ = wide
    grads = flash._backward(d_, q_, k_, v_, out_, lse, 0.0, causal, attn_mask=None, scale=0.3)
    for ours, exact in zip(grads, wanted, strict=True):
        assert error(ours[..., :8], exact) < 1e-13


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [2, 4])
def test_kernels_of_cuda_are_called_as_they_are_declared(
    masked: bool, dtype: Any, heads: int
) -> None:
    with torch.device("meta"):
        q = torch.empty(2, 4, 40, 64, dtype=dtype)
        k, v = (torch.empty(2, heads, 50, 64, dtype=dtype) for _ in range(2))
        mask = torch.empty(2, 1, 1, 50, dtype=dtype) if masked else None
        out, lse, state = kernels.lse_forward(q, k, v, mask, 0.1, False)
        assert bool(state.sizes) == (dtype == torch.bfloat16 and not masked)  # flash
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, q.shape[:3], torch.float32)
        for d_out, d_lse in ((out, None), (out, lse), (None, lse)):
            grads = kernels.lse_backward(q, k, v, mask, 0.1, False, out, state, d_out, d_lse)
            assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(("capability", "first"), [((8, 0), "FLASH"), ((9, 0), "CUDNN")])
def test_the_order_of_the_fused_kernels(
    capability: tuple[int, int], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels._order.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    orders = [[kernel.name for kernel in kernels._order(0, masked)] for masked in (False, True)]
    kernels._order.cache_clear()
    assert orders[0][0] == f"{first}_ATTENTION"
    assert len(set(orders[0])) == 3
    assert "MATH" not in orders[0]
    assert orders[1] == ["EFFICIENT_ATTENTION"]


def test_a_mask_is_laid_out_in_aligned_rows() -> None:
    mask = draw(2, 1, 1, 50)
    laid = kernels._aligned(mask, draw(2, 4, 40, 8), draw(2, 4, 50, 8))
    assert laid.shape == (2, 4, 40, 50)
    assert torch.equal(laid, mask.expand(2, 4, 40, 50))
    assert all(n % (16 // 4) == 0 for n in laid.stride()[:-1])
