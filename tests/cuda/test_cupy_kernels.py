"""The CuPy backend's kernels and launch code, on the emulator, against the float64 oracle.

Nothing is drawn at random: each call is there for a way through the kernels. The conformance suite
draws; `python tests/cuda/emulated_cupy.py` runs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from emulated_checks import (
    DTYPES,
    check,
    fused,
    normal,
    random_mask,
    same_bits,
    sanitized,
)
from emulated_cupy import NAME, EmulatedBackend, EmulatedRuntime, register
from reference_cases import normal_case

import pdcore
from pdcore.backend import Request
from pdcore.plugins import registry as plugins
from pdcore.spec import Expression, Parameter, PointwiseKernel, exp, log
from pdcore_backends.cupy import programs
from pdcore_backends.cupy.choice import limit
from pdcore_backends.cupy.operands import packed
from pdcore_backends.cupy.programs import Program, columns_for
from pdcore_conformance.judge.calls import dtype_of

# A program is compiled for each combination, which takes seconds.
pytestmark = pytest.mark.sampled(6)


@pytest.fixture(scope="module")
def backend() -> EmulatedBackend:
    """Return one backend for all tests, because it caches compiled kernels."""
    return EmulatedBackend()


# 70 rows and 83 keys: one full tile of 64 and a partial one in float32.
LONG = {"n": 70, "m": 83, "d": 9, "dv": 5}
CALLS = {
    "ragged, grouped heads": ("softmax", LONG),
    "another count of columns": ("softmax", {"n": 3, "m": 4, "d": 33, "dv": 1, "group": 1}),
    "causal, an offset each, padding": (
        "causal",
        {**LONG, "offset": np.asarray([5, -20]), "key_mask": random_mask(2, 83)},
    ),
    "causal from the end": ("causal", {**LONG, "offset": "end"}),
    "rows that see nothing": ("causal", {**LONG, "offset": -68}),
    "a window": ("sparse(20,3)", {**LONG, "offset": 7}),
    "a window ahead, no window behind": ("sparse(inf,3)", LONG),
    "pooled keys, padding and mask": (
        "causal+sh(1,3)",
        {
            **LONG,
            "key_mask": random_mask(2, 83),
            "mask": random_mask(2, 1, 70, 83, share=0.9),
        },
    ),
    "pooled keys, a mask for all rows": ("sh(2,1)", {**LONG, "mask": random_mask(83)}),
    "a bias of every entry": ("softmax", {**LONG, "bias": normal(2, 4, 70, 83)}),
    "a bias for all rows": ("softmax", {**LONG, "n": 33, "bias": normal(2, 4, 1, 83)}),
    "a bias for all keys, and a mask": (
        "causal",
        {**LONG, "m": 34, "bias": normal(4, 70, 1), "mask": random_mask(2, 4, 70, 1)},
    ),
    "a bias for some leading axes": (
        "softmax",
        {"lead": (2, 2), "n": 5, "m": 7, "bias": normal(2, 1, 4, 5, 7)},
    ),
    "a bias that removes": (
        "softmax",
        {**LONG, "n": 4, "bias": np.where(random_mask(4, 83), normal(4, 83), -math.inf)},
    ),
    "key bias": ("gaussian(gamma=0.3)", LONG),
    "statistics": ("bn(beta=param)+h(count)", LONG),
    "weights phi . phi": ("linear+sparse(9,2)", {**LONG, "n": 40, "m": 41}),
    "weights that vanish": ("relu+sparse(9,2)+h(one)", {"n": 40, "m": 41}),
    "no rows": ("softmax", {"n": 0, "m": 4, "bias": normal(1, 4)}),
    "no keys": ("causal", {"n": 4, "m": 0}),
    "no sequence": ("softmax", {"lead": (0,), "bias": normal(5, 7)}),
    "no sequence, a bias of each": (
        "softmax",
        {"lead": (0,), "n": 5, "m": 7, "bias": normal(0, 4, 5, 7)},
    ),
    "far before the keys": ("causal", {"offset": 5 - 2**32}),
    "no values": ("softmax", {"n": 3, "m": 4, "dv": 0}),
    "no leading axis": ("causal", {"lead": (), "offset": 1}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "call"), CALLS.values(), ids=CALLS)
def test_forward_and_gradients(backend: Any, spec: str, call: dict, dtype: str) -> None:
    check(backend, normal_case(spec, dtype=np.dtype(dtype), **call))


HALF = (
    "ragged, grouped heads",
    "causal, an offset each, padding",
    "pooled keys, padding and mask",
    "a bias for all rows",
    "a bias for some leading axes",
    "key bias",
    "statistics",
    "weights phi . phi",
    "weights that vanish",
    "no keys",
    "no values",
    "no sequence",
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("spec", "call"), [CALLS[name] for name in HALF], ids=HALF)
def test_sixteen_bits(backend: Any, spec: str, call: dict, dtype: str) -> None:
    check(backend, normal_case(spec, dtype=dtype_of(dtype), **call))


@pytest.mark.parametrize("spec", ["polynomial(degree=2,coef0=1)", "softmax(softcap=2)"])
def test_expressions_are_compiled_in(backend: Any, spec: str) -> None:
    check(backend, normal_case(spec, dtype=np.float32, n=20, m=23))


@dataclass(frozen=True)
class Tempered(PointwiseKernel):
    """A kernel with two scalar parameters, whose names are keywords of C++."""

    word = "tempered"

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("float", (("H",),)), Parameter("new", (("H",),), 1.0))

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        return params["float"] * s - log(1.0 + params["new"] * exp(0.1 * s))

    def latex(self) -> str:
        return "?"


def test_scalars_of_log_kappa_get_gradients(backend: Any) -> None:
    spec = pdcore.AttentionSpec(kernel=Tempered())
    # The gradient of one scalar is a sum over rows and query heads of several blocks.
    check(backend, normal_case(spec, dtype=np.float32, n=70, m=20))


class WithoutHalfWhere:
    """NumPy with the `where` of CuPy, which returns float32 for bfloat16."""

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self.xp, name)

    def where(self, condition: Any, x: Any, y: Any) -> Any:
        result = self.xp.where(condition, x, y)
        return result.astype("float32") if result.dtype.name == "bfloat16" else result


def test_padding_keeps_the_dtype_bfloat16() -> None:
    backend = EmulatedBackend()
    backend._xp = WithoutHalfWhere(backend.xp)
    name = "causal, an offset each, padding"
    spec, call = CALLS[name]
    results = check(backend, normal_case(spec, dtype=dtype_of("bfloat16"), **call))
    assert {results[n].dtype.name for n in ("out", "d_q", "d_k", "d_v")} == {"bfloat16"}


def test_a_pullback_uses_out_before_rounding(backend: Any) -> None:
    case = normal_case("causal", dtype=np.float16)
    assert fused(backend, case).contraction.choice.rounds
    assert not fused(backend, case, vjp=True).contraction.choice.rounds


# --- execution ------------------------------------------------------------------------------------


def test_wide_arrays_run_in_slices(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "COLUMNS", (32,))
    assert columns_for(70) == 32
    check(backend, normal_case("causal", dtype=np.float32, n=9, m=11, d=70, dv=65))


def test_keys_that_no_row_sees_are_not_read(backend: Any) -> None:
    case = normal_case("sparse(3,3)", n=100, m=200, dtype=np.float64)
    case.k[..., 128:, :] = np.nan  # the tiles from the fifth on
    case.v[..., 128:, :] = np.nan
    out, lse = backend.attention(fused(backend, case), case.inputs(), lse=True)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


def test_arrays_are_read_without_a_copy(backend: Any) -> None:
    case = normal_case(
        "softmax",
        n=6,
        m=7,
        d=8,
        dv=4,
        heads=4,
        group=1,
        dtype=np.float32,
        bias=np.broadcast_to(normal(1, 4, 1, 7), (2, 4, 6, 7)),
    )
    # The sequence axis before the heads, as after a projection, and slices of wider rows.
    q, k, v = (np.ascontiguousarray(np.swapaxes(x, -2, -3)).swapaxes(-2, -3) for x in case.qkv)
    wide = np.concatenate([k, k], axis=-1)
    case = replace(case, q=q, k=wide[..., 8:], v=v)
    check(backend, case)
    seen: list[Any] = []

    class Watched(EmulatedBackend):
        def scores_of_groups(self, c: Any, operands: Any, heads: Any) -> Any:
            [x] = (packed(c, o, (), xp=self.xp) for o in operands)
            seen.extend(a for a in x.arrays if isinstance(a, np.ndarray))
            return super().scores_of_groups(c, operands, heads)

    Watched().attention(fused(backend, case), case.inputs())
    for x, source in zip(seen, (*case.qkv, case.call["bias"]), strict=True):
        assert np.shares_memory(x, source)


@pytest.mark.parametrize("schedule", cuda_on_cpu.SCHEDULES)
def test_any_order_of_threads_gives_the_same_bits(backend: Any, schedule: str) -> None:
    case = normal_case("causal", dtype=np.float64, n=40, m=37, d=5, dv=3, bias=normal(1, 37))
    plan = fused(backend, case)
    same_bits(backend, case, plan, schedule)


SANITIZED = """
import numpy as np
from emulated_cupy import EmulatedBackend
from reference_cases import normal_case
from emulated_checks import fused
backend = EmulatedBackend()
for spec, call in (
    ("causal+sh(2)", {"m": 70, "key_mask": np.arange(70) % 5 > 0, "lead": ()}),
    ("softmax", {"m": 36, "bias": np.ones((35, 36)), "lead": ()}),
    ("causal+sh(1,2)", {"m": 36, "lead": (), "heads": 2, "group": 1}),
):
    case = normal_case(spec, **{"n": 35, "heads": 1, **call})
    out, lse, vjp = backend.attention_vjp(fused(backend, case), case.inputs())
    vjp(out, lse)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    launched = sanitized(SANITIZED, sanitizer)
    for name in ("forward", "rows", "keys", "bias"):
        assert f"scores_{name}" in launched


