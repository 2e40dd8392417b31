"""Normalizations that declare nothing on the JAX backend."""

from __future__ import annotations

import pytest
from normalization_laws import (  # noqa: F401 - collected here too
    test_it_is_as_exact_as_batch_normalization,
    test_it_runs_in_float16_and_is_right,
    test_its_kernel_is_that_of_batch_normalization,
    test_keys_that_stay_far_from_zero_are_rounded_near_a_point,
    test_rows_that_leave_the_range_of_float16_are_right,
    words,
)


@pytest.fixture
def name() -> str:
    return "jax"
