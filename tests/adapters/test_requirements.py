"""Adapters without the library that they adapt: an error that says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import sys
sys.modules[{blocked!r}] = None  # an import of it raises ModuleNotFoundError
try:
    import pdcore_adapters.{module}
except ModuleNotFoundError as error:
    print(error.name, "|", error)
"""


@pytest.mark.parametrize(
    ("module", "blocked", "extra"),
    [
        ("torch_nn", "torch", "torch"),
        ("torch_nn.layer", "torch", "torch"),
        ("transformers", "torch", "transformers"),
        ("flax", "jax", "flax"),
        ("equinox", "equinox", "equinox"),
        ("sklearn", "sklearn", "svr"),
        ("time_series.model", "torch", "torch"),
        ("aeon", "torch", "aeon"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(module: str, blocked: str, extra: str) -> None:
    code = CHILD.format(module=module, blocked=blocked)
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    name, _, text = child.stdout.strip().partition(" | ")
    assert name.partition(".")[0] == blocked
    assert text == f"{blocked} is not installed: pip install 'pdcore[{extra}]'"


def test_a_defect_of_ours_is_left_as_it_is() -> None:
    from pdcore_adapters.requirements import requires

    with pytest.raises(ModuleNotFoundError, match="No module named"), requires("torch"):
        import pdcore_adapters.nothing  # noqa: F401
