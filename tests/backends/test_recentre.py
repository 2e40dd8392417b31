"""Attention-BN without division on the backends that need no framework."""

from __future__ import annotations

import pytest
from recentre_laws import (  # noqa: F401 - collected here too
    test_a_nan_of_one_sequence_stays_there_under_the_gaussian_kernel,
    test_a_variance_that_overflows_is_not_computed,
    test_it_grows_with_prefix_statistics,
    test_it_is_plain_attention_of_other_queries,
    test_it_is_the_division_by_one,
    test_the_gaussian_kernel_does_not_see_it,
)


@pytest.fixture(params=["numpy", "strict"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)
