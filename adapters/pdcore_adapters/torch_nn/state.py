"""What a layer keeps for its spec: parameters, and buffers of running statistics.

The update of running statistics is one operator, which a compiler does not trace: it runs outside
of autograd, and sees whether activation checkpointing computes a forward for the second time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from array_api_compat import torch as xp
from torch import distributed, nn

from pdcore import AttentionSpec, Parameter
from pdcore.extend import parse

from ..bound import BoundSpec, check_running, new_arrays
from ..key_statistics import merged, real_keys, state_of_keys, statistics_of

__all__ = ["arrays_of", "attach_spec", "group_of", "track"]

#: The process groups of layers by name, as an operator takes no other objects.
_GROUPS: dict[str, Any] = {}


def attach_spec(
    layer: Any, bound: BoundSpec, momentum: float | None, process_group: Any, group: Any
) -> list[str]:
    """Set the spec of a layer, and return the names of its new parameters.

    Parameters and buffers that the layer has already keep their values.
    """
    like, sizes = next(layer.parameters()), (layer.num_heads, layer.head_dim, layer.num_heads)
    made = new_arrays(bound.spec, sizes, xp=xp, dtype=like.dtype, device=like.device)
    check_running(bound.spec, momentum, process_group=process_group)
    layer.momentum = momentum
    names = {_name(p): (p, x.contiguous()) for p, x in made.items()}
    tracks = any(p.running for p in made)
    counter = ["num_batches_tracked"] * tracks
    for name in getattr(layer, "_kept", ()):
        if name not in names and name not in counter:
            delattr(layer, name)
    new = []
    for name, (p, value) in names.items():
        if hasattr(layer, name):
            continue
        if p.buffer:
            layer.register_buffer(name, value)
        else:
            layer.register_parameter(name, nn.Parameter(value))
            new.append(name)
    if tracks and not hasattr(layer, counter[0]):
        layer.register_buffer(counter[0], torch.zeros((), dtype=torch.int64, device=like.device))
    layer._kept = (*names, *counter)
    layer._bound = bound
    layer._group = _named(group)
    layer._ranks = layer._group if process_group is None else _named(process_group)
    # Turns off the fast paths of `nn.TransformerEncoderLayer` and `nn.TransformerEncoder`, which
    # read the weights of this layer without calling it.
    layer._qkv_same_embed_dim = False
    return new


def _named(group: Any) -> str:
    """Return the name of a group of processes, under which it is kept; empty for None."""
    if group is None:
        return ""
    group = group.get_group() if hasattr(group, "get_group") else group
    name = str(group.group_name)
    _GROUPS[name] = group
    return name


def group_of(layer: Any) -> dict[str, Any]:
    """Return the argument ``group`` of the calls of a layer whose sequences are cut, by name."""
    return {"group": _GROUPS[layer._group]} if layer._group else {}


def _name(parameter: Parameter) -> str:
    """Return the name of an array in the state dict."""
    return parameter.buffer or f"spec_{parameter.name}"


def arrays_of(layer: Any, spec: AttentionSpec) -> dict[str, Any]:
    """Return the arrays of a layer that a call of a spec takes as `params`."""
    arrays = {p.name: getattr(layer, _name(p)) for p in spec.parameters()}
    if layer.training:
        # Copies of what `track` writes to, since autograd may keep the arrays of a call.
        buffers = [p.name for p in spec.parameters() if p.running]
        arrays |= {name: arrays[name].clone() for name in buffers}
    return arrays


def track(layer: Any, k: Any, key_mask: Any, segments: Any) -> None:
    """Update the running statistics of a layer, if it has any, by the keys (B, M, H, D) of a call.

    Does nothing outside of training.

    Raises
    ------
    UnsupportedError
        For packed sequences whose keys are pooled.
    """
    buffers = [getattr(layer, p.buffer) for p in layer.spec.parameters() if p.running]
    if not (layer.training and buffers):
        return
    real = real_keys(layer.spec, key_mask, segments, xp=xp)
    real = None if real is None else real.to(k.device)
    keys, spec = k.detach().transpose(-3, -2), str(layer.spec)
    update(buffers, layer.num_batches_tracked, keys, real, spec, layer.momentum, layer._ranks)


@torch.library.custom_op("pdcore_adapters::update_running", mutates_args=("buffers", "batches"))  # type: ignore[untyped-decorator]
def update(
    buffers: list[torch.Tensor],
    batches: torch.Tensor,
    k: torch.Tensor,
    key_mask: torch.Tensor | None,
    spec: str,
    momentum: float | None,
    group: str,
) -> None:
    """Update running statistics by those of a call's keys.

    Parameters
    ----------
    buffers : list of Tensor (Hkv, D)
        The buffers, in the order of the constant parameters of the spec.
    batches : integer Tensor ()
        The number of updates so far.
    k : Tensor (B, Hkv, M, D)
        Keys of the call.
    key_mask : bool Tensor (B, M) or None
        True for a real key.
    spec : str
        The spec of the layer, whose head scaling pools the keys.
    momentum : float or None
        The weight of the new statistics; None for their mean over all updates.
    group : str
        The name of the processes over whose keys the statistics are, or empty.
    """
    if torch._C._current_graph_task_id() != -1:
        return  # within a backward pass, where checkpointing computes the forward again
    parsed = parse(spec)
    with torch.no_grad():
        state = state_of_keys(parsed, k, key_mask, xp=xp)
        if group:
            state = merged(parsed, _gathered(state, _GROUPS[group]), xp=xp)
        batches += 1
        new = statistics_of(parsed, state, xp=xp)
        for buffer, name in zip(buffers, new, strict=True):
            share = 1.0 / batches if momentum is None else momentum
            value = new[name].to(buffer.dtype)
            buffer += share * (torch.where(state["n"][:, 0] > 0, value, buffer) - buffer)


def _gathered(state: Mapping[str, Any], group: Any) -> list[dict[str, Any]]:
    """Return the states of all processes of a group, in the order of their ranks."""
    sizes = {name: x.shape for name, x in state.items()}
    own = torch.cat([state[name].flatten() for name in sizes])
    flat = [torch.empty_like(own) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(flat, own, group=group)
    parts = [part.split([shape.numel() for shape in sizes.values()]) for part in flat]
    return [
        {name: x.reshape(shape) for (name, shape), x in zip(sizes.items(), part, strict=True)}
        for part in parts
    ]
