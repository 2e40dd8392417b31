"""The fold of the PyTorch backend, and its prefix statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch_cases import draw

import pdcore
from pdcore_backends.torch import fold


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", ["normal", "far", "outlier", "masked"])
def test_prefix_moments_are_those_of_every_prefix(length: int, kind: str) -> None:
    rng = np.random.default_rng(0)
    k = rng.standard_normal((2, 3, length, 4))
    real = None
    if kind == "far":
        k = 100 + 0.1 * k
    if kind == "outlier":
        k[..., 0, :] = 1e4
    if kind == "masked":
        real = rng.random((2, 1, length)) > 0.4
        real[0, :, :70] = False
    narrow = torch.tensor(k, dtype=torch.float32)
    n, mean, var = fold.prefix_moments(narrow, None if real is None else torch.tensor(real))
    exact = narrow.double().numpy()
    for row in range(length):
        for b in range(2):
            kept = np.ones(row + 1, bool) if real is None else real[b, 0, : row + 1]
            keys = exact[b, :, : row + 1][:, kept]
            assert n[b, 0, row, 0] == keys.shape[1]
            if not keys.shape[1]:
                continue
            wanted = keys.var(axis=1)
            scale = np.abs(keys).max() * 2e-6
            assert np.abs(mean[b, :, row].numpy() - keys.mean(axis=1)).max() <= scale
            # The error of rounding keys to float32, and 1e-4 of the variance.
            assert np.all(np.abs(var[b, :, row].numpy() - wanted) <= 1e-4 * wanted + scale**2)


@pytest.mark.parametrize("over_batch", [False, True])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fold_has_the_gradient_of_its_plain_form(
    over_batch: bool, split: bool, masked: bool
) -> None:
    q = draw(2, 2, 3, 5, 4, count=1, dtype=torch.float64, grad=True)[0]
    k = draw(2, 2, 7, 4, count=1, dtype=torch.float64, grad=True)[0]
    beta = torch.tensor([[[0.5]], [[1.5]]], dtype=torch.float64, requires_grad=True)
    real = torch.rand(2, 1, 7, generator=torch.Generator().manual_seed(1)) > 0.3 if masked else None

    def of(function: Any) -> list[Any]:
        folded, keys = function()
        weight = torch.linspace(-1, 1, folded.numel(), dtype=torch.float64).reshape(folded.shape)
        # As in a call: padding is not seen, and terms constant along a row cancel.
        seen = torch.ones(2, 1, 7, 1) if real is None else real[..., None].double()
        mean = (keys * seen).sum(-2, keepdim=True) / seen.sum(-2, keepdim=True)
        scores = folded @ ((keys - mean) * seen)[:, :, None].mT
        total = (weight * folded).sum() + (scores**2).sum()
        return [total, *torch.autograd.grad(total, (q, k, beta))]

    options = {"eps": 1e-5, "split": split, "over_batch": over_batch}

    def kept() -> Any:
        # As in a call: padding is zero.
        return k if real is None else torch.where(real[..., None], k, 0.0)

    folded = of(lambda: fold.fold(q, kept(), real, beta, **options))
    plain = of(lambda: fold._plain(q, kept(), real, beta, 1e-5, split, over_batch))
    for a, b in zip(folded, plain, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 130])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_the_fold_by_chunks_is_its_plain_form(length: int, masked: bool, closed: bool) -> None:
    q = draw(2, 2, 3, length, 4, count=1, dtype=torch.float64, grad=True)[0]
    k = (draw(2, 2, length, 4, count=1, dtype=torch.float64)[0] + 50).requires_grad_()
    beta = torch.tensor([[[0.5]], [[1.5]]], dtype=torch.float64, requires_grad=True)
    real = None
    if masked:
        real = torch.rand(2, 1, length, generator=torch.Generator().manual_seed(1)) > 0.5
        real[0, :, :40] = False

    def of(function: Any) -> list[Any]:
        kept = k if real is None else torch.where(real[..., None], k, 0.0)
        folded, keys, alive = function(q, kept, real, beta, 0, eps=1e-2, closed=closed)
        if alive is not None:
            folded = torch.where(alive[:, :, None, :, None], folded, 0.0)
        weight = torch.linspace(-1, 1, folded.numel(), dtype=torch.float64).reshape(folded.shape)
        total = (weight * folded).sum() + (keys.detach() * keys).sum()
        return [folded, keys, *torch.autograd.grad(total, (q, k, beta))]

    for a, b in zip(of(fold.fold_prefix), of(fold._prefix_plain), strict=True):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def test_a_mean_far_from_zero_costs_the_fold_by_chunks_no_digits() -> None:
    q, k = (x[0] for x in (draw(1, 1, 1, 300, 8, count=1), draw(1, 1, 300, 8, count=1)))
    k = 100 + 0.1 * k
    k[:, :, 0] = 100.0
    folded, exact = (
        fold.fold_prefix(q.to(kind), k.to(kind), None, 1.0, 0, eps=1e-5, closed=True)[0]
        for kind in (torch.float32, torch.float64)
    )
    error = (folded - exact).abs().amax(-1) / exact.abs().amax(-1).clamp_min(1e-9)
    assert error.max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize(
    "spec",
    [
        "bn",
        "bn(statistics=batch)",
        "bn(beta=0.5,with_std=false)",
        "causal+bn(statistics=prefix)",
        "causal+bn(statistics=prefix,with_std=false)",
        "causal",
    ],
)
def test_a_call_without_masks_has_the_result_of_one_with_a_mask(
    spec: str, length: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in draw(2, 4, length, 8, count=3))
    k, v = k[:, :2] + 3, v[:, :2]
    layer = pdcore.bind(spec)
    every = torch.ones(2, length, dtype=torch.bool)
    tolerance = 5e-2 if dtype == torch.bfloat16 else 2e-5
    grads = []
    for mask in (None, every):
        x = [y.detach().requires_grad_() for y in (q, k, v)]
        out = layer(*x, key_mask=mask)
        with torch.no_grad():
            again = layer(*x, key_mask=mask)
            assert again.dtype == out.dtype == dtype
            assert torch.allclose(again, out, rtol=tolerance, atol=tolerance)
        grads.append([out, *torch.autograd.grad(out.square().sum(), x)])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [1e30, -1e30, float("inf"), float("nan")])
def test_a_row_of_scores_that_overflow_is_nan_and_one_of_zeros_is_not(value: float) -> None:
    q, k, v = draw(1, 1, 3, 4, count=3)
    q[:, :, 0], k[:] = 0.0, 1.0  # in row 0 every score is 0, and with one key so is L
    out = pdcore.attention(q, k[:, :, :1], v[:, :, :1])
    assert torch.allclose(out, v[:, :, :1].expand_as(out))
    q[:, :, 1], k[:, :, :] = value, 1e30
    out = pdcore.attention(q, k[:, :, :1], v[:, :, :1])
    assert torch.isnan(out[:, :, 1]).all()
    assert torch.allclose(out[:, :, 0], v[:, :, 0])
