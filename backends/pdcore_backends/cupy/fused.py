"""Plans by CUDA kernels of our own where they compute one, else by the library's operations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pdcore.array_backend import ArrayBackend
from pdcore.backend import Request
from pdcore.operands import Operands
from pdcore.plan import Features, Plan, Scores

from .feature_programs import MAPS
from .feature_programs import columns_for as feature_columns
from .features import FeatureKernels, feature_count, state_blocks
from .programs import columns_for, scalar_of, tile
from .runtime import Runtime
from .scores import ScoreKernels

__all__ = ["Compiled", "CompiledFeatures", "KernelBackend", "limit"]

#: The oldest devices that the kernels are compiled for, and how many blocks a grid may have.
CAPABILITY = 75
BLOCKS = 2**31 - 1, 65535


@dataclass(frozen=True)
class Compiled(Scores):
    """A contraction by scores that the kernels compute."""


@dataclass(frozen=True)
class CompiledFeatures(Features):
    """A contraction by features that the kernels compute."""


class KernelBackend(ArrayBackend):
    """Runs contractions on the kernels of a runtime, and all else by array calls."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        self.kernels = ScoreKernels(runtime)
        self.feature_kernels = FeatureKernels(self.kernels)

    def fuse(self, plan: Plan, request: Request) -> Plan:
        """Choose the kernels where they compute the plan, see `Backend.fuse`."""
        c = plan.contraction
        why = limit(plan, request, self.runtime.capability(request.device))
        if why:
            step = f"kernel: {self.info.library}'s own operations, O(N + M) memory: {why}"
            return replace(plan, steps=(*plan.steps, step))
        if isinstance(c, Features):
            return _fused_features(plan, c)
        log_w = "scale s" if c.expression is None else str(c.expression)
        what = f"log w = {log_w}" if c.weight == "log" else "w = s"
        step = f"kernel: tiles of CUDA cores in {plan.accumulate}, with {what} compiled in"
        return replace(plan, contraction=c.run_as(Compiled), steps=(*plan.steps, step))

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, by the kernels where they were chosen."""
        if isinstance(c, Compiled):
            return self.kernels.forward(c, o, xp=self.xp)
        return super().scores(c, o)

    def scores_vjp(self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any,
                   d_level: Any) -> dict[str, Any]:  # fmt: skip
        """Pull back, by the kernels where they were chosen."""
        if isinstance(c, Compiled):
            return self.kernels.pullback(c, o, out, level, d_out, d_level, xp=self.xp)
        return super().scores_vjp(c, o, out, level, d_out, d_level)

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, by the kernels where they were chosen."""
        if isinstance(c, CompiledFeatures):
            return self.feature_kernels.forward(c, o, xp=self.xp)
        return super().features(c, o)

    def features_vjp(self, c: Features, o: Operands, out: Any, level: Any, d_out: Any,
                     d_level: Any) -> dict[str, Any]:  # fmt: skip
        """Pull back, by the kernels where they were chosen."""
        if isinstance(c, CompiledFeatures):
            return self.feature_kernels.pullback(c, o, out, level, d_out, d_level, xp=self.xp)
        return super().features_vjp(c, o, out, level, d_out, d_level)


def _fused_features(plan: Plan, c: Features) -> Plan:
    """Leave phi to the kernels if they have it, else to array calls as the plan does."""
    raw = type(c.kernel) in MAPS
    phi = "phi compiled in" if raw else f"{'log ' if c.log else ''}phi by array calls"
    step = f"kernel: states of chunks on CUDA cores in {plan.accumulate}, {phi}"
    transforms = plan.transforms[:-1] if raw else plan.transforms
    contraction = CompiledFeatures(c.kernel, raw=raw, log=c.log, signed=c.signed)
    return replace(plan, transforms=transforms, contraction=contraction, steps=(*plan.steps, step))


def limit(plan: Plan, request: Request, capability: int) -> str:
    """Say why the kernels do not run a plan on a device, nothing if they do.

    Parameters
    ----------
    plan : Plan
    request : Request
    capability : int
        The device's compute capability, 90 for 9.0.
    """
    c = plan.contraction
    if isinstance(c, Scores) and c.weight == "log_features":
        return "no kernel takes log features, whose maxima differ from block to block"
    if not request.q[-1]:
        return "got D = 0, and a tile takes one feature at least"
    if capability < CAPABILITY:
        return (f"the device has compute capability {capability / 10}, and the kernels are for "
                f"{CAPABILITY / 10} and later")  # fmt: skip
    size = tile(scalar_of(plan.accumulate))
    *lead, rows, dim = request.q
    keys, value_dim = request.v[-2:]
    longest = max(rows, keys)
    blocks = math.prod(lead) * -(-longest // size)
    if request.bias is not None:
        blocks = max(blocks, math.prod(lead) * -(-rows // size) * -(-keys // size))
    if isinstance(c, Features):
        dim = feature_count(c.kernel, dim)
        blocks = max(blocks, state_blocks(dim, value_dim, longest, math.prod(lead), size))
    columns = feature_columns if isinstance(c, Features) else columns_for
    slices, most = max(-(-n // columns(n)) for n in (dim, value_dim, 1)), columns(2**31)
    if max(longest, blocks) > BLOCKS[0] - size or slices > BLOCKS[1]:
        return (f"got q {request.q} and v {request.v}, and a grid has {BLOCKS[0]} by {BLOCKS[1]} "
                f"blocks at most, of {size} rows and keys and {most} columns")  # fmt: skip
    return ""
