"""The contraction by scores on tensor cores: what they take, and their launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pdcore.extend import (
    Contracted,
    Fold,
    GaussianRows,
    Operands,
    Plan,
    Pullback,
    Request,
    Rows,
    Scores,
    central,
    dtype_name,
)

from .grouped import ForwardKernel, GroupCall, contract
from .operands import NULL
from .programs import type_of
from .query_fold import FoldedLoad
from .runtime import KernelCache, Runtime
from .score_call import ScoreCall
from .scores import Compiled

__all__ = [
    "WIDTHS",
    "TensorCores",
    "folded_in",
    "forward",
    "memory",
    "pullback",
    "pullback_memory",
    "rounded_in",
    "unfit",
]

#: Columns of queries and of values that tiles are made for.
WIDTHS = (32, 64, 96, 128)
#: The oldest device that has the instructions.
CAPABILITY = 80
#: Of a block, MMA_THREADS of kernels/mma_tiles.cuh; and its rows, ROWS of kernels/scores_mma.cu.
THREADS = 128
ROWS = 128
#: Rows, or keys, of a block of the pullback, OWN of kernels/scores_mma_vjp.cu.
OWN = 64


@dataclass(frozen=True)
class TensorCores(Compiled):
    """The choice of tensor cores for the products of a contraction by scores.

    Attributes
    ----------
    dtype : {"float16", "bfloat16"}
        In which queries, keys and values are multiplied, and the weights too.
    """

    dtype: str = "float16"


def unfit(plan: Plan, request: Request, capability: int) -> str:
    """Say why tensor cores do not run a 16-bit plan that the kernels run, nothing if they do."""
    c = plan.contraction
    if capability < CAPABILITY:
        return (
            f"tensor cores are for compute capability {CAPABILITY / 10} and later, the device "
            f"has {capability / 10}"
        )
    if not isinstance(c, Scores) or c.weight != "log":
        return "tensor cores are for weights that have a logarithm, which keeps them within 16 bits"
    if request.q[-1] not in WIDTHS or request.v[-1] not in WIDTHS:
        return (
            f"tensor cores are for D and Dv of {', '.join(map(str, WIDTHS))}, got "
            f"{request.q[-1]} and {request.v[-1]}"
        )
    if plan.holds != "float16":
        return f"transformed rows may leave the range of {request.dtype}"
    if request.weights:
        return "the weights are array operations"
    if request.vjp and c.scalars:
        return "tensor cores give no gradients of a kernel's parameters"
    return ""


def folded_in(plan: Plan, request: Request) -> Plan:
    """Let the query load fold the statistics of the keys, where 16-bit queries hold the result.

    Those of float16 do not; given statistics need not be those of the keys, see `FoldedLoad`; and
    a pullback needs the row constant apart from L.
    """
    first = plan.transforms[0] if len(plan.transforms) == 1 else None
    if (
        request.vjp
        or request.dtype != "bfloat16"
        or not isinstance(first, Fold)
        or plan.summary is None
    ):
        return plan
    step = "fold: as the kernel reads queries, with c = 0 for keys that are not pooled"
    folded = replace(first, choice=FoldedLoad(first))
    return replace(plan, transforms=(folded,), steps=(*plan.steps, step))


@dataclass(frozen=True)
class RoundedGaussian:
    """Distances between points as the tensor cores read them.

    Of rows that are rounded afterwards, the squares would not be those of the product: the
    difference grows with the points' norms, not with their distance.

    Attributes
    ----------
    gaussian : GaussianRows
        In whose place it is chosen.
    dtype : {"float16", "bfloat16"}
    """

    gaussian: GaussianRows
    dtype: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Round the shifted rows, and compute with what that gives, see `GaussianRows`."""
        shift = central(rows.k, rows.key_mask, xp=xp)
        shifted = [x - shift for x in (rows.q, rows.k)]
        q, k = (xp.astype(_rounded(x, self.dtype, xp), x.dtype) for x in shifted)
        return self.gaussian.between(q, k, rows.key_mask, xp=xp)


def rounded_in(plan: Plan, dtype: str) -> Plan:
    """Let distances be of rows that are rounded to a dtype already."""
    steps = tuple(
        replace(step, choice=RoundedGaussian(step, dtype))
        if isinstance(step, GaussianRows)
        else step
        for step in plan.transforms
    )
    return replace(plan, transforms=steps)


def memory(dim: int, value_dim: int, plain: bool = True) -> int:
    """Give the bytes of shared memory of a block, Forward::BYTES of kernels/scores_mma.cu."""
    keys = 64 if value_dim <= 64 else 32 if plain or value_dim < 128 else 16
    stages = 2
    return 2 * (ROWS * dim + stages * keys * (dim + value_dim)) + 8 * ROWS + 1280


