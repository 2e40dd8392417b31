"""Keys and values pooled over windows, and the pullback, by CUDA kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.extend import Plan, Request, dtype_name

from .columns import ColumnLaunch, limit
from .operands import in_rows, one_lead, record, strides_of
from .runtime import KernelCache

__all__ = ["KERNELS", "PoolKernels", "pooled"]

#: The value of `Plan.pool_choice` where the kernels pool.
KERNELS = "kernels"

#: The most rows that one lane sums; longer windows are shared by several lanes.
ALONE = 8

#: `Windows` of kernels/pooling.cu, member by member.
WINDOWS = np.dtype(
    [
        ("rows", np.int64, 3),
        ("weights", np.int64),
        *(
            (n, np.int32)
            for n in ("heads", "count", "columns", "windows", "scale", "blocks", "team", "bits")
        ),
    ],
    align=True,
)


def pooled(plan: Plan, request: Request, capability: int, library: str) -> Plan:
    """Choose the kernels for the pooling of a plan if they can run it."""
    if not plan.pools:
        return plan
    why = limit(request.k, capability) or limit(request.v, capability)
    if why:
        return replace(plan, steps=(*plan.steps, f"pooling: {library}'s own operations: {why}"))
    step = f"pooling: kernels, each key and value read once, in {plan.accumulate}"
    if request.dtype != plan.accumulate:
        step += f", of keys and values in {request.dtype}"
    return replace(plan, pool_choice=KERNELS, steps=(*plan.steps, step))


class PoolKernels:
    """The pooling of `pdcore.extend.pool`, by the kernels of one runtime."""

    def __init__(self, cache: KernelCache) -> None:
        self.cache = cache

    def pool(self, x: Any, weights: Any, *, xp: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool rows (*B, H, M, D) by weights (*B, 1, ceil(M / s), s), see `heads.pool`."""
        *lead, heads, rows, columns = x.shape
        windows, scale = weights.shape[-2:]
        launch = ColumnLaunch(self.cache, dtype_name(x), columns, xp)
        # One (windows, s) for each sequence, or one for all sequences.
        weights = xp.ascontiguousarray(
            xp.reshape(weights, (math.prod(weights.shape[:-2]), windows, scale))
        )
        batch = math.prod(lead)

        def layout(strides: tuple[int, ...], blocks: int, team: int) -> Any:
            return record(
                WINDOWS,
                {
                    "rows": strides,
                    "weights": windows * scale if weights.shape[0] > 1 else 0,
                    "heads": heads,
                    "count": rows,
                    "columns": columns,
                    "windows": windows,
                    "scale": scale,
                    "blocks": blocks,
                    "team": team,
                    "bits": launch.bits,
                },
            )

        def pullback(cotangent: Any) -> Any:
            with self.cache.runtime.on(cotangent):
                result = launch.empty(*x.shape)
                blocks = -(-rows // launch.tile)
                launch.run(
                    "pooled_vjp",
                    batch * heads * blocks,
                    (
                        weights,
                        xp.ascontiguousarray(cotangent),
                        result,
                        layout((0, 0, 0), blocks, 1),
                    ),
                )
            return result

        with self.cache.runtime.on(x):
            source = in_rows(one_lead(x, lead, xp), xp)
            team = _team(scale, launch.lanes)
            blocks = -(-windows // (launch.lanes // team))
            result = launch.empty(*lead, heads, windows, columns)
            launch.run(
                "pooled",
                batch * heads * blocks,
                (source, weights, result, layout(strides_of(source)[:-1], blocks, team)),
            )
        return result, pullback


def _team(scale: int, lanes: int) -> int:
    """Choose the number of lanes that share a window of `scale` rows."""
    team = 1
    while team < lanes and team * ALONE < scale:
        team *= 2
    return team
