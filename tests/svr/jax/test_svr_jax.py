"""A support vector expansion as attention on JAX, against the solver's prediction."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from solved import SPECS, fitted


@pytest.mark.parametrize("spec", SPECS)
def test_jax(spec: str, wide: None) -> None:
    expansion, q, wanted = fitted(spec)
    found = expansion.attention(jax.numpy.asarray(q))
    assert found.dtype == jax.numpy.float64
    assert np.max(np.abs(np.asarray(found) - wanted)) < 1e-10 * np.max(np.abs(wanted))
