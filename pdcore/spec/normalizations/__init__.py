"""Normalizations T(x): one file a contribution, with its statistics."""

from __future__ import annotations

from .base import Identity, Normalization
from .batch import Batch
from .convolution import Conv1d, Conv2d, Convolution
from .instance_enhanced import InstanceEnhanced
from .mixture import GaussianMixture, Mixture

__all__ = [
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
