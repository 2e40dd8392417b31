"""All scales of Attention-SH in one launch of the CuPy backend's forward kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
from reference_cases import Case, normal_case

import pdcore
from pdcore.backend import Contracted
from pdcore.plugins import registry as plugins
from pdcore_backends.cupy.grouped import GROUP, GROUPS, TABLE, launches
from pdcore_backends.cupy.scores import Compiled
from pdcore_backends.cupy.tensor_cores import TensorCores
from pdcore_conformance.judge.budget import expect, judge
from pdcore_conformance.judge.calls import dtype_of

pytest.importorskip("ml_dtypes")

from emulated_checks import fused, normal, random_mask, same_bits
from emulated_cupy import NAME, EmulatedBackend, EmulatedRuntime, register

# A program is compiled for each combination, which takes seconds.
pytestmark = pytest.mark.sampled(6)


class Noting(EmulatedRuntime):
    """A runtime that records the tables that are passed to kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Any] = []

    def structure(self, value: Any, arrays: Any) -> Any:
        self.tables.append(value)
        return super().structure(value, arrays)


class Watched(EmulatedBackend):
    """A backend that contracts all groups at once, or each apart; records the result."""

    apart = False

    def __init__(self) -> None:
        super().__init__(Noting())

    def scores_of_groups(self, c: Any, operands: Any, heads: Any) -> Contracted:
        one_by_one = super().scores_of_groups
        if self.apart:
            self.contracted = Contracted(
                [one_by_one(c, [o], [own]).parts[0] for o, own in zip(operands, heads, strict=True)]
            )
        else:
            self.contracted = one_by_one(c, operands, heads)
        return self.contracted


@pytest.fixture(scope="module")
def backend() -> Watched:
    """Return one backend for all tests, because it caches compiled kernels."""
    return Watched()


def run(backend: Watched, case: Case, *, apart: bool = False) -> tuple[Any, Any, list[str]]:
    """Return out, lse and the forward kernels that were launched."""
    runtime = backend.runtime
    runtime.launches.clear()
    runtime.tables.clear()
    backend.apart = apart
    out, lse = backend.attention(fused(backend, case, Compiled), case.inputs(), lse=True)
    return out, lse, [name for name in runtime.launches if name.startswith("scores_")]


def check(backend: Watched, case: Case, count: int = 1) -> None:
    """Assert that a call is in its budgets, and has the bits of one launch for each scale."""
    out, lse, names = run(backend, case)
    assert len(names) == count, names
    wanted = expect(*case.qkv, case.spec, **case.call)
    for name, verdict in judge({"out": out, "lse": lse}, wanted).items():
        assert verdict.ok, f"{case.spec} {case.q.dtype} {name}: {verdict}"
    *others, names = run(backend, case, apart=True)
    assert len(names) == len(set(case.spec.heads.scales))
    np.testing.assert_array_equal(out, others[0])
    np.testing.assert_array_equal(lse, others[1])


def case_of(spec: str, dtype: str, **call: Any) -> Case:
    return normal_case(spec, dtype=dtype_of(dtype), **{"n": 35, "m": 70, "d": 32, "dv": 32, **call})


