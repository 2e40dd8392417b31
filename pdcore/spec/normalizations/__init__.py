"""Normalizations T(x): one file a contribution, with its statistics."""

from __future__ import annotations

from .base import Identity, Normalization
from .batch import Batch
from .convolution import Conv1d, Conv2d, Convolution
from .instance_enhanced import InstanceEnhanced
from .mixture import GaussianMixture, Mixture

#: What pdcore brings beside `Identity` and `Batch`, registered by
#: `pdcore.plugins.builtin_normalizations`.
BUILT_IN: tuple[type[Normalization], ...] = (Conv1d, Conv2d, Mixture, InstanceEnhanced)

__all__ = [
    "BUILT_IN",
    "Normalization",
    "Identity",
    "Batch",
    "InstanceEnhanced",
    "Mixture",
    "GaussianMixture",
    "Convolution",
    "Conv1d",
    "Conv2d",
]
