"""The fused CUDA kernels of the PyTorch backend, on meta tensors and by CPU kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_cases import draw, error

from pdcore_backends.torch import derivatives, flash, kernels


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
    wanted = derivatives.gradients(q, k, v, None, 0.3, causal, out, lse, d_out, d_lse)
    wide = kernels.with_lse(q, k, v, out, d_out, d_lse, step)
    assert {x.shape[-1] for x in wide} == {9 if step == 1 else 16}
    q_, k_, v_, out_, d_ = wide
    grads = flash.pull_back_on_cpu(
        d_, q_, k_, v_, out_, lse, 0.0, causal, attn_mask=None, scale=0.3
    )
    for ours, exact in zip(grads, wanted, strict=True):
        assert error(ours[..., :8], exact) < 1e-13


@pytest.mark.parametrize("length", [1.0, 1e-9, 1e-30, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_of_the_log_sum_exp_moves_out(length: float, dtype: Any) -> None:
    x = [draw(1, 4, 13, 8, seed=i).to(dtype).requires_grad_() for i in range(3)]
    out, lse = flash.attend_with_lse(*x, scale=0.3)
    d_out, d_lse = draw(*out.shape, seed=4).to(dtype), draw(*lse.shape, seed=5).to(dtype)
    d_out[..., :5, :] *= length
    moved = flash._shifted(out.detach(), d_out, d_lse)
    assert (moved is None) == (length < 1e-10)  # then by one more feature
    d_lse[..., :2] = 0.0  # a row whose two cotangents are 0 has no need of it
    grads = torch.autograd.grad((out, lse), x, (d_out, d_lse))
    arrays = [a.detach().double() for a in (*x, out, lse, d_out, d_lse)]
    wanted = derivatives.gradients(*arrays[:3], None, 0.3, False, *arrays[3:])
    for ours, exact in zip(grads, wanted, strict=True):
        assert error(ours.double(), exact) < (1e-5 if dtype == torch.float32 else 1e-13)


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


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Record the kernels that PyTorch may try for each call on a device, in their order."""
    calls: list[list[str]] = []

    def allow(order: Any, set_priority: bool = False) -> Any:
        calls.append([kernel.name.removesuffix("_ATTENTION") for kernel in order])
        return contextlib.nullcontext()

    kernels._order.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(kernels, "sdpa_kernel", allow)
    yield calls
    kernels._order.cache_clear()


def attend(rows: int, keys: int, *, grad: bool = False, **more: Any) -> None:
    """Call a fused kernel on arrays of a device that have no memory."""
    with torch.device("meta"):
        q, k = (torch.empty(1, 4, n, 64, dtype=torch.bfloat16) for n in (rows, keys))
    flash.attend(q.requires_grad_(grad), k, k, scale=0.1, **more)


@pytest.mark.parametrize(("capability", "first"), [((8, 0), "FLASH"), ((9, 0), "CUDNN")])
def test_the_order_of_the_fused_kernels(
    capability: tuple[int, int],
    first: str,
    tried: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    attend(128, 300)
    attend(128, 300, mask=torch.zeros((), dtype=torch.bfloat16, device="meta"))
    assert tried[0][0] == first
    assert sorted(tried[0]) == ["CUDNN", "EFFICIENT", "FLASH"]  # never the math kernel
    assert tried[1] == ["EFFICIENT"]


@pytest.mark.parametrize("rows", [1, 4, 127])
@pytest.mark.parametrize("causal", [False, True])
def test_decoding_builds_no_plan_of_cudnn(rows: int, causal: bool, tried: list[list[str]]) -> None:
    for keys in (127, 128, 129, 4096):
        attend(rows, keys, causal=causal)
    assert tried == 4 * [["FLASH", "EFFICIENT"]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("rows", "keys", "whole"),
    [
        (128, 128, True),
        (4096, 16384, True),
        (704, 704, False),  # 64 keys are left over, where cuDNN 9 gave NaN
        (1, 128, False),  # here too
        (128, 64, False),
        (200, 256, False),
        (256, 257, False),
    ],
)
def test_cudnn_computes_no_gradient_of_a_tile_filled_in_part(
    rows: int, keys: int, whole: bool, causal: bool, tried: list[list[str]]
) -> None:
    attend(rows, keys, causal=causal, grad=True)
    assert [("CUDNN" in order) for order in tried] == [whole]
    with torch.no_grad():
        attend(rows, keys, causal=causal, grad=True)
    assert ("CUDNN" in tried[1]) == (rows >= 128)


@pytest.mark.parametrize("lengths_vary", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(256, 128), (256, 130), (5, 128)])
def test_a_trace_knows_what_holds_for_all_its_lengths(
    rows: int, keys: int, grad: bool, lengths_vary: bool
) -> None:
    def choose(q: Any, k: Any) -> Any:
        return q.sum() + bool(kernels.by_cudnn(q.shape[0], k.shape[0], flash.recorded(q, k)))

    torch._dynamo.reset()
    traced = torch.compile(choose, backend="eager", fullgraph=True, dynamic=lengths_vary)
    q, k = (torch.zeros(n, requires_grad=grad) for n in (rows, keys))
    wanted = not lengths_vary and kernels.by_cudnn(rows, keys, grad)
    assert traced(q, k).item() == wanted
    with torch._dynamo.config.patch(error_on_recompile=lengths_vary):
        traced(q.new_zeros(rows + 128, requires_grad=grad), k)


def test_a_mask_is_laid_out_in_aligned_rows() -> None:
    mask = draw(2, 1, 1, 50)
    laid = kernels._aligned(mask, draw(2, 4, 40, 8), draw(2, 4, 50, 8))
    assert laid.shape == (2, 4, 40, 50)
    assert torch.equal(laid, mask.expand(2, 4, 40, 50))
    assert all(n % (16 // 4) == 0 for n in laid.stride()[:-1])
