"""Plans by CUDA kernels of our own where they compute one, else by the library's operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pdcore.extend import (
    ArrayBackend,
    Call,
    Contracted,
    FeatureRows,
    Features,
    Inputs,
    Operands,
    Plan,
    Request,
    Scores,
    Summary,
    UnsupportedError,
)

from .feature_programs import MAPS
from .feature_programs import columns_for as feature_columns
from .features import CompiledFeatures, FeatureKernels, feature_count, state_blocks
from .grouped import launches
from .pooling import CompiledPool, PoolKernels, pooled
from .programs import columns_for, scalar_of, tile
from .query_fold import FoldedLoad
from .runtime import BLOCKS, KernelCache, Runtime, too_old
from .scores import Compiled, ScoreKernels
from .statistics import CompiledSummary, MomentKernels, summarised
from .tensor_cores import TensorCores, folded_in, forward, pullback, rounded_in, unfit

__all__ = ["Compiled", "KernelBackend", "limit", "uncapturable"]


class KernelBackend(ArrayBackend):
    """Runs contractions, moments and pooling on a runtime's kernels, all else by array calls."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        cache = KernelCache(runtime)
        self.kernels = ScoreKernels(cache)
        self.feature_kernels = FeatureKernels(self.kernels)
        self.moments = MomentKernels(cache)
        self.pooling = PoolKernels(cache)

    def fuse(self, plan: Plan, request: Request) -> Plan:
        """Choose the kernels where they compute the plan, see `Backend.fuse`."""
        capability = self.runtime.capability(request.device)
        plan = pooled(plan, request, capability, self.info.library)
        plan = summarised(plan, request, capability, self.info.library)
        c = plan.contraction
        why = limit(plan, request, capability)
        if why:
            step = f"kernel: {self.info.library}'s own operations, O(N + M) memory: {why}"
            return replace(plan, steps=(*plan.steps, step))
        prefix = plan.summary is not None and plan.summary.scope == "prefix"
        # A pullback takes `out` as it was before it was rounded: what rounding does to
        # d_out . out, the keys' mean would multiply.
        rounds = plan.normaliser == "sum" and not prefix and not request.vjp
        if isinstance(c, Features):
            return _fused_features(plan, c, request.dtype, rounds)
        log_w = "scale s" if c.expression is None else str(c.expression)
        what = f"log w = {log_w}" if c.weight == "log" else "w = s"
        step = f"kernel: tiles of CUDA cores in {plan.accumulate}, with {what} compiled in"
        if request.dtype != plan.accumulate:
            why = unfit(plan, request, capability)
            if not why:
                step = f"kernel: tiles of tensor cores in {request.dtype}, with {what} compiled in"
                step += _scales(plan)
                found = c.run_as(TensorCores, rounds=rounds, dtype=request.dtype)
                plan = rounded_in(replace(plan, steps=(*plan.steps, step)), request.dtype)
                plan = folded_in(plan, request)
                return replace(plan, contraction=found)
            step += f", {_stored(plan, request.dtype, rounds)}; {why}"
        step += _scales(plan, apart=request.dtype != plan.accumulate)
        return replace(
            plan, contraction=c.run_as(Compiled, rounds=rounds), steps=(*plan.steps, step)
        )

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan on the arrays' device, see `Backend.attention`."""
        with self.runtime.on(inputs.q):
            return super().attention(plan, inputs, lse=lse)

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan on the arrays' device and give its pullback, see `Backend.attention_vjp`."""
        with self.runtime.on(inputs.q):
            out, lse, vjp = super().attention_vjp(plan, inputs)

        def on_device(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            with self.runtime.on(inputs.q):
                return vjp(d_out, d_lse)

        return out, lse, on_device

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights on the arrays' device, see `Backend.attention_weights`."""
        with self.runtime.on(inputs.q):
            return super().attention_weights(plan, inputs)

    def call(self, plan: Plan, inputs: Inputs) -> Call:
        """Take the arrays of a call, see `ArrayBackend.call`."""
        if self.runtime.capturing() and (why := uncapturable(plan)):
            raise UnsupportedError(
                f"backend {self.info.name}: the stream is being captured into a "
                f"CUDA graph, and {why}"
            )
        return super().call(plan, inputs)

    def native(self, plan: Plan) -> frozenset[str]:
        """Read 16-bit arrays where kernels run, see `ArrayBackend.native`."""
        kernels = {
            "contraction": isinstance(plan.contraction, Compiled | CompiledFeatures),
            "pool": isinstance(plan.pool, CompiledPool),
        }
        by_kernel = isinstance(plan.summary, CompiledSummary)
        kernels |= dict.fromkeys(("statistics", "statistics_vjp"), by_kernel)
        folded = all(isinstance(step, FoldedLoad) for step in plan.transforms)
        kernels["transforms"] = kernels["contraction"] and folded
        return frozenset(step for step, chosen in kernels.items() if chosen)

    def pool(self, kind: str, x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool keys or values, by the kernels where they were chosen."""
        if isinstance(kind, CompiledPool):
            return self.pooling.pool(x, weights, xp=self.xp)
        return super().pool(kind, x, weights)

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute a finalised state of the keys, by the kernels where they were chosen."""
        if not isinstance(summary, CompiledSummary):
            return super().statistics(summary, keys, mask)
        if summary.scope == "prefix":
            return self.moments.prefixes(keys, mask, xp=self.xp)
        return self.moments.moments(keys, mask, shared=summary.scope == "batch", xp=self.xp)

    def statistics_vjp(
        self,
        summary: Summary,
        keys: Any,
        mask: Any,
        final: Mapping[str, Any],
        cotangent: Mapping[str, Any],
    ) -> Any:
        """Pull a state back, by the kernels where they were chosen."""
        if isinstance(summary, CompiledSummary):
            return self.moments.vjp(keys, mask, final, cotangent, xp=self.xp)
        return super().statistics_vjp(summary, keys, mask, final, cotangent)

    def prefix_vjp(
        self,
        summary: Summary,
        keys: Any,
        mask: Any,
        rows: Mapping[str, Any],
        cotangent: Mapping[str, Any],
        later: Any,
    ) -> Any:
        """Pull the states of prefixes back, by the kernels where they were chosen."""
        if isinstance(summary, CompiledSummary):
            return self.moments.prefix_vjp(keys, mask, rows, cotangent, later, xp=self.xp)
        return super().prefix_vjp(summary, keys, mask, rows, cotangent, later)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, by the kernels where they were chosen."""
        if isinstance(c, Compiled):
            return self.scores_of_groups(c, [o], [tuple(range(o.k.shape[-3]))]).parts[0]
        return super().scores(c, o)

    def scores_of_groups(
        self, c: Scores, operands: list[Operands], heads: list[tuple[int, ...]]
    ) -> Contracted:
        """Contract all head groups at once, by the kernels where they were chosen."""
        if isinstance(c, TensorCores):
            return forward(self.kernels, c, operands, heads, xp=self.xp)
        if isinstance(c, Compiled):
            return self.kernels.forward(c, operands, heads, xp=self.xp)
        return super().scores_of_groups(c, operands, heads)

    def scores_vjp(
        self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Pull back, by the kernels where they were chosen."""
        if isinstance(c, TensorCores):
            return pullback(self.kernels, c, o, out, level, d_out, d_level, xp=self.xp)
        if isinstance(c, Compiled):
            return self.kernels.pullback(c, o, out, level, d_out, d_level, xp=self.xp)
        return super().scores_vjp(c, o, out, level, d_out, d_level)

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, by the kernels where they were chosen."""
        if isinstance(c, CompiledFeatures):
            return self.feature_kernels.forward(c, o, xp=self.xp)
        return super().features(c, o)

    def features_vjp(
        self, c: Features, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Pull back, by the kernels where they were chosen."""
        if isinstance(c, CompiledFeatures):
            return self.feature_kernels.pullback(c, o, out, level, d_out, d_level, xp=self.xp)
        return super().features_vjp(c, o, out, level, d_out, d_level)


def _fused_features(plan: Plan, c: Features, dtype: str, rounds: bool) -> Plan:
    """Leave phi to the kernels if they have it, else to array calls as the plan does."""
    raw = type(c.kernel) in MAPS
    phi = "phi compiled in" if raw else f"{'log ' if c.log else ''}phi by array calls"
    found = replace(
        plan,
        transforms=plan.transforms[:-1] if raw else plan.transforms,
        contraction=CompiledFeatures(c.kernel, raw, c.log, c.signed, rounds),
    )
    step = f"kernel: states of chunks on CUDA cores in {plan.accumulate}, {phi}"
    if dtype != plan.accumulate:
        step += f", {_stored(found, dtype, rounds)}"
    return replace(found, steps=(*plan.steps, step))


def _stored(plan: Plan, dtype: str, rounds: bool) -> str:
    """Say which arrays of a 16-bit call the kernels read and write as they are."""
    pooled = any(group.scale > 1 for group in plan.groups)
    names = [] if plan.transforms else ["q"]
    if not pooled:
        names += [*([] if plan.transforms else ["k"]), "v", *(["out"] if rounds else [])]
    if not names:
        return "of rows that were cast"
    return f"of {', '.join(names)} in {dtype}" + (", other rows cast" if len(names) < 4 else "")


def _scales(plan: Plan, apart: bool = False) -> str:
    """Say how many launches the scales take; `apart`, pooled keys are of another type."""
    scales = [group.scale for group in plan.groups]
    if len(scales) == 1:
        return ""
    count = launches(["pooled" if apart and scale > 1 else "" for scale in scales])
    many = "one launch" if count == 1 else f"{count} launches"
    order = ", longest first" if count < len(scales) else ""
    return f"; {len(scales)} scales in {many} of the forward{order}"


def uncapturable(plan: Plan) -> str:
    """Say why a plan cannot run while its stream is captured, nothing if it can."""
    heads = [head for group in plan.groups for head in group.heads]
    if heads != sorted(heads):
        return (
            "heads of different scales alternate, whose indices would be copied from the host; "
            "put heads of one scale beside each other"
        )
    if any(isinstance(step, FeatureRows) for step in plan.transforms):
        return (
            "phi is array calls, which may be matrix products of the library or need arrays of "
            "the host"
        )
    if type(plan.contraction) in (Scores, Features):
        return "the call runs by matrix products of the library, which cannot be captured"
    return ""


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
    if why := too_old(capability):
        return why
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
        return (
            f"got q {request.q} and v {request.v}, and a grid has {BLOCKS[0]} by {BLOCKS[1]} "
            f"blocks at most, of {size} rows and keys and {most} columns"
        )
    return ""
