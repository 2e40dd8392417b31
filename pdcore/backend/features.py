"""The features for which a backend declares its support."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FEATURES"]

#: The features for which a backend declares its support, each with a description.
FEATURES: Mapping[str, str] = {
    "exponential": "softmax attention",
    "softcap": "exponential kernel with softcap",
    "gaussian": "gaussian kernel",
    "cosine": "cosine kernel",
    "polynomial": "polynomial kernel",
    "features": "feature-map kernels",
    "user_kernel": "kernels registered by users and plugins",
    "batch": "batch normalization by statistics of this call",
    "running": "batch normalization by given statistics",
    "prefix": "batch normalization by prefix statistics",
    "user_normalization": "normalizations registered by users and plugins",
    "head_scaling": "heads fitted on pooled keys",
    "count": "the normalisers h(count) and h(one)",
    "sink": "a sink in the normaliser h(sum)",
    "alibi": "a bias linear in the distance of positions",
    "relative": "log kappa by the distance of positions",
    "labels": "log kappa by labels of positions",
    "causal": "causal support",
    "window": "windows of positions",
    "mask": "boolean masks",
    "key_mask": "padding masks",
    "bias": "additive bias on log kappa",
    "offset": "query offsets",
    "gqa": "more query heads than key heads",
    "lse": "return_lse",
    "float16": "float16 inputs",
    "bfloat16": "bfloat16 inputs",
    "float32": "float32 inputs, no TF32",
    "float64": "float64 inputs, computed in float64",
    "vjp": "attention_vjp",
    "autodiff": "gradients by the framework's automatic differentiation",
    "double_backward": "gradients of gradients",
    "vmap": "the framework's vectorising map",
    "jvp": "forward-mode derivatives",
    "compile": "the framework's compiler",
    "weights": "attention_weights",
    "dropout": "dropout in training",
    "axis_name": "sequence shards along a mapped axis",
    "group": "sequence shards over a group of processes",
    "segments": "packed sequences",
    "deterministic": "the same call twice gives the same bits",
    "batch_invariant": "a row's result does not depend on its batch",
    "thread_safe": "calls from several threads",
}
