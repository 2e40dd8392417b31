"""The PyTorch backend: choice of kernel, user normalizations, autocast and dtypes.

The conformance suite checks the backend's numbers.
"""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_cases import draw, relative

import pdcore
from pdcore.reference import reference_attention
from pdcore.spec import HeadScaling, Moments, Support
from pdcore_backends.torch import blocked, flash

FUSED = "scaled_dot_product_attention (flash)"
OWN = "blocks of our own"


@pytest.mark.parametrize(
    ("spec", "call", "kernel"),
    [
        ("softmax", {}, FUSED),
        ("bn", {"key_mask": torch.ones(1, 6, dtype=torch.bool)}, FUSED),
        ("causal+bn(statistics=prefix)", {}, FUSED),
        ("gaussian(gamma=0.3)+bn", {}, FUSED),
        ("cosine+sh(1,2)", {}, FUSED),
        ("conv1d", {}, FUSED),
        ("conv2d(2,3)+gaussian(gamma=0.3)", {}, FUSED),
        ("causal+conv1d(padding=causal)", {}, FUSED),
        ("mixture", {}, FUSED),
        ("softmax", {"mask": torch.ones(6, 6, dtype=torch.bool)}, FUSED),
        ("softmax(softcap=2.0)", {}, "weights that are no exp of an inner product"),
        ("polynomial(degree=2,coef0=1)", {}, "weights that are no exp of an inner product"),
        ("sparse(2,2)", {}, FUSED),
        ("sparse(2,1)+bn", {"key_mask": torch.ones(1, 6, dtype=torch.bool)}, FUSED),
        ("sparse(2,2)", {"mask": torch.ones(6, 6, dtype=torch.bool)}, "a window with a mask"),
        ("sparse(2,2)+sh(1,2)", {}, "a window over pooled keys"),
        ("causal+sh(1,2)", {}, "pooled keys under causal"),
        ("bn(statistics=prefix)+sh(1,2)", {}, "prefix statistics of pooled keys"),
        ("causal", {"offset": torch.tensor([1])}, "positions that are arrays"),
        ("softmax", {"dropout": 0.1}, "dropout, which no kernel of a library draws from pdcore's"),
    ],
)
def test_explain_says_which_kernel_runs_and_why(spec: str, call: dict, kernel: str) -> None:
    q, k, v = draw(1, 2, 6, 4)
    text = str(pdcore.explain(q, k, v, spec, **call))
    assert "kernel: " in text
    assert kernel in text
    assert (OWN + ", O(N + M) memory" in text) == (kernel != FUSED)


