"""The kernel K of the regression of one head, and its Gram matrix over the head's points.

It is computed by the reference, not by the backends that run the expansion as attention. Only the
pooling of points and targets is shared with the backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import UnsupportedError
from ..reference import reference_attention, reference_keys, reference_weights
from ..spec import (
    AttentionSpec,
    Convolution,
    Exponential,
    HeadScaling,
    Identity,
    pool,
    pooling_weights,
    positive_semidefinite,
)

__all__ = ["HeadKernel", "check_regression", "head_kernels", "pool_rows"]

Array = np.ndarray[Any, Any]

#: The largest |log h|; 1 / (h h) leaves the range of float64 at 354.
LARGEST_LOG = 300.0
#: Per point: an eigenvalue >= -ROUNDING * W * (largest eigenvalue) counts as not negative.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class HeadKernel:
    """K(x, y) = kappa(T(x), T(y)) / (h(x) h(y)) of one head, W points.

    Attributes
    ----------
    spec : AttentionSpec
        The spec of this head alone, without its scale.
    points : array (W, D)
        The keys, pooled where the head has a scale.
    window : int array (M,)
        The point that each key belongs to.
    params : mapping of str to array (1, ...)
        The parameters of this head.
    log_h : array (W,)
        log h of the points; -inf where h = 0.
    gram : array (W, W)
        K of the points.
    """

    spec: AttentionSpec
    points: Array
    window: Array
    params: Mapping[str, Array]
    log_h: Array
    gram: Array

    @cached_property
    def inverse_h(self) -> Array:
        """1 / h of the points, (W,); 0 where h = 0, since then Phi = 0."""
        return _inverse(self.log_h)

    @cached_property
    def eigenvalues(self) -> Array:
        """The eigenvalues of the Gram matrix, ascending, (W,)."""
        return np.linalg.eigvalsh(self.gram)

    @property
    def condition(self) -> float:
        """The condition number of the Gram matrix; inf where it exceeds what float64 resolves."""
        low, high = self.eigenvalues[[0, -1]]
        resolved = low > high * np.finfo(np.float64).eps * len(self.points)
        return float(high / low) if resolved else float("inf")

    def rows(self, queries: Array, offset: int = 0) -> Array:
        """Evaluate K between queries (N, D) and the points, (N, W)."""
        q, k = queries[None], self.points[None]
        weights = reference_weights(
            q, k, np.zeros((*k.shape[:2], 1)), self.spec, offset=offset, params=self.params
        )[0]
        return np.asarray(weights * self.inverse_h)

    def expand_to_keys(self, x: Any) -> Any:
        """Repeat the entries of the points for their keys, (W, ...) to (M, ...)."""
        return x[self.window]


def check_regression(spec: AttentionSpec) -> None:
    """Check that a spec is one regression per head, with a positive definite kernel.

    Raises
    ------
    UnsupportedError
        When it is not; the message has the reason.
    """
    kernel, support = spec.kernel, spec.support
    if isinstance(kernel, Exponential) and kernel.softcap is not None:
        raise UnsupportedError(
            f"spec: {spec} has a softcap, and exp(cap tanh(.)) is not positive definite, so no "
            "Phi has it as Phi(x).Phi(y); leave softcap out"
        )
    parts: tuple[Any, ...] = (*spec.terms, kernel)
    if placed := [part.word for part in parts if part.places]:
        raise UnsupportedError(
            f"spec: under {spec} kappa goes by positions or labels too, which the points of a "
            f"regression do not have here; leave {placed[0]} out"
        )
    if kernel.signed:
        raise UnsupportedError(
            f"spec: the kernel {kernel.word} of {spec} is declared signed, and the regression "
            "takes kernels with kappa >= 0; use a kernel that is not signed"
        )
    if support.causal or spec.prefix:
        why = "keys" if support.causal else "statistics"
        raise UnsupportedError(
            f"spec: under {spec} every query has {why} of its own, so a regression of its own; "
            "expected one regression for a head: leave causal and statistics=prefix out"
        )
    if support.left != support.right:
        raise UnsupportedError(
            f"spec: the window of {spec} is not symmetric, so neither is its Gram matrix; "
            "expected sparse(n,n)"
        )
    if support.restricts and spec.heads.largest > 1:
        raise UnsupportedError(
            f"spec: {spec} pools keys under a window, and a pooled key is at no single position "
            "as a training input; use scales of 1 or no window"
        )


def head_kernels(
    spec: AttentionSpec, keys: Array, params: Mapping[str, Array]
) -> tuple[HeadKernel, ...]:
    """Compute the kernel of each head; keys (H, M, D), params as the spec declares them.

    Raises
    ------
    ValueError
        If h, or kappa with ``h(one)``, leaves the range of float64.
    UnsupportedError
        If a Gram matrix is not positive semidefinite.
    """
    kernels = []
    for head, x in enumerate(keys):
        head_params = {name: p[head : head + 1] for name, p in params.items()}
        kernels.append(_head_kernel(spec, head, x, pool_rows(x, spec, head), head_params))
    return tuple(kernels)


def pool_rows(x: Array, spec: AttentionSpec, head: int) -> Array:
    """Pool the rows of one head over windows of its scale, (M, ...) to (W, ...)."""
    scale = spec.heads.scales[head] if spec.heads.scales else 1
    if scale == 1:
        return x
    kind = spec.heads.pool
    weights = pooling_weights(len(x), None, scale, kind, x, xp=np)
    return np.asarray(pool(kind, x[None], weights, xp=np)[0][0])


def _head_kernel(
    spec: AttentionSpec, head: int, keys: Array, points: Array, params: Mapping[str, Array]
) -> HeadKernel:
    scale = spec.heads.scales[head] if spec.heads.scales else 1
    unscaled = replace(spec, heads=HeadScaling())
    x, units, spec_of_points = points[None], np.eye(len(points))[None], unscaled
    params_of_points = params
    if isinstance(spec.normalization, Convolution):
        # The training inputs are the convolved points; T leaves queries unchanged.
        x = reference_keys(x, unscaled, params)
        spec_of_points = replace(unscaled, normalization=Identity())
        names = [p.name for p in spec_of_points.parameters()]
        params_of_points = {name: p for name, p in params.items() if name in names}
    # With unit vectors as values, the attention is the matrix of weights; its lse is log h.
    out, lse = reference_attention(
        x, x, units, spec_of_points, params=params_of_points, return_lse=True
    )
    weights, log_h = out[0], lse[0]
    finite = np.isfinite(log_h)
    if not np.all(finite | np.isneginf(log_h)) or np.any(np.abs(log_h[finite]) > LARGEST_LOG):
        raise ValueError(
            f"keys: log h of head {head} goes from {log_h.min():.4g} to {log_h.max():.4g}, "
            f"expected at most {LARGEST_LOG:.0f} in size: beyond it 1 / (h h) is no float64; "
            "scale the keys, or give the kernel a smaller scale"
        )
    gram = weights * _inverse(log_h)
    if not np.all(np.isfinite(gram)):
        raise ValueError(
            f"keys: kappa of head {head} overflows float64; scale the keys, or give the kernel a "
            "smaller scale"
        )
    kernel = HeadKernel(
        unscaled, points, np.arange(len(keys)) // scale, params, log_h, 0.5 * (gram + gram.T)
    )
    if spec.support.restricts or not positive_semidefinite(unscaled):
        _check_definite(kernel, spec, head)
    return kernel


def _inverse(log_h: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.where(np.isneginf(log_h), 0.0, np.exp(-log_h))


def _check_definite(kernel: HeadKernel, spec: AttentionSpec, head: int) -> None:
    low, high = kernel.eigenvalues[[0, -1]]
    if low >= -ROUNDING * len(kernel.points) * high:
        return
    matrix = "masked Gram matrix" if spec.support.restricts else "Gram matrix"
    raise UnsupportedError(
        f"spec: the {matrix} of head {head} under {spec} is not positive semidefinite: its "
        f"smallest eigenvalue is {low:.4g}, its largest {high:.4g}, so no regression belongs "
        f"to it; use {'no window, or other keys' if spec.support.restricts else 'another kernel'}"
    )
