"""A support vector expansion as attention on the CUDA kernels, against the solver's prediction."""

from __future__ import annotations

import numpy as np
import pytest
from emulated_cupy import NAME, register
from solved import SPECS, fitted

from pdcore.plugins import registry as plugins


@pytest.mark.parametrize("spec", [s for s in SPECS if "linear" not in s and "relu" not in s])
def test_cuda_kernels(spec: str) -> None:
    expansion, q, wanted = fitted(spec)
    register()
    try:
        found = expansion.attention(q, backend=NAME)
    finally:
        plugins.unregister_backend(NAME)
    assert np.max(np.abs(found - wanted)) < 1e-10 * np.max(np.abs(wanted))
