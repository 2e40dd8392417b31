"""The choice of a kernel by the PyTorch backend, for CUDA devices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pdcore.backend import Request
from pdcore.plugins import registry as plugins
from pdcore.spec import parse
from pdcore_backends.torch import device

FLEX = "kernel: FlexAttention, compiled, in "
MANY = "more than 65,535 sequences or heads"


def steps(spec: str, place: str = "cuda:0", dtype: str = "float32", **more: Any) -> str:
    shape = more.pop("shape", (1, 2, 300, 64))
    request = Request(parse(spec), "torch", dtype, place, shape, shape, shape, **more)
    return "\n".join(plugins.load_backend("torch").fuse(request.lower(), request).steps)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the device supports FlexAttention and Triton."""
    monkeypatch.setattr(device, "without_flex", lambda name: "")
    monkeypatch.setattr(device, "without_triton", lambda name: "")


@pytest.mark.parametrize(
    ("spec", "more", "words"),
    [
        ("softmax(softcap=2)", {}, FLEX + "float32, for weights that are no exp"),
        ("polynomial", {"dtype": "bfloat16"}, FLEX + "bfloat16, for weights"),
        ("sparse(20,7)", {}, "blocks that no query sees are skipped"),
        ("sparse(20,7)", {"offset": "array"}, "no block is skipped, as positions are arrays"),
        ("causal+sh(1,2)", {}, FLEX + "float32, for pooled keys under causal"),
        ("bn(statistics=prefix)+sparse(9,9)", {"dtype": "float16"}, FLEX + "float32, for a window"),
        ("bn", {}, "two Triton kernels"),
        ("bn", {"dtype": "bfloat16", "lse": True}, "here flash, in bfloat16"),
        ("softmax", {"lse": True}, "here memory-efficient, in float32"),
        ("bn", {"dtype": "float64"}, "not FlexAttention: its kernels have no float64"),
        ("softmax", {"dropout": 0.1}, "stream; not FlexAttention: it drops no weights"),
        ("softmax", {"dropout": 0.1, "native_dropout": True}, "(flash or memory-efficient)"),
        ("sparse(2,2)+linear", {}, "not FlexAttention: weights that are no exp of scores"),
        ("sparse(2,2)", {"vjp": True}, "not FlexAttention: attention_vjp and attention_weights"),
        ("sparse(2,2)", {"shape": (1, 2, 300, 264)}, "not FlexAttention: more than 256 features"),
        ("sparse(2,2)", {"shape": (1, 2, 99, 64)}, "not FlexAttention: fewer than 128 queries"),
        ("softmax", {}, "scaled_dot_product_attention (cuDNN, flash or memory-efficient)"),
        ("softmax", {}, "gradients not by cuDNN unless queries and keys are multiples of 128"),
        ("softmax", {"shape": (1, 2, 127, 64)}, "attention (flash or memory-efficient)"),
        ("softmax", {"key_mask": (1, 300)}, "attention (memory-efficient)"),
        (
            "softmax",
            {"shape": (2**8, 2**8, 2, 9, 8)},
            "blocks of our own, O(N + M) memory, for " + MANY,
        ),
        ("softmax", {"shape": (1, 2**16, 9, 8)}, "not FlexAttention: " + MANY),
        ("sparse(2,2)", {"shape": (2**16, 1, 300, 8)}, "not FlexAttention: " + MANY),
    ],
)
def test_the_choice_is_a_step_of_the_plan(gpu: None, spec: str, more: dict, words: str) -> None:
    assert words in steps(spec, **more)


def test_what_a_device_lacks_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (device.without_flex, device.without_triton):
        function.cache_clear()
    assert "not FlexAttention: PyTorch has no gradients of it on cpu" in steps("polynomial", "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda name: (7, 5))
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert "not Triton: the package triton is not installed" in steps("bn")
    device.without_triton.cache_clear()
    monkeypatch.setattr(device, "find_spec", lambda name: object())
    assert "not FlexAttention: compute capability 7.5 is below 8.0" in steps("sparse(2,2)")
    for function in (device.without_flex, device.without_triton):
        function.cache_clear()
