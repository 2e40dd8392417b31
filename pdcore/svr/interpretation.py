"""A trained attention layer as a regression: multipliers, support vectors, and the C it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention import attention
from ..spec import AttentionSpec, as_spec
from .checks import check_float64, check_number
from .expansion import SupportVectorExpansion
from .fitting import fit
from .head_kernel import check_regression, head_kernels, pool_rows

__all__ = ["Interpretation", "interpret"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Interpretation:
    """The multipliers that correspond to the values of a layer; H heads, M tokens, Dv outputs.

    Attributes
    ----------
    coefficients : array (H, M, Dv)
        a - a* = v h(k), the multipliers that correspond to the layer's values. In a head with a
        scale, all tokens of a window have those of the pooled key.
    C : array (H,)
        The largest |a - a*|: the smallest C whose box contains the layer's multipliers.
    expansion : SupportVectorExpansion
        The regression, solved at `epsilon`, whose targets are the layer's outputs at its keys.
    support : bool array (H, M)
        The tokens that are support vectors of at least one output of that regression.
    share : array (H, M)
        The share of the outputs in which a token is a support vector.
    needed : array (H,)
        The largest |a - a*| of that regression.
    error : array (H,)
        The largest difference, over the queries, of the regression's outputs and the layer's.
    """

    coefficients: Array
    C: Array
    expansion: SupportVectorExpansion
    support: Array
    share: Array
    needed: Array
    error: Array

    def __str__(self) -> str:
        epsilon, tokens = self.expansion.epsilon, self.support.shape[1]
        lines = [f"{self.expansion.spec}: {tokens} tokens, epsilon {epsilon:.4g}"]
        for head, support in enumerate(self.support):
            lines.append(
                f"  head {head}: the values need C = {self.C[head]:.4g}; {support.sum()} of "
                f"{tokens} tokens are support vectors, with multipliers to "
                f"{self.needed[head]:.4g}; error at the queries {self.error[head]:.2g}"
            )
        return "\n".join(lines)


def interpret(
    q: Array,
    k: Array,
    v: Array,
    spec: str | AttentionSpec = "softmax",
    *,
    epsilon: float,
    C: float | None = None,
    solver: str = "clarabel",
    params: Any = None,
) -> Interpretation:
    """Read the values of an attention layer as the multipliers of its regression.

    By v = (a - a*) / h(k), any values v are those of an expansion with the multipliers v h(k). A
    layer has b = 0, so these need not sum to 0. To find which tokens matter, a regression is
    fitted to the layer's outputs at its keys, where errors up to epsilon cost nothing: it needs
    only its support vectors.

    Parameters
    ----------
    q : float64 array (Hq, N, D)
        Queries of one sequence; Hq is a multiple of H.
    k : float64 array (H, M, D)
        Keys.
    v : float64 array (H, M, Dv)
        Values.
    spec : str or AttentionSpec
        The layer's attention; restricted as in `fit`.
    epsilon : float
        The size of errors that cost nothing, >= 0, in units of the layer's outputs.
    C : float, optional
        The bound of the multipliers of the regression, the largest of `Interpretation.C` by
        default.
    solver, params
        As in `fit`.

    Returns
    -------
    Interpretation
    """
    spec = as_spec(spec)
    check_regression(spec)
    q, k, v = (check_float64(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    layer = attention(q, k, v, spec, params=params, backend="numpy")  # checks q, k, v and params
    spec = spec.for_heads(k.shape[-3])
    if not (k.size and v.size):
        raise ValueError(
            f"k, v: got shapes {k.shape} and {v.shape}, expected no axis of length 0: there is "
            "no regression without training points and outputs"
        )
    kernels = head_kernels(spec, k, dict(params or {}))
    pairs = [
        (kernel, _times_h(pool_rows(x, spec, head), kernel.inverse_h))
        for head, (kernel, x) in enumerate(zip(kernels, v, strict=True))
    ]
    coefficients = np.stack([kernel.expand_to_keys(beta) for kernel, beta in pairs])
    outputs = np.stack([kernel.expand_to_keys(kernel.gram @ beta) for kernel, beta in pairs])
    box = np.max(np.abs(coefficients), axis=(1, 2))
    if C is None:
        C = float(np.max(box)) or 1.0
    check_number("C", C, zero=False)
    expansion = fit(k, outputs, spec, C=C, epsilon=epsilon, solver=solver, params=params)
    error = np.abs(expansion.attention(q, backend="numpy") - layer)
    return Interpretation(
        coefficients,
        box,
        expansion,
        np.any(expansion.support, axis=-1),
        np.mean(expansion.support, axis=-1),
        np.max(np.abs(expansion.coefficients), axis=(1, 2)),
        np.max(error.reshape(len(k), -1), axis=1, initial=0.0),
    )


def _times_h(values: Array, inverse: Array) -> Array:
    """Compute v h from 1 / h, (W, Dv); 0 where h = 0, since no query sees such a point."""
    seen = inverse > 0
    return np.where(seen[:, None], values / np.where(seen, inverse, 1.0)[:, None], 0.0)
