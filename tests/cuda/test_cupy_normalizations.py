"""Normalizations that declare nothing by the CuPy backend's kernels, on the emulator."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("ml_dtypes")

from emulated_cupy import NAME, register
from normalization_laws import (  # noqa: F401 - collected here too
    test_it_is_as_exact_as_batch_normalization,
    test_it_runs_in_float16_and_is_right,
    test_its_kernel_is_that_of_batch_normalization,
    test_keys_that_stay_far_from_zero_are_rounded_near_a_point,
    test_rows_that_leave_the_range_of_float16_are_right,
    words,
)

from pdcore.plugins import registry as plugins


@pytest.fixture(scope="module")
def name() -> Iterator[str]:
    register()
    yield NAME
    plugins.unregister_backend(NAME)
