"""Variants of kernels, each of which decides a question of design by its speed.

A variant is timed in turn with the code as it is, once its result is right. It is no part of a
backend: what a record decides is then written there, and its variant goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

from pdcore import bind
from pdcore.backend import Inputs

from ..bench.measurements import Bench
from ..bench.peers import Peer
from ..bench.workload import DIRECTIONS, Workload
from ..judge.nonconforming import Nonconforming

__all__ = [
    "EIGHT_WARPS",
    "SCALE_IN_REGISTER",
    "VARIANTS",
    "Changes",
    "Variant",
    "changed",
    "constants_of",
    "variant_steps",
]


class Variant(NamedTuple):
    """A variant: the backend that it changes, the specs that it computes, how it is measured."""

    backend: str
    specs: tuple[str, ...]
    measure: Callable[[Bench, Workload], None]


class Changes(NamedTuple):
    """Changes of the CuPy backend.

    Attributes
    ----------
    code : tuple of (str, str)
        Texts of the kernels, and what stands in their place.
    constants : tuple of (str, int)
        Names of `pdcore_backends.cupy.tensor_cores`, with their values.
    more_memory : int
        Bytes of shared memory that a block has in addition.
    """

    code: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...] = ()
    more_memory: int = 0


#: 256 threads in a block of tensor cores, with as many rows: half as many blocks read each key.
EIGHT_WARPS = Changes(
    (("constexpr int WARPS = 4;", "constexpr int WARPS = 8;"), ("1280", "2304")),
    (("THREADS", 256), ("ROWS", 256), ("OWN", 128)),
    1024,
)
#: The scale of the logits in a register of each thread, not read again for each score.
SCALE_IN_REGISTER = Changes(
    (
        ("bool plain, float s, float d_weight", "bool plain, float scale, float s, float d_weight"),
        (
            "  const float scale = float(head.shape->scale);\n  const float logit",
            "  const float logit",
        ),
        ("pulled(head, plain, s.x", "pulled(head, plain, scale, s.x"),
        (
            "  const Head& head = source.head;\n  const int tiles",
            (
                "  const Head& head = source.head;\n  const float scale = float(shape.scale);\n"
                "  const int tiles"
            ),
        ),
    )
)


def variant_steps(backend: str, device: str) -> dict[str, tuple[Variant, Workload]]:
    """Return the variants of a backend, each with each call that is timed, by name."""
    gpu = device.partition(":")[0] == "cuda"
    shapes = [(2, 16, 4096, dim) for dim in (64, 128)] if gpu else [(1, 4, 128, 32)]
    return {
        f"{name}: {workload}": (variant, workload)
        for name, variant in VARIANTS.items()
        if variant.backend == backend
        for shape in shapes
        for spec in variant.specs
        for direction in DIRECTIONS
        for workload in [Workload(spec, shape, "bfloat16" if gpu else "float32", direction)]
    }


def _keys_as_they_are(bench: Bench, workload: Workload) -> None:
    """Attention-BN by SDPA, with the inverse variance in the queries and the keys as they are.

    The mean of the keys moves all logits of a row alike, so the softmax does not change.
    """

    def make(workload: Workload) -> Callable[[Mapping[str, Any]], Any]:
        import torch

        def attend(x: Mapping[str, Any]) -> Any:
            keys = x["k"].float()
            variance, mean = torch.var_mean(keys, dim=-2, keepdim=True, correction=0)
            q = ((x["q"].float() - mean) / (variance + 1e-5)).to(x["q"].dtype)
            return torch.nn.functional.scaled_dot_product_attention(q, x["k"], x["v"])

        return attend

    name = "keys as they are"
    bench.peers = [Peer(name, "torch", ("bn",), make, ("cpu", "cuda"), backward=True)]
    bench.against_peers(workload)
    if bench.speed["missing_peers"]:
        raise Nonconforming(str(bench.speed["missing_peers"]))


def _cupy(name: str, changes: Changes) -> Variant:
    def measure(bench: Bench, workload: Workload) -> None:
        _against_changed(bench, workload, _changed_backend(changes), changes, name)

    return Variant("cupy", ("softmax", "causal"), measure)


@contextmanager
def constants_of(changes: Changes) -> Iterator[None]:
    """Set the constants of the launches in a block."""
    from pdcore_backends.cupy import tensor_cores

    constants: dict[str, Any] = dict(changes.constants)
    for name in ("memory", "pullback_memory"):
        constants[name] = _more(getattr(tensor_cores, name), changes.more_memory)
    with patch.multiple(tensor_cores, **constants):
        yield


def _more(memory: Callable[..., int], more: int) -> Callable[..., int]:
    return lambda *arguments: memory(*arguments) + more


def changed(code: str, kernel: str, changes: Changes) -> str:
    """Return the code of a kernel, changed where it is one of tensor cores."""
    if kernel.startswith("scores_mma"):
        for before, after in changes.code:
            code = code.replace(before, after)
    return code


@cache
def _changed_backend(changes: Changes) -> Any:
    from pdcore_backends.cupy.impl import CupyBackend, CupyRuntime
    from pdcore_backends.cupy.kernel_backend import KernelBackend

    class Runtime(CupyRuntime):
        def compile(self, code: str, name: str, shared: int = 0) -> Any:
            return super().compile(changed(code, name, changes), name, shared)

    class Changed(CupyBackend):
        def __init__(self) -> None:
            KernelBackend.__init__(self, Runtime())

    return Changed()


def _against_changed(
    bench: Bench, workload: Workload, backend: Any, changes: Changes, name: str
) -> None:
    """Time the backend in turn with a changed one, whose result is compared with the oracle."""
    vjp = workload.direction != "forward"

    def call_of(x: Mapping[str, Any], d: Any, changed: bool) -> Callable[[], Any]:
        own, plan, inputs, _ = bind(workload.spec, backend=bench.backend).prepare(
            Inputs(x["q"], x["k"], x["v"]), vjp=vjp
        )
        runner = backend if changed else own

        def call() -> Any:
            if not vjp:
                return runner.attention(plan, inputs)[0]
            out, _, pull = runner.attention_vjp(plan, inputs)
            gradients = pull(d)
            return out, {n: gradients[n] for n in "qkv"}

        def changed_call() -> Any:
            with constants_of(changes):
                return call()

        return changed_call if changed else call

    with bench.framework.precision(workload.dtype):
        if not bench.check_backend(workload):
            return
        if not bench.green(name, workload, lambda x, d: call_of(x, d, True), bench.framework):
            raise Nonconforming(f"{name}: {bench.speed['numerics'][-1]['error_over_budget']}")
        x, d = bench.arrays(workload, bench.framework)
        calls = {bench.backend: call_of(x, d, False), name: call_of(x, d, True)}
        bench.against(workload, calls)


VARIANTS: Mapping[str, Variant] = {
    "Attention-BN with the keys as they are": Variant("torch", ("bn",), _keys_as_they_are),
    "eight warps": _cupy("eight warps", EIGHT_WARPS),
    "the scale in a register": _cupy("the scale in a register", SCALE_IN_REGISTER),
}
