"""Attention derived from support vector regression, on any array library.

An attention is a choice of kernel, normalization and head scaling. Write it once as a spec and
run it on the backend of your arrays:

>>> import numpy as np, pdcore
>>> q = k = v = np.ones((1, 4, 6, 8), dtype=np.float32)
>>> pdcore.attention(q, k, v, "bn+sh(1,1,2,2)").shape
(1, 4, 6, 8)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .attention import (
    BoundAttention,
    attention,
    attention_vjp,
    attention_weights,
    bind,
    explain,
)
from .backend import SPEC_VERSION, Backend, BackendInfo
from .convolution import Conv1d, Conv2d
from .errors import NoBackendError, PluginError, SpecError, UnsupportedError
from .heads import HeadScaling
from .instance_enhanced import InstanceEnhanced
from .kernels import (
    Cosine,
    Elu,
    Exponential,
    FeatureMap,
    Gaussian,
    Kernel,
    Parameter,
    PointwiseKernel,
    Polynomial,
    RandomFeatures,
    Relu,
)
from .layers import Derivation, derive
from .mixture import Mixture
from .normalization import Batch, Identity, Normalization
from .plugins import register_backend
from .selection import use_backend
from .spec import PRESETS, AttentionSpec, parse
from .statistics import KeySet, Moments, Statistics
from .support import Support
from .vocabulary import register_kernel, register_normalization

if TYPE_CHECKING:
    from .hookspecs import hookimpl

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "SPEC_VERSION",
    "AttentionSpec",
    "Backend",
    "BackendInfo",
    "Batch",
    "BoundAttention",
    "Conv1d",
    "Conv2d",
    "Cosine",
    "Derivation",
    "Elu",
    "Exponential",
    "FeatureMap",
    "Gaussian",
    "HeadScaling",
    "Identity",
    "InstanceEnhanced",
    "Kernel",
    "KeySet",
    "Mixture",
    "Moments",
    "NoBackendError",
    "Normalization",
    "Parameter",
    "PluginError",
    "PointwiseKernel",
    "Polynomial",
    "RandomFeatures",
    "Relu",
    "SpecError",
    "Statistics",
    "Support",
    "UnsupportedError",
    "attention",
    "attention_vjp",
    "attention_weights",
    "bind",
    "derive",
    "explain",
    "hookimpl",
    "parse",
    "register_backend",
    "register_kernel",
    "register_normalization",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    # pluggy would be a fifth of the import; only plugins need it.
    if name == "hookimpl":
        from .hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module 'pdcore' has no attribute {name!r}")
