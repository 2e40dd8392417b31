"""One rank of `test_groups_torch.py`: layers on parts of sequences, of a batch and of weights."""

from __future__ import annotations

from typing import Any

import torch
from ranks import joined, part
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pdcore
from pdcore_adapters.torch_nn import PDMultiheadAttention

__all__ = ["BATCHED", "CUT", "HEADS", "arrays", "heads", "layer_of", "one_process", "steps"]

#: Specs of layers whose sequences are cut.
CUT = (
    "causal+bn(statistics=prefix)",
    "bn(beta=param)+sh(half=2)",
    "bn(statistics=running)",
    "causal+h(sum,sink=param)",
)
#: Specs of layers whose batch is cut.
BATCHED = ("bn(beta=param)", "causal+linear")
#: Specs of calls whose heads are cut.
HEADS = ("bn", "causal+bn(statistics=prefix)", "linear")


def layer_of(spec: str, **options: Any) -> PDMultiheadAttention:
    """Return a layer with the same weights in every process."""
    torch.manual_seed(0)
    layer = PDMultiheadAttention(12, 4, spec=spec, batch_first=True, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def arrays() -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs of a layer and its padding, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 8, 12, generator=generator, dtype=torch.float64)
    return x, torch.arange(8) >= torch.tensor([[8], [3], [5], [1]])


def gradients(layer: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of a layer's parameters."""
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def one_process(spec: str) -> dict[str, Any]:
    """Compute on whole sequences what `cut` computes on parts."""
    return _results(layer_of(spec), *arrays())


def _results(layer: Any, x: Any, padding: Any) -> dict[str, Any]:
    out, _ = layer(x, x, x, key_padding_mask=padding, need_weights=False)
    (out**2).sum().backward()
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return {"out": out.detach().clone(), "gradients": gradients(layer), "buffers": buffers}


def cut(spec: str, group: Any) -> dict[str, Any]:
    """Compute with this rank's part of the sequences."""
    x, padding = arrays()
    layer = layer_of(spec, group=group)
    return _results(layer, part(x, group, 1).contiguous(), part(padding, group, 1))


def steps(layer: Any, x: Any) -> Any:
    """Return the loss of a batch after two steps of training on it."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        out, _ = layer(x, x, x, need_weights=False)
        (out**2).mean().backward()
        optimizer.step()
    return layer(x, x, x, need_weights=False)[0].detach().clone()


def over_batch(spec: str, group: Any) -> dict[str, Any]:
    """Train on this rank's part of the batch, with whole weights and with weights in shards."""
    x = part(arrays()[0], group, 0)
    found = {"DDP": steps(DistributedDataParallel(layer_of(spec)), x)}
    sharded = layer_of(spec)
    fully_shard(sharded)
    return {**found, "FSDP": steps(sharded, x)}


def over_heads(spec: str, group: Any) -> Any:
    """Compute the attention of this rank's heads, two query heads for each key head."""
    q, k, v = heads()
    return pdcore.attention(*(part(x, group, 1) for x in (q, k, v)), spec)


def heads() -> tuple[torch.Tensor, ...]:
    """Return q, k and v of 8 query heads and 4 key heads, the same in every process."""
    generator = torch.Generator().manual_seed(2)
    return tuple(
        torch.randn(2, count, 9, 5, generator=generator, dtype=torch.float64) for count in (8, 4, 4)
    )


def results(group: Any) -> dict[str, Any]:
    """Run all layers on this rank."""
    return {
        "heads": {spec: over_heads(spec, group) for spec in HEADS},
        "cut": {spec: cut(spec, group) for spec in CUT},
        "batch": {spec: over_batch(spec, group) for spec in BATCHED},
    }


if __name__ == "__main__":
    joined(results)
