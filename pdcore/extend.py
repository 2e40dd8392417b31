"""All that the author of a plug-in may import, beside the names of `pdcore` itself.

Backends, kernels, normalizations and adapters are written against this module, those that come
with pdcore too. The promise: what is in ``__all__`` keeps its name and its meaning while
`SPEC_VERSION` stays what it is; names may be added. A backend declares the version that it was
written for, and one that was written for another version is refused with that reason. Everything
else in pdcore is private, and moves without notice.

Each name is documented where it is defined; the groups are:

- declare: what a plug-in says about itself, and how it is registered;
- contract: what a backend is called with, and what it answers;
- plan: what a backend is asked to compute;
- execute: `ArrayBackend`, which runs every plan, and the array calls that its steps are made of;
- specify: what an attention is, for new kernels and normalizations and for those who read a spec;
- arrays: whose array this is;
- try: the oracle, loaded backends and what is broken;
- refuse: the exceptions.

Nothing in pdcore imports this module.
"""

from __future__ import annotations

from .arrays import device_name, dtype_name, library_of, register_array_type, stop_gradient
from .backend import (
    FEATURES,
    SPEC_VERSION,
    ArrayBackend,
    Backend,
    BackendInfo,
    Call,
    Contracted,
    GroupRun,
    Inputs,
    Operands,
    Request,
    SilentBackend,
    chunks,
    constants_held,
    divide,
    feature_contraction,
    finite,
    log_weight,
    relative_features,
    score_contraction,
    scores,
    scores_vjp,
    shifted_features,
    spacing,
)
from .dispatch import finite_dropout, parameter_shape, wrong_arguments
from .errors import PluginError, SettingError, SpecError, UnsupportedError
from .lowering import (
    FeatureRows,
    Features,
    Fold,
    GaussianRows,
    Group,
    Normalize,
    Plan,
    Pullback,
    Rows,
    Scores,
    Signature,
    Summary,
    Transform,
    central,
    first_real,
    lower,
    restored,
    sum_to,
)
from .plugins import (
    broken,
    hookimpl,
    load_backend,
    register_backend,
    unregister_backend,
)
from .reference import reference_attention
from .spec import (
    AttentionSpec,
    Batch,
    Conv1d,
    Conv2d,
    Convolution,
    Cosine,
    Elu,
    Exponential,
    Expression,
    FeatureMap,
    Gaussian,
    Identity,
    InstanceEnhanced,
    Kernel,
    KeySet,
    Moments,
    Normalization,
    Parameter,
    PointwiseKernel,
    RandomFeatures,
    Relu,
    Statistics,
    Support,
    Visibility,
    all_of,
    as_spec,
    default_scale,
    exp,
    log,
    maximum,
    parse,
    pool,
    pooling_weights,
    prefix_states,
    random_matrix,
    reduce_axis,
    register_kernel,
    register_normalization,
    tanh,
    unregister,
    where,
    windows,
)

__all__ = [
    # declare
    "SPEC_VERSION",
    "FEATURES",
    "BackendInfo",
    "hookimpl",
    "register_backend",
    "register_kernel",
    "register_normalization",
    "unregister",
    "unregister_backend",
    # contract
    "Backend",
    "Inputs",
    "Request",
    "finite_dropout",
    "wrong_arguments",
    "parameter_shape",
    # plan
    "Plan",
    "Group",
    "Summary",
    "Scores",
    "Features",
    "Transform",
    "Rows",
    "FeatureRows",
    "GaussianRows",
    "Fold",
    "Normalize",
    "Pullback",
    "Signature",
    "lower",
    "restored",
    # execute
    "ArrayBackend",
    "SilentBackend",
    "Call",
    "Contracted",
    "GroupRun",
    "Operands",
    "central",
    "chunks",
    "constants_held",
    "divide",
    "feature_contraction",
    "finite",
    "first_real",
    "log_weight",
    "relative_features",
    "score_contraction",
    "scores",
    "scores_vjp",
    "shifted_features",
    "spacing",
    "sum_to",
    # specify
    "AttentionSpec",
    "as_spec",
    "parse",
    "Parameter",
    "Kernel",
    "PointwiseKernel",
    "FeatureMap",
    "Cosine",
    "Elu",
    "Exponential",
    "Gaussian",
    "RandomFeatures",
    "Relu",
    "default_scale",
    "random_matrix",
    "Expression",
    "exp",
    "log",
    "maximum",
    "tanh",
    "where",
    "Normalization",
    "Identity",
    "Batch",
    "InstanceEnhanced",
    "Convolution",
    "Conv1d",
    "Conv2d",
    "Statistics",
    "Moments",
    "KeySet",
    "prefix_states",
    "reduce_axis",
    "pool",
    "pooling_weights",
    "windows",
    "Support",
    "Visibility",
    "all_of",
    # arrays
    "device_name",
    "dtype_name",
    "stop_gradient",
    "library_of",
    "register_array_type",
    # try
    "broken",
    "load_backend",
    "reference_attention",
    # refuse
    "PluginError",
    "SettingError",
    "SpecError",
    "UnsupportedError",
]
