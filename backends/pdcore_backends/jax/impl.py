"""The JAX backend: the calls it runs, on whole sequences and in shards."""

from __future__ import annotations

from typing import Any

import jax

from pdcore.extend import Inputs, Plan, Request, shard_refusals, told

from . import segments, sharded
from .choice import chosen
from .device import find
from .local import LocalJaxBackend

__all__ = ["JaxBackend"]


class JaxBackend(LocalJaxBackend):
    """Runs plans on JAX arrays, under jit, grad, vmap and jvp too."""

    pads_segments = True

    def refusals(self, request: Request) -> list[str]:
        """Return why the backend cannot run a call, see `Backend.refusals`."""
        reasons = super().refusals(request)
        if request.dtype == "float64" and not jax.config.jax_enable_x64:
            reasons.append(
                "float64 inputs: JAX has 64 bits only under "
                "jax.config.update('jax_enable_x64', True)"
            )
        if request.axis_name is not None:
            reasons += shard_refusals(request)
        try:
            find(request.device)
        except RuntimeError as error:
            reasons.append(f"device {request.device}: {error}")
        return reasons

    def traced_segments(self, request: Request) -> list[str]:
        """Return why the backend cannot run traced segments, see `Backend.traced_segments`."""
        return [] if request.segments in (None, "values") else segments.refusals(request)

    def fuse(self, plan: Plan, request: Request) -> Plan:
        """Choose the kernel of a plan, and state what shards exchange, see `Backend.fuse`."""
        if request.axis_name is not None:
            plan = told(plan, request, sharded.KEYS_TRAVEL)
        if request.segments == "traced":
            plan = segments.segmented(plan)
        return chosen(plan, request)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, in shards where an axis is named, see `Backend.attention`."""
        if inputs.axis_name is not None:
            return sharded.attention(plan, inputs, lse=lse)
        return super().attention(plan, inputs, lse=lse)
