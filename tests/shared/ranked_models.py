"""One rank of `test_groups_transformers.py`: a tiny Llama on its part of the sequences."""

from __future__ import annotations

from typing import Any

import torch
from ranks import joined, part
from transformers import LlamaConfig, LlamaForCausalLM

from pdcore_adapters.transformers import register

__all__ = ["SPECS", "arrays", "losses"]

SPECS = ("softmax", "causal+bn(statistics=prefix)", "linear")


def arrays() -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (2, 12) and the real ones among them, padding on the right."""
    ids = torch.randint(1, 61, (2, 12), generator=torch.Generator().manual_seed(3))
    return ids, (torch.arange(12) < torch.tensor([[12], [7]])).long()


def losses(spec: str, group: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the logits of a model, and the gradients of the sum of their log-probabilities."""
    register("shards", spec, group=group)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.set_attn_implementation("shards")
    ids, real = arrays()
    positions = torch.arange(12).expand(2, -1)
    if group is not None:
        ids, real, positions = (part(x, group, 1) for x in (ids, real, positions))
    logits = model(ids, attention_mask=real, position_ids=positions, use_cache=False).logits
    seen = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0] * real
    seen.sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def results(group: Any) -> dict[str, Any]:
    """Run all specs on this rank."""
    return {spec: losses(spec, group) for spec in SPECS}


if __name__ == "__main__":
    joined(results)
