"""Test which models call pdcore, biased scores, saved specs and compiled models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import pdcore
from pdcore_adapters.transformers import check, register

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 0,
}
PREFIX = "causal+bn(statistics=prefix)"
IDS = torch.arange(1, 9).reshape(1, 8)


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(vocab_size=31, hidden_size=16, n_layer=1, n_head=2),
        transformers.MptConfig(vocab_size=31, d_model=16, n_layers=1, n_heads=2),
        transformers.MPNetConfig(**SMALL),
        transformers.NystromformerConfig(**SMALL),
        transformers.RoFormerConfig(**SMALL),
    ],
    ids=lambda config: config.model_type,
)
def test_models_that_attend_by_themselves(config: Any) -> None:
    register()
    model = transformers.AutoModel.from_config(config, attn_implementation="pdcore").eval()
    with pytest.raises(pdcore.UnsupportedError, match=f"{config.model_type}: computes its"):
        model(IDS)
    result = check(model)
    assert result.others
    assert not result.calls
    assert "attends by itself" in str(result)


def test_check() -> None:
    register("pdcore_bn", PREFIX)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    assert not check(llama).calls
    llama.set_attn_implementation("pdcore_bn")
    assert list(check(llama).calls) == ["model.layers.0.self_attn"]
    assert not check(llama).others
    deberta = transformers.DebertaModel(transformers.DebertaConfig(**SMALL))
    assert "attends by itself" in next(iter(check(deberta).others.values()))


def test_a_spec_is_saved(tmp_path: Path) -> None:
    register("pdcore_bn", PREFIX)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.set_attn_implementation("pdcore_bn")
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "pdcore_bn"
    torch.testing.assert_close(loaded(IDS).logits, expected)
    register("pdcore_bn", "softmax")
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with"):
        other(IDS)


@pytest.mark.parametrize("kind", ["T5", "UMT5"])
def test_relative_biases_equal_those_of_eager(kind: str) -> None:
    register()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=31,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    result = []
    for attention in ("eager", "pdcore"):
        each = copy.deepcopy(model)
        each.set_attn_implementation(attention)
        out = each(IDS, labels=IDS)
        out.loss.backward()
        grads = [p.grad for n, p in each.named_parameters() if "relative_attention_bias" in n]
        assert all(g is not None and g.abs().max() > 0 for g in grads)
        result.append([out.logits, *grads])
    for actual, expected in zip(result[1], result[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["softmax", PREFIX])
def test_a_compiled_model_has_one_graph(spec: str) -> None:  # tracing takes seconds
    register("pdcore_bn", spec)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.set_attn_implementation("pdcore_bn")
    real = torch.ones_like(IDS)
    real[:, :2] = 0
    with torch.no_grad():
        expected = model(IDS, attention_mask=real, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        actual = compiled(IDS, attention_mask=real, use_cache=False).logits
    torch.testing.assert_close(actual[:, 2:], expected[:, 2:], rtol=1e-4, atol=1e-5)
