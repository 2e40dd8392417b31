"""The specification of an attention: its words, their grammar, and the axes that they set."""

from __future__ import annotations

from .attention_spec import PRESETS, AttentionSpec, as_spec, parse, positive_semidefinite
from .expression import Expression, exp, log, maximum, tanh, trace, where
from .grammar import instantiate, read_arguments, read_words
from .heads import HeadScaling, pool, pooling_weights
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
)
from .latex import align_environment, derivation_latex, sections
from .latex_text import latex_number
from .normalizations.base import Identity, Normalization
from .normalizations.batch import Batch
from .normalizations.convolution import Conv1d, Conv2d, Convolution, convolve
from .normalizations.instance_enhanced import InstanceEnhanced
from .normalizations.mixture import GaussianMixture, Mixture, uniform_draws
from .statistics import KeySet, Moments, Statistics, prefix_states, reduce_axis
from .support import Support, Visibility, all_of
from .vocabulary import (
    find_kernel,
    kernel_words,
    normalization_words,
    register_kernel,
    register_normalization,
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
    "align_environment",
    "all_of",
    "derivation_latex",
    "positive_semidefinite",
    "sections",
    "as_spec",
    "convolve",
    "default_scale",
    "uniform_draws",
    "exp",
    "find_kernel",
    "kernel_words",
    "latex_number",
    "log",
    "instantiate",
    "maximum",
    "normalization_words",
    "parse",
    "pool",
    "pooling_weights",
    "prefix_states",
    "read_arguments",
    "read_words",
    "reduce_axis",
    "register_kernel",
    "register_normalization",
    "tanh",
    "trace",
    "where",
]
