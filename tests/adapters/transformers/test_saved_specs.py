"""Test that a saved model is loaded with its spec, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AttentionInterface

from pdcore_adapters.torch_nn import PDMultiheadAttention, convert
from pdcore_adapters.transformers import check, register

PARTS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
TEXT = PARTS | {"vocab_size": 31, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PICTURES = PARTS | {"image_size": 16, "patch_size": 8}
PREFIX = "causal+bn(statistics=prefix)"
IDS = torch.arange(1, 9).reshape(1, 8)
INPUTS = {"input_ids": IDS, "pixel_values": torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)}


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes transformers forget an attention, as in another process."""
    return lambda name: monkeypatch.delitem(AttentionInterface._global_mapping, name)


def llama(name: str | None = None) -> Any:
    config = transformers.LlamaConfig(**TEXT)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation=name)
    return model.eval()


def clip() -> Any:
    config = transformers.CLIPConfig(text_config=dict(TEXT), vision_config=dict(PICTURES))
    return transformers.CLIPModel(config).eval()


def siglip() -> Any:
    config = transformers.SiglipConfig(text_config=dict(TEXT), vision_config=dict(PICTURES))
    return transformers.SiglipModel(config).eval()


def bert_to_bert() -> Any:
    bert = transformers.BertConfig(**TEXT)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(bert, bert)
    return transformers.EncoderDecoderModel(config).eval()


def whisper() -> Any:
    sizes = {
        f"{part}_{size}": 2
        for part in ("encoder", "decoder")
        for size in ("layers", "attention_heads")
    }
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        vocab_size=31,
        d_model=16,
        num_mel_bins=8,
        max_source_positions=8,
        **sizes,
        **tokens,
    )
    return transformers.WhisperModel(config).eval()


INPUTS_OF = {
    llama: {"input_ids": IDS},
    clip: INPUTS,
    bert_to_bert: {"input_ids": IDS, "decoder_input_ids": IDS},
    whisper: {
        "input_features": torch.linspace(-1, 1, 128).reshape(1, 8, 16),
        "decoder_input_ids": IDS,
    },
}


def specs(model: Any) -> dict[str, str]:
    return {name: spec for name, spec in check(model).calls.items() if spec != "softmax"}


def compute(model: Any, inputs: Any) -> Any:
    with torch.no_grad():
        return model.eval()(**inputs).to_tuple()[0]


@pytest.mark.parametrize(
    ("build", "attention"),
    [
        (llama, "pdcore_g"),
        (clip, "pdcore_g"),
        (clip, {"text_config": "pdcore_g", "vision_config": "pdcore_h"}),
        (clip, {"text_config": "eager", "vision_config": "pdcore_g"}),
        (clip, {"text_config": "pdcore", "vision_config": "pdcore_g"}),  # softmax
        (bert_to_bert, "pdcore_g"),
        (bert_to_bert, {"encoder": "pdcore_h", "decoder": "sdpa"}),
        (whisper, "pdcore_g"),
    ],
)
def test_a_model_is_loaded_as_it_was_saved(
    build: Any, attention: Any, tmp_path: Path, forget: Any
) -> None:
    register("pdcore_g", "polynomial")
    register("pdcore_h", "sparse(2,2)")
    register()
    model, inputs = build(), INPUTS_OF[build]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    softmax = compute(model, inputs)
    model.set_attn_implementation(attention)
    expected = compute(model, inputs)
    assert (expected - softmax).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    assert "pdcore" not in str(model.config.to_dict())  # in the file only
    for kind in (type(model), transformers.AutoModel):
        if kind is type(model) or build in (clip, whisper):
            loaded = kind.from_pretrained(tmp_path)
            assert specs(loaded) == specs(model)
            torch.testing.assert_close(compute(loaded, inputs), expected)
    forget("pdcore_g" if "pdcore_g" in str(attention) else "pdcore_h")
    with pytest.raises(ValueError, match=r'attn_implementation="pdcore_[gh]"` is not supported'):
        type(model).from_pretrained(tmp_path)


def test_another_spec_under_the_name_is_refused(tmp_path: Path) -> None:
    register("pdcore_bn", PREFIX)
    llama("pdcore_bn").save_pretrained(tmp_path)
    register("pdcore_bn", "softmax")
    other = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with"):
        other(IDS)
    other.config.pdcore_spec = None
    assert compute(other, {"input_ids": IDS}).isfinite().all()


