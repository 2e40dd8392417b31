"""Attention-BN without division on the PyTorch backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recentre_laws import (  # noqa: F401 - collected here too
    test_a_nan_of_one_sequence_stays_there_under_the_gaussian_kernel,
    test_a_variance_that_overflows_is_not_computed,
    test_it_grows_with_prefix_statistics,
    test_it_is_plain_attention_of_other_queries,
    test_it_is_the_division_by_one,
    test_the_gaussian_kernel_does_not_see_it,
)
from torch_cases import draw

import pdcore
from pdcore_backends.torch import flash

PREFIX = "causal+bn(statistics=prefix,with_std=false)"


@pytest.fixture
def name() -> str:
    return "torch"


def kernels_keys(monkeypatch: pytest.MonkeyPatch, q: Any, k: Any, v: Any, spec: str) -> Any:
    """Return the keys that PyTorch's kernel reads in a call without the log-sum-exp."""
    seen = []

    def forward(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
        seen.append(k)
        return v[:, :, :1].expand(q.shape), torch.ones(q.shape[:-1])

    monkeypatch.setattr(flash, "_forward", forward)
    pdcore.attention(q, k, v, spec)
    [keys] = seen
    return keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "spec",
    [
        "bn(with_std=false)",
        "bn(beta=0.5,statistics=batch,with_std=false)",
        PREFIX,
    ],
)
def test_the_kernel_reads_the_keys_of_the_caller(
    monkeypatch: pytest.MonkeyPatch, spec: str, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in draw(2, 2, 9, 4, count=3))
    keys = kernels_keys(monkeypatch, q, k, v, spec)
    assert keys.dtype == dtype
    assert keys.data_ptr() == k.data_ptr()


@pytest.mark.parametrize(
    "spec", ["bn(with_std=false)", "causal+bn(statistics=prefix,with_std=false)"]
)
def test_a_gradient_reads_keys_near_zero(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    q, k, v = draw(2, 2, 9, 4, count=3)
    keys = kernels_keys(monkeypatch, q.requires_grad_(), 100 + k, v, spec)
    assert keys.abs().max() < 10


def test_pooled_keys_are_shifted_before_they_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (x.to(torch.bfloat16) for x in draw(1, 2, 8, 4, count=3))
    keys = kernels_keys(monkeypatch, q, 100 + k, v, "bn(with_std=false)+sh(2,2)")
    assert keys.dtype == torch.bfloat16
    assert keys.abs().max() < 10


def test_explain_says_that_keys_stay() -> None:
    q, k, v = draw(1, 2, 8, 4, count=3)
    text = str(pdcore.explain(q, k, v, "bn(with_std=false)"))
    assert "recentre: q' = q - beta mu" in text
    assert "keys as they are (c = 0)" in text
    assert "scaled_dot_product_attention" in text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prefix_rows_of_sixteen_bits_are_not_computed_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in draw(1, 2, 8, 4, count=3))
    assert not any("float32" in step for step in pdcore.explain(q, k, v, PREFIX).plan.steps)
    assert kernels_keys(monkeypatch, q, k, v, PREFIX).dtype == dtype


def test_one_graph_by_the_compiler() -> None:
    q, k, v = draw(2, 2, 9, 4, count=3)
    layer = pdcore.bind("bn(beta=0.5,with_std=false)")
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), layer(q, k, v))
