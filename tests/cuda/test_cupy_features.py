"""The CuPy backend's kernels for features, on the emulator, against the float64 oracle.

As in test_cupy_kernels.py, each call is there for a way through the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from emulated_cupy import NAME, EmulatedBackend, register
from reference_cases import normal_case
from test_cupy_kernels import LONG

import pdcore
from pdcore.lowering import ScaledRows
from pdcore.plugins import registry as plugins
from pdcore.spec import Elu, FeatureMap, Parameter, Relu
from pdcore_backends.cupy import feature_programs, features
from pdcore_backends.cupy.feature_programs import FeatureProgram
from pdcore_conformance.judge.calls import dtype_of

# A program is compiled for each combination, which takes seconds.
pytestmark = pytest.mark.sampled(6)


@pytest.fixture(scope="module")
def backend() -> EmulatedBackend:
    """Return one backend for all tests, because it caches compiled kernels."""
    return EmulatedBackend()


PADDED = {**LONG, "key_mask": random_mask(2, 83)}
CALLS = {
    "ragged, grouped heads": ("linear", PADDED),
    "causal": ("linear+causal", LONG),
    # float32 has three chunks of keys, and rows past the last key.
    "causal, several chunks": ("linear+causal", {"n": 140, "m": 131, "group": 1, "lead": ()}),
    "causal, an offset each, padding": (
        "linear+causal",
        {**PADDED, "offset": np.asarray([5, -20])},
    ),
    "causal from the end": ("linear+causal", {**PADDED, "offset": "end"}),
    "rows that see nothing": ("relu+causal", {**LONG, "offset": -68}),
    "rows that see everything": ("relu+causal", {**LONG, "offset": 100}),
    "far before the keys": ("linear+causal", {"offset": 5 - 2**32}),
    "pooled keys": ("linear+sh(1,3)", PADDED),
    "pooled keys under causal": (
        "linear+causal+sh(1,3)",
        {**PADDED, "n": 200, "m": 200, "key_mask": random_mask(2, 200)},
    ),
    "pooled keys, an offset each": ("relu+causal+sh(2,5)", {**LONG, "offset": np.asarray([9, -9])}),
    "weights that vanish": ("relu+h(one)", {"n": 40, "m": 2, "d": 2}),
    "statistics": ("linear+bn(beta=param)+h(count)", LONG),
    "no keys that are real": ("linear+causal", {"key_mask": np.zeros((2, 7), bool)}),
    "more features and values than a block has": (
        "linear+causal",
        {"n": 9, "m": 11, "d": 130, "dv": 133, "heads": 1, "lead": ()},
    ),
    "values that vectors can hold": ("linear", {"d": 8, "dv": 8}),
    "log features": ("random_features(5)", PADDED),
    "log features under causal": (
        "random_features(70)+causal",
        {**PADDED, "offset": np.asarray([5, -20])},
    ),
    "log features of several chunks": (
        "random_features(3)+causal",
        {"n": 140, "m": 140, "lead": (), "sd": 2.0},
    ),
    "log features far below 0": ("random_features(4)+causal", {**LONG, "mean": 8.0, "sd": 0.1}),
    "log features of no real keys": (
        "random_features(4)+causal",
        {**LONG, "key_mask": np.arange(83)[None] >= [[70], [90]]},
    ),
    "no rows": ("linear+causal", {"n": 0, "m": 4}),
    "no keys": ("linear", {"n": 4, "m": 0}),
    "no keys, log features": ("random_features(4)+causal", {"n": 4, "m": 0}),
    "no sequence": ("linear", {"lead": (0,)}),
    "no values": ("linear+causal", {"n": 3, "m": 4, "dv": 0}),
    "several leading axes": ("linear+causal", {"lead": (2, 2), "offset": 1}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("spec", "call"), CALLS.values(), ids=CALLS)
def test_forward_and_gradients(
    backend: EmulatedBackend,
    spec: str,
    call: dict[str, Any],
    dtype: str,
) -> None:
    check(backend, normal_case(spec, dtype=np.dtype(dtype), **call))


HALF = (
    "causal, an offset each, padding",
    "pooled keys under causal",
    "statistics",
    "weights that vanish",
    "log features under causal",
    "no values",
)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("spec", "call"), [CALLS[name] for name in HALF], ids=HALF)
def test_sixteen_bits(
    backend: EmulatedBackend, spec: str, call: dict[str, Any], dtype: str
) -> None:
    check(backend, normal_case(spec, dtype=dtype_of(dtype), **call))


@pytest.mark.parametrize("spec", ["linear", "random_features(3)"])
def test_chunks_of_all_keys_are_summed(
    backend: EmulatedBackend,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
) -> None:
    monkeypatch.setattr(features, "SMALLEST_SPLIT", 64)
    # Eleven chunks of keys and of rows: more than a scan reads at once.
    check(backend, normal_case(spec, dtype=np.float32, n=643, m=641, heads=1, lead=()))


@dataclass(frozen=True)
class Shifted(FeatureMap):
    """A signed map, x - shift, with a parameter."""

    word = "shifted"
    signed = True

    def parameters(self) -> tuple[Parameter, ...]:
        return (Parameter("shift", (("H", "D"),)),)

    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        return x - params["shift"]

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        return cotangent, {"shift": -cotangent}

    def latex(self) -> str:
        return "?"


@pytest.mark.parametrize("support", ["", "+causal"])
def test_signed_user_maps(backend: EmulatedBackend, support: str) -> None:
    base = pdcore.parse("linear+h(one)" + support)
    spec = pdcore.AttentionSpec(Shifted(), "one", base.normalization, base.heads, base.support)
    check(backend, normal_case(spec, dtype=np.float32, **LONG))


@pytest.mark.parametrize(("phi", "kernel"), [("elu", Elu()), ("relu", Relu())])
def test_the_compiled_phi_agrees_with_the_kernel(phi: str, kernel: FeatureMap) -> None:
    x = np.array([[-800.0, -2.0, -0.0, 0.0, 0.5, 30.0, np.nan, np.inf]])
    texts = feature_programs.MAPS[phi]
    code = 'extern "C" __global__ void both(const double* from, double* value, double* slope) {\n'
    code += "  const double x = from[threadIdx.x];\n"
    for name, text in zip(("value", "slope"), texts, strict=True):
        text = text.replace("exponential", "exp").replace("scalar", "double")
        code += f"  {name}[threadIdx.x] = {text};\n"
    value, slope = np.empty_like(x), np.empty_like(x)
    cuda_on_cpu.RawModule(code + "}").get_function("both")((1,), (x.size,), (x, value, slope))
    np.testing.assert_allclose(value, kernel.features(x, xp=np, params={}), rtol=1e-15)
    own = kernel.features_vjp(x, np.ones_like(x), xp=np, params={})[0]
    np.testing.assert_allclose(slope[~np.isnan(x)], own[~np.isnan(x)], rtol=1e-15)


# --- execution ------------------------------------------------------------------------------------


def test_keys_that_a_row_does_not_see_may_be_nan(backend: EmulatedBackend) -> None:
    # Sums of prefixes are not subtracted: keys that no row of a chunk sees are not added.
    case = normal_case("linear+causal", n=70, m=200, dtype=np.float32)
    case.k[..., 128:, :] = np.nan
    case.v[..., 128:, :] = np.nan
    out, lse = backend.attention(fused(backend, case), case.inputs(), lse=True)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize("schedule", cuda_on_cpu.SCHEDULES)
def test_any_order_of_threads_gives_the_same_bits(
    backend: EmulatedBackend,
    schedule: str,
) -> None:
    for spec in ("linear+causal", "random_features(3)"):
        case = normal_case(spec, dtype=np.float64, n=70, m=67, d=5, dv=3, heads=1, lead=())
        same_bits(backend, case, fused(backend, case), schedule)


SANITIZED = """
import numpy as np
from emulated_checks import fused
from emulated_cupy import EmulatedBackend
from reference_cases import normal_case
backend = EmulatedBackend()
for spec, call in (
    ("linear+causal+sh(2)", {"m": 140, "key_mask": np.arange(140) % 5 > 0}),
    ("random_features(3)+causal", {"m": 66, "dv": 4}),
):
    case = normal_case(spec, n=66, heads=1, lead=(), **call)
    out, lse, vjp = backend.attention_vjp(fused(backend, case), case.inputs())
    vjp(out, lse)