def test_another_attention_at_loading_is_a_warning(tmp_path: Path) -> None:
    register("pdcore_bn", PREFIX)
    llama("pdcore_bn").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="trained with the spec .*prefix.* attention is 'sdpa'"):
        other = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    other.save_pretrained(tmp_path / "again")
    with pytest.warns(UserWarning, match="trained with"):
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "again")
    again.config.pdcore_spec = None
    again.save_pretrained(tmp_path / "settled")
    transformers.LlamaForCausalLM.from_pretrained(tmp_path / "settled")


def test_a_part_is_loaded_with_its_spec(tmp_path: Path, forget: Any) -> None:
    register("pdcore_g", "gaussian(gamma=0.4)")
    model = clip()
    model.set_attn_implementation({"vision_config": "pdcore_g"})
    model.save_pretrained(tmp_path)
    part = transformers.CLIPVisionModel.from_pretrained(tmp_path)
    assert list(check(part).calls.values()) == ["gaussian(gamma=0.4)"]
    assert not check(transformers.CLIPTextModel.from_pretrained(tmp_path)).calls
    forget("pdcore_g")
    with pytest.raises(ValueError, match="is not supported"):
        transformers.CLIPVisionModel.from_pretrained(tmp_path)


def test_a_spec_that_no_saved_config_has_is_a_warning(tmp_path: Path) -> None:
    register("pdcore_g", "gaussian(gamma=0.4)")
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    model = transformers.T5Model(config)
    model.encoder.set_attn_implementation("pdcore_g")  # whose config is a copy
    with pytest.warns(UserWarning, match=r"encoder.block.0.layer.0.SelfAttention: gaussian"):
        model.save_pretrained(tmp_path)


# --- layers that torch_nn.convert has converted ---------------------------------------------------


@pytest.mark.parametrize("attention", [None, "pdcore_g"])
def test_converted_layers_are_loaded_converted(
    attention: str | None, tmp_path: Path, forget: Any
) -> None:
    register("pdcore_g", "gaussian(gamma=0.4)")
    model = siglip()
    convert(model, "bn(beta=param,statistics=running)")
    head = model.vision_model.head.attention
    torch.nn.init.normal_(head.running_mean)
    torch.nn.init.constant_(head.spec_beta, 0.3)
    torch.nn.init.normal_(head.in_proj_weight)
    if attention:
        model.set_attn_implementation(attention)
    expected = compute(model, INPUTS)
    model.save_pretrained(tmp_path)

    for kind in (transformers.SiglipModel, transformers.AutoModel):
        loaded = kind.from_pretrained(tmp_path)
        assert check(loaded).calls["vision_model.head.attention"] == str(head.spec)
        torch.testing.assert_close(loaded.vision_model.head.attention.spec_beta, head.spec_beta)
        assert torch.equal(loaded.vision_model.head.attention.running_mean, head.running_mean)
        torch.testing.assert_close(compute(loaded, INPUTS), expected)
        loaded.save_pretrained(tmp_path / "again")
    again = transformers.SiglipVisionModel.from_pretrained(tmp_path / "again")  # a part
    torch.testing.assert_close(again.head.attention.spec_beta, head.spec_beta)

    if not attention:
        convert(loaded, "softmax")  # which needs no record
        loaded.save_pretrained(tmp_path / "softmax")
        plain = transformers.SiglipModel.from_pretrained(tmp_path / "softmax")
        assert not check(plain).calls

    forget(attention or "pdcore_converted")  # as where no adapter is imported
    with pytest.raises(ValueError, match="is not supported"):
        transformers.SiglipModel.from_pretrained(tmp_path)


class Own(transformers.PreTrainedModel):  # type: ignore[misc]
    """A model whose class says the spec."""

    config_class = transformers.BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.first = PDMultiheadAttention(16, 2, spec="bn")
        self.second = torch.nn.MultiheadAttention(16, 2)
        convert(self.second, "cosine")
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        pass


def test_layers_of_the_class_of_a_model_need_no_record(tmp_path: Path, forget: Any) -> None:
    model = Own(transformers.BertConfig(**TEXT))
    model.save_pretrained(tmp_path)
    forget("pdcore_converted")
    loaded = Own.from_pretrained(tmp_path)
    assert check(loaded).calls == {"first": "softmax+bn", "second": "cosine"}


def test_converted_layers_are_loaded_with_what_they_drop(tmp_path: Path) -> None:
    model = siglip()
    convert(model, "linear", drop="output")
    model.save_pretrained(tmp_path)
    loaded = transformers.SiglipModel.from_pretrained(tmp_path)
    head = loaded.vision_model.head.attention
    assert (str(head.spec), head.drop) == ("linear", "output")
