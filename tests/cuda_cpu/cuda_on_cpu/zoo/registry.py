"""The planted defects: the arguments of each kernel, and the results of the correct kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..module import empty

__all__ = ["DEFECTS", "Defect"]

#: Arguments of the kernel, and what some of them hold afterwards, by their place.
Case = tuple[list[Any], dict[int, np.ndarray]]
SIZE = 128


@dataclass(frozen=True)
class Defect:
    """A kernel with a defect, which also compiles without it.

    Attributes
    ----------
    name : str
        Of the kernel, whose first template argument is whether the defect is in it; of a launch,
        none but this.
    source : str
        The file.
    what : str
        What an author got wrong.
    case : callable
        Makes arguments and results.
    grid, block : tuple of int
    shared : int
        Bytes of dynamic shared memory.
    launch : callable, optional
        Changes the launch, where that is what is wrong: ``(grid, block, args, shared)``.
    """

    name: str
    source: str
    what: str
    case: Callable[[], Case]
    grid: tuple[int, ...] = (1,)
    block: tuple[int, ...] = (SIZE,)
    shared: int = 0
    launch: Callable[..., tuple[Any, ...]] | None = None


DEFECTS: dict[str, Defect] = {}


def _numbers(count: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(count).astype(dtype)


def _defect(source: str, what: str, **launch: Any) -> Callable[..., Callable[[], Case]]:
    def register(case: Callable[[], Case]) -> Callable[[], Case]:
        DEFECTS[case.__name__] = Defect(case.__name__, source, what, case, **launch)
        return case

    return register


_barrier = "barriers.cu"


@_defect(_barrier, "no barrier between a write to shared memory and another thread's read")
def missing_barrier_before_read() -> Case:
    x = _numbers(SIZE)
    return [x, empty(SIZE)], {1: x[::-1]}


@_defect(_barrier, "no barrier between a read of shared memory and the next tile's write")
def missing_barrier_before_write() -> Case:
    x = _numbers(4 * SIZE)
    return [x, empty(SIZE)], {1: x.reshape(4, SIZE)[:, ::-1].sum(0)}


@_defect(_barrier, "no `__syncwarp` between lanes that exchange by shared memory")
def missing_syncwarp() -> Case:
    x, t = _numbers(SIZE), np.arange(SIZE)
    # In the lockstep schedule, each lane has written what the next lane reads.
    return [x, empty(SIZE)], {1: x[np.where(t % 32, t - 1, t)]}


@_defect(_barrier, "a shuffle in place of `__syncwarp`: it orders no memory")
def shuffle_as_barrier() -> Case:
    x, t = _numbers(SIZE), np.arange(SIZE)
    return [x, empty(SIZE)], {1: x[t ^ 1] + x[t ^ 2]}


@_defect(_barrier, "threads of a block in two different `__syncthreads`")
def divergent_barrier() -> Case:
    return missing_barrier_before_read()


@_defect(_barrier, "lanes in `__syncwarp`, while those they wait for are in `__syncthreads`")
def barriers_that_wait_for_each_other() -> Case:
    return missing_barrier_before_read()


@_defect(_barrier, "threads of a block add to the same number without `atomicAdd`")
def race_in_a_block() -> Case:
    x = np.random.default_rng(0).integers(0, 8, SIZE).astype(np.int32)
    return [x, empty(8, np.int32)], {1: np.bincount(x, minlength=8)}


@_defect(_barrier, "blocks add to the same numbers without `atomicAdd`", grid=(3,))
def race_between_blocks() -> Case:
    x = np.arange(3 * SIZE, dtype=np.int32)
    return [x, np.zeros(SIZE, np.int32)], {1: x.reshape(3, SIZE).sum(0)}


@_defect(_barrier, "no `__threadfence` before the count that tells the last block", grid=(3,))
def missing_fence() -> Case:
    x = _numbers(3)
    return [x, empty(1), empty(3), np.zeros(1, np.uint32)], {1: x.sum(keepdims=True)}


@_defect(_barrier, "a block reads what the block before it wrote", grid=(3,))
def order_of_blocks() -> Case:
    x = _numbers(3)
    return [x, empty(3)], {1: x.cumsum()}


_warp = {"block": (32,)}


@_defect("warps.cu", "lanes of one shuffle in two branches", **_warp)
def divergent_shuffle() -> Case:
    x = _numbers(32)
    return [x, empty(32)], {1: x[np.arange(32) ^ 1]}


@_defect("warps.cu", "a shuffle reads a lane that has left the kernel", **_warp)
def shuffle_from_a_lane_that_left() -> Case:
    x = _numbers(20)
    return [x, empty(20), np.int32(20)], {1: x + np.append(x[1:], np.float32(0))}


@_defect("warps.cu", "a lane in an operation whose mask is without it", **_warp)
def lane_outside_its_mask() -> Case:
    return divergent_shuffle()


@_defect("warps.cu", "a reduction that leaves half of the lanes out", **_warp)
def wrong_lane() -> Case:
    x = _numbers(32)
    return [x, empty(32)], {1: np.full(32, x.sum())}


def _product() -> Case:
    a, b = (_numbers(16 * n, np.float16).reshape(16, n) for n in (16, 8))
    result = a.astype(np.float32) @ b.astype(np.float32)
    return [a.view(np.uint16), b.view(np.uint16), empty((16, 8))], {2: result}


@_defect("warps.cu", "the halves of an `mma` operand swapped", **_warp)
def fragment_in_the_wrong_place() -> Case:
    return _product()


@_defect("warps.cu", "`ldmatrix` without `.trans` for a matrix stored by rows", **_warp)
def matrix_not_transposed() -> Case:
    return _product()


@_defect("warps.cu", "rows for `ldmatrix` that are not aligned to 16 bytes", **_warp)
def misaligned_row() -> Case:
    return _product()


_memory = "memory.cu"


@_defect(_memory, "the guard of a global write is `<=`", grid=(2,))
def global_write_past_the_end() -> Case:
    x = _numbers(200)
    return [x, empty(200), np.int32(200)], {1: 2 * x}


@_defect(_memory, "a stencil reads the neighbour of the last element", grid=(2,))
def global_read_past_the_end() -> Case:
    x = _numbers(200)
    return [x, empty(200), np.int32(200)], {1: x + np.append(x[1:], np.float32(0))}


@_defect(_memory, "an index past the end of dynamic shared memory", shared=4 * SIZE)
def dynamic_shared_past_the_end() -> Case:
    x = _numbers(SIZE)
    return [x, empty(SIZE)], {1: x}


@_defect(_memory, "an index past the end of a static shared array")
def static_shared_past_the_end() -> Case:
    return dynamic_shared_past_the_end()


@_defect(_memory, "an index past the end of a local array")
def local_past_the_end() -> Case:
    x = _numbers(SIZE)
    places = np.full(SIZE, 3, np.int32)
    return [x, empty(SIZE), places], {1: x}


@_defect(_memory, "a `float4` is read from an address that is no multiple of 16")
def misaligned_vector() -> Case:
    x = _numbers(4 * SIZE + 1)
    return [x, empty(SIZE)], {1: x[1:].reshape(SIZE, 4).sum(1)}


@_defect(_memory, "the index of an element is more than an `int` holds", block=(1,))
def index_overflow() -> Case:
    y = empty(1, np.int64)
    return [y, np.int32(70_000), np.int32(40_000)], {0: np.array([70_000 * 40_000])}


@_defect(_memory, "a register is read that nothing was put in")
def uninitialised_register() -> Case:
    x = _numbers(4 * SIZE)
    return [x, empty(SIZE), np.int32(4)], {1: x.reshape(SIZE, 4).sum(1)}


@_defect(_memory, "a place of shared memory is read that nothing was written to")
def uninitialised_shared() -> Case:
    return missing_barrier_before_read()


@_defect(_memory, "the last output is not written", grid=(2,))
def output_not_written() -> Case:
    x = _numbers(200)
    return [x, empty(200), np.int32(200)], {1: x}


_copy = "copies.cu"


@_defect(_copy, "no `cp.async.wait_group`")
def missing_wait() -> Case:
    x = _numbers(4 * SIZE)
    return [x, empty(SIZE)], {1: x[:SIZE]}


@_defect(_copy, "a wait that lets the group that is needed be on its way")
def wait_for_the_wrong_group() -> Case:
    x = _numbers(8 * SIZE)
    return [x, empty(SIZE)], {1: x[:SIZE] + x[4 * SIZE : 5 * SIZE]}


@_defect(_copy, "no barrier after the wait: it is for the thread's own copies")
def missing_barrier_after_wait() -> Case:
    x = _numbers(4 * SIZE)
    return [x, empty(SIZE)], {1: x[: -SIZE - 1 : -1]}


@_defect(_copy, "no barrier before a buffer is filled again")
def missing_barrier_before_refill() -> Case:
    x = _numbers(12 * SIZE)
    return [x, empty(SIZE)], {1: x.reshape(3, 4 * SIZE)[:, : -SIZE - 1 : -1].sum(0)}


@_defect(_copy, "a copy of 16 bytes from an address that is no multiple of 16")
def misaligned_copy() -> Case:
    x = _numbers(4 * SIZE + 4)
    return [x, empty(SIZE)], {1: x[:SIZE]}


@_defect(_copy, "the copy of a ragged tile reads all of it, rather than zero-filling")
def copy_past_the_end() -> Case:
    x = _numbers(210)
    whole = np.append(x, np.zeros(4 * SIZE - 210, np.float32)).reshape(SIZE, 4)
    return [x, empty(SIZE), np.int32(210)], {1: whole[:, 0] + whole[:, 3]}


def _scaled() -> Case:
    x = _numbers(200)
    return [x, empty(200), np.int32(200), np.float32(3)], {1: 3 * x}


def _launch(name: str, what: str, change: Callable[..., tuple[Any, ...]]) -> None:
    DEFECTS[name] = Defect(name, "launches.cu", what, _scaled, grid=(2,), launch=change)


def _with(place: int, value: Any) -> Callable[..., tuple[Any, ...]]:
    """Return a function that replaces one argument of a launch."""
    return lambda grid, block, args, shared: (
        grid,
        block,
        [*args[:place], value, *args[place + 1 :]],
        shared,
    )


_launch("too_few_arguments", "an argument left out", lambda g, b, a, s: (g, b, a[:-1], s))
_launch("wrong_width", "an `int64` for an `int`", _with(2, np.int64(200)))
_launch("python_int", "a Python int, which is passed as 8 bytes, for an `int`", _with(2, 200))
_launch("wrong_kind", "an `int32` for a `float`", _with(3, np.int32(3)))
_launch("wrong_array", "an array of float64 for a pointer to `float`", _with(0, np.zeros(200)))
_launch("too_many_threads", "more than 1024 threads", lambda g, b, a, s: (g, (64, 32), a, s))
_launch(
    "too_many_blocks", "more than 65535 blocks along y", lambda g, b, a, s: ((1, 65536), b, a, s)
)
_launch(
    "too_much_shared_memory",
    "more than 48 KiB of shared memory without asking",
    lambda g, b, a, s: (g, b, a, 50_000),
)