@pytest.mark.parametrize(
    "spec", ["softmax", "bn", "causal", "gaussian(gamma=0.3)", "bn+sh(1,2)", "conv1d"]
)
def test_the_fused_kernel_runs_where_explain_says_so(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("not the fused kernel")

    monkeypatch.setattr(blocked, "scores", never)
    q, k, v = draw(1, 2, 6, 4, grad=True)
    pdcore.attention(q, k, v, spec).sum().backward()
    with torch.no_grad():
        pdcore.attention(q, k, v, spec, return_lse=True)
    monkeypatch.setattr(flash, "_forward", never)
    with pytest.raises(AssertionError, match="not the fused kernel"):
        pdcore.attention(q, k, v, spec)


def test_the_plain_call_is_the_frameworks_own() -> None:
    q, k, v = draw(2, 3, 50, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert torch.equal(pdcore.attention(q, k, v), wanted)


@pytest.mark.parametrize("offset", [-3, 0, 2, 9, 40, "end"])
def test_causal_at_any_offset(offset: Any) -> None:
    q, k, v = (x.double() for x in draw(1, 2, 10, 4))
    wanted = reference_attention(
        *(x.numpy() for x in (q[..., :7, :], k, v)), "causal", offset=offset
    )
    assert relative(pdcore.attention(q[..., :7, :], k, v, "causal", offset=offset), wanted) < 1e-14


def test_a_bias_with_a_gradient_gets_one() -> None:
    q, k, v = draw(1, 2, 5, 4, dtype=torch.float64)
    bias = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: pdcore.attention(q, k, v, bias=b), (bias,))


def test_strided_inputs_are_no_reason_for_another_kernel() -> None:
    q, k, v = (x.transpose(-1, -2) for x in draw(1, 2, 4, 6))
    wanted = reference_attention(*(x.double().numpy() for x in (q, k, v)), "softmax")
    assert relative(pdcore.attention(q, k, v), wanted) < 1e-6


def test_prefixes_of_pooled_keys_are_counted_in_windows() -> None:
    q, k, v = draw(1, 2, 7, 4, dtype=torch.float64)
    spec = "bn(statistics=prefix)+sh(2,1)"
    wanted = reference_attention(*(x.numpy() for x in (q, k, v)), spec)
    assert relative(pdcore.attention(q, k, v, spec), wanted) < 1e-12


@pytest.mark.parametrize("spec", ["linear", "causal+linear"])
def test_small_features_neither_overflow_nor_lose_their_gradient(spec: str) -> None:
    q, k, v = draw(1, 1, 3, 2)
    arrays = [x.requires_grad_() for x in (q - 70.0, k, v)]
    exact = [x.detach().double().requires_grad_() for x in arrays]
    grads = torch.autograd.grad(pdcore.attention(*arrays, spec).sum(), arrays)
    wanted = torch.autograd.grad(reference_attention(*exact, spec).sum(), exact)
    for ours, grad in zip(grads, wanted, strict=True):
        assert torch.allclose(ours.double(), grad, rtol=1e-3, atol=1e-6)
    smallest = pdcore.attention(q - 95.0, k, v, spec)
    assert smallest.abs().max() <= 1.01 * v.abs().max()


def test_a_key_bias_beyond_float16_is_no_nan() -> None:
    q, k, v = draw(1, 1, 6, 8, dtype=torch.float16)
    k = torch.cat([k[:, :, :5], torch.full_like(k[:, :, :1], 200.0)], -2)
    spec = "gaussian(gamma=0.3)"
    wanted = reference_attention(*(x.double().numpy() for x in (q, k, v)), spec)
    assert relative(pdcore.attention(q, k, v, spec), wanted) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_of_pooled_keys_are_taken_before_rounding(dtype: Any) -> None:
    q, k, v = draw(1, 2, 64, 8, dtype=torch.float64)
    k = k.unflatten(2, (32, 2))
    k = (k + 8.0 - k.mean(-2, keepdim=True) + 0.02 * q[:, :, :32, None]).flatten(2, 3)
    q, k, v = (x.to(dtype) for x in (8.0 + 0.02 * q.roll(1, 2), k, v))
    spec = "bn+sh(2,2)"
    wanted = reference_attention(*(x.double().numpy() for x in (q, k, v)), spec)
    exact = torch.as_tensor(np.asarray(wanted))
    # A call with the log-sum-exp computes in float32 and rounds only the result.
    rounding = (pdcore.attention(q, k, v, spec, return_lse=True)[0].double() - exact).abs().max()
    error = (pdcore.attention(q, k, v, spec).double() - exact).abs().max()
    assert error <= 8 * rounding


def test_a_default_device_is_not_asked() -> None:
    q, k, v = draw(2, 2, 6, 4)
    key_mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    for spec in ("softmax", "causal", "bn", "linear", "sparse(2,2)"):
        wanted = pdcore.attention(q, k, v, spec, key_mask=key_mask, return_lse=True)
        with torch.device("meta"):
            result = pdcore.attention(q, k, v, spec, key_mask=key_mask, return_lse=True)
        for a, b in zip(result, wanted, strict=True):
            assert torch.equal(a, b)
    with torch.device("meta"):
        assert pdcore.attention(q, k, v, dropout=0.5).device == q.device


@dataclass(frozen=True)
class Recentre(pdcore.Normalization):
    """T(x) = x - mu."""

    allow_leak: bool = False
    word = "recentre"

    def statistics_state(self) -> Moments:
        return Moments()

    def apply(self, x: Any, state: Any, *, xp: Any, params: Any) -> Any:
        return x - state["mean"]

    def latex(self) -> str:
        return r"x - \mu"


@pytest.mark.parametrize(
    ("more", "keys"),
    [
        ({}, 9),
        ({"heads": HeadScaling((1, 2))}, 8),
        ({"support": Support(causal=True), "normalization": Recentre(allow_leak=True)}, 9),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_normalization_of_ones_own_runs_by_fused_kernels(
    more: dict[str, Any], keys: int, dtype: Any
) -> None:
    spec = pdcore.AttentionSpec(**{"normalization": Recentre(), **more})
    [q] = draw(1, 4, 9, 8, count=1, dtype=dtype, grad=True)
    k, v = draw(1, 2, keys, 8, count=2, dtype=dtype, grad=True)
    assert "kernel: scaled_dot_product_attention" in str(pdcore.explain(q, k, v, spec))
    out = pdcore.attention(q, k, v, spec)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = reference_attention(*wide, spec)
    tight = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.double(), wanted, rtol=tight, atol=tight)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    for grad, want in zip(grads, torch.autograd.grad(wanted.sum(), wide), strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=tight, atol=10 * tight)


def test_autocast_changes_nothing() -> None:
    q, k, v = draw(1, 2, 30, 8)
    for spec in ("softmax", "bn", "linear", "sparse(4,4)"):
        wanted = pdcore.attention(q, k, v, spec)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = pdcore.attention(q, k, v, spec)
        assert result.dtype == torch.float32
        assert torch.equal(result, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_stays_16_bit(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    kernel = flash._forward
    monkeypatch.setattr(
        flash,
        "_forward",
        lambda q, k, v, *a, **n: (seen.append(k.dtype), kernel(q, k, v, *a, **n))[1],
    )
    x = draw(1, 2, 6, 4, dtype=dtype)
    pdcore.attention(*x, "bn")
    assert seen == [dtype]


def test_a_bound_layer_is_copied_and_pickled() -> None:
    layer = pdcore.bind("bn", backend="torch")
    x = draw(1, 2, 6, 4)
    wanted = layer(*x)
    again = pickle.loads(pickle.dumps(layer))  # noqa: S301 - pickled in the same expression
    assert again.spec == layer.spec
    assert torch.equal(again(*x), wanted)


def test_arrays_of_numpy_in_every_layout() -> None:
    file = Path(__file__).parents[2] / "shared" / "layouts.py"
    run = subprocess.run([sys.executable, str(file), "torch"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout.splitlines()[-1:] + run.stderr.splitlines()[-5:]


@pytest.mark.parametrize("to", ["numpy", "strict"])
def test_tensors_of_odd_layouts_go_to_another_backend(to: str) -> None:
    x = draw(1, 2, 6, 4)
    odd = {
        "negated": torch._neg_view(-x[0]),
        "of a complex tensor": torch.complex(x[0], -x[0]).conj().imag,
        "broadcast": x[0][..., :1].expand(1, 2, 6, 4),
        "every second": x[0].repeat_interleave(2, -1)[..., ::2],
        "transposed": x[0].mT.contiguous().mT,
    }
    for name, q in odd.items():
        out = pdcore.attention(q, *x[1:], backend=to)
        assert type(out) is torch.Tensor
        assert relative(out, pdcore.attention(q.clone(), *x[1:])) < 1e-5, name
    with pytest.raises(pdcore.UnsupportedError, match="detach"):
        pdcore.attention(x[0].requires_grad_(), *x[1:], backend=to)


class Named(torch.Tensor):  # type: ignore[misc]
    """A subclass of a user."""


def test_subclasses_of_tensors() -> None:
    x = draw(1, 2, 6, 4)
    for spec in ("softmax", "bn+sh(1,2)", "sparse(2,1)", "causal+linear"):
        want = pdcore.attention(*x, spec)
        peer = torch.nn.functional.scaled_dot_product_attention(*(y.as_subclass(Named) for y in x))
        out = pdcore.attention(*(y.as_subclass(Named) for y in x), spec)
        assert type(out) is type(peer) is Named
        assert relative(out.as_subclass(torch.Tensor), want) < 1e-6
        out = pdcore.attention(*map(torch.nn.Parameter, x), spec)
        out.sum().backward()
        assert relative(out, want) < 1e-5


def test_shapes_are_inferred_of_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for spec in ("softmax", "bn+sh(1,2)", "sparse(2,1)", "causal+linear", "relu"):
            q, k, v = torch.empty(1, 4, 6, 8), torch.empty(1, 2, 5, 8), torch.empty(1, 2, 5, 3)
            assert pdcore.attention(q, k, v, spec).shape == (1, 4, 6, 3)


FOREIGN = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x[0, 0].to_sparse_csr(),
    "meta": lambda x: x.to("meta"),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
}
SAYS = {
    "nested": "got a nested tensor, .*to_padded_tensor",
    "jagged": "got a nested tensor, .*to_padded_tensor",
    "sparse": r"got a tensor of layout torch.sparse_coo, .*\.to_dense\(\)",
    "sparse rows": r"got a tensor of layout torch.sparse_csr, .*\.to_dense\(\)",
    "meta": "got a tensor on the device meta, .*FakeTensorMode",
    "quantized": r"got a quantized tensor, .*dequantize\(\)",
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FOREIGN)
@pytest.mark.parametrize("name", ["q", "k", "v", "mask", "key_mask", "bias", "params['beta']"])
def test_forms_of_tensors_that_are_not_dense(form: str, name: str) -> None:
    x = dict(zip("qkv", draw(1, 2, 6, 4), strict=True))
    pdcore.attention(*x.values(), "bn(beta=param)", params={"beta": torch.ones(2, 4)})
    foreign = FOREIGN[form](draw(1, 2, 6, 4)[0])
    params = {"beta": torch.ones(2, 4)}
    if name.startswith("params"):
        params["beta"] = foreign
    else:
        x[name] = foreign
    with pytest.raises(TypeError, match=rf"^{re.escape(name)}: {SAYS[form]}") as caught:
        pdcore.attention(**x, spec="bn(beta=param)", params=params)
    assert "\n" not in str(caught.value)


def test_a_sparse_cotangent() -> None:
    out, _, vjp = pdcore.attention_vjp(*draw(1, 2, 6, 4))
    with pytest.raises(TypeError, match="d_out: got a tensor of layout"):
        vjp(out.to_sparse())