def pullback_memory(dim: int, value_dim: int) -> int:
    """Give the same for a pullback, Backward::BYTES of kernels/scores_mma_vjp.cu."""
    by, stages = 64 if dim + value_dim <= 128 else 32, 2
    return 2 * (OWN + stages * by) * (dim + value_dim) + 8 * OWN + 1280


def forward(
    cache: KernelCache,
    c: Scores,
    operands: Sequence[Operands],
    heads: Sequence[tuple[int, ...]],
    *,
    xp: Any,
) -> Contracted:
    """Contract, see `ArrayBackend.scores_of_groups`."""
    with cache.runtime.on(operands[0].q):
        rounded = [_handed_over(cache.runtime, c, o, xp) for o in operands]
        groups = [
            GroupCall.of(ScoreCall(cache, c, o, xp), c.choice.rounds, _fold(o, xp)) for o in rounded
        ]
        x = groups[0].call.packed
        kernel = ForwardKernel(
            f"scores_mma<{x.dim}, {x.value_dim}>",
            ROWS,
            THREADS,
            memory(x.dim, x.value_dim, c.expression is None),
        )
        return contract(groups, heads, kernel)


def pullback(
    cache: KernelCache,
    c: Scores,
    o: Operands,
    out: Any,
    level: Any,
    d_out: Any,
    d_level: Any,
    *,
    xp: Any,
) -> dict[str, Any]:
    """Pull back, see `score_contraction.scores_vjp`; gradients are as what they are of."""
    names = ("q", "k", "v") if o.key_bias is None else ("q", "k", "v", "key_bias")
    like = {name: getattr(o, name) for name in names}
    with cache.runtime.on(o.q):
        o = _handed_over(cache.runtime, c, o, xp)
        call = ScoreCall(cache, c, o, xp)
        out, level, d_level = map(xp.ascontiguousarray, (out, level, d_level))
        d_out = xp.ascontiguousarray(_rounded(d_out, c.choice.dtype, xp))
        d_out = _aligned(cache.runtime, d_out, xp)
        cotangents = (d_out, level, call.delta(out, level, d_out, d_level))
        grads = {name: call.result(*x.shape, dtype=x.dtype) for name, x in like.items()}
        types = {name: type_of(dtype_name(x)) for name, x in like.items()}
        x = call.packed
        shared, program = pullback_memory(x.dim, x.value_dim), call.program(d_out=d_out)

        def launch(name: str, blocks: int, *results: Any) -> None:
            if blocks:
                kernel = cache.kernel(program, f"scores_mma_{name}>", shared)
                arguments = (*x.arrays, *cotangents, *results, x.shape)
                kernel((blocks,), (THREADS,), arguments, shared_mem=shared)

        heads, sizes = x.batch * x.heads, f"<{x.dim}, {x.value_dim}"
        launch(f"rows{sizes}, {types['q']}", heads * x.group * -(-x.rows // OWN), grads["q"])
        launch(
            f"keys{sizes}, {types['k']}, {types['v']}",
            heads * -(-x.keys // OWN),
            grads["k"],
            grads["v"],
            grads.get("key_bias", NULL),
        )
        if o.bias is not None:
            grads["bias"] = call.of_bias(cotangents)
    return grads


def _fold(o: Operands, xp: Any) -> tuple[Any, ...]:
    """Give what the query load folds in, a row (D) for each sequence and key head."""
    if o.fold is None:
        return ()
    shape = (*o.k.shape[:-2], 1, o.k.shape[-1])
    return tuple(xp.ascontiguousarray(xp.broadcast_to(x, shape)) for x in o.fold)


def _handed_over(runtime: Runtime, c: Scores, o: Operands, xp: Any) -> Operands:
    """Round rows that a step before has computed; copy rows that 16 bytes cannot be read from."""
    q, k, v = (_aligned(runtime, _rounded(x, c.choice.dtype, xp), xp) for x in (o.q, o.k, o.v))
    return o._replace(q=q, k=k, v=v)


def _rounded(x: Any, dtype: str, xp: Any) -> Any:
    if x.dtype.itemsize == 2:
        return x
    if dtype == "float16":
        return xp.astype(x, xp.float16)
    from ml_dtypes import bfloat16  # who passes such arrays has it

    return xp.astype(x, np.dtype(bfloat16))


def _aligned(runtime: Runtime, x: Any, xp: Any) -> Any:
    steps = [s for s, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1]
    beside = x.strides[-1] == x.itemsize
    if not math.prod(x.shape) or (
        beside and not any(s % 16 for s in steps) and runtime.address(x) % 16 == 0
    ):
        return x
    return xp.asarray(x, copy=True, order="C")
