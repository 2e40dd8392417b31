"""The public calls inside PyTorch's compiler, TorchScript's trace, torch.func and ONNX export."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch_cases import draw, relative

import pdcore

SPEC = "conv1d+sh(1,2)"  # parameters with a default, and head groups
PARSED = pdcore.parse(SPEC)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def compiled(function: Any) -> Any:
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True)


CALLS = {
    "attention": lambda q, k, v: pdcore.attention(q, k, v, SPEC),
    "attention of a spec": lambda q, k, v: pdcore.attention(q, k, v, PARSED),
    "attention by a list": lambda q, k, v: pdcore.attention(q, k, v, SPEC, backend=["torch"]),
    "bind": lambda q, k, v: pdcore.bind(SPEC)(q, k, v),
    "attention_weights": lambda q, k, v: pdcore.attention_weights(q, k, v, SPEC),
    "attention_vjp": lambda q, k, v: pdcore.attention_vjp(q, k, v, SPEC)[2](v)["k"],
}


@pytest.mark.parametrize("name", CALLS)
def test_public_calls_are_one_graph(name: str) -> None:
    x = draw(1, 2, 6, 4)
    assert relative(compiled(CALLS[name])(*x), CALLS[name](*x)) < 1e-5


def test_an_import_does_not_compile_a_call_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    function = torch.compile(CALLS["attention"], backend=counter, fullgraph=True)
    x = draw(1, 2, 6, 4)
    function(*x)
    monkeypatch.setitem(sys.modules, "imported_later", types.ModuleType("imported_later"))
    function(*x)
    assert counter.frame_count == 1


@pytest.mark.parametrize("spec", ["conv1d", "conv2d(2,3)"])
def test_default_parameters_under_torch_func(spec: str) -> None:
    x = draw(2, 2, 6, 4)

    def total(q: Any) -> Any:
        return pdcore.attention(q, *x[1:], spec).sum()

    q = x[0].clone().requires_grad_()
    total(q).backward()
    assert relative(torch.func.grad(total)(x[0]), q.grad) < 1e-5
    assert relative(compiled(torch.func.grad(total))(x[0]), q.grad) < 1e-5
    by_sequence = torch.func.vmap(lambda *x: pdcore.attention(*x, spec))(*x)
    assert relative(by_sequence, pdcore.attention(*x, spec)) < 1e-5


def test_use_backend_is_honoured_outside_of_a_trace() -> None:
    x = draw(1, 2, 6, 4)
    function = compiled(CALLS["attention"])
    with pdcore.use_backend("numpy"):
        with pytest.raises(Exception, match="cannot hand PyTorch tensors to numpy"):
            function(*x)
        assert "use_backend" in str(pdcore.explain(*x, SPEC))
    assert relative(compiled(CALLS["attention"])(*x), CALLS["attention"](*x)) < 1e-5


ANY_LENGTH = ["softmax", "causal", "bn", "gaussian(0.3)+sparse(3,3)", "linear", "iebn", "conv1d"]


@pytest.mark.parametrize("spec", ANY_LENGTH)
@pytest.mark.parametrize("more", [{}, {"return_lse": True}, {"offset": "end"}], ids=str)
def test_a_torchscript_trace_is_right_for_other_lengths(spec: str, more: Any) -> None:
    gate = {"slope": torch.ones(2, 4), "shift": torch.ones(2, 4)} if spec == "iebn" else {}

    def call(*x: Any) -> Any:
        result = pdcore.attention(*x, spec, params=gate, **more)
        return result if isinstance(result, torch.Tensor) else result[0] + result[1][..., None]

    traced = torch.jit.trace(call, tuple(draw(1, 2, 6, 4)))
    for length in (6, 9, 300):
        x = draw(1, 2, length, 4)
        assert relative(traced(*x), call(*x)) < 1e-5


@pytest.mark.parametrize("spec", ["sh(1,2)", "causal+linear", "causal+bn(statistics=prefix)"])
def test_a_torchscript_trace_of_unrolled_loops_refuses_other_lengths(spec: str) -> None:
    x = tuple(draw(1, 2, 130, 4))
    traced = torch.jit.trace(lambda *x: pdcore.attention(*x, spec), x)
    assert relative(traced(*x), pdcore.attention(*x, spec)) < 1e-5
    with pytest.raises(RuntimeError, match="expanded size"):
        traced(*draw(1, 2, 260, 4))


def test_a_torchscript_trace_of_weights_in_blocks_refuses_other_lengths() -> None:
    x = tuple(draw(1, 1, 260, 4))
    traced = torch.jit.trace(lambda *x: pdcore.attention_weights(*x), x)
    assert relative(traced(*x), pdcore.attention_weights(*x)) < 1e-5
    with pytest.raises(RuntimeError, match="expanded size"):
        traced(*draw(1, 1, 520, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("spec", ["softmax", "bn", "causal"])
def test_onnx_export_by_torchscript(spec: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")

    class Model(torch.nn.Module):  # type: ignore[misc]
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return pdcore.attention(q, k, v, spec)

    x, file = draw(1, 2, 6, 4), io.BytesIO()
    torch.onnx.export(Model(), tuple(x), file, dynamo=False, input_names=["q", "k", "v"])
    session = onnxruntime.InferenceSession(file.getvalue())
    [out] = session.run(None, {n: np.asarray(a) for n, a in zip("qkv", x, strict=True)})
    assert relative(torch.from_numpy(out), pdcore.attention(*x, spec)) < 1e-5
