"""The contract of a backend, and `ArrayBackend`, the one executor of plans."""

from __future__ import annotations

from .array_backend import ArrayBackend
from .call import Call, accumulation, constants_held, cut_heads, spacing
from .contract import (
    LAYOUTS,
    SPEC_VERSION,
    Backend,
    BackendInfo,
    Inputs,
    Request,
    shape_in,
)
from .dropout import Dropout
from .feature_contraction import chunks, shifted_features
from .features import FEATURES
from .group_run import GroupRun
from .log_kappa import log_weight
from .operands import Carried, Contracted, Operands
from .raw_features import mapped
from .score_contraction import divide, finite, relative_features, scores, scores_vjp
from .sharded import ShardedSteps, merged, plan_of_shard, shard_refusals, told
from .shards import ALL, NOTHING, SOME, Shards, pairs_seen
from .silent_backend import SilentBackend

__all__ = [
    "ALL",
    "NOTHING",
    "SOME",
    "ShardedSteps",
    "Shards",
    "merged",
    "pairs_seen",
    "plan_of_shard",
    "shard_refusals",
    "told",
    "ArrayBackend",
    "Backend",
    "BackendInfo",
    "Call",
    "Carried",
    "Contracted",
    "Dropout",
    "FEATURES",
    "GroupRun",
    "Inputs",
    "LAYOUTS",
    "Operands",
    "Request",
    "SPEC_VERSION",
    "SilentBackend",
    "accumulation",
    "chunks",
    "constants_held",
    "cut_heads",
    "divide",
    "finite",
    "log_weight",
    "mapped",
    "relative_features",
    "scores",
    "scores_vjp",
    "shape_in",
    "shifted_features",
    "spacing",
]
