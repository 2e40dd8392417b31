"""Checks that the tests of the CUDA kernels share: calls on the emulator, against the oracle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from reference_cases import Case, cotangents

from pdcore.backend import Request
from pdcore.lowering import Plan
from pdcore_backends.cupy.features import CompiledFeatures
from pdcore_backends.cupy.scores import Compiled
from pdcore_conformance.judge.budget import Expected, expect, judge

if shutil.which("g++") is None:
    pytest.skip("no g++", allow_module_level=True)

from emulated_cupy import EmulatedBackend

TESTS = Path(__file__).resolve().parent
DTYPES = ("float32", "float64")


def random_mask(*shape: int, share: float = 0.7) -> Any:
    return np.random.default_rng(5).random(shape) < share


def normal(*shape: int) -> Any:
    return np.random.default_rng(6).standard_normal(shape)


def request_of(case: Case, **fields: Any) -> Request:
    shapes = {
        n: None if (x := case.call.get(n)) is None else x.shape
        for n in ("mask", "key_mask", "bias")
    }
    return Request(
        case.spec,
        "numpy",
        str(case.q.dtype),
        "cpu",
        case.q.shape,
        case.k.shape,
        case.v.shape,
        **shapes,
        **fields,
    )


def fused(
    backend: EmulatedBackend, case: Case, kind: Any = Compiled | CompiledFeatures, **fields: Any
) -> Plan:
    """Return the fused plan of a case; assert that its contraction is of a type."""
    plan = backend.fuse(case.plan(), request_of(case, **fields))
    assert isinstance(plan.contraction.choice, kind), plan.steps
    return plan


def check_budgets(
    case: Case, results: Mapping[str, Any], expected: Expected, lse_dtype: str = ""
) -> None:
    """Assert that results are within their budgets, lse within that of `lse_dtype` if given."""
    expected = expected._replace(lse_dtype=lse_dtype or expected.lse_dtype)
    for name, verdict in judge(results, expected).items():
        assert verdict.ok, f"{case.spec} {case.q.dtype} {name}: {verdict}"


def check(
    backend: EmulatedBackend, case: Case, plan: Plan | None = None, lse_dtype: str = ""
) -> dict[str, Any]:
    """Assert that out, lse and all gradients are within their budgets; return them by name."""
    plan = fused(backend, case) if plan is None else plan
    out, lse, vjp = backend.attention_vjp(plan, case.inputs())
    d_out, d_lse = (x.astype(case.q.dtype) for x in cotangents(case, lse))
    results = {"out": out, "lse": lse}
    results |= {f"d_{name}": x for name, x in vjp(d_out, d_lse).items()}
    expected = expect(*case.qkv, case.spec, **case.call, d_out=d_out, d_lse=d_lse)
    check_budgets(case, {n: results[n] for n in expected.oracle}, expected, lse_dtype)
    return results


def same_bits(backend: EmulatedBackend, case: Case, plan: Plan, schedule: str) -> None:
    """Assert that a schedule of threads gives the same bits as threads in lockstep."""
    results = []
    for name in ("lockstep", schedule):
        with cuda_on_cpu.using(schedule=name, seed=3):
            out, lse, vjp = backend.attention_vjp(plan, case.inputs())
            results.append([out, lse, *vjp(out, lse).values()])
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


def sanitized(code: str, sanitizer: str) -> str:
    """Run code under a sanitizer; return the names of the kernels that ``backend`` launched."""
    environment = cuda_on_cpu.environment(sanitizer)
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    code += "\nprint(sorted(set(backend.runtime.launches)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