def test_a_kernel_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = EmulatedBackend()
    compiled = []
    compile_ = EmulatedRuntime.compile

    def counted(self: Any, code: str, name: str, shared: int = 0) -> Any:
        compiled.append(name)
        return compile_(self, code, name, shared)

    monkeypatch.setattr(EmulatedRuntime, "compile", counted)
    for spec in ("softmax", "softmax(scale=2)", "bn", "bn(beta=2)"):
        case = normal_case(spec, dtype=np.float32)
        backend.attention(fused(backend, case), case.inputs())
    moments = ["moments_of_chunks<scalar>", "moments_merged<Moments>"]
    assert compiled == ["scores_forward<32>", *moments]
    of_bn = [*moments, "scores_forward<32>"]
    assert backend.runtime.launches == [*2 * ["scores_forward<32>"], *of_bn, *of_bn]


# --- refusals -------------------------------------------------------------------------------------


def test_explain_says_what_runs() -> None:
    register()
    try:
        q, k, v = normal(3, 1, 2, 5, 4)
        text = str(pdcore.explain(q, k, v, "softmax(softcap=2)", backend=NAME))
        assert "kernel: tiles of CUDA cores in float64, with log w = (2.0 * tanh(" in text
        text = str(pdcore.explain(q, k, v, "linear+sparse(2,2)", backend=NAME))
        assert "kernel: tiles of CUDA cores in float64, with w = s compiled in" in text
        text = str(pdcore.explain(q, k, v, "random_features(4)+sparse(2,2)", backend=NAME))
        assert "no kernel takes log features" in text
        out = pdcore.attention(q, k, v, "bn", backend=NAME)
        np.testing.assert_allclose(out, pdcore.attention(q, k, v, "bn", backend="numpy"))
    finally:
        plugins.unregister_backend(NAME)


