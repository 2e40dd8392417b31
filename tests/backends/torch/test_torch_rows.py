"""Rows of the gaussian and the cosine kernel on PyTorch's CPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch_cases import draw

import pdcore
from pdcore.extend import reference_attention

SPECS = ["gaussian(0.3)", "causal+gaussian(0.3)", "gaussian(0.3)+bn", "cosine", "cosine+h(count)"]


def arrays(value: int = 8, padded: bool = False) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Draw queries of 4 heads, keys and values of 2, far from 0, and the other arguments."""
    shapes = ((2, 4, 70, 8), (2, 2, 70, 8), (2, 2, 70, value))
    x = [draw(*shape, count=1, dtype=torch.float64)[0] + 1.0 for shape in shapes]
    real = torch.ones(2, 70, dtype=torch.bool)
    real[0, :40], real[1, ::3] = False, False
    return [a.requires_grad_() for a in x], {"key_mask": real} if padded else {}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spec", SPECS)
def test_both_derivatives_are_those_of_the_oracle(spec: str, padded: bool) -> None:
    x, more = arrays(value=5 if padded else 8, padded=padded)

    def derivatives(attention: Any) -> Any:
        out = attention(*x, spec, **more)
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(slope.square().sum() for slope in first), x)
        return out, *first, *second

    wanted = derivatives(reference_attention)
    for got, exact in zip(derivatives(pdcore.attention), wanted, strict=True):
        torch.testing.assert_close(got, exact)
    out = pdcore.attention(*x, spec, **more)
    slopes = torch.autograd.grad(out.square().sum(), x)
    for got, exact in zip(slopes, wanted[1:], strict=False):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_the_log_sum_exp_with_a_key_bias(padded: bool) -> None:
    x, more = arrays(padded=padded)
    slopes = []
    for attention in (pdcore.attention, reference_attention):
        out, lse = attention(*x, "gaussian(0.3)", return_lse=True, **more)
        slopes.append(torch.autograd.grad(lse.sin().sum() + out.sum(), x))
        lse = attention(*x, "gaussian(0.3)", return_lse=True, **more)[1]
        slopes.append(torch.autograd.grad(lse.square().sum(), x[:2]))
    for got, exact in zip((*slopes[0], *slopes[1]), (*slopes[2], *slopes[3]), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("mask", [None, "keys", "rows"])
def test_masks_and_biases_with_a_key_bias(mask: str | None) -> None:
    x, more = arrays(padded=True)
    shape = {"keys": (1, 70), "rows": (70, 70)}.get(mask or "", (1, 70))
    more["bias"] = draw(*shape, count=1, dtype=torch.float64)[0]
    if mask is not None:
        more["mask"] = draw(*shape, count=1, dtype=torch.float64)[0] < 1.0
    got = pdcore.attention(*x, "gaussian(0.3)", **more)
    torch.testing.assert_close(got, reference_attention(*x, "gaussian(0.3)", **more))


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e30])
def test_unit_rows_of_any_length(size: float) -> None:
    x = [a.detach().float() for a in arrays()[0]]
    wanted = pdcore.attention(*x, "cosine")
    torch.testing.assert_close(pdcore.attention(size * x[0], x[1], x[2], "cosine"), wanted)
    x[1][:, :, 3] = 0.0  # a key of length 0 has a kernel value of 1
    wanted = reference_attention(*(a.double() for a in x), "cosine").float()
    torch.testing.assert_close(pdcore.attention(*x, "cosine"), wanted)


def test_a_squared_length_that_overflows_is_visible() -> None:
    x = [a.detach().float() for a in arrays()[0]]
    x[1][0, 0, 5] = 3e19
    assert pdcore.attention(*x, "gaussian(0.3)")[0, :2].isnan().all()
    assert pdcore.attention(*x, "gaussian(0.3)")[1].isfinite().all()


def test_nan_of_a_key_moves_no_other_key() -> None:
    x = [a.detach() for a in arrays()[0]]
    wanted = pdcore.attention(*x, "causal+gaussian(0.3)")
    x[1][0, 0, 69] = math.nan
    got = pdcore.attention(*x, "causal+gaussian(0.3)")
    torch.testing.assert_close(got[0, 2:], wanted[0, 2:])
    torch.testing.assert_close(got[1], wanted[1])
