"""Test pdcore attention in tiny random models of Hugging Face transformers; no downloads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from specs_of_words import SPECS, needs_arrays
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import sdpa_mask

import pdcore
from pdcore.reference import reference_attention
from pdcore_adapters.transformers import LayerMask, register

VOCABULARY = 61
B, M = 3, 11
PREFIX = "causal+bn(statistics=prefix)"
CAUSAL_SPECS = [PREFIX, "sh(1,2)", f"{PREFIX}+sh(1,2)", "linear", "gaussian(gamma=0.2)"]

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def build(name: str) -> Any:
    """Build a model whose weights are large enough for attention to matter."""
    t = transformers
    match name:
        case "llama":  # two query heads for each key head
            model = t.LlamaForCausalLM(t.LlamaConfig(**DECODER))
        case "gpt2":
            config = t.GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=64,
                scale_attn_by_inverse_layer_idx=True,
                bos_token_id=1,
                eos_token_id=None,
                pad_token_id=0,
            )
            model = t.GPT2LMHeadModel(config)
        case "mistral":  # every layer sees the last four keys
            model = t.MistralForCausalLM(t.MistralConfig(**DECODER, sliding_window=4))
        case "qwen3":  # the second layer sees the last four keys
            config = t.Qwen3Config(
                **DECODER,
                head_dim=8,
                use_sliding_window=True,
                sliding_window=4,
                max_window_layers=1,
            )
            model = t.Qwen3ForCausalLM(config)
        case "gemma2":  # sliding and full layers in turn, a softcap, and another scale
            config = t.Gemma2Config(
                **DECODER,
                head_dim=8,
                sliding_window=4,
                query_pre_attn_scalar=11,
                attn_logit_softcapping=2.0,
            )
            model = t.Gemma2ForCausalLM(config)
        case "gpt_oss":  # sinks; sliding and full layers in turn
            config = t.GptOssConfig(
                **DECODER, head_dim=8, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
            )
            model = t.GptOssForCausalLM(config)
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.self_attn.sinks.copy_(torch.tensor([0.5, -1.0, 2.0, 0.0]))
        case "bert":
            config = t.BertConfig(
                **ENCODER,
                vocab_size=VOCABULARY,
                max_position_embeddings=64,
                attention_probs_dropout_prob=0.0,  # which ``linear`` needs
            )
            model = t.BertForMaskedLM(config)
        case "vit":
            config = t.ViTConfig(**ENCODER, image_size=24, patch_size=8, num_labels=5)
            model = t.ViTForImageClassification(config)
        case _:
            raise ValueError(name)
    weights = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            with torch.no_grad():
                parameter.normal_(0.0, 0.3, generator=weights)
    return model.eval()


MODELS: dict[str, Any] = {}


@pytest.fixture
def model_of() -> Callable[..., Any]:
    """Return the model of this name with an attention, its weights the same each time."""

    def model(name: str, attention: str = "eager") -> Any:
        if name not in MODELS:
            MODELS[name] = build(name)
        MODELS[name].set_attn_implementation(attention)
        assert MODELS[name].config._attn_implementation == attention
        return MODELS[name].train(False)

    return model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tokens(seed: int = 0, length: int = M) -> Any:
    return torch.randint(2, VOCABULARY, (B, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, length: int = M) -> Any:
    real = torch.ones(B, length, dtype=torch.long)
    if side == "left":
        real[0, :4], real[1, :1] = 0, 0
    elif side == "right":
        real[0, -4:], real[1, -1:] = 0, 0
    return real


def positions(real: Any) -> Any:
    return (real.cumsum(-1) - 1).clamp(min=0)


def logits(model: Any, ids: Any, real: Any = None, **others: Any) -> Any:
    """Compute the logits of a model, without a cache unless the call has one."""
    others.setdefault("use_cache", "past_key_values" in others)
    if real is not None and model.config.model_type != "bert":
        others.setdefault("position_ids", positions(real)[:, -ids.shape[1] :])
    with torch.no_grad():
        return model(ids, attention_mask=real, **others).logits


def close(a: Any, b: Any) -> None:
    """Check that logits, of the order of 5, are equal to float32 rounding."""
    assert b.abs().max() > 0.5
    torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)


def literal(spec: str) -> None:
    """Register the formulas of a spec as an attention; keys that no query sees are padding."""

    def mask(*arguments: Any, **named: Any) -> Any:
        named |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(*arguments, **named)

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any
    ) -> tuple[Any, None]:
        real = attention_mask.any(-2)[:, 0].expand(query.shape[0], -1)
        out = reference_attention(query, key, value, spec, key_mask=real)
        return out.transpose(1, 2), None

    AttentionInterface.register("literal", attention)
    AttentionMaskInterface.register("literal", mask)


# --- softmax is what the models do themselves -----------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gemma2", "bert", "gpt_oss"])
def test_softmax_equals_eager(name: str, side: str, model_of: Any) -> None:
    register()
    ids, real = tokens(), padding(side)
    expected = logits(model_of(name), ids, real)
    actual = logits(model_of(name, "pdcore"), ids, real)
    close(actual[real.bool()], expected[real.bool()])
    assert torch.isfinite(actual).all()


def test_softmax_equals_eager_in_a_vision_transformer(model_of: Any) -> None:
    register()
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        expected = model_of("vit")(pixels).logits
        close(model_of("vit", "pdcore")(pixels).logits, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gemma2", "gpt_oss"])
def test_generation_equals_that_of_eager(name: str, model_of: Any) -> None:
    register()
    ids, real = tokens(), padding("left")
    for cache in ("dynamic", "static"):
        result = [
            model_of(name, attention).generate(
                ids,
                attention_mask=real,
                max_new_tokens=8,
                do_sample=False,
                cache_implementation=cache,
            )
            for attention in ("eager", "pdcore")
        ]
        assert result[0].shape == (B, M + 8)
        torch.testing.assert_close(result[1], result[0], rtol=0, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "bert", "gpt_oss"])
def test_a_training_step_equals_that_of_eager(
    name: str, checkpointing: bool, model_of: Any
) -> None:
    register()
    ids, real = tokens(), padding("right")
    labels = torch.where(real.bool(), ids, -100)
    gradients = []
    for attention in ("eager", "pdcore"):
        model = copy.deepcopy(model_of(name, attention))
        model.config.attention_dropout = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, attention_mask=real, labels=labels, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert max(g.abs().max() for g in gradients[0].values()) > 0.1
    for parameter, expected in gradients[0].items():
        size = float(expected.abs().max()) + 1.0
        torch.testing.assert_close(gradients[1][parameter], expected, rtol=1e-4, atol=1e-5 * size)


def test_gradients_of_attention_bn(model_of: Any) -> None:
    register("pdcore_bn", PREFIX)
    model = copy.deepcopy(model_of("llama", "pdcore_bn"))
    ids, real = tokens(), padding("right")
    result = []
    for checkpointing in (False, True):  # the recomputed forward pass has its mask too
        model.zero_grad()
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, attention_mask=real, labels=ids, use_cache=False).loss.backward()
        result.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert result[0].abs().max() > 1e-3
    torch.testing.assert_close(result[1], result[0])


# --- encoders: statistics and pooling over the real keys ------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(
    "spec",
    [
        "bn",
        "bn(with_std=false)",
        "sh(1,1,2,3)",
        "bn(beta=0.5)+sh(1,2,2,4)",
        "cosine+bn",
        "linear",
        "sparse(3,2)",
    ],
)
def test_encoder_is_the_formula(spec: str, side: str, model_of: Any) -> None:
    register("pdcore_encoder", spec)
    literal(spec)
    ids, real = tokens(), padding(side)
    actual = logits(model_of("bert", "pdcore_encoder"), ids, real)
    expected = logits(model_of("bert", "literal"), ids, real)
    close(actual[real.bool()], expected[real.bool()])
    assert (actual - logits(model_of("bert"), ids, real)).abs().max() > 0.05  # differs from softmax

    other = torch.where(real.bool(), ids, tokens(seed=1))  # other tokens in the padding
    again = logits(model_of("bert", "pdcore_encoder"), other, real)
    torch.testing.assert_close(again[real.bool()], actual[real.bool()], rtol=0, atol=0)


@pytest.mark.parametrize("spec", ["bn", "sh(1,1,2,2)", "bn+sh(1,1,2,2)"])
def test_vision_transformer_is_the_formula(spec: str, model_of: Any) -> None:
    register("pdcore_encoder", spec)
    literal(spec)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        result = model_of("vit", "pdcore_encoder")(pixels).logits
        close(result, model_of("vit", "literal")(pixels).logits)


def test_one_spec_fits_layers_of_any_number_of_heads() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text = sizes | {"num_attention_heads": 2, "vocab_size": VOCABULARY, "eos_token_id": 2}
    vision = sizes | {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    model = transformers.CLIPModel(config).eval()
    inputs = {"input_ids": tokens(), "pixel_values": torch.randn(B, 3, 16, 16)}
    results = []
    register("pdcore_half", "sh(half=2)")
    register("pdcore_2", "sh(1,2)")
    register("pdcore_4", "sh(1,1,2,2)")
    parts = {"text_config": "pdcore_2", "vision_config": "pdcore_4"}
    for names in ("pdcore_half", parts):
        model.set_attn_implementation(names)
        with torch.no_grad():
            results.append(model(**inputs).logits_per_image)
    torch.testing.assert_close(*results)
    model.set_attn_implementation("pdcore_4")
    with pytest.raises(ValueError, match=r"4 scales in .*sh\(1,1,2,2\), .* 2 key heads of CLIPAtt"):
        model(**inputs)


def test_scales_that_do_not_fit_name_the_layer(model_of: Any) -> None:
    register("pdcore_encoder", "sh(1*16,2*16)")
    message = (
        r"32 scales in .*\(1\*16,2\*16\), .* 2 key heads of LlamaAttention .*, layer 0; sh\(half"
    )
    with pytest.raises(ValueError, match=message):
        logits(model_of("llama", "pdcore_encoder"), tokens())


def test_padding_on_the_right_is_as_if_it_were_not_there(model_of: Any) -> None:
    register("pdcore_encoder", "bn+sh(1,1,2,2)")
    model = model_of("bert", "pdcore_encoder")
    ids, real = tokens(), padding("right")
    result = logits(model, ids, real)
    for row, length in enumerate(real.sum(-1).tolist()):
        close(result[row, :length], logits(model, ids[row : row + 1, :length])[0])


# --- decoders -------------------------------------------------------------------------------------


def test_causal_attention_bn_is_the_formula(model_of: Any) -> None:
    register("pdcore_bn", PREFIX)
    literal(PREFIX)
    ids, real = tokens(), padding("left")
    actual = logits(model_of("llama", "pdcore_bn"), ids, real)
    expected = logits(model_of("llama", "literal"), ids, real)
    close(actual[real.bool()], expected[real.bool()])
    assert (actual - logits(model_of("llama"), ids, real)).abs().max() > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_statistics_ignore_padding(side: str, model_of: Any) -> None:
    register("pdcore_bn", PREFIX)
    model = model_of("llama", "pdcore_bn")
    ids, real = tokens(), padding(side)
    result = logits(model, ids, real)
    for row in range(B):
        chosen = real[row].bool()
        close(result[row, chosen], logits(model, ids[row : row + 1, chosen])[0])


@pytest.mark.parametrize("spec", CAUSAL_SPECS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_equals_the_whole_sequence(spec: str, cache: str, model_of: Any) -> None:
    register("pdcore_step", spec)
    model = model_of("llama", "pdcore_step")
    ids, real = tokens(), padding("left")
    whole = logits(model, ids, real)
    if cache == "dynamic":
        kept = DynamicCache(config=model.config)
    else:
        kept = transformers.StaticCache(config=model.config, max_cache_len=M + 4)
    steps = [slice(0, 5), *(slice(i, i + 1) for i in range(5, 9)), slice(9, M)]
    result = [
        logits(
            model,
            ids[:, s],
            real[:, : s.stop],
            past_key_values=kept,
            position_ids=positions(real)[:, s],
        )
        for s in steps
    ]
    close(torch.cat(result, dim=1)[real.bool()], whole[real.bool()])


@pytest.mark.parametrize("spec", ["softmax", PREFIX, f"{PREFIX}+sh(1,2)"])
def test_caches_that_are_edited(spec: str, model_of: Any) -> None:
    register("pdcore_step", spec)
    model = model_of("llama", "pdcore_step")
    ids, more, real = tokens(), tokens(seed=1, length=4), padding("left")
    grown = torch.cat([real, torch.ones(B, 4, dtype=torch.long)], dim=1)

    def filled() -> Any:
        kept = DynamicCache(config=model.config)
        logits(model, ids, real, past_key_values=kept)
        return kept

    def follow(kept: Any, ids: Any, real: Any, more: Any) -> None:
        """Check that the logits of `more` after the cache equal those after the tokens."""
        whole = torch.cat([ids, more], dim=1)
        expected = logits(model, whole, real)[:, -more.shape[1] :]
        close(logits(model, more, real, past_key_values=kept), expected)

    kept = filled()
    kept.reorder_cache(torch.tensor([2, 0, 0]))  # beam search
    follow(kept, ids[[2, 0, 0]], grown[[2, 0, 0]], more)
    kept = filled()
    kept.crop(-3)  # as assisted decoding drops rejected tokens
    follow(kept, ids[:, :-3], torch.cat([real[:, :-3], grown[:, -4:]], dim=1), more)
    kept = filled()
    kept.batch_select_indices(torch.tensor([1]))
    follow(kept, ids[1:2], grown[1:2], more[1:2])


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}, {}])
@pytest.mark.parametrize("spec", [PREFIX, f"{PREFIX}+sh(1,2)"])
def test_generation_with_a_cache_is_without(spec: str, options: Any, model_of: Any) -> None:
    register("pdcore_step", spec)
    model = model_of("llama", "pdcore_step")
    ids, real = tokens(), padding("left")
    settings = {"attention_mask": real, "max_new_tokens": 8, "do_sample": False}
    cached = model.generate(ids, **settings, **options)
    beams = {name: options[name] for name in options if name == "num_beams"}
    without = model.generate(ids, **settings, **beams, use_cache=False)
    torch.testing.assert_close(cached, without, rtol=0, atol=0)


@pytest.mark.parametrize("spec", [PREFIX, "sh(1,2)"])
def test_a_cache_that_drops_keys(spec: str, model_of: Any) -> None:
    register("pdcore_bn", spec)
    model = model_of("mistral", "pdcore_bn")
    ids, real = tokens(), padding("none")
    whole = logits(model, ids, real)

    def step(kept: Any, i: int) -> Any:
        at = slice(i, i + 1)
        return logits(
            model,
            ids[:, at],
            real[:, : i + 1],
            past_key_values=kept,
            position_ids=positions(real)[:, at],
        )

    # Layers that see four keys keep the last three. The step that would miss one is refused, and
    # those before it are right; so is a sequence at once, and a cache that keeps every key.
    kept = DynamicCache(config=model.config)
    close(torch.cat([step(kept, i) for i in range(4)], dim=1), whole[:, :4])
    with pytest.raises(pdcore.UnsupportedError, match=r"dropped.*DynamicCache\(\)"):
        step(kept, 4)
    kept = DynamicCache()
    close(torch.cat([step(kept, i) for i in range(M)], dim=1), whole)
    settings = {"max_new_tokens": 6, "do_sample": False}
    result = model.generate(ids, past_key_values=DynamicCache(), **settings)
    without = model.generate(ids, use_cache=False, **settings)
    torch.testing.assert_close(result, without, rtol=0, atol=0)


def test_bn_in_a_causal_layer_names_what_to_do(model_of: Any) -> None:
    register("pdcore_bn", "bn")
    with pytest.raises(
        pdcore.UnsupportedError, match=r"LlamaAttention.*causal\+bn\(statistics=prefix\)"
    ):
        logits(model_of("llama", "pdcore_bn"), tokens())
    register("pdcore_bn", "bn(allow_leak=true)")
    assert torch.isfinite(logits(model_of("llama", "pdcore_bn"), tokens())).all()


@pytest.mark.parametrize("spec", ["causal", PREFIX, "bn(statistics=prefix)"])
def test_causal_in_a_layer_that_looks_both_ways(spec: str, model_of: Any) -> None:
    register("pdcore_bn", spec)
    with pytest.raises(pdcore.UnsupportedError, match="looks both ways"):
        logits(model_of("bert", "pdcore_bn"), tokens())


def test_causal_may_be_left_to_the_model(model_of: Any) -> None:
    ids = tokens()
    register("pdcore_a", "bn(statistics=prefix)")
    register("pdcore_b", PREFIX)
    result = logits(model_of("llama", "pdcore_a"), ids)
    torch.testing.assert_close(result, logits(model_of("llama", "pdcore_b"), ids), rtol=0, atol=0)


def test_a_decoder_may_look_both_ways(model_of: Any) -> None:
    register()
    ids, real = tokens(), padding("right")
    expected = logits(model_of("llama"), ids, real, is_causal=False)
    actual = logits(model_of("llama", "pdcore"), ids, real, is_causal=False)
    close(actual[real.bool()], expected[real.bool()])
    causal = logits(model_of("llama"), ids, real)
    assert (actual - causal).abs().max() > 0.05


# --- masks of other kinds -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences(model_of: Any, name: str) -> None:
    register()
    ids = tokens()
    packed = torch.cat([torch.arange(5), torch.arange(M - 5)]).expand(B, M)
    expected = logits(model_of(name), ids, position_ids=packed)
    close(logits(model_of(name, "pdcore"), ids, position_ids=packed), expected)
    for spec in (PREFIX, "sh(1,2)", "causal"):
        register("pdcore_bn", spec)
        model = model_of(name, "pdcore_bn")
        together = logits(model, ids, position_ids=packed)
        close(together[:, :5], logits(model, ids[:, :5]))
        close(together[:, 5:], logits(model, ids[:, 5:]))


def test_packed_sequences_of_one_token_and_none(model_of: Any) -> None:
    register("pdcore_bn", PREFIX)
    model, ids = model_of("llama", "pdcore_bn"), tokens()
    packed = torch.cat([torch.arange(1), torch.arange(1), torch.arange(M - 2)]).expand(B, M)
    together = logits(model, ids, position_ids=packed)
    close(together[:, 1:2], logits(model, ids[:, 1:2]))
    close(logits(model, ids, position_ids=torch.arange(M).expand(B, M)), logits(model, ids))


def test_packed_sequences_of_a_compiled_model_are_refused_with_statistics(model_of: Any) -> None:
    register("pdcore_bn", PREFIX)
    model = torch.compile(model_of("llama", "pdcore_bn"), backend="eager")
    packed = torch.cat([torch.arange(5), torch.arange(M - 5)]).expand(B, M)
    with pytest.raises(Exception, match="packed sequences"):
        logits(model, tokens(), position_ids=packed)


def test_masks_that_the_caller_makes(model_of: Any) -> None:
    register()
    ids = tokens()
    mask = torch.rand(B, 1, M, M, generator=torch.Generator().manual_seed(0)) < 0.6
    mask |= torch.eye(M, dtype=torch.bool)
    scores = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model_of("llama")(ids, attention_mask=scores).logits
        for options in (mask, scores, scores + 0.0):
            close(model_of("llama", "pdcore")(ids, attention_mask=options).logits, expected)


def test_a_mask_turns_into_the_whole_one() -> None:
    register()
    make = AttentionMaskInterface()["pdcore"]
    for kind in (
        transformers.masking_utils.causal_mask_function,
        transformers.masking_utils.bidirectional_mask_function,
        transformers.masking_utils.sliding_window_causal_mask_function(3),
        transformers.masking_utils.sliding_window_bidirectional_mask_function(2),
    ):
        for side in ("none", "left", "right"):
            arguments = {
                "batch_size": B,
                "q_length": 4,
                "kv_length": M - 2,
                "q_offset": 7,
                "kv_offset": 2,
                "mask_function": kind,
                "attention_mask": padding(side).bool(),
            }
            counter = torch.tensor(7)  # a static cache counts its tokens in place
            mask = make(**arguments | {"q_offset": counter})
            counter += 4
            whole = sdpa_mask(**arguments, allow_is_causal_skip=False)
            assert isinstance(mask, LayerMask)
            assert mask.shape == (B, 1, 4, M - 2)
            assert mask.dtype == torch.bool
            assert "LayerMask((3, 1, 4, 9)" in repr(mask)
            for use in (
                lambda x: x & True,
                lambda x: x[:, :, 1:, :5],
                lambda x: torch.where(x, 1.0, -1.0),
                lambda x: torch.cat([x, x], -1),
                lambda x: x.clone(),
            ):
                assert type(use(mask)) is torch.Tensor
                torch.testing.assert_close(use(mask), use(whole))
            assert isinstance(mask.contiguous(), LayerMask)  # no mask is computed here
            assert isinstance(mask.detach(), LayerMask)
            # The parts of the mask agree with the whole.
            at, keys = torch.arange(4)[:, None] + mask.parts.offset, torch.arange(M - 2)
            seen = (keys >= at - mask.parts.pattern.left) & (keys <= at + mask.parts.pattern.right)
            if mask.parts.pattern.causal:
                seen = seen & (keys <= at)
            real = torch.ones(B, M - 2, dtype=torch.bool)
            real = real if mask.parts.key_mask is None else mask.parts.key_mask
            torch.testing.assert_close(seen & real[:, None, None, :], whole)
            assert mask.parts.dropped


# --- what a layer says beside its mask ------------------------------------------------------------


class Layer(torch.nn.Module):  # type: ignore[misc]
    is_causal = True


def call(spec: str = "softmax", mask: Any = None, **others: Any) -> Any:
    register("pdcore_layer", spec)
    q = torch.randn(B, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, B, 2, 7, 8, generator=torch.Generator().manual_seed(1))
    out, weights = AttentionInterface()["pdcore_layer"](Layer(), q, k, v, mask, **others)
    return q, k, v, out, weights


@pytest.mark.parametrize(
    ("spec", "others", "expected"),
    [
        ("softmax", {}, "causal"),
        ("softmax", {"is_causal": False}, "softmax"),
        ("softmax", {"scaling": 0.7}, "causal+softmax(scale=0.7)"),
        (
            "softmax(scale=0.7)",
            {"scaling": 0.7, "softcap": 2.0},
            "causal+softmax(scale=0.7,softcap=2.0)",
        ),
        ("polynomial", {"scaling": 0.7}, "causal+polynomial(scale=0.7)"),
        ("random_features", {"scaling": 0.7}, "causal+random_features(scale=0.7)"),
        ("linear", {"scaling": 8**-0.5}, "causal+linear"),
        ("softmax", {"sliding_window": 3}, "causal+sparse(2,0)"),
        ("sparse(1,inf)", {"sliding_window": 3}, "causal+sparse(1,0)"),
        (
            "sparse(5,inf)",
            {
                "sliding_window": 3,
                "position_ids": torch.arange(5),
                "cache": None,
                "output_attentions": False,
            },
            "causal+sparse(2,0)",
        ),
        (PREFIX, {"softcap": 2.0}, f"softmax(softcap=2)+{PREFIX}"),
    ],
)
def test_what_a_layer_says_joins_the_spec(spec: str, others: Any, expected: str) -> None:
    q, k, v, out, weights = call(spec, **others)
    literally = reference_attention(q, k, v, expected, offset=2)
    torch.testing.assert_close(out, literally.transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert out.is_contiguous()
    assert weights is None


@pytest.mark.parametrize(
    ("spec", "others", "error", "message"),
    [
        ("softmax(scale=0.5)", {"scaling": 0.7}, ValueError, "scaling: got 0.7 .*scale=0.5"),
        ("linear", {"scaling": 1.0}, pdcore.UnsupportedError, "linear has no scale"),
        ("cosine", {"scaling": 1.0}, pdcore.UnsupportedError, "cosine has no scale"),
        ("linear", {"softcap": 2.0}, pdcore.UnsupportedError, "softcap: got 2, and linear"),
        ("softmax(softcap=3)", {"softcap": 2.0}, ValueError, "softcap: got 2 .*says 3"),
        (
            "gaussian(0.3)",
            {"softcap": 2.0},
            pdcore.UnsupportedError,
            "softcap: got 2, and gaussian",
        ),
        ("sh(1,8)", {"sliding_window": 3}, pdcore.UnsupportedError, "8 pooled keys never fits"),
        (
            "softmax",
            {"sliding_window": 3, "is_causal": False},
            pdcore.UnsupportedError,
            "sliding_window: got 3",
        ),
        (
            "linear",
            {"position_bias": torch.zeros(1, 4, 5, 7)},
            pdcore.UnsupportedError,
            "bias",
        ),
        ("softmax", {"s_aux": torch.zeros(1)}, ValueError, r"'sink'.*shape \(1,\).*\(4,\)"),
        ("linear", {"s_aux": torch.zeros(4)}, pdcore.UnsupportedError, "Layer with .*sink"),
        ("h(count)", {"s_aux": torch.zeros(4)}, pdcore.UnsupportedError, "Layer with .*sink"),
        ("h(sum,sink=0)", {"s_aux": torch.zeros(4)}, ValueError, "s_aux: got sinks"),
        ("softmax", {"cache": object()}, pdcore.UnsupportedError, "cache: got a object"),
        ("softmax", {"cu_seq_lens_q": torch.zeros(1)}, pdcore.UnsupportedError, "position_ids"),
        ("softmax", {"head_mask": torch.zeros(1)}, pdcore.UnsupportedError, "head_mask"),
        ("softmax", {"mask": torch.ones(B, 7)}, ValueError, r"got shape \(3, 7\)"),
        ("softmax", {"mask": torch.ones(B, 1, 5, 6)}, ValueError, r"broadcasts to \(3, 4, 5, 7\)"),
        ("softmax", {"mask": [1]}, TypeError, "attention_mask: got list"),
        ("sh(1,2,2)", {}, ValueError, "3 scales in softmax.sh.1,2,2., .* the 2 key heads of Layer"),
    ],
)
def test_what_is_refused(spec: str, others: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(spec, **others)


def test_weights(model_of: Any) -> None:
    q, k, v, out, weights = call("sh(1,2)", output_attentions=True)
    assert weights.shape == (B, 4, 5, 7)
    product = weights @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(out, product.transpose(1, 2), rtol=1e-5, atol=1e-5)
    expected = pdcore.attention_weights(q, k, v, "causal+sh(1,2)", offset=2)
    torch.testing.assert_close(weights, expected)

    register()
    real = padding("right")
    with torch.no_grad():
        actual = [
            model_of("bert", attention)(tokens(), attention_mask=real, output_attentions=True)
            for attention in ("eager", "pdcore")
        ]
    for ours, eager in zip(actual[1].attentions, actual[0].attentions, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


def test_dropout_is_the_layers_own(model_of: Any) -> None:
    ones = torch.ones(B, 2, 7, 8)  # so each output is the sum of a row's weights
    register("pdcore_layer")
    attention = AttentionInterface()["pdcore_layer"]
    q = torch.randn(B, 4, 5, 8)
    drawn = torch.stack([attention(Layer(), q, ones, ones, None, 0.5)[0] for _ in range(200)])
    assert (drawn[0] - 1).abs().max() > 0.1
    torch.testing.assert_close(drawn.mean(0), torch.ones(B, 5, 4, 8), rtol=0, atol=0.4)

    ids = tokens()
    expected = logits(model_of("llama", "pdcore_layer"), ids)
    model = model_of("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    try:
        model = model_of("llama", "pdcore_layer")
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=0)
        assert (logits(model.train(), ids) - expected).abs().max() > 0.05
    finally:
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.0


def test_layers_that_are_alike_share_what_is_bound(model_of: Any) -> None:
    register("pdcore_layer")
    logits(model_of("gemma2", "pdcore_layer"), tokens())
    attention = AttentionInterface()["pdcore_layer"]
    assert [str(bound.spec) for bound in vars(attention._layers).values()] == [
        f"softmax(scale={11**-0.5},softcap=2)+causal+sparse(3,0)",
        f"softmax(scale={11**-0.5},softcap=2)+causal",
    ]
    assert repr(attention) == "<pdcore attention 'pdcore_layer': softmax>"


def test_autocast(model_of: Any) -> None:
    register()
    ids, real = tokens(), padding("left")
    expected = logits(model_of("qwen3"), ids, real)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # k is normalized in float32, v is not
        actual = logits(model_of("qwen3", "pdcore"), ids, real)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual[real.bool()].float(), expected[real.bool()], rtol=0, atol=0.5)


def test_inference_mode(model_of: Any) -> None:
    register("pdcore_bn", PREFIX)
    model = model_of("llama", "pdcore_bn")
    expected = logits(model, tokens(), padding("left"))
    with torch.inference_mode():
        torch.testing.assert_close(logits(model, tokens(), padding("left")), expected)


# --- registering ----------------------------------------------------------------------------------


def test_a_name_is_replaced_with_its_models(model_of: Any) -> None:
    ids = tokens()
    register("pdcore_twice")
    model = model_of("llama", "pdcore_twice")
    before = logits(model, ids)
    register("pdcore_twice", PREFIX)
    assert (logits(model, ids) - before).abs().max() > 0.05
    register("pdcore_twice")
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["eager", "sdpa", "flash_attention_2", "my_flash", "", "a/b", "paged|pdcore", 3]
)
def test_names_with_a_meaning(name: Any) -> None:
    with pytest.raises(ValueError, match="name: got"):
        register(name)


def test_specs_that_cannot_be_registered() -> None:
    for spec in (
        "bn(beta=param)",
        "bn(statistics=running)",
        "bn(statistics=running,with_std=false)",
    ):
        with pytest.raises(pdcore.UnsupportedError, match="no place for them"):
            register("pdcore_none", spec)
    with pytest.raises(pdcore.SpecError, match="unknown word"):
        register("pdcore_none", "sofmax")
    assert "pdcore_none" not in AttentionInterface()
    assert "pdcore_none" not in AttentionMaskInterface()


@pytest.mark.parametrize("spec", SPECS)
def test_every_word_is_registered_or_refused_by_name(spec: str) -> None:
    if needs_arrays(spec):
        with pytest.raises(pdcore.UnsupportedError, match=r"takes the arrays .* has no place for"):
            register("pdcore_word", spec)
    else:
        register("pdcore_word", spec)


def test_the_choice_of_backend_is_made_when_it_is_registered() -> None:
    with pdcore.use_backend("numpy"):
        register("pdcore_numpy")
    register("pdcore_named", backend=["numpy"])
    x = torch.randn(1, 2, 5, 8)
    expected = reference_attention(x, x, x, "causal").transpose(1, 2)
    for name in ("pdcore_numpy", "pdcore_named"):
        attention = AttentionInterface()[name]
        torch.testing.assert_close(attention(Layer(), x, x, x, None)[0], expected)
        with pytest.raises(pdcore.UnsupportedError, match="would cut it"):
            attention(Layer(), x.clone().requires_grad_(), x, x, None)
