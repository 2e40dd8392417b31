"""Checks of a rewrite of the lowering, for exact plans and for planted defects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, PlainNumpy, check_forward, run

from pdcore.lowering import Plan, Rows
from pdcore_conformance.judge.budget import expect, judge, worst


def exact(case: Case, plan: Plan | None = None, backend: PlainNumpy | None = None) -> None:
    """Check a plan, by default that of the case, against the oracle at 1e-12 relative."""
    with np.errstate(all="ignore"):
        out, lse = run(backend or PlainNumpy(), case, plan=plan)
    check_forward(case, out, lse)


def caught(case: Case, plan: Plan | None = None, backend: PlainNumpy | None = None) -> None:
    """Check that `exact` fails because a result is wrong, not by another error."""
    with pytest.raises(AssertionError, match=r"out|lse"):
        exact(case, plan, backend)


def spread(case: Case, seed: int = 9) -> Case:
    """Return the case with different distributions of queries and keys, to show mix-ups."""
    rng = np.random.default_rng(seed)
    return replace(case, q=0.7 * case.q - 0.4, k=case.k * 1.3 + rng.normal(size=case.k.shape[-1]))


def padded(case: Case, seed: int = 5) -> Case:
    rng = np.random.default_rng(seed)
    real = rng.random((*case.k.shape[:-3], case.k.shape[-2])) < 0.7
    real[..., 1] = False
    real[..., 3] = True
    return replace(case, call={**case.call, "key_mask": real})


def with_transform(case: Case, transform: Any, at: int = 0) -> Plan:
    """Lower the case, and replace one of its transforms."""
    plan = case.plan()
    transforms = list(plan.transforms)
    transforms[at] = transform
    return replace(plan, transforms=tuple(transforms))


def forward_only(rows: Rows) -> tuple[Rows, Any]:
    return rows, None


def within_budget(case: Case, plan: Plan | None = None, backend: PlainNumpy | None = None) -> float:
    """Compute the error over the budget, in the dtype of the case."""
    with np.errstate(all="ignore"):
        out, lse = run(backend or PlainNumpy(), case, plan=plan)
    verdicts = judge({"out": out, "lse": lse}, expect(*case.qkv, case.spec, **case.call))
    return worst(verdicts)
