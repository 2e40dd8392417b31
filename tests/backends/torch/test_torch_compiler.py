"""The PyTorch backend under the compiler and export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_cases import SPECS, draw, relative

import pdcore
from pdcore.lowering import Signature, lower

TRACED = [
    *SPECS,
    "random_features(count=8)",
    "polynomial(degree=2,coef0=1)",
    "gaussian(gamma=0.3)+sparse(3,3)",
]
#: Specs with a second program for lengths that are whole chunks, or whole pooling windows.
CHUNKED = ("causal+bn(statistics=prefix)", "causal+linear", "bn+sh(1,2)")


@pytest.mark.parametrize("spec", TRACED)
def test_a_layer_that_never_ran_is_one_graph_for_all_lengths(spec: str) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    layer = pdcore.bind(spec)
    compiled = torch.compile(
        lambda q, k, v: layer(2.0 * q, k, v), backend=counter, fullgraph=True, dynamic=True
    )
    for length in (100, 37, 81, 70):
        q, k, v = draw(1, 2, length, 8)
        wanted = layer(2.0 * q, k, v)
        assert torch.allclose(compiled(q, k, v), wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= (2 if spec in CHUNKED else 1)


def test_a_filter_of_as_many_taps_as_features_compiles() -> None:
    # Equal sizes may share a symbol where sizes are dynamic.
    q, k, v = draw(1, 2, 6, 3)
    weight, layer = torch.randn(2, 3, 3), pdcore.bind("conv1d")
    compiled = torch.compile(
        lambda *x: layer(*x[:3], params={"weight": x[3]}),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    want = layer(q, k, v, params={"weight": weight})
    assert relative(compiled(q, k, v, weight), want) < 1e-6


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,2)", "sparse(4,2)", "softmax(softcap=2.0)"])
def test_compiled_gradients(spec: str) -> None:
    torch.compiler.reset()
    layer = pdcore.bind(spec)
    compiled = torch.compile(lambda *x: layer(*x), backend="aot_eager", fullgraph=True)
    for function in (layer, compiled):
        x = draw(1, 2, 20, 4, grad=True)
        function(*x).square().sum().backward()
        if function is layer:
            wanted = [y.grad for y in x]
    for array, grad in zip(x, wanted, strict=True):
        assert torch.allclose(array.grad, grad, rtol=1e-3, atol=1e-5)


def test_compiled_dropout() -> None:
    torch.compiler.reset()
    layer = pdcore.bind("softmax")
    q, k, _ = draw(1, 2, 30, 30)
    v = torch.eye(30).expand(1, 2, 30, 30)
    compiled = torch.compile(lambda *x: layer(*x, dropout=0.3), backend="aot_eager", fullgraph=True)
    out = compiled(q, k, v)
    share = float((out == 0).float().mean())
    assert 0.25 < share < 0.35
    whole = layer(q, k, v)
    assert torch.allclose(out[out != 0], whole[out != 0] / 0.7, rtol=1e-4)
    assert not torch.equal(out, compiled(q, k, v))


def test_a_wrong_shape_is_an_error_while_tracing_too() -> None:
    torch.compiler.reset()
    layer = pdcore.bind("softmax")
    compiled = torch.compile(lambda *x: layer(*x), backend="eager", fullgraph=True)
    q, k, v = draw(1, 2, 6, 4)
    with pytest.raises(Exception, match="v: got shape"):
        compiled(q, k, v[..., :5, :])


def test_a_named_backend_of_another_library_is_refused_while_tracing() -> None:
    torch.compiler.reset()
    layer = pdcore.bind("softmax", backend="numpy")
    compiled = torch.compile(lambda *x: layer(*x), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot hand PyTorch tensors to numpy"):
        compiled(*draw(1, 2, 6, 4))


@pytest.mark.parametrize("spec", ["bn", "causal+sparse(4,0)"])
def test_export_keeps_the_length_open(spec: str) -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = pdcore.bind(spec)

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return self.attention(q, k, v)

    length = torch.export.Dim("length", min=2, max=4096)
    shapes = tuple({2: length} for _ in range(3))
    program = torch.export.export(Layer(), tuple(draw(1, 2, 40, 8)), dynamic_shapes=shapes)
    q, k, v = draw(1, 2, 55, 8)
    assert torch.allclose(program.module()(q, k, v), pdcore.attention(q, k, v, spec), atol=1e-5)


OPERANDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "key_bias": {"key_bias": (1, 2, 7)},
    "bias": {"bias": (1, 1, 1, 5, 7)},
    "mask": {"mask": True},
    "positions": {"positions": torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64)},
}


@pytest.mark.parametrize("case", OPERANDS)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_the_operator_keeps_the_contract_of_operators(case: str) -> None:
    options = OPERANDS[case]
    q, k, v = draw(1, 2, 1, 5, 4, count=1, grad=True) + draw(1, 2, 7, 4, count=2, grad=True)
    more = {
        n: torch.randn(options[n], requires_grad=True) for n in ("key_bias", "bias") if n in options
    }
    plan = lower(pdcore.parse("softmax(softcap=2.0)+sparse(3,3)"), Signature(4, 2, "float32")).text
    arguments = (
        q,
        k,
        v,
        more.get("key_bias"),
        more.get("bias"),
        [],
        None,
        None,
        torch.rand(1, 1, 1, 5, 7) > 0.3 if options.get("mask") else None,
        options.get("positions"),
        *options.get("labels", (None, None)),
        None,
        0,
        7,
        1,
        0.0,
        plan,
    )
    torch.library.opcheck(torch.ops.pdcore.scores.default, arguments)