"""


@pytest.mark.nightly
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(sanitizer: str) -> None:
    launched = sanitized(SANITIZED, sanitizer)
    for name in ("highest", "states", "scan", "forward", "rows", "keys"):
        assert f"features_{name}" in launched


def test_only_the_scale_of_phi_is_computed_by_array_calls() -> None:
    own = EmulatedBackend()
    case = normal_case("linear", dtype=np.float32)
    plan = fused(own, case)
    assert [type(step) for step in plan.transforms] == [ScaledRows]
    own.attention(plan, case.inputs())
    assert own.runtime.launches == [
        "features_states<false>",
        "features_scan<0>",
        "features_forward<64>",
    ]


def test_explain_says_what_runs() -> None:
    register()
    try:
        q, k, v = normal(3, 1, 2, 5, 4)
        for spec, phi in (
            ("linear", "phi compiled in"),
            ("random_features(4)+causal", "log phi by array calls"),
        ):
            text = str(pdcore.explain(q, k, v, spec, backend=NAME))
            assert f"kernel: states of chunks on CUDA cores in float64, {phi}" in text
        weights = pdcore.attention_weights(q, k, v, "linear", backend=NAME)
        np.testing.assert_allclose(weights, pdcore.attention_weights(q, k, v, "linear"))
    finally:
        plugins.unregister_backend(NAME)


def test_every_program_has_its_own_text() -> None:
    names = {
        FeatureProgram("float", "features", log=log, phi=phi).text("features_forward<64>")
        for log, phi in ((False, ""), (True, ""), (False, "elu"), (False, "relu"))
    }
    assert len(names) == 4
