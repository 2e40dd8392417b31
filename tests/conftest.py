"""Settings of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# In CI every run draws the same examples. Elsewhere each run draws others, and the failures are
# kept beside the checkout by Hypothesis.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", settings.get_profile("local"), derandomize=True, database=None, print_blob=True
)
# Whatever plugins are installed, the suite runs without them; the tests of plugins name theirs.
os.environ.setdefault("PDCORE_PLUGINS", "")

settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def wide() -> Iterator[None]:
    """Let JAX have float64."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
