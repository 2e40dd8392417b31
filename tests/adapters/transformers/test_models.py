"""Test which models call pdcore, biased scores and compiled models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

import pdcore
from pdcore_adapters.torch_nn import convert
from pdcore_adapters.transformers import check, register

SMALL = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 0,
}
PICTURES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 16,
    "patch_size": 8,
}
DROPOUT = (
    r"attention_probs_dropout_prob: got 0.1 for bert, and linear .*attention_probs_dropout_prob=0"
)
PREFIX = "causal+bn(statistics=prefix)"
IDS = torch.arange(1, 9).reshape(1, 8)


OWN = [
    transformers.BloomConfig(vocab_size=31, hidden_size=16, n_layer=1, n_head=2),
    transformers.MptConfig(vocab_size=31, d_model=16, n_layers=1, n_heads=2),
    transformers.MPNetConfig(**SMALL),
    transformers.NystromformerConfig(**SMALL),
    transformers.RoFormerConfig(**SMALL),
    transformers.DebertaConfig(**SMALL),  # takes no mask of transformers, nor does Yoso
    transformers.YosoConfig(**SMALL),
]


@pytest.mark.parametrize("config", OWN, ids=lambda config: config.model_type)
def test_models_that_attend_by_themselves(config: Any) -> None:
    register()
    result = check(transformers.AutoModel.from_config(copy.deepcopy(config)))
    assert result.others
    assert not result.calls
    assert "attends by itself" in str(result)
    with pytest.raises(pdcore.UnsupportedError, match=f"{config.model_type}: computes its"):
        transformers.AutoModel.from_config(copy.deepcopy(config), attn_implementation="pdcore")


@pytest.mark.parametrize("config", OWN[:5], ids=lambda config: config.model_type)
def test_a_mask_answers_where_the_config_was_changed_by_hand(config: Any) -> None:
    register()
    model = transformers.AutoModel.from_config(copy.deepcopy(config)).eval()
    model.config._attn_implementation = "pdcore"
    with pytest.raises(pdcore.UnsupportedError, match=f"{config.model_type}: computes its"):
        model(IDS)


def test_models_of_which_some_layers_attend_by_themselves() -> None:
    register()
    siglip = transformers.SiglipConfig(text_config=dict(SMALL), vision_config=dict(PICTURES))
    with pytest.warns(UserWarning, match=r"siglip_vision_model: .*MultiheadAttention \(head.att"):
        model = transformers.AutoModel.from_config(siglip, attn_implementation="pdcore")
    result = check(model)
    assert len(result.calls) == 2
    assert list(result.others) == ["vision_model.head.attention"]
    convert(model, "softmax")
    assert not check(model).others
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("pdcore")  # and warns of nothing

    git = transformers.GitConfig(**SMALL, vision_config=dict(PICTURES))
    model = transformers.AutoModel.from_config(git)
    with pytest.warns(
        UserWarning, match="git: these layers attend by themselves.*GitSelfAttention"
    ):
        model.set_attn_implementation("pdcore")


def test_dropout_with_a_feature_map_is_refused_beforehand() -> None:
    register("pdcore_linear", "linear")
    bert = transformers.BertModel(transformers.BertConfig(**SMALL))
    with pytest.raises(pdcore.UnsupportedError, match=DROPOUT):
        bert.set_attn_implementation("pdcore_linear")
    with pytest.raises(pdcore.UnsupportedError, match=DROPOUT):
        transformers.BertModel._from_config(
            transformers.BertConfig(**SMALL), attn_implementation="pdcore_linear"
        )
    none = transformers.BertConfig(**SMALL, attention_probs_dropout_prob=0.0)
    model = transformers.BertModel._from_config(none, attn_implementation="pdcore_linear")
    assert model.train()(IDS).last_hidden_state.isfinite().all()
    model.encoder.layer[0].attention.self.dropout.p = 0.2  # not by the config
    with pytest.raises(
        pdcore.UnsupportedError, match=r"dropout: got 0.2 for BertSelfAttention with"
    ):
        model(IDS)


def test_check() -> None:
    register("pdcore_bn", PREFIX)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    assert not check(llama).calls
    llama.set_attn_implementation("pdcore_bn")
    assert list(check(llama).calls) == ["model.layers.0.self_attn"]
    assert not check(llama).others
    deberta = transformers.DebertaModel(transformers.DebertaConfig(**SMALL))
    assert "attends by itself" in next(iter(check(deberta).others.values()))


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


def compiled(model: Any, backend: str) -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # of inductor's own code
@pytest.mark.parametrize(
    ("backend", "spec"),
    [
        ("aot_eager", "softmax"),
        ("aot_eager", PREFIX),
        pytest.param("inductor", PREFIX, marks=pytest.mark.nightly),  # compiles C++
    ],
)
def test_a_compiled_model_has_one_graph(backend: str, spec: str) -> None:  # tracing takes seconds
    register("pdcore_bn", spec)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.set_attn_implementation("pdcore_bn")
    real = torch.ones_like(IDS)
    real[:, :2] = 0
    result = []
    for each in (model, compiled(model, backend)):
        model.zero_grad()
        labels = torch.where(real.bool(), IDS, -100)
        out = each(IDS, attention_mask=real, labels=labels, use_cache=False)
        out.loss.backward()
        result.append([out.logits[:, 2:].detach(), *(p.grad for p in model.parameters())])
    for actual, expected in zip(result[1], result[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_static_cache_in_a_compiled_model() -> None:  # prefill and decoding, a graph for each
    from torch._dynamo.testing import CompileCounter

    register("pdcore_bn", PREFIX)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.set_attn_implementation("pdcore_bn")
    cache, real = transformers.StaticCache(model.config, max_cache_len=12), torch.ones_like(IDS)
    counter = CompileCounter()
    step = compiled(model, counter)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        steps = [
            step(IDS[:, at], attention_mask=real[:, : at.stop], past_key_values=cache).logits
            for at in (slice(0, 6), slice(6, 7), slice(7, 8))
        ]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 3  # the lengths of the mask become dynamic
