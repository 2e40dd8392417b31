"""`DecoderCache` in generate(): the same tokens as without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import pdcore
from pdcore_adapters.transformers import DecoderCache, register

PREFIX = "causal+bn(statistics=prefix)"
SPECS = ("softmax", "linear", PREFIX, f"{PREFIX}+sh(1,2)", "linear+sh(half=3)", "gaussian(0.2)")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(kind: str, spec: str) -> Any:
    torch.manual_seed(0)
    t = transformers
    match kind:
        case "llama":
            model = t.LlamaForCausalLM(t.LlamaConfig(**SIZES))
        case "mistral":
            model = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=4))
        case "gpt_oss":
            more = {"head_dim": 8, "sliding_window": 4, "num_local_experts": 2}
            model = t.GptOssForCausalLM(t.GptOssConfig(**SIZES, **more, num_experts_per_tok=1))
    model = model.eval()
    if kind != "gpt_oss":  # whose experts take no float64
        model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    register("pdcore_cache", spec)
    model.set_attn_implementation("pdcore_cache")
    return model


def prompt(batch: int = 3, length: int = 9, *, padded: bool = True) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 61, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :3], mask[2, :5] = 0, 0
        ids = torch.where(mask > 0, ids, 0)
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    result: torch.Tensor = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=False, **options
    )
    return result


def alone(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Generate for each sequence of a padded batch, without its padding and without a cache."""
    results = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        whole = {"input_ids": ids[mask > 0][None], "attention_mask": mask[mask > 0][None]}
        results.append(generated(model, whole, use_cache=False, **options)[..., -8:])
    return results


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        *(("llama", spec) for spec in SPECS),
        *(("mistral", spec) for spec in SPECS),  # features in a window run as scores
        *(("gpt_oss", spec) for spec in SPECS if "linear" not in spec),  # they have no sink
    ],
)
def test_generate_gives_the_tokens_of_a_model_without_cache(kind: str, spec: str) -> None:
    model, inputs = build(kind, spec), prompt()
    expected = torch.cat(alone(model, inputs))
    cache = DecoderCache()
    assert torch.equal(generated(model, inputs, past_key_values=cache)[:, -8:], expected)
    assert cache.get_seq_length() == 9 + 8 - 1


@pytest.mark.parametrize("spec", SPECS)
def test_logits_are_those_without_a_cache(spec: str) -> None:
    model, inputs = build("llama", spec), prompt()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, at = DecoderCache(capacity=16), 0
    with torch.no_grad():
        for stop in (4, 5, 9):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, at:stop]
            part = model(
                input_ids=ids[:, at:stop],
                attention_mask=mask[:, :stop],
                position_ids=positions,
                past_key_values=cache,
            ).logits
            for b, first in enumerate((0, 3, 5)):
                whole = model(input_ids=ids[b : b + 1, first:], use_cache=False).logits[0]
                got = part[b, max(first - at, 0) :]
                expected = whole[max(at - first, 0) : max(stop - first, 0)]
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            at = stop


@pytest.mark.parametrize("spec", SPECS)
def test_beams_are_reordered(spec: str) -> None:
    model, inputs = build("llama", spec), prompt()
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = torch.cat(alone(model, inputs, **options))
    found = generated(model, inputs, past_key_values=DecoderCache(), **options)[:, -8:]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", SPECS)
def test_assisted_decoding_takes_rejected_tokens_back(spec: str) -> None:
    model, inputs = build("llama", spec), prompt(1, padded=False)
    expected = generated(model, inputs, use_cache=False)
    assistant = build("llama", spec)
    with torch.no_grad():  # agrees with the model now and then
        assistant.lm_head.weight.add_(0.5 * torch.randn_like(assistant.lm_head.weight))
    found = generated(
        model, inputs, past_key_values=DecoderCache(undo=30), assistant_model=assistant
    )
    assert torch.equal(found, expected)


