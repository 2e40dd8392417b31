"""The plugin that brings pdcore's further normalizations in, by the hook that anyone's use."""

from __future__ import annotations

from collections.abc import Sequence

from pluggy import HookimplMarker

from ..spec import Conv1d, Conv2d, InstanceEnhanced, Mixture, Normalization


@HookimplMarker("pdcore")
def pdcore_normalizations() -> Sequence[type[Normalization]]:
    """Give the classes."""
    return [InstanceEnhanced, Mixture, Conv1d, Conv2d]
