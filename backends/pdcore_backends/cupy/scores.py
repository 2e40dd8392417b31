"""The contraction by scores and its pullback, by CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdcore.extend import Contracted, Operands, Scores

from .grouped import ForwardKernel, GroupCall, contract
from .programs import columns_for, memory, tile
from .runtime import KernelCache
from .score_call import THREADS, ScoreCall

__all__ = ["Compiled", "ScoreKernels"]


@dataclass(frozen=True)
class Compiled:
    """The choice of the kernels for a contraction.

    Attributes
    ----------
    rounds : bool
        Whether `out` is the result of the call, and so may be rounded to its dtype.
    """

    rounds: bool = False


class ScoreKernels:
    """The contraction by scores, by the kernels of one runtime."""

    def __init__(self, cache: KernelCache) -> None:
        self.cache, self.runtime = cache, cache.runtime

    def forward(
        self,
        c: Scores,
        operands: Sequence[Operands],
        heads: Sequence[tuple[int, ...]],
        *,
        xp: Any,
    ) -> Contracted:
        """Contract groups, see `ArrayBackend.scores_of_groups`; 16-bit arrays are not cast."""
        with self.runtime.on(operands[0].q):
            groups = [
                GroupCall.of(ScoreCall(self.cache, c, o, xp), c.choice.rounds) for o in operands
            ]
            first = groups[0].call
            width, scalar = first.packed.value_dim, first.scalar
            columns = columns_for(width)
            kernel = ForwardKernel(
                f"scores_forward<{columns}>",
                tile(scalar),
                THREADS,
                memory(scalar, columns),
                max(1, -(-width // columns)),
            )
            return contract(groups, heads, kernel)

    def pullback(
        self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any, *, xp: Any
    ) -> dict[str, Any]:
        """Compute the gradients, in the dtypes of the operands, see `scores_vjp`.

        The gradient of a bias that is broadcast is in the dtype of sums.
        """
        with self.runtime.on(o.q):
            call = ScoreCall(self.cache, c, o, xp)
            out, level, d_out, d_level = map(xp.ascontiguousarray, (out, level, d_out, d_level))
            delta = xp.zeros_like(level) if c.signed else call.delta(out, level, d_out, d_level)
            cotangents = (d_out, level, delta)
            grads = call.of_rows(cotangents) | call.of_keys(cotangents)
            if o.bias is not None:
                grads["bias"] = call.of_bias(cotangents)
        return grads
