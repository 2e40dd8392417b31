"""Settings of the whole test suite."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from nightly import NIGHTLY

#: What the tests in a folder of this name need. Where it is missing the folder is left out, unless
#: the command line names it: then its tests fail.
NEEDS = {
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "jax": "jax",
    "flax": "flax",
    "equinox": "equinox",
    "sklearn": "sklearn",
    "aeon": "aeon",
    "solvers": "clarabel",
    "numba": "numba",
    "onnxruntime": "onnxruntime",
    "cuda": "cuda_on_cpu",
    "emulator": "cuda_on_cpu",
    "browser": "selenium",
}

# In CI every run draws the same examples. Elsewhere each run draws others, and the failures are
# kept beside the checkout by Hypothesis.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", settings.get_profile("local"), derandomize=True, database=None, print_blob=True
)
# As many examples again, and of those that no other run has drawn.
settings.register_profile(
    "nightly", settings.get_profile("local"), max_examples=300, database=None, print_blob=True
)
# Whatever plugins are installed, the suite runs without them; the tests of plugins name theirs.
os.environ.setdefault("PDCORE_PLUGINS", "")
# What takes most of the time on JAX is compiling, and the programs of tests are small and run once.
# At night, and in `nox -s conform`, XLA optimizes.
if not NIGHTLY:
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

settings.load_profile("nightly" if NIGHTLY else "ci" if os.environ.get("CI") else "local")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out a folder of tests whose framework is missing."""
    needed = NEEDS.get(collection_path.name)
    if needed is None or not collection_path.is_dir() or importlib.util.find_spec(needed):
        return None
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(collection_path) for path in named) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked ``nightly``, and most of those marked ``sampled(n)``, by day."""
    if NIGHTLY:
        return
    left_out = [item for item in items if not in_sample(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if in_sample(item)]


def in_sample(item: pytest.Item) -> bool:
    """Tell whether a test runs by day: not marked ``nightly``, and its parameters in the sample.

    Parameter values are numbered, and a combination is in it if its numbers add up to a multiple of
    n. So each value is in the sample where another parameter has n values or more, and of two
    parameters each value meets every n-th of the other.
    """
    if item.get_closest_marker("nightly"):
        return False
    mark = item.get_closest_marker("sampled")
    if mark is None or not hasattr(item, "callspec"):
        return True
    numbers = dict(item.callspec.indices)
    for parametrized in item.iter_markers("parametrize"):
        names = parametrized.args[0]
        joint = [x.strip() for x in names.split(",")] if isinstance(names, str) else list(names)
        for name in joint[1:]:  # one number for those that vary together
            numbers.pop(name, None)
    return sum(numbers.values()) % mark.args[0] == 0


@pytest.fixture
def wide() -> Iterator[None]:
    """Let JAX have float64."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
