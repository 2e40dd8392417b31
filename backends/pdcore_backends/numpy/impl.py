"""Plans on NumPy arrays: `ArrayBackend` with a threaded, tiled contraction by scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pdcore import feature_contraction
from pdcore.array_backend import ArrayBackend
from pdcore.backend import Inputs
from pdcore.operands import Operands
from pdcore.plan import Features, Group, Plan, Scores

from . import INFO, scores, threads
from .tiles import PRODUCTS

__all__ = ["NumpyBackend"]

_LARGE = 2**16  # numbers in q and k; below this, starting threads costs more than they save


class NumpyBackend(ArrayBackend):
    """Runs plans on NumPy arrays, on as many threads as the process has cores.

    ``PDCORE_NUM_THREADS`` sets another number of threads.
    """

    info = INFO

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        # 0 / 0 and log 0 are expected, and resolved, in rows that see nothing.
        with np.errstate(all="ignore"):
            return super().attention(plan, inputs, lse=lse)

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and give its pullback, see `Backend.attention_vjp`."""
        with np.errstate(all="ignore"):
            out, lse, pull = super().attention_vjp(plan, inputs)

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            with np.errstate(all="ignore"):
                return pull(d_out, d_lse)

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        with np.errstate(all="ignore"):
            return super().attention_weights(plan, inputs)

    def groups(self, plan: Plan, inputs: Inputs) -> tuple[Group, ...]:
        """Split feature contractions into single heads, which then run beside each other.

        Scores need no splitting: their blocks are spread over the threads.
        """
        if isinstance(plan.contraction, Scores) or inputs.q.size + inputs.k.size < _LARGE:
            return plan.groups
        return tuple(Group(g.scale, (head,)) for g in plan.groups for head in g.heads)

    def each(self, function: Callable[[Group], Any], groups: tuple[Group, ...]) -> list[Any]:
        """Run a function on every head group, large ones by several threads."""
        if len(groups) == 1 or any(len(g.heads) > 1 for g in groups):
            return super().each(function, groups)
        found: dict[Group, Any] = {}

        def run(group: Group) -> None:
            found[group] = function(group)

        threads.run(run, groups, threads.count())
        return [found[group] for group in groups]

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores in tiles."""
        return super().scores(c, o) if c.weight == "log_features" else scores.scores(c, o)

    def scores_vjp(self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any,
                   d_level: Any) -> dict[str, Any]:  # fmt: skip
        """Pull back in tiles; with a bias or with scalars per head, by the generic blocks."""
        if c.weight == "log_features" or o.bias is not None or o.values:
            return super().scores_vjp(c, o, out, level, d_out, d_level)
        return scores.scores_vjp(c, o, out, level, d_out, d_level)

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, in products that BLAS runs in the calling thread."""
        return feature_contraction.features(c, o, xp=self.xp, size=_chunk(o), tiled=True)

    def features_vjp(self, c: Features, o: Operands, out: Any, level: Any, d_out: Any,
                     d_level: Any) -> dict[str, Any]:  # fmt: skip
        """Pull back, likewise."""
        return feature_contraction.features_vjp(
            c, o, out, level, d_out, d_level, xp=self.xp, size=_chunk(o), tiled=True
        )

    def versions(self) -> dict[str, str]:
        """Give NumPy's version and the number of threads."""
        return {"numpy": np.__version__, "threads": str(threads.count())}


def _chunk(o: Operands) -> int:
    """Choose the chunk of a feature contraction so that no product is split by BLAS."""
    width, values = o.q.shape[-1], o.v.shape[-1] + 1
    size = feature_contraction.CHUNK
    while size > 4 and size * max(size * max(width, values), width * values) > PRODUCTS:
        size //= 2
    return size
