"""What a layer of Equinox keeps for its spec: parameters, and the index of running statistics."""

from __future__ import annotations

from typing import Any

import equinox
from jax import numpy as jnp

from ..bound import BoundSpec, Drop, check_drop, check_running, new_arrays, refuse_dropout
from ..key_statistics import BATCHES

__all__ = ["attach_spec"]


def attach_spec(
    layer: Any,
    bound: BoundSpec,
    drop: Drop,
    momentum: float | None,
    axis_name: str | None,
    name: str = "the layer",
    call: str = "PDMultiheadAttention",
) -> None:
    """Set the spec on a new layer, with its parameters and running statistics."""
    spec = bound.spec
    check_running(spec, momentum, axis_name=axis_name)
    spec.for_heads(layer.num_heads, f"heads of {name}")
    check_drop(drop)
    p = layer.dropout.p
    drops = drop == "weights" and not layer.dropout.inference
    if drops and isinstance(p, int | float):  # and no traced leaf
        advice = (
            f"{call}(drop='output') to drop outputs of the layer in their place, or dropout_p=0"
        )
        refuse_dropout(spec, "dropout_p", p, advice, name)
    sizes = (layer.num_heads, layer.qk_size, layer.num_heads)
    arrays = new_arrays(spec, sizes, xp=jnp, dtype=layer.query_proj.weight.dtype)
    buffers = {p.buffer: x for p, x in arrays.items() if p.running}
    counter = {BATCHES: jnp.zeros((), jnp.int32)}
    running = equinox.nn.StateIndex(buffers | counter) if buffers else None
    params = {p.name: x for p, x in arrays.items() if not p.running}
    how = {"_bound": bound, "drop": drop, "axis_name": axis_name, "momentum": momentum}
    for attribute, value in {"spec_params": params, "running": running, **how}.items():
        object.__setattr__(layer, attribute, value)
