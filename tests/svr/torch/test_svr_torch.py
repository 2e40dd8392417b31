"""A support vector expansion as attention on PyTorch, against the solver's prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from solved import SPECS, fitted


@pytest.mark.parametrize("spec", SPECS)
def test_torch(spec: str) -> None:
    expansion, q, wanted = fitted(spec)
    found = expansion.attention(torch.as_tensor(q))
    assert found.dtype == torch.float64
    assert np.max(np.abs(found.numpy() - wanted)) < 1e-10 * np.max(np.abs(wanted))
    # By a backend of another library, which NumPy arrays are taken to.
    there = expansion.attention(q, backend="torch")
    assert type(there) is np.ndarray
    assert np.max(np.abs(there - wanted)) < 1e-10 * np.max(np.abs(wanted))