CALLS = {
    "grouped heads, causal": ("causal+sh(1,2)", {"group": 2, "offset": 40}),
    "several tiles of rows": ("causal+sh(2,1)", {"n": 140, "m": 150, "group": 1, "lead": (1,)}),
    "heads that alternate": ("sh(1,3,1,3)", {"heads": 4, "group": 1}),
    "heads in no order": ("sh(1,1,2,1)", {"heads": 4, "group": 1, "lead": ()}),
    "an offset for each sequence, padding": (
        "causal+sh(3,1)",
        {"offset": np.asarray([5, -20]), "key_mask": random_mask(2, 70)},
    ),
    "a mask": ("sh(2,1)", {"mask": random_mask(2, 1, 35, 70, share=0.9)}),
    "a window, several leading axes": ("sparse(20,3)+sh(1,2)", {"lead": (2, 2), "group": 1}),
    "key bias, first of a window": ("gaussian(gamma=0.3)+sh(2,1,pool=first)", {}),
    "scalars of each head": ("polynomial(degree=2,coef0=1)+sh(2,1)", {}),
    "statistics": ("bn(beta=param)+sh(1,2)+h(count)", {}),
    "statistics of the batch": ("bn(statistics=batch)+sh(1,2)", {}),
    "no keys": ("causal+sh(1,2)", {"m": 0}),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_one_launch_agrees_with_several(backend: Watched, name: str, dtype: str) -> None:
    spec, call = CALLS[name]
    check(backend, case_of(spec, dtype, **call))


def test_in_double_precision(backend: Watched) -> None:
    check(backend, case_of("causal+sh(1,2)", "float64"))


@pytest.mark.parametrize("schedule", cuda_on_cpu.SCHEDULES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_order_of_threads_gives_the_same_bits(
    backend: Watched, dtype: str, schedule: str
) -> None:
    case = case_of("causal+sh(3,1)", dtype, offset=40, group=1, lead=())
    backend.apart = False
    same_bits(backend, case, fused(backend, case, Compiled, vjp=True), schedule)


def test_which_kernels_run(backend: Watched) -> None:
    for dtype, kernel in (("bfloat16", "scores_mma<32, 32>"), ("float32", "scores_forward<32>")):
        assert run(backend, case_of("sh(1,2)", dtype))[2] == [kernel]


def test_pooled_keys_of_another_dtype_take_another_launch(backend: Watched) -> None:
    case = case_of("sh(1,2,3)", "bfloat16", d=24, dv=24, heads=3, group=1)
    plan = fused(backend, case, Compiled)
    assert not isinstance(plan.contraction.choice, TensorCores)
    assert "3 scales in 2 launches of the forward, longest first" in plan.steps[-1]
    out, lse, names = run(backend, case)
    assert len(names) == 2
    for verdict in judge({"out": out, "lse": lse}, expect(*case.qkv, case.spec)).values():
        assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_more_groups_than_fit_in_one_launch(backend: Watched, dtype: str) -> None:
    scales = [*range(1, GROUPS + 2)]
    spec = f"causal+sh({','.join(map(str, scales))})"
    case = case_of(spec, dtype, n=5, m=20, heads=len(scales), group=1, lead=())
    check(backend, case, 2)
    assert launches([""] * len(scales)) == 2
    assert backend.runtime.tables


def test_the_largest_group_comes_first(backend: Watched) -> None:
    case = case_of("causal+sh(4,4,1,2)", "bfloat16", n=140, heads=4, group=2)
    run(backend, case)
    [table] = backend.runtime.tables
    groups = table["x"][: table["count"]]
    assert groups["shape"]["keys"].tolist() == [70, 35, 18]
    # 2 sequences, 2 query heads of each key head, 2 tiles of rows.
    assert groups["first"].tolist() == [0, 8, 16]


@pytest.mark.parametrize(
    ("spec", "written"),
    [
        ("causal+sh(1,1,2,2)", True),
        ("sh(1,3,1,3)", True),
        ("bn+sh(1,1,2,2)", True),
        ("sh(1,1,2,1)", False),
    ],
)
def test_heads_are_written_where_the_caller_has_them(
    backend: Watched, spec: str, written: bool
) -> None:
    out, lse, _ = run(backend, case_of(spec, "bfloat16", heads=4, group=2))
    whole = backend.contracted.whole
    assert (whole is not None) == written
    if whole is not None:
        assert np.shares_memory(out, whole[0])
        assert np.shares_memory(lse, whole[1])


def test_results_that_a_normaliser_changes_are_copied(backend: Watched) -> None:
    out, *_ = run(backend, case_of("sh(1,2)+h(count)", "bfloat16", bias=normal(35, 70)))
    assert backend.contracted.whole is not None
    assert not np.shares_memory(out, backend.contracted.whole[0])


def test_the_table_is_within_the_parameters_of_a_launch() -> None:
    assert TABLE.itemsize <= 4096
    assert TABLE.itemsize == GROUPS * GROUP.itemsize + 8


def test_addresses_are_put_where_the_pointers_are() -> None:
    from pdcore_backends.cupy.impl import CupyRuntime

    at = {8: 4096, TABLE.itemsize - 16: 2**63 + 1}
    arrays = {place: SimpleNamespace(data=SimpleNamespace(ptr=x)) for place, x in at.items()}
    value = np.zeros((), TABLE)
    value["count"] = 3
    table = CupyRuntime().structure(value[()], arrays)
    assert (table.dtype, table["count"], table["x"][0]["inputs"][1]) == (TABLE, 3, 4096)
    words = np.frombuffer(table.tobytes(), np.uint64)
    assert np.flatnonzero(words).tolist() == [1, len(words) - 2, len(words) - 1]
    assert not value["x"]["inputs"].any()


def test_explain_says_how_many_launches() -> None:
    register()
    try:
        q, k, v = normal(3, 1, 4, 5, 32).astype(np.float16)
        for x in (q, q.astype(np.float32)):
            y, z = k.astype(x.dtype), v.astype(x.dtype)
            assert "; 2 scales in one launch of the forward, longest first" in str(
                pdcore.explain(x, y, z, "sh(1,1,2,2)", backend=NAME)
            )
            assert "scales in" not in str(pdcore.explain(x, y, z, "sh(2,2,2,2)", backend=NAME))
    finally:
        plugins.unregister_backend(NAME)
