"""The plugin of pdcore's further normalizations, which uses the public hook."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from ..spec import Conv1d, Conv2d, InstanceEnhanced, Mixture, Normalization


@HookimplMarker("pdcore")
def pdcore_normalizations() -> Sequence[type[Normalization]]:
    """Return the classes."""
    return [InstanceEnhanced, Mixture, Conv1d, Conv2d]
