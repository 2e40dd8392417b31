"""A tiny Llama whose sequences are cut over two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranked_models import SPECS, arrays, losses
from ranks import run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run("ranked_models", tmp_path_factory.mktemp("ranks"), 2)


@pytest.mark.parametrize("spec", SPECS)
def test_two_ranks_give_what_one_process_gives(found: list[dict[str, Any]], spec: str) -> None:
    real = arrays()[1].bool()
    logits, gradients = losses(spec)
    parts = [x[spec] for x in found]
    got = torch.cat([x[0] for x in parts], 1)
    torch.testing.assert_close(got[real], logits[real], rtol=1e-9, atol=1e-10)
    for name, gradient in gradients.items():
        total = sum(x[1][name] for x in parts)
        torch.testing.assert_close(total, gradient, rtol=1e-8, atol=1e-9, msg=name)
