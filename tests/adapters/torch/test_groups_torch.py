"""Layers on two ranks: sequences in parts, a batch in parts, weights in parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranked_layers import BATCHED, CUT, HEADS, arrays, heads, layer_of, one_process, steps
from ranks import Ranks, run

import pdcore
from pdcore.extend import Inputs
from pdcore_adapters.diagnostics import capture
from pdcore_adapters.torch_nn import PDMultiheadAttention
from pdcore_adapters.watching import tell

Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run("ranked_layers", tmp_path_factory.mktemp("ranks"), 2)


def close(x: Any, y: Any) -> None:
    torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("spec", CUT)
def test_cut_sequences_give_what_one_process_gives(found: Found, spec: str) -> None:
    parts, whole = [x["cut"][spec] for x in found], one_process(spec)
    close(torch.cat([x["out"] for x in parts], 1), whole["out"])
    # The caller adds the gradients of all ranks.
    for name, gradient in whole["gradients"].items():
        close(sum(x["gradients"][name] for x in parts), gradient)
    for name, value in whole["buffers"].items():
        for x in parts:
            close(x["buffers"][name], value)


@pytest.mark.parametrize("spec", HEADS)
def test_heads_in_parts_need_nothing(found: Found, spec: str) -> None:
    close(torch.cat([x["heads"][spec] for x in found], 1), pdcore.attention(*heads(), spec))


@pytest.mark.parametrize("how", ["DDP", "FSDP"])
@pytest.mark.parametrize("spec", BATCHED)
def test_a_batch_in_parts_needs_nothing(found: Found, spec: str, how: str) -> None:
    # The mean over both ranks of equally many outputs is the mean of the whole batch.
    whole = steps(layer_of(spec), arrays()[0])
    close(torch.cat([x["batch"][spec][how] for x in found]), whole)


def test_weights_of_cut_sequences_are_refused() -> None:
    layer = PDMultiheadAttention(12, 4, group=Ranks(), batch_first=True)
    x = torch.ones(1, 4, 12)
    with pytest.raises(pdcore.NoBackendError, match="shards by a group of 2: mask has entries"):
        layer(x, x, x, attn_mask=torch.zeros(4, 4).bool(), need_weights=False)
    with pytest.raises(pdcore.UnsupportedError, match="need_weights: got True in a layer"):
        layer(x, x, x, need_weights=True)


def test_weights_of_a_recorded_part_are_refused() -> None:
    layer, x = PDMultiheadAttention(12, 4, batch_first=True), torch.ones(1, 4, 6, 3)
    with capture(layer) as record:
        tell(layer, pdcore.bind("softmax"), Inputs(x, x, x, group=Ranks()), x, "bhnd")
    with pytest.raises(pdcore.NoBackendError, match="attention_weights is not written"):
        record.calls[0].weights()
