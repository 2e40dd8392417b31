"""Plans by the CUDA kernels of this backend, and by array calls where there is no kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pdcore.extend import (
    ArrayBackend,
    Call,
    Contracted,
    Features,
    Inputs,
    Mean,
    Operands,
    Plan,
    Request,
    Scores,
    Summary,
    UnsupportedError,
)

from .choice import chosen, uncapturable
from .features import FeatureKernels
from .pooling import PoolKernels
from .query_fold import FoldedLoad
from .runtime import KernelCache, Runtime
from .scores import ScoreKernels
from .statistics import MomentKernels
from .tensor_cores import TensorCores, forward, pullback

__all__ = ["KernelBackend"]


class KernelBackend(ArrayBackend):
    """Runs contractions, moments and pooling by kernels, everything else by array calls."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        self.cache = KernelCache(runtime)
        self.kernels = ScoreKernels(self.cache)
        self.feature_kernels = FeatureKernels(self.cache)
        self.moments = MomentKernels(self.cache)
        self.pooling = PoolKernels(self.cache)

    def fuse(self, plan: Plan, request: Request) -> Plan:
        """Choose the kernels that run a plan, see `Backend.fuse`."""
        return chosen(plan, request, self.runtime.capability(request.device), self.info.library)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan on the arrays' device, see `Backend.attention`."""
        with self.runtime.on(inputs.q):
            return super().attention(plan, inputs, lse=lse)

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and its pullback on the arrays' device, see `Backend.attention_vjp`."""
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

    def call(self, plan: Plan, inputs: Inputs, *, level: bool = True) -> Call:
        """Return the arrays of a call, see `ArrayBackend.call`."""
        if self.runtime.capturing() and (why := uncapturable(plan)):
            raise UnsupportedError(
                f"backend {self.info.name}: the stream is being captured into a "
                f"CUDA graph, and {why}"
            )
        return super().call(plan, inputs, level=level)

    def native(self, plan: Plan) -> frozenset[str]:
        """Return the steps whose kernels read 16-bit arrays, see `ArrayBackend.native`."""
        contraction = plan.contraction.choice is not None
        statistics = plan.summary is not None and plan.summary.choice is not None
        loads = (isinstance(getattr(t, "choice", None), FoldedLoad) for t in plan.transforms)
        kernels = {
            "pool": plan.pool_choice is not None,
            "statistics": statistics,
            "statistics_vjp": statistics,
            "transforms": contraction and all(loads),
            "contraction": contraction,
        }
        return frozenset(step for step, by_kernel in kernels.items() if by_kernel)

    def pool_of(self, plan: Plan) -> Callable[..., tuple[Any, Callable[[Any], Any]]]:
        """Return the function that pools keys and values: the kernels if the plan chose them."""
        return self.pool if plan.pool_choice is None else self.pool_by_kernels

    def pool_by_kernels(self, kind: str, x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool keys or values by the kernels, see `ArrayBackend.pool`."""
        return self.pooling.pool(x, weights, xp=self.xp)

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute a finalised state of the keys, by the kernels if the plan chose them."""
        if summary.choice is None:
            return super().statistics(summary, keys, mask)
        if summary.scope == "prefix":
            final = self.moments.prefixes(keys, mask, xp=self.xp)
        else:
            shared = summary.scope == "batch"
            final = self.moments.moments(keys, mask, shared=shared, xp=self.xp)
        if type(summary.statistics) is Mean:
            return summary.statistics.finalize({n: final[n] for n in ("n", "mean")}, xp=self.xp)
        return final

    def statistics_vjp(
        self,
        summary: Summary,
        keys: Any,
        mask: Any,
        final: Mapping[str, Any],
        cotangent: Mapping[str, Any],
    ) -> Any:
        """Compute the gradient through a state, by the kernels if the plan chose them."""
        if summary.choice is not None:
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
        """Compute the gradient through prefix states, by the kernels if the plan chose them."""
        if summary.choice is not None:
            return self.moments.prefix_vjp(keys, mask, rows, cotangent, later, xp=self.xp)
        return super().prefix_vjp(summary, keys, mask, rows, cotangent, later)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, by the kernels if the plan chose them."""
        if c.choice is not None:
            return self.scores_of_groups(c, [o], [tuple(range(o.k.shape[-3]))]).parts[0]
        return super().scores(c, o)

    def scores_of_groups(
        self, c: Scores, operands: list[Operands], heads: list[tuple[int, ...]]
    ) -> Contracted:
        """Contract all head groups at once, by the kernels if the plan chose them."""
        if isinstance(c.choice, TensorCores):
            return forward(self.cache, c, operands, heads, xp=self.xp)
        if c.choice is not None:
            return self.kernels.forward(c, operands, heads, xp=self.xp)
        return super().scores_of_groups(c, operands, heads)

    def scores_vjp(
        self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Compute the gradients, by the kernels if the plan chose them."""
        if isinstance(c.choice, TensorCores):
            return pullback(self.cache, c, o, out, level, d_out, d_level, xp=self.xp)
        if c.choice is not None:
            return self.kernels.pullback(c, o, out, level, d_out, d_level, xp=self.xp)
        return super().scores_vjp(c, o, out, level, d_out, d_level)

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, by the kernels if the plan chose them."""
        if c.choice is not None:
            return self.feature_kernels.forward(c, o, xp=self.xp)
        return super().features(c, o)

    def features_vjp(
        self, c: Features, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Compute the gradients, by the kernels if the plan chose them."""
        if c.choice is not None:
            return self.feature_kernels.pullback(c, o, out, level, d_out, d_level, xp=self.xp)
        return super().features_vjp(c, o, out, level, d_out, d_level)
