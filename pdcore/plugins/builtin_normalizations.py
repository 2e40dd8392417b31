"""The plugin of pdcore's further normalizations, which uses the public hook."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from ..spec import Normalization
from ..spec.normalizations import BUILT_IN


@HookimplMarker("pdcore")
def pdcore_normalizations() -> Sequence[type[Normalization]]:
    """Return the classes."""
    return BUILT_IN
