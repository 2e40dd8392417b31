"""Calls under JAX's own checks: implicit broadcasts and casts, leaks, NaN and infinities.

JAX looks for NaN and infinities in the results of each program: those of a call, and the arrays
that a call keeps for its derivative.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pdcore
from pdcore.extend import log, maximum


@dataclass(frozen=True)
class Ramp(pdcore.PointwiseKernel):
    """kappa = max(t s, 0)^2, which is 0 for half of the pairs."""

    word = "ramp"

    def parameters(self):
        return (pdcore.Parameter("slope", (("H",),), default=1.0),)

    def log_kappa(self, s, dim, **params):
        return 2.0 * log(maximum(params["slope"] * s, 0.0))

    def latex(self):
        return r"\max(t\, x^\top y, 0)^2"


@dataclass(frozen=True)
class Signed(pdcore.FeatureMap):
    """phi(x) = x."""

    word = "signed"
    signed = True

    def features(self, x, *, xp, params):
        return x

    def latex(self):
        return "x"


def user(kernel: Any, **more: Any) -> pdcore.AttentionSpec:
    return pdcore.AttentionSpec(kernel=kernel, normalization=pdcore.Identity(), **more)


#: Every word and every argument of a call, several in one call where they do not hide one another;
#: rows, and whole sequences, that see no key. The second words are explained in `draw`.
CASES: list[Any] = [
    pytest.param("softmax", "", marks=pytest.mark.nightly),
    ("exponential(scale=0.3,softcap=2)+sparse(2,inf)", "mask bias key_mask"),
    ("causal", "offsets"),
    pytest.param("causal+sparse(2,0)+h(count)", "early key_mask", marks=pytest.mark.nightly),
    ("sparse(inf,1)+h(one)", "blind bias"),
    ("causal+sh(1,2)", "offset"),
    ("bn(beta=param)+sh(1,2,pool=first)", "key_mask"),
    ("bn(statistics=batch)+h(count)", "grouped padding"),
    ("bn(statistics=running)+causal", "end"),
    ("causal+bn(statistics=prefix,beta=0.5)+sh(1,2)", "padding"),
    ("iebn", "padding"),
    ("mixture(3,steps=2)", "padding"),
    ("conv1d", "key_mask"),
    pytest.param("conv2d(2,3)", "default", marks=pytest.mark.nightly),
    ("gaussian(0.3)+bn", "padding"),
    ("polynomial(2)", "zero key_mask"),
    ("cosine(2)+sparse(2,1)", "zero padding"),
    ("linear+sh(1,2)+h(count)", "key_mask"),
    ("elu+causal", "offsets grouped"),
    ("relu", "zero padding"),
    pytest.param("relu+causal+h(one)", "zero early", marks=pytest.mark.nightly),
    ("relu+sparse(1,1)", "zero blind"),
    ("random_features(4)", "padding"),
    ("random_features(4)+causal", "padding early"),
    ("random_features(4)+sparse(1,1)", "blind"),
    (user(Ramp()), "zero blind"),
    (user(Signed(), normaliser="one", support=pdcore.Support(right=0)), ""),
]


@contextmanager
def checks(leaks: bool = True) -> Iterator[None]:
    """Turn every check of JAX on."""
    with ExitStack() as stack:
        for check in (
            jax.numpy_rank_promotion("raise"),
            jax.numpy_dtype_promotion("strict"),
            jax.debug_nans(True),
            jax.debug_infs(True),
            jax.checking_leaks() if leaks else nullcontext(),
        ):
            stack.enter_context(check)
        yield


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request: pytest.FixtureRequest) -> Iterator[bool]:
    with jax.enable_x64(request.param):
        yield request.param


def draw(spec: pdcore.AttentionSpec, words: str, dtype: str) -> tuple[dict[str, Any], ...]:
    """Draw the arrays that have gradients, and the other arguments of a call."""
    rng, rows = np.random.default_rng(0), np.arange(6)
    heads = 4 if "grouped" in words else 2
    shapes = {"q": (2, heads, 6, 4), "k": (2, 2, 6, 4), "v": (2, 2, 6, 3)}
    if "bias" in words:
        shapes["bias"] = (heads, 6, 6)
    moving = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
    if "zero" in words:  # kappa is 0, or has no derivative
        moving["q"][..., 0, :] = 0
        moving["q"][..., 1, :] = -abs(moving["q"][..., 1, :])
    if "default" not in words:
        sizes: dict[Any, int] = {"H": 2, "D": 4}
        for p in spec.parameters():
            shape = tuple(sizes.get(n, n) for n in p.shapes[-1])
            moving[p.name] = rng.uniform(0.5, 1.5, shape).astype(dtype)
    mask = rng.random((2, 1, 6, 6)) < 0.8
    blind = mask & (rows != 1)[:, None]
    more: dict[str, dict[str, Any]] = {
        "mask": {"mask": mask},
        "blind": {"mask": blind},
        "key_mask": {"key_mask": rows < np.array([[6], [4]])},
        "padding": {"key_mask": rows < np.array([[6], [0]])},
        "offset": {"offset": np.asarray(1)},
        "offsets": {"offset": np.asarray([1, 0])},
        "early": {"offset": -2},
        "end": {"offset": "end"},
    }
    fixed = {name: x for word in words.split() for name, x in more.get(word, {}).items()}
    return moving, {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in fixed.items()}


def finite(tree: Any) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("spec", "words"), CASES, ids=str)
@pytest.mark.sampled(2)
def test_a_call_and_its_gradient_pass_the_checks(spec: Any, words: str, x64: bool) -> None:
    spec = pdcore.parse(spec) if isinstance(spec, str) else spec
    moving, fixed = draw(spec, words, "float64" if x64 else "float32")

    def call(moving: dict[str, Any]) -> Any:
        params = dict(moving)
        arrays = {name: params.pop(name) for name in ("q", "k", "v", "bias") if name in params}
        return pdcore.attention(spec=spec, params=params, **arrays, **fixed)

    with checks():
        out, pull = jax.vjp(call, jax.tree.map(jnp.asarray, moving))
        [gradients] = pull(jnp.asarray(np.ones(out.shape, out.dtype)))
    assert finite((out, gradients))


def test_blocks_pass_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    from pdcore_backends.jax import blocks, scores

    monkeypatch.setattr(scores, "sizes", lambda *a, **k: blocks.BlockSizes(True, 4, 4))
    spec = pdcore.parse("gaussian(0.7)")  # of no other test: its programs are kept
    moving, fixed = draw(spec, "blind", "float32")
    with checks():
        x = {name: jnp.asarray(array) for name, array in moving.items()}
        out, pull = jax.vjp(lambda x: pdcore.attention(spec=spec, **x, **fixed), x)
        assert finite((out, pull(out)))


def test_every_way_to_call_passes_the_checks() -> None:
    spec = pdcore.parse("bn")
    moving, fixed = draw(spec, "key_mask grouped", "float32")
    with checks():
        x = [jnp.asarray(moving[name]) for name in "qkv"]
        out, lse, pull = pdcore.attention_vjp(*x, spec, **fixed)
        assert finite((out, lse, pull(out), pull(out, lse)))
        assert finite(pdcore.attention_weights(*x, spec, **fixed))
        turned = [a.swapaxes(1, 2) for a in x]
        assert finite(jax.jit(partial(pdcore.bind(spec), layout="bnhd"))(*turned, **fixed))
        assert finite(pdcore.attention(*(moving[n] for n in "qkv"), spec, backend="jax"))


@pytest.mark.parametrize("spec", ["softmax+causal", "random_features(4)+causal"])
def test_shards_pass_the_checks(spec: str) -> None:
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec(None, None, "rows")
    part = jax.sharding.PartitionSpec(None, "rows")
    moving, fixed = draw(pdcore.parse(spec), "padding", "float32")

    def local(x: dict[str, Any], real: Any) -> Any:
        return pdcore.attention(spec=spec, axis_name="rows", key_mask=real, **x)

    call = jax.shard_map(local, mesh=mesh, in_specs=(rows, part), out_specs=rows)
    # JAX 0.10 reports leaks of every compiled program in a compiled `shard_map` that has a psum.
    with checks(leaks=False):
        x = {name: jnp.asarray(array) for name, array in moving.items()}
        out, pull = jax.vjp(jax.jit(lambda x: call(x, fixed["key_mask"])), x)
        assert finite((out, pull(out)))
