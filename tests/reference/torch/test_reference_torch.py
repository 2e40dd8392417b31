"""Test the oracle on PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from oracle_checks import (  # noqa: F401 - collected here too
    Framework,
    Slopes,
    arguments,
    call,
    loss,
    test_a_constant_feature,
    test_a_row_whose_kernel_values_are_all_zero_has_zero_gradient,
    test_empty,
    test_empty_rows_have_zero_gradient_and_padding_has_none,
    test_large_inputs_have_finite_gradients,
    test_numbers_are_those_of_numpy_and_gradients_true,
    test_plain_calls_with_grouped_heads,
    test_where_kappa_or_its_logarithm_bends,
)

from pdcore.spec import AttentionSpec


@pytest.fixture
def framework() -> Framework:
    return torch_framework()


def torch_framework() -> Framework:
    def slopes(spec: str | AttentionSpec) -> Slopes:
        def function(smooth: Mapping[str, Any], fixed: Mapping[str, Any]) -> Any:
            leaves = {name: torch.asarray(x).requires_grad_() for name, x in smooth.items()}
            fixed = {name: torch.asarray(x) for name, x in fixed.items()}
            out, lse = call(spec, leaves, fixed, return_lse=True)
            loss(out, lse, torch.where, torch.isfinite, torch.asarray).backward()
            gradients = {
                name: np.zeros(x.shape) if x.grad is None else x.grad.numpy()
                for name, x in leaves.items()
            }
            return out.detach().numpy(), lse.detach().numpy(), gradients

        return function

    return Framework(torch.asarray, slopes)


def test_torch_16_bit() -> None:
    smooth, _ = arguments("linear")
    for dtype in (torch.float16, torch.bfloat16):
        arrays = {name: torch.asarray(x).to(dtype) for name, x in smooth.items()}
        out, lse = call("bn", arrays, {}, return_lse=True)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        wide = call("bn", {name: x.float() for name, x in arrays.items()}, {})
        assert torch.equal(out, wide.to(dtype))
        rounded = call("bn", arrays, {}, round_intermediates=dtype)
        assert not torch.equal(rounded, out)