def asked(
    spec: str = "softmax",
    q: tuple[int, ...] = (2, 4, 100, 8),
    keys: int = 100,
    bias: tuple[int, ...] | None = None,
) -> Request:
    head = (*q[:-2], keys)
    return Request(
        pdcore.parse(spec), "cupy", "float32", "cuda:0", q, (*head, q[-1]), (*head, 8), bias=bias
    )


@pytest.mark.parametrize(
    ("request_", "capability", "reason"),
    [
        (asked(), 90, ""),
        (asked(), 75, ""),
        (asked(), 70, "compute capability 7.0, and the kernels are for 7.5 and later"),
        (asked("linear"), 90, ""),
        (asked("random_features(2097152)", (64, 64, 2**15, 8)), 90, "a grid has"),
        (asked(q=(1, 1, 5, 0)), 90, "got D = 0"),
        (asked(q=(1, 1, 5, 8), keys=2**31), 90, "a grid has 2147483647 by 65535 blocks"),
        (asked(q=(2**16, 2**10, 4096, 8)), 90, "got q (65536, 1024, 4096, 8)"),
        (asked(q=(1, 4, 2**22, 8), keys=2**22), 90, ""),
        (asked(q=(1, 4, 2**22, 8), keys=2**22, bias=(2**22, 2**22)), 90, "a grid has"),
        (asked(q=(1, 4, 2**22, 2**25)), 90, "256 columns"),
    ],
)
def test_limits_are_known_before_a_launch(request_: Request, capability: int, reason: str) -> None:
    message = limit(request_.lower(), request_, capability)
    assert reason in message
    assert bool(message) == bool(reason)


def test_a_plan_that_was_not_fused_runs_by_array_calls() -> None:
    backend = EmulatedBackend()
    case = normal_case("causal", dtype=np.float32)
    backend.attention(case.plan(), case.inputs())
    assert not backend.runtime.launches


def test_every_program_has_its_own_text() -> None:
    names = {
        Program(s, w).text("scores_forward<32>")
        for s in ("float", "double")
        for w in ("log", "features")
    }
    assert len(names) == 4
