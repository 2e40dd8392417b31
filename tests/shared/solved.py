"""Support vector expansions and what their solver predicts, for the tests on frameworks."""

from __future__ import annotations

from typing import Any

import numpy as np

from pdcore.svr import SupportVectorExpansion, fit

SPECS = [
    "softmax",
    "gaussian(gamma=0.1)+h(count)",
    "cosine+h(one)",
    "polynomial",
    "linear",
    "relu",
    "random_features(count=16)",
    "bn",
    "linear+bn",
    "sh(1,3)",
    "bn+sh(2,1)",
    "sparse(0,0)",
]


def fitted(spec: str) -> tuple[SupportVectorExpansion, Any, Any]:
    """Fit two heads; give queries of four, and the solver's prediction."""
    rng = np.random.default_rng(0)
    keys, targets = rng.standard_normal((2, 25, 4)), rng.standard_normal((2, 25, 3))
    q = rng.standard_normal((4, 9, 4))
    first = fit(keys, targets, spec, C=1.0, epsilon=0.1, solver="sklearn")
    C = 5.0 / float(np.mean(np.diag(first.heads[0].kernel.gram)))
    expansion = fit(keys, targets, spec, C=C, epsilon=0.1, solver="sklearn")
    return expansion, q, expansion.predict(q)
