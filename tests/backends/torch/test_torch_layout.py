"""``layout="bnhd"`` on PyTorch: traced, differentiated, and taken to other backends."""

from __future__ import annotations

import pytest
import torch
from torch_cases import relative

import pdcore

SPECS = ("softmax", "bn", "causal+linear")


def draw(rows: int = 9) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, n, h, 8, dtype=torch.float64) for n, h in ((rows, 4), (11, 2), (11, 2))]


def swapped(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(-2, -3)


def test_a_traced_call_is_one_graph_for_all_lengths() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter, layer = CompileCounter(), pdcore.bind("bn")
    compiled = torch.compile(
        lambda q, k, v: layer(q, k, v, layout="bnhd"), backend=counter, fullgraph=True, dynamic=True
    )
    for rows in (9, 40, 21):
        q, k, v = draw(rows)
        wanted = swapped(layer(*map(swapped, (q, k, v))))
        assert relative(compiled(q, k, v), wanted) < 1e-12
    assert counter.frame_count == 1


def test_a_traced_error_shows_the_shapes_of_the_caller() -> None:
    layer, (q, k, _) = pdcore.bind(), draw()
    compiled = torch.compile(
        lambda q, k, v: layer(q, k, v, layout="bnhd"), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match=r"v: got shape \(2, 9, 4, 8\)"):
        compiled(q, k, q)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_have_the_layout_of_their_arrays(spec: str) -> None:
    x = [a.requires_grad_() for a in draw()]
    out = pdcore.attention(*x, spec, layout="bnhd")
    d = torch.randn_like(out)
    got = torch.autograd.grad(out, x, d)
    want = torch.autograd.grad(pdcore.attention(*map(swapped, x), spec), x, swapped(d))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.parametrize("backend", ["numpy", "jax", "torch:cpu"])
def test_other_backends_and_devices(backend: str) -> None:
    x = [a.float() for a in draw()]
    out = pdcore.attention(*x, "bn", backend=backend, layout="bnhd")
    assert isinstance(out, torch.Tensor)
    assert relative(out, swapped(pdcore.attention(*map(swapped, x), "bn"))) < 1e-5
    weights = pdcore.attention_weights(*x, "bn", backend=backend, layout="bnhd")
    assert weights.shape == (2, 4, 9, 11)


def test_a_device_in_the_call() -> None:
    x = draw()
    out = pdcore.attention(*x, device="cpu", layout="bnhd")
    assert torch.equal(out, swapped(pdcore.attention(*map(swapped, x))))
