"""The contraction by scores on tensor cores: which calls they run, and their launches."""

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
    Recentre,
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

#: The columns of queries and of values for which there are tiles.
WIDTHS = (32, 64, 96, 128)
#: The oldest compute capability that has the instructions.
CAPABILITY = 80
#: Threads of a block, MMA_THREADS of kernels/mma_tiles.cuh, and its rows in the forward, ROWS of
#: kernels/scores_mma.cu.
THREADS = 128
ROWS = 128
#: Rows or keys of a block of the pullback, OWN of kernels/scores_mma_vjp.cu.
OWN = 64
#: Keys are far from 0 in a feature whose median is more than this many median deviations, which
#: are 8 standard deviations of normal keys: those within 4 are between a half and twice the median.
FAR = 12


@dataclass(frozen=True)
class TensorCores(Compiled):
    """The choice of tensor cores for the products of a contraction by scores.

    Attributes
    ----------
    dtype : {"float16", "bfloat16"}
        The dtype in which queries, keys, values and weights are multiplied.
    """

    dtype: str = "float16"


def unfit(plan: Plan, request: Request, capability: int) -> str:
    """Return why tensor cores cannot run a 16-bit plan of the kernels; empty if they can."""
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
    if not plan.fits(request.dtype):
        return f"transformed rows may leave the range of {request.dtype}"
    if request.weights:
        return "the weights are array operations"
    if request.dropout:
        return "tensor cores drop no weights"
    if request.vjp and c.scalars:
        return "tensor cores give no gradients of a kernel's parameters"
    return ""


def folded_in(plan: Plan, request: Request) -> Plan:
    """Fold the statistics of the keys into the query load, if 16 bits can hold the queries.

    float16 cannot hold queries that are divided by a variance. Statistics that the caller passes
    need not be those of the keys, see `FoldedLoad`, and the load has one state for all rows. A
    pullback needs the row constant separately from L.
    """
    first = plan.transforms[0] if len(plan.transforms) == 1 else None
    holds = isinstance(first, Recentre) or (isinstance(first, Fold) and request.dtype == "bfloat16")
    if request.vjp or not holds or plan.summary is None or plan.prefix:
        return plan
    step = "fold: as the kernel reads queries, with c = 0 for keys that are not pooled"
    assert isinstance(first, Fold | Recentre)
    folded = replace(first, choice=FoldedLoad(first))
    return replace(plan, transforms=(folded,), steps=(*plan.steps, step))


@dataclass(frozen=True)
class RoundedGaussian:
    """`GaussianRows` of rows that are rounded as the tensor cores read them.

    If the rows were rounded after their squares were computed, the squares would not match the
    product: the difference grows with the norms of the points, not with their distance.

    16-bit inputs are exact as they are, and so is x - c for x from c / 2 to 2 c (Sterbenz's lemma).
    So a feature is shifted by the median c of its keys, for small squares, only where keys are in
    that range; elsewhere a shift would cost lse its float32 accuracy.

    Attributes
    ----------
    gaussian : GaussianRows
        The transform that this one replaces.
    dtype : {"float16", "bfloat16"}
    """

    gaussian: GaussianRows
    dtype: str

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Pullback]:
        """Compute distances between the rounded shifted rows, see `GaussianRows`."""
        center = central(rows.k, rows.key_mask, xp=xp)
        spread = central(xp.abs(rows.k - center), rows.key_mask, xp=xp)
        far = xp.abs(center) > FAR * spread
        shift = xp.where(far, center, xp.zeros_like(center))
        shifted = [x - shift for x in (rows.q, rows.k)]
        q, k = (xp.astype(_rounded(x, self.dtype, xp), x.dtype) for x in shifted)
        return self.gaussian.between(q, k, rows.key_mask, xp=xp)


def rounded_in(plan: Plan, dtype: str) -> Plan:
    """Return the plan with distances between rows that are rounded to a dtype."""
    steps = tuple(
        replace(step, choice=RoundedGaussian(step, dtype))
        if isinstance(step, GaussianRows)
        else step
        for step in plan.transforms
    )
    return replace(plan, transforms=steps)


def memory(dim: int, value_dim: int, plain: bool = True) -> int:
    """Return the bytes of shared memory of a block: Forward::BYTES of kernels/scores_mma.cu."""
    keys = 64 if value_dim <= 64 else 32 if plain or value_dim < 128 else 16
    stages = 2
    return 2 * (ROWS * dim + stages * keys * (dim + value_dim)) + 8 * ROWS + 1280


def pullback_memory(dim: int, value_dim: int) -> int:
    """Return the bytes of a block of the pullback: Backward::BYTES of kernels/scores_mma_vjp.cu."""
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
    """Contract groups, see `ArrayBackend.scores_of_groups`."""
    with cache.runtime.on(operands[0].q):
        rounded = [_rounded_operands(cache.runtime, c, o, xp) for o in operands]
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
    """Compute the gradients, in the dtypes of the operands, see `scores_vjp`."""
    names = ("q", "k", "v") if o.key_bias is None else ("q", "k", "v", "key_bias")
    like = {name: getattr(o, name) for name in names}
    with cache.runtime.on(o.q):
        o = _rounded_operands(cache.runtime, c, o, xp)
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
    """Return the arrays of the `QueryFold`, with a row (D) for each sequence and key head."""
    if o.fold is None:
        return ()
    shape = (*o.k.shape[:-2], 1, o.k.shape[-1])
    return tuple(xp.ascontiguousarray(xp.broadcast_to(x, shape)) for x in o.fold)


def _rounded_operands(runtime: Runtime, c: Scores, o: Operands, xp: Any) -> Operands:
    """Round rows of an earlier step to 16 bits, and copy rows that are not aligned to 16 bytes."""
    q, k, v = (_aligned(runtime, _rounded(x, c.choice.dtype, xp), xp) for x in (o.q, o.k, o.v))
    return o._replace(q=q, k=k, v=v)


def _rounded(x: Any, dtype: str, xp: Any) -> Any:
    if x.dtype.itemsize == 2:
        return x
    if dtype == "float16":
        return xp.astype(x, xp.float16)
    from ml_dtypes import bfloat16  # a caller with bfloat16 arrays has it installed

    return xp.astype(x, np.dtype(bfloat16))


def _aligned(runtime: Runtime, x: Any, xp: Any) -> Any:
    steps = [s for s, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1]
    contiguous = x.strides[-1] == x.itemsize
    if not math.prod(x.shape) or (
        contiguous and not any(s % 16 for s in steps) and runtime.address(x) % 16 == 0
    ):
        return x
    return xp.asarray(x, copy=True, order="C")
