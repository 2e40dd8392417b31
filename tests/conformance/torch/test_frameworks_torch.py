"""What the suite asks of PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from framework_checks import (  # noqa: F401 - collected here too
    arrays,
    test_availability,
    test_forward_mode,
    test_map_and_compiler,
    test_poisoned_memory,
    test_reverse_mode,
    test_second_derivatives,
    test_strides_are_kept,
    test_there_and_back,
    test_what_is_no_array_of_the_library,
)

from pdcore_conformance.frameworks import Framework, framework


@pytest.fixture
def library() -> Framework:
    return framework("torch")


def test_a_tensor_shares_nothing_with_its_array() -> None:
    x = np.zeros(3)
    framework("torch").asarray(x).fill_(1.0)
    assert not x.any()


# --- precision, poison ----------------------------------------------------------------------------


def test_torch_precision() -> None:
    import torch

    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "tf32"
    try:
        with framework("torch").precision("float32"):
            assert switch.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert switch.fp32_precision == "tf32"
    finally:
        switch.fp32_precision = before


def test_torch_poison_reaches_new_empty_and_backward() -> None:
    import torch

    seen = []

    class Fresh(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, d: Any) -> Any:
            seen.append(d.new_empty(2))
            return d

    with framework("torch").poisoned():
        x = torch.ones(2, requires_grad=True)
        Fresh.apply(x).sum().backward()
        assert torch.isnan(x.new_empty(3)).all()
        assert torch.isnan(torch.empty_strided((2, 2), (1, 2))).all()
        half = torch.empty(2, dtype=torch.bfloat16)
    assert torch.isnan(half).all()
    assert torch.isnan(seen[0]).all()


def test_torch_compile_without_a_compiler(monkeypatch: Any) -> None:
    monkeypatch.setenv("PATH", "")
    assert framework("torch").missing("compile") == (
        "torch.compile takes a C++ compiler, and there is none"
    )
