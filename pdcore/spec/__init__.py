"""What an attention is: words, grammar, and the axes that they set."""

from __future__ import annotations

from .attention_spec import PRESETS, AttentionSpec, as_spec, parse
from .expression import Expression, exp, log, maximum, tanh, trace, where
from .grammar import made, read_arguments, read_words
from .heads import HeadScaling, pool, pooling_weights, windows
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
    default_scale,
    latex_number,
    random_matrix,
)
from .latex import aligned, derivation_latex, positive_semidefinite, sections
from .normalizations.base import Identity, Normalization
from .normalizations.batch import Batch
from .normalizations.convolution import Conv1d, Conv2d, Convolution, convolve
from .normalizations.instance_enhanced import InstanceEnhanced
from .normalizations.mixture import GaussianMixture, Mixture, draws
from .statistics import KeySet, Moments, Statistics, prefix_states, reduce_axis
from .support import Support, Visibility, all_of
from .vocabulary import (
    find_kernel,
    kernel_words,
    normalization_words,
    register_kernel,
    register_normalization,
    unregister,
)

__all__ = [
    "AttentionSpec",
    "Batch",
    "Conv1d",
    "Conv2d",
    "Convolution",
    "Cosine",
    "Elu",
    "Exponential",
    "Expression",
    "FeatureMap",
    "Gaussian",
    "GaussianMixture",
    "HeadScaling",
    "Identity",
    "InstanceEnhanced",
    "Kernel",
    "KeySet",
    "Mixture",
    "Moments",
    "Normalization",
    "PRESETS",
    "Parameter",
    "PointwiseKernel",
    "Polynomial",
    "RandomFeatures",
    "Relu",
    "Statistics",
    "Support",
    "Visibility",
    "aligned",
    "all_of",
    "derivation_latex",
    "positive_semidefinite",
    "sections",
    "as_spec",
    "convolve",
    "default_scale",
    "draws",
    "exp",
    "find_kernel",
    "kernel_words",
    "latex_number",
    "log",
    "made",
    "maximum",
    "normalization_words",
    "parse",
    "pool",
    "pooling_weights",
    "prefix_states",
    "random_matrix",
    "read_arguments",
    "read_words",
    "reduce_axis",
    "register_kernel",
    "register_normalization",
    "tanh",
    "trace",
    "unregister",
    "where",
    "windows",
]
