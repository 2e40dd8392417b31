"""Windows of the PyTorch backend on the CPU: the fused kernel on blocks of rows and keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch_cases import draw

import pdcore
from pdcore.extend import reference_attention
from pdcore_backends.torch import windows
from pdcore_backends.torch.windows import Window

SPECS = [
    "sparse(40,25)",
    "sparse(0,0)",
    "sparse(30,inf)",
    "sparse(20,1)+bn",
    "gaussian(0.3)+sparse(10,7)",
    "causal+sparse(9,9)+bn(statistics=prefix)",
    "sparse(5,5)+h(count)",
]
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padded": True, "value": 5},
    "positions": {"rows": 290, "keys": 333, "offset": 40},
    "few keys": {"rows": 200, "keys": 9},
}


def arrays(
    rows: int = 300, keys: int | None = None, value: int = 8, padded: bool = False, offset: int = 0
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Draw queries of 4 heads, keys and values of 2, and the other arguments of a call."""
    keys = rows if keys is None else keys
    shapes = ((2, 4, rows, 8), (2, 2, keys, 8), (2, 2, keys, value))
    x = [draw(*shape, count=1, dtype=torch.float64)[0] for shape in shapes]
    real = torch.ones(2, keys, dtype=torch.bool)
    real[0, :150], real[1, ::3] = False, False
    return x, {"offset": offset, **({"key_mask": real} if padded else {})}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("spec", SPECS)
def test_results_and_gradients_are_those_of_the_oracle(spec: str, call: str) -> None:
    x, more = arrays(**CALLS[call])
    assert "a window: blocks of rows" in str(pdcore.explain(*x, spec, **more))
    for array in x:
        array.requires_grad_()
    wanted, level = reference_attention(*x, spec, return_lse=True, **more)
    none = level == -torch.inf
    d_out, d_lse = (draw(*a.shape, count=1, dtype=torch.float64)[0] for a in (wanted, level))

    def gradients(out: torch.Tensor, lse: torch.Tensor) -> Any:
        loss = (out * d_out).sum() + (lse.masked_fill(none, 0.0) * d_lse).sum()
        return torch.autograd.grad(loss, x)

    slopes = gradients(wanted, level)
    out, lse = pdcore.attention(*x, spec, return_lse=True, **more)
    assert torch.equal(lse == -torch.inf, none)
    assert (out == 0)[none].all()
    for got, exact in zip((out, lse, *gradients(out, lse)), (wanted, level, *slopes), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pdcore.attention(*x, spec, **more), wanted)
    with torch.no_grad():
        torch.testing.assert_close(pdcore.attention(*x, spec, **more), wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_gradients(padded: bool) -> None:
    x, more = arrays(rows=170, padded=padded)
    for array in x:
        array.requires_grad_()

    def second(attention: Any) -> Any:
        slopes = torch.autograd.grad(
            attention(*x, "sparse(2,3)", **more).square().sum(), x, create_graph=True
        )
        return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), x)

    for got, exact in zip(second(pdcore.attention), second(reference_attention), strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("offset", [-50, 0, 7, 500, 2**62])
@pytest.mark.parametrize(("left", "ahead"), [(0, 0), (5, 70), (300, 20), (math.inf, 3)])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (999, 1003), (400, 30)])
def test_parts_have_every_row_once_and_the_keys_it_sees(
    rows: int, keys: int, left: float, ahead: float, offset: int, size: int
) -> None:
    row = 0
    for part in Window(left, ahead, offset).parts(rows, keys, size):
        assert part.row == row
        for block in range(part.blocks):
            first = part.key + block * part.rows
            assert part.keys == 0 or 0 <= first <= first + part.keys <= keys
            seen = max(row + offset - left, 0), min(row + part.rows + offset + ahead, keys)
            assert seen[0] >= seen[1] or first <= seen[0] <= seen[1] <= first + part.keys
            row += part.rows
    assert row == rows


def test_blocks_of_long_sequences_run_in_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = arrays(rows=700)
    one = pdcore.attention(*x, "sparse(9,9)")
    monkeypatch.setattr(windows, "MOST_KEYS", 200)
    assert len(Window(9, 9, 0).parts(700, 700, 32)) > 5
    torch.testing.assert_close(pdcore.attention(*x, "sparse(9,9)"), one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_summed_in_float32(dtype: Any) -> None:
    x = [a.to(dtype).requires_grad_() for a in arrays(rows=500)[0]]
    wide = [a.detach().double().requires_grad_() for a in x]
    for got, exact in zip(
        torch.autograd.grad(pdcore.attention(*x, "sparse(60,60)").float().square().sum(), x),
        torch.autograd.grad(pdcore.attention(*wide, "sparse(60,60)").square().sum(), wide),
        strict=True,
    ):
        assert got.dtype == dtype
        error = (got.double() - exact).abs().max() / exact.abs().max()
        assert error < 4 * torch.finfo(dtype).eps


def test_what_padding_holds_changes_nothing() -> None:
    x, more = arrays(padded=True)
    out = pdcore.attention(*x, "sparse(40,25)", **more)
    for array in x[1:]:
        array[~more["key_mask"][:, None].expand(-1, 2, -1)] = math.nan
    assert torch.equal(pdcore.attention(*x, "sparse(40,25)", **more), out)
