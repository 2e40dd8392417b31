"""`ArrayBackend` on PyTorch: traceable, and with the gradients of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from array_backend_cases import (
    SPECS,
    full_case,
    gradients_by_numpy,
    per_sequence,
    same_gradients,
    with_leaves,
)
from reference_cases import check_forward, cotangents, normal_case, plain_info

from pdcore.backend import ArrayBackend, Inputs


class Torch(ArrayBackend):
    """`ArrayBackend` on PyTorch."""

    info = plain_info("plain_torch", "Torch", "torch")
    query_block = 4
    key_block = 3


@pytest.mark.parametrize("array_offset", [False, True])
@pytest.mark.parametrize("text", SPECS)
def test_torch_autograd(text: str, array_offset: bool) -> None:
    case = per_sequence(text) if array_offset else full_case(text)
    leaves = {n: torch.asarray(x).requires_grad_() for n, x in case.differentiable.items()}
    inputs = with_leaves(case, leaves, torch.asarray)
    out, lse = Torch().attention(case.plan(), inputs, lse=True)
    check_forward(case, out.detach().numpy(), lse.detach().numpy())
    d_out, d_lse = cotangents(case, lse.detach().numpy())
    finite = torch.isfinite(lse)
    loss = torch.sum(out * torch.asarray(d_out))
    loss = loss + torch.sum(torch.where(finite, lse, 0.0) * torch.asarray(d_lse))
    loss.backward()
    want = gradients_by_numpy(case, d_out, d_lse)
    got = {n: x.grad if x.grad is not None else torch.zeros_like(x) for n, x in leaves.items()}
    same_gradients({n: x.numpy() for n, x in got.items()}, want)


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "bn",
        "linear+causal",
        "sh(1,2)+causal+h(count)",
        "causal+bn(statistics=prefix,eps=0.1)",
    ],
)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_dynamo_traces_the_whole(text: str) -> None:
    case = per_sequence(text)
    plan, backend = case.plan(), Torch()
    inputs = case.inputs(torch.asarray)
    want = backend.attention(plan, inputs, lse=True)  # the namespace is imported by now

    def call(q: Any, k: Any, v: Any) -> Any:
        return backend.attention(plan, inputs._replace(q=q, k=k, v=v), lse=True)

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    for got, x in zip(compiled(inputs.q, inputs.k, inputs.v), want, strict=True):
        torch.testing.assert_close(got, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_torch_keeps_the_dtype(dtype: str) -> None:
    case = normal_case("bn+sh(1,2)")
    low = [torch.asarray(x).to(getattr(torch, dtype)) for x in case.qkv]
    out, lse = Torch().attention(case.plan(), Inputs(*low), lse=True)
    assert out.dtype == low[0].dtype
    assert lse.dtype == torch.float32
    wide = [x.to(torch.float64) for x in low]
    want, _ = Torch().attention(case.plan(), Inputs(*wide), lse=True)
    bound = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5}[dtype]
    assert float(torch.max(torch.abs(out.to(torch.float64) - want))) < bound
