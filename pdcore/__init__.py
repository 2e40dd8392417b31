"""Attention derived from support vector regression, on any array library.

An attention is a choice of kernel, normalization and head scaling. Write it once as a spec and
run it on the backend of your arrays:

>>> import numpy as np, pdcore
>>> q = k = v = np.ones((1, 4, 6, 8), dtype=np.float32)
>>> pdcore.attention(q, k, v, "bn+sh(1,1,2,2)").shape
(1, 4, 6, 8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Not lazy: the name is a module of this package too, which its import would leave in its place.
from .attention import BoundAttention, attention, attention_vjp, attention_weights, bind, explain
from .moved import attribute as _attribute
from .moved import install as _install

if TYPE_CHECKING:
    from .backend import (
        SPEC_VERSION,
        Backend,
        BackendInfo,
    )
    from .decoding import Decoder, decoder
    from .derivation import (
        Derivation,
        derive,
    )
    from .dispatch import (
        segments_from_cu_seqlens,
        segments_from_lengths,
        use_backend,
    )
    from .errors import (
        NoBackendError,
        PluginError,
        SpecError,
        UnsupportedError,
    )
    from .plugins import (
        hookimpl,
        register_backend,
    )
    from .spec import (
        PRESETS,
        Alibi,
        AttentionSpec,
        Cosine,
        Elu,
        Exponential,
        FeatureMap,
        Gaussian,
        HeadScaling,
        Kernel,
        KeySet,
        Labels,
        Mean,
        Moments,
        Parameter,
        PointwiseKernel,
        Polynomial,
        RandomFeatures,
        Relative,
        Relu,
        Statistics,
        Support,
        parse,
        register_kernel,
        register_normalization,
        score_kernel,
    )
    from .spec.normalizations import (
        Batch,
        Conv1d,
        Conv2d,
        Identity,
        InstanceEnhanced,
        Mixture,
        Normalization,
    )

__version__ = "0.1.0"

# Imported at the first use of one of its names.
_LAZY = {
    "backend": (
        "SPEC_VERSION",
        "Backend",
        "BackendInfo",
    ),
    "decoding": ("Decoder", "decoder"),
    "derivation": (
        "Derivation",
        "derive",
    ),
    "dispatch": ("segments_from_cu_seqlens", "segments_from_lengths", "use_backend"),
    "errors": (
        "NoBackendError",
        "PluginError",
        "SpecError",
        "UnsupportedError",
    ),
    "plugins": (
        "register_backend",
        "hookimpl",
    ),
    "spec.normalizations": (
        "Batch",
        "Conv1d",
        "Conv2d",
        "Identity",
        "InstanceEnhanced",
        "Mixture",
        "Normalization",
    ),
    "spec": (
        "PRESETS",
        "Alibi",
        "AttentionSpec",
        "Cosine",
        "Elu",
        "Exponential",
        "FeatureMap",
        "Gaussian",
        "HeadScaling",
        "Kernel",
        "KeySet",
        "Labels",
        "Mean",
        "Moments",
        "Parameter",
        "PointwiseKernel",
        "Polynomial",
        "RandomFeatures",
        "Relative",
        "Relu",
        "Statistics",
        "Support",
        "parse",
        "register_kernel",
        "register_normalization",
        "score_kernel",
    ),
}
_ROOM_OF = {name: room for room, names in _LAZY.items() for name in names}

__all__ = [
    "PRESETS",
    "SPEC_VERSION",
    "Alibi",
    "AttentionSpec",
    "Backend",
    "BackendInfo",
    "Batch",
    "BoundAttention",
    "Conv1d",
    "Conv2d",
    "Cosine",
    "Decoder",
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
    "Labels",
    "Mixture",
    "Mean",
    "Moments",
    "NoBackendError",
    "Normalization",
    "Parameter",
    "PluginError",
    "PointwiseKernel",
    "Polynomial",
    "RandomFeatures",
    "Relative",
    "Relu",
    "SpecError",
    "Statistics",
    "Support",
    "UnsupportedError",
    "attention",
    "attention_vjp",
    "attention_weights",
    "bind",
    "decoder",
    "derive",
    "explain",
    "hookimpl",
    "parse",
    "register_backend",
    "register_kernel",
    "register_normalization",
    "score_kernel",
    "segments_from_cu_seqlens",
    "segments_from_lengths",
    "use_backend",
]

# Modules of 0.1 import for one more release.
_install()


def __getattr__(name: str) -> Any:
    room = _ROOM_OF.get(name)
    if room is None:
        return _attribute(__name__, name)
    value = getattr(importlib.import_module(f".{room}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
