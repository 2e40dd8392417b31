"""What an attention is: words, grammar, and the axes that they set."""

from __future__ import annotations

from .attention_spec import PRESETS, AttentionSpec, as_spec, parse, positive_semidefinite
from .expression import (
    DISTANCE,
    KEY_LABEL,
    PLACES,
    QUERY_LABEL,
    Expression,
    exp,
    log,
    maximum,
    tanh,
    trace,
    where,
)
from .function_kernel import score_kernel
from .grammar import instantiate, read_arguments, read_words
from .heads import HeadScaling, pool, pooling_weights, scales_text, windows
from .kernels import (
    Cosine,
    Elu,
    Exponential,
    FeatureMap,
    FeatureScale,
    Gaussian,
    Kernel,
    Parameter,
    PointwiseKernel,
    Polynomial,
    RandomFeatures,
    Relu,
    default_scale,
    random_matrix,
)
from .latex import align_environment, sections
from .normaliser import normaliser_word
from .normalizations import (
    Batch,
    Conv1d,
    Conv2d,
    Convolution,
    GaussianMixture,
    Identity,
    InstanceEnhanced,
    Mixture,
    Normalization,
)
from .normalizations.convolution import convolve
from .normalizations.mixture import uniform_draws
from .statistics import KeySet, Mean, Moments, Statistics, prefix_states, reduce_axis
from .support import Support, Visibility, all_of
from .terms import Alibi, Labels, Place, Relative, Term
from .vocabulary import (
    find_kernel,
    kernel_words,
    normalization_words,
    register_kernel,
    register_normalization,
    unregister,
)

__all__ = [
    # the specification and its text
    "AttentionSpec",
    "PRESETS",
    "as_spec",
    "parse",
    "instantiate",
    "read_arguments",
    "read_words",
    # its words
    "find_kernel",
    "kernel_words",
    "normalization_words",
    "register_kernel",
    "register_normalization",
    "score_kernel",
    "unregister",
    # kernels
    "Kernel",
    "PointwiseKernel",
    "FeatureMap",
    "FeatureScale",
    "Parameter",
    "Cosine",
    "Elu",
    "Exponential",
    "Gaussian",
    "Polynomial",
    "RandomFeatures",
    "Relu",
    "default_scale",
    "random_matrix",
    # log kappa as an expression
    "Expression",
    "exp",
    "log",
    "maximum",
    "tanh",
    "trace",
    "where",
    # normalizations
    "Normalization",
    "Identity",
    "Batch",
    "InstanceEnhanced",
    "Mixture",
    "GaussianMixture",
    "Convolution",
    "Conv1d",
    "Conv2d",
    "convolve",
    "uniform_draws",
    # statistics of keys
    "Statistics",
    "Mean",
    "Moments",
    "KeySet",
    "prefix_states",
    "reduce_axis",
    # the normaliser
    "normaliser_word",
    # terms of log kappa by positions and labels
    "Term",
    "Place",
    "Alibi",
    "Labels",
    "Relative",
    "DISTANCE",
    "QUERY_LABEL",
    "KEY_LABEL",
    "PLACES",
    # head scaling
    "HeadScaling",
    "pool",
    "pooling_weights",
    "scales_text",
    "windows",
    # support
    "Support",
    "Visibility",
    "all_of",
    # formulas
    "align_environment",
    "positive_semidefinite",
    "sections",
]
