"""Plans on the JAX arrays of one program: `ArrayBackend`, with JAX's own transformations."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax

from pdcore.extend import (
    ArrayBackend,
    Features,
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
from .namespace import NAMESPACE
from .prefix import prefix_states
from .scores import scores

__all__ = ["LocalJaxBackend"]


class LocalJaxBackend(ArrayBackend):
    """Runs plans on JAX arrays of one device or program, without an `axis_name`."""

    info = INFO

    @property
    def xp(self) -> Any:
        """jax.numpy, which is an array-API namespace itself."""
        return NAMESPACE

    def pool(self, kind: str, x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool keys or values, see `heads.pool`."""
        pooled, pullback = super().pool(kind, x, weights)
        if kind == "mean":
            # The last step must not be a product. XLA repeats it wherever pooled keys are read, and
            # rounds it or not: the first key less itself would not be 0, and a variance of 0 makes
            # that large.
            cut = windows(x, weights.shape[-1], xp=self.xp)
            pooled = jax.numpy.sum(cut * weights[..., None], axis=-2)
        return pooled, pullback

    def prefix_states(self, stats: Statistics, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute the state of every prefix, see `.prefix.prefix_states`."""
        return prefix_states(stats, keys, mask)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, by cuDNN where the plan says so; see `.scores.scores`."""
        if isinstance(c.choice, ByCudnn):
            result = cudnn_scores(c, o)
            if result is not None:
                return result
        return scores(c, o, turns=isinstance(c.choice, ByBlocks) and c.choice.turns)

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, under causal by loops of XLA's; see `.features`."""
        return feature_contraction.features(c, o, xp=self.xp, contract=prefix_contract)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        results: tuple[Any, Any] = _attention(self, plan, *_static(inputs), lse=lse)
        return results

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and give its pullback, see `Backend.attention_vjp`."""
        out, lse, pull = _with_pullback(self, plan, *_static(inputs))

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            cotangents = d_out, jax.numpy.zeros_like(lse) if d_lse is None else d_lse
            gradients: dict[str, Any] = _pulled(pull, cotangents)
            return gradients

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        return _weights(self, plan, *_static(inputs))

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Take an array of another library by DLPack, and move it where it was asked to be."""
        x = array if isinstance(array, jax.Array) else jax.numpy.from_dlpack(array)
        return x if device is None else jax.device_put(x, find(device))

    def synchronize(self) -> None:
        """Wait for all arrays that exist."""
        jax.block_until_ready(jax.live_arrays())

    def versions(self) -> dict[str, str]:
        """Give the versions of JAX and of its compiler."""
        compiler = importlib.import_module("jaxlib").__version__
        return {"jax": str(jax.__version__), "jaxlib": str(compiler)}


#: A call is one program: single operations take JAX several times as long to compile, and for
#: each shape anew.
_program = partial(jax.jit, static_argnums=(0, 1, 2))


@partial(_program, static_argnames="lse")
def _attention(backend: LocalJaxBackend, plan: Plan, offset: Any, arrays: Any, *, lse: bool) -> Any:
    inputs = constants_held(plan, _joined(arrays, offset), jax.lax.stop_gradient)
    with _in_full():
        return ArrayBackend.attention(backend, plan, inputs, lse=lse)


@_program
def _with_pullback(backend: LocalJaxBackend, plan: Plan, offset: Any, arrays: Any) -> Any:
    params = arrays["params"]
    moving = {name: arrays[name] for name in ("q", "k", "v", "bias") if arrays[name] is not None}

    def run(moving: dict[str, Any]) -> Any:
        changed = {name: moving.get(name, x) for name, x in arrays.items()}
        changed["params"] = {name: moving[name] for name in params}
        return _attention(backend, plan, offset, changed, lse=True)

    (out, lse), pull = jax.vjp(run, {**moving, **params})
    # The pullback is a tree whose leaves are what it keeps, so a program can give it back.
    return out, lse, pull


def _pull(pull: Any, cotangents: Any) -> Any:
    with _in_full():
        return pull(cotangents)[0]


_pulled = jax.jit(_pull)


@_program
def _weights(backend: LocalJaxBackend, plan: Plan, offset: Any, arrays: Any) -> Any:
    with _in_full():
        return ArrayBackend.attention_weights(backend, plan, _joined(arrays, offset))


def _static(inputs: Inputs) -> tuple[Any, dict[str, Any]]:
    """Part an offset that is known in Python, which decides what a program skips, from arrays."""
    if inputs.axis_name is not None:
        raise UnsupportedError(
            f"axis_name: got {inputs.axis_name!r}, expected None: only attention runs in shards"
        )
    arrays = {name: x for name, x in inputs._asdict().items() if name in _ARRAYS}
    if not isinstance(inputs.offset, int | str):
        return None, {**arrays, "offset": inputs.offset}
    return inputs.offset, arrays


_ARRAYS = frozenset({"q", "k", "v", "mask", "key_mask", "bias", "params"})


def _joined(arrays: Mapping[str, Any], offset: Any) -> Inputs:
    return Inputs(**arrays) if offset is None else Inputs(**arrays, offset=offset)


def _in_full() -> Any:
    """Take matrix products in full; on a GPU or TPU the default for float32 is less.

    It is recorded with each product, so the gradients of the call have it as well.
    """
    return jax.default_matmul_precision("highest")
