"""The Triton kernels of Attention-BN against the formula in float64, by the interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

import pdcore  # noqa: E402
from pdcore.errors import UnsupportedError  # noqa: E402
from pdcore.reference import reference_attention  # noqa: E402
from pdcore_backends.torch import fold, triton_fold  # noqa: E402


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink tiles and pieces, so that short sequences have several of each."""
    monkeypatch.setattr(triton_fold, "TILE", 256)
    monkeypatch.setattr(triton_fold, "STEPS", 2)
    monkeypatch.setattr(fold, "by_triton", lambda k: k.dtype != torch.float64)


def draw(*shape: int, mean: float = 0.0, seed: int = 0, dtype: Any = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) + mean).to(DEVICE, dtype)


def relative(result: Any, wanted: Any) -> float:
    result, wanted = result.detach(), wanted.detach()
    return float((result.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def folded(arrays: list[Any], real: Any, split: bool) -> tuple[Any, Any]:
    q, k, beta = arrays
    call = {"eps": 1e-5, "split": split, "over_batch": False}
    q_, k_ = fold.fold(q.unflatten(1, (k.shape[1], -1)), k, real, beta, **call)
    return q_, k_ if real is None else torch.where(real[..., None], k_, 0.0)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("shape", [(2, 2, 2, 37, 70, 12), (1, 1, 1, 5, 1, 8)])
def test_fold_and_its_gradients(
    shape: tuple[int, ...], mean: float, masked: bool, split: bool
) -> None:
    batch, heads, group, rows, keys, dim = shape
    q = draw(batch, heads * group, rows, dim, mean=mean)
    k = draw(batch, heads, keys, dim, mean=mean, seed=1)
    beta = draw(heads, 1, dim, seed=2)
    real = None
    if masked:
        real = draw(batch, 1, keys, seed=3) > -0.5
        real[-1] = False  # a sequence without a key
    # No cotangent reaches padding.
    runs, grads = [], []
    for dtype in (torch.float32, torch.float64):
        arrays = [x.to(dtype).requires_grad_() for x in (q, k, beta)]
        results = folded(arrays, real, split)
        d = [draw(*x.shape, seed=4 + i).to(dtype) for i, x in enumerate(results)]
        runs.append(results)
        grads.append(torch.autograd.grad(results, arrays, d))
    # A float32 near 1e4 has 3 digits after the point, and so has a mean.
    limit = 3e-6 if mean == 0 else 2e-3
    for ours, wanted in zip((*runs[0], *grads[0]), (*runs[1], *grads[1]), strict=True):
        assert torch.isfinite(ours).all()
        assert relative(ours, wanted) < limit


def test_strides_are_read_as_they_are() -> None:
    q, k = (draw(2, 20, 2, 8, seed=i).transpose(1, 2) for i in range(2))
    ours = folded([q, k, 1.0], None, False)
    wanted = folded([q.double(), k.double(), 1.0], None, False)
    for x, y in zip(ours, wanted, strict=True):
        assert relative(x, y) < 3e-6


@pytest.mark.parametrize("spec", ["bn", "bn(beta=0.5)+sh(1,2)"])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_attention_is_the_oracles(spec: str, mean: float) -> None:
    q, k, v = draw(1, 2, 40, 8, mean=mean), draw(1, 2, 50, 8, mean=mean, seed=1), draw(1, 2, 50, 8)
    key_mask = draw(1, 50, seed=2) > -0.5
    out = pdcore.attention(q, k, v, spec, key_mask=key_mask)
    arrays = [x.double().cpu().numpy() for x in (q, k, v)]
    wanted = reference_attention(*arrays, spec, key_mask=key_mask.cpu().numpy())
    assert relative(out.cpu(), torch.from_numpy(wanted)) < (1e-5 if mean == 0 else 5e-3)


def test_gradients_of_gradients() -> None:
    arrays = [draw(1, 1, 6, 8).requires_grad_(), draw(1, 1, 7, 8, seed=1).requires_grad_(), 1.0]
    runs = []
    for dtype in (torch.float32, torch.float64):
        x = [a.detach().to(dtype).requires_grad_() for a in arrays[:2]]
        results = folded([*x, 1.0], None, False)
        first = torch.autograd.grad(sum(r.square().sum() for r in results), x, create_graph=True)
        runs.append(torch.autograd.grad(sum(g.square().sum() for g in first), x))
    for ours, wanted in zip(*runs, strict=True):
        assert relative(ours, wanted) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_is_rounded_at_the_end(dtype: Any) -> None:
    q, k = draw(1, 1, 30, 8, mean=5.0, dtype=dtype), draw(1, 1, 40, 8, mean=5.0, dtype=dtype)
    ours = folded([q, k, 1.0], None, True)
    wanted = folded([q.double(), k.double(), 1.0], None, True)
    for x, y in zip(ours, wanted, strict=True):
        assert x.dtype == dtype
        assert relative(x, y) < 2 * torch.finfo(dtype).eps


class Launches:
    """Kernels that record their grids in place of running."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getattr__(self, name: str) -> Launches:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *arguments: None


def launched(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Return the grids of forward and backward, on arrays without memory."""
    launches = Launches()
    monkeypatch.setattr(triton_fold, "TILE", 8192)
    monkeypatch.setattr(triton_fold, "STEPS", 8)
    monkeypatch.setattr(triton_fold, "kernels", launches)
    batch, heads, group, rows, keys, dim = shape
    with torch.device("meta"):
        q = torch.empty(batch, heads, group, rows, dim, dtype=torch.bfloat16)
        k = torch.empty(batch, heads, keys, dim, dtype=torch.bfloat16)
        folded, shifted, *statistics = triton_fold._forward(q, k, None, 1.0, 1e-5, True)
        triton_fold._backward(q, k, None, 1.0, True, *statistics, folded, shifted)
    return launches.grids


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 5_000_000, 5_000_000, 128),  # many tiles
        (1, 1, 8, 1_000_000, 40_000_000, 256),  # many pieces
        (100_000, 16, 1, 4, 4, 64),  # many sequences
        (2, 100_000, 1, 4, 4, 64),  # many heads
    ],
)
def test_grids_grow_along_x_alone(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    grids = launched(shape, monkeypatch)
    assert len(grids) == 4
    assert max(count for [count] in grids) > 65_535
    assert all(count < 2**31 for [count] in grids)


def test_more_blocks_than_a_grid_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedError, match=r"1100000000 pairs .* of 2 blocks each, .* pass"):
        launched((1_100_000_000, 1, 1, 1, 1, 8), monkeypatch)
