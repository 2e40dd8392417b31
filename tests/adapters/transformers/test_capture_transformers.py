"""Test what `capture` records of models of transformers, against their eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers

from pdcore_adapters.diagnostics import capture
from pdcore_adapters.transformers import register

SIZES = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 16,
}
MODELS = {
    "llama": (transformers.LlamaModel, transformers.LlamaConfig(num_key_value_heads=2, **SIZES)),
    "bert": (transformers.BertModel, transformers.BertConfig(**SIZES)),
}
IDS = torch.arange(1, 15).reshape(2, 7)
REAL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def make(name):
    torch.manual_seed(0)
    kind, config = MODELS[name]
    return kind(config).double().eval()


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_are_those_of_eager(name):
    register("pdcore_capture", "softmax")
    model = make(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(IDS, attention_mask=REAL, output_attentions=True).attentions
    with capture(model) as record:
        model(IDS, attention_mask=REAL)
    assert not record.calls
    assert len(record.left) == 2
    model.set_attn_implementation("pdcore_capture")
    with torch.no_grad(), capture(model) as record:
        model(IDS, attention_mask=REAL)
    assert not record.left
    assert len(record.layers) == len(want) == 2
    for layer, weights in zip(record.layers, want, strict=True):
        assert "self" in layer
        for rows in (slice(None), slice(1, 4), slice(4, 5)):
            found = record.weights(layer, rows)
            # Eager attention of a padded query is not defined.
            torch.testing.assert_close(found[0], weights[0, :, rows], rtol=1e-6, atol=1e-9)
            real = slice(rows.start or 0, min(rows.stop or 7, 5))
            count = real.stop - real.start
            torch.testing.assert_close(
                found[1, :, :count], weights[1, :, real], rtol=1e-6, atol=1e-9
            )


def test_decoding_is_recorded_call_by_call():
    register("pdcore_capture", "softmax")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **SIZES)
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation("pdcore_capture")
    with capture(model) as record:
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False, use_cache=True)
    calls = record.of(record.layers[0])
    assert [tuple(c.weights().shape[-2:]) for c in calls] == [(7, 7), (1, 8), (1, 9)]
    assert all(torch.allclose(c.weights().sum(-1), torch.ones(())) for c in calls)
