"""Plans on the JAX arrays of one program: `ArrayBackend`, with JAX's own transformations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import numpy
from array_api_compat import array_namespace

from pdcore.extend import (
    ArrayBackend,
    Call,
    Features,
    Group,
    GroupRun,
    Inputs,
    Operands,
    Plan,
    Scores,
    Statistics,
    UnsupportedError,
    constants_held,
    feature_contraction,
    windows,
)

from . import INFO
from .choice import ByBlocks, ByCudnn
from .cudnn import cudnn_scores
from .device import find
from .features import prefix_contract
from .namespace import NAMESPACE, in_full
from .prefix import prefix_states
from .scores import scores
from .segments import SegmentRun, with_runs

__all__ = ["LocalJaxBackend"]


class LocalJaxBackend(ArrayBackend):
    """Runs plans on JAX arrays of one device or program, without an `axis_name`."""

    info = INFO
    compiles = True
    words = "uint32"

    @property
    def xp(self) -> Any:
        """The array-API namespace, which is jax.numpy."""
        return NAMESPACE

    def pool(self, kind: str, x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool keys or values, see `heads.pool`."""
        pooled, pullback = super().pool(kind, x, weights)
        if kind == "mean":
            # The last step must not be a product. XLA repeats a product wherever pooled keys are
            # read, rounded or fused: the first key minus itself would not be 0, and a variance of 0
            # would make the difference large.
            cut = windows(x, weights.shape[-1], xp=self.xp)
            pooled = jax.numpy.sum(cut * weights[..., None], axis=-2)
        return pooled, pullback

    def prefix_states(self, stats: Statistics, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute the state of every prefix, see `.prefix.prefix_states`."""
        return prefix_states(stats, keys, mask)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, by cuDNN if the plan chose it; see `.scores.scores`."""
        turns = isinstance(c.choice, ByBlocks) and c.choice.turns
        by_blocks = partial(scores, c, turns=turns)
        result = cudnn_scores(c, o, by_blocks) if isinstance(c.choice, ByCudnn) else None
        return by_blocks(o) if result is None else result

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, under causal by loops of XLA; see `.features`."""
        return feature_contraction.features(c, o, xp=self.xp, contract=prefix_contract)

    def group_run(self, call: Call, group: Group) -> GroupRun:
        """Return the steps of a head group, those of `SegmentRun` for traced segments."""
        steps = GroupRun if call.inputs.segments is None else SegmentRun
        return steps(self, call, group)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        results: tuple[Any, Any] = _attention(self, plan, *_static(inputs), lse=lse)
        return results

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and return its pullback, see `Backend.attention_vjp`."""
        out, lse, pull = _with_pullback(self, plan, *_static(inputs))

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            cotangents = d_out, jax.numpy.zeros_like(lse) if d_lse is None else d_lse
            gradients: dict[str, Any] = _pulled(pull, cotangents)
            return gradients

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        return _weights(self, plan, *_static(inputs))

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function as one program, see `ArrayBackend.program`."""
        compiled: Callable[..., Any] = jax.jit(function)
        return compiled

    def computing(self, x: Any) -> AbstractContextManager[Any]:
        """Return a context of full precision, see `ArrayBackend.computing`."""
        return in_full()

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Convert an array of another library by DLPack, and copy it to `device`."""
        x = array if isinstance(array, jax.Array) else _imported(array)
        return x if device is None else jax.device_put(x, find(device))

    def synchronize(self) -> None:
        """Wait until all live arrays are computed."""
        jax.block_until_ready(jax.live_arrays())

    def versions(self) -> dict[str, str]:
        """Return the versions of JAX and of jaxlib, its compiler."""
        compiler = importlib.import_module("jaxlib").__version__
        return {"jax": str(jax.__version__), "jaxlib": str(compiler)}


def _imported(array: Any) -> jax.Array:
    """Import an array by DLPack, by a copy if its strides are not those of a contiguous array."""
    try:
        return jax.numpy.from_dlpack(array)
    except jax.errors.JaxRuntimeError:
        copy = array_namespace(array).asarray(array, copy=True)
        return jax.numpy.from_dlpack(copy)


#: A call is one program: JAX takes several times as long to compile single operations, and
#: compiles them again for each shape.
_program = partial(jax.jit, static_argnums=(0, 1, 2))


@partial(_program, static_argnames="lse")
def _attention(backend: LocalJaxBackend, plan: Plan, static: Any, arrays: Any, *, lse: bool) -> Any:
    inputs = constants_held(plan, _joined(arrays, static), jax.lax.stop_gradient)
    with in_full():
        return ArrayBackend.attention(backend, plan, inputs, lse=lse)


@_program
def _with_pullback(backend: LocalJaxBackend, plan: Plan, static: Any, arrays: Any) -> Any:
    params = arrays["params"]
    moving = {name: arrays[name] for name in ("q", "k", "v", "bias") if arrays[name] is not None}

    def run(moving: dict[str, Any]) -> Any:
        changed = {name: moving.get(name, x) for name, x in arrays.items()}
        changed["params"] = {name: moving[name] for name in params}
        return _attention(backend, plan, static, changed, lse=True)

    (out, lse), pull = jax.vjp(run, {**moving, **params})
    # The pullback is a pytree whose leaves are the residuals, so a program can return it.
    return out, lse, pull


def _pull(pull: Any, cotangents: Any) -> Any:
    with in_full():
        return pull(cotangents)[0]


_pulled = jax.jit(_pull)


@_program
def _weights(backend: LocalJaxBackend, plan: Plan, static: Any, arrays: Any) -> Any:
    with in_full():
        return ArrayBackend.attention_weights(backend, plan, _joined(arrays, static))


def _static(inputs: Inputs) -> tuple[tuple[Any, float], dict[str, Any]]:
    """Return an offset known in Python, by which programs skip blocks, dropout, and the arrays."""
    if inputs.axis_name is not None:
        raise UnsupportedError(
            f"axis_name: got {inputs.axis_name!r}, expected None: only attention runs in shards"
        )
    arrays = {name: x for name, x in inputs._asdict().items() if name in _ARRAYS}
    if isinstance(seed := inputs.seed, int):  # one program for all seeds
        arrays["seed"] = numpy.array([seed & 0xFFFFFFFF, seed >> 32], numpy.uint32)
    if not isinstance(inputs.offset, int | str):
        return (None, inputs.dropout), {**arrays, "offset": inputs.offset}
    return (inputs.offset, inputs.dropout), arrays


_ARRAYS = frozenset(
    {"q", "k", "v", "mask", "key_mask", "bias", "params", "labels", "segments", "seed"}
)


def _joined(arrays: Mapping[str, Any], static: tuple[Any, float]) -> Inputs:
    offset, dropout = static
    known = {} if offset is None else {"offset": offset}
    return with_runs(Inputs(**arrays, **known, dropout=dropout))