def test_a_token_of_linear_attention_costs_no_more_memory() -> None:
    model, cache = build("llama", "linear"), DecoderCache()
    sizes = []
    with torch.no_grad():
        for ids in prompt(1, 40, padded=False)["input_ids"].split(20, dim=1):
            model(input_ids=ids, past_key_values=cache)
            sizes.append(sum(x.numel() for layer in cache.layers for x in layer.state.values()))
    assert sizes[0] == sizes[1]


def test_room_for_keys_is_doubled() -> None:
    model = build("llama", PREFIX)
    ids = torch.randint(2, 61, (1, 300))
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = DecoderCache()
        parts = [model(input_ids=x, past_key_values=cache).logits for x in ids.split(150, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spec", ["softmax", "linear", f"{PREFIX}+sh(1,2)"])
def test_a_compiled_step_serves_all_lengths(spec: str, padded: bool) -> None:
    """It is one graph, compiled anew once at most, which writes into the memory of the state."""
    model, inputs = build("llama", spec), prompt(3, 14, padded=padded)
    ids, capacity, graphs = inputs["input_ids"], 16, []
    options: dict[str, Any] = {"past_key_values": DecoderCache(capacity)}
    if padded:
        options["attention_mask"] = torch.nn.functional.pad(
            inputs["attention_mask"], (0, 2), value=1
        )
    places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)

    def backend(graph: Any, arrays: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        first = model(input_ids=ids[:, :9], position_ids=places[:, :9], **options).logits
        memory = [
            (x.data_ptr(), x.shape)
            for layer in options["past_key_values"].layers
            for x in layer.state.values()
        ]
        steps = [
            step(input_ids=ids[:, i : i + 1], position_ids=places[:, i : i + 1], **options).logits
            for i in range(9, 14)
        ]
        got = torch.cat([first, *steps], dim=1)
        for b, start in enumerate((0, 3, 5) if padded else (0, 0, 0)):
            whole = model(input_ids=ids[b : b + 1, start:], use_cache=False).logits[0]
            torch.testing.assert_close(got[b, start:], whole, rtol=1e-9, atol=1e-9)
        assert len(graphs) <= 2
        assert memory == [
            (x.data_ptr(), x.shape)
            for layer in options["past_key_values"].layers
            for x in layer.state.values()
        ]
        for _ in range(3):
            out = step(input_ids=ids[:, :1], position_ids=places[:, :1], **options).logits
        assert torch.isnan(out[0]).all()  # beyond the capacity


def test_generate_takes_a_cache_of_fixed_capacity() -> None:
    spec = f"{PREFIX}+sh(1,2)"
    model, inputs = build("llama", spec), prompt()
    for options in ({}, {"num_beams": 3, "num_return_sequences": 2}):
        expected = torch.cat(alone(model, inputs, **options))
        cache = DecoderCache(capacity=20)
        assert torch.equal(
            generated(model, inputs, past_key_values=cache, **options)[:, -8:], expected
        )
    assert int(cache.get_seq_length()) == 9 + 8 - 1
    inputs = prompt(1, padded=False)
    expected = generated(model, inputs, use_cache=False)
    cache = DecoderCache(capacity=40, undo=30)
    found = generated(model, inputs, past_key_values=cache, assistant_model=build("llama", spec))
    assert torch.equal(found, expected)


def test_another_attention_does_not_pass_the_cache_by() -> None:
    model, inputs = build("llama", "softmax"), prompt(1, padded=False)
    model.set_attn_implementation("sdpa")
    cache = DecoderCache()
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        with pytest.raises(pdcore.UnsupportedError, match="did not read it"):
            model(**inputs, past_key_values=cache)


def test_what_a_decoder_does_not_do_is_refused() -> None:
    model, inputs = build("llama", "linear"), prompt(1, padded=False)
    with torch.no_grad():
        cache = DecoderCache()
        model(**inputs, past_key_values=cache)
        with pytest.raises(ValueError, match="takes 2 positions back, expected at most 0"):
            cache.crop(-2)
        with pytest.raises(pdcore.UnsupportedError, match="leave output_attentions out"):
            build("llama", "linear").model(
                **inputs, past_key_values=DecoderCache(), output_attentions=True
            )
