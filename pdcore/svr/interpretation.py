"""A trained attention layer read as a regression: multipliers, support vectors, the C it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention import attention
from ..spec import AttentionSpec, as_spec
from .checks import check_number, float64
from .expansion import SupportVectorExpansion
from .fitting import fit
from .head_kernel import head_kernels, pooling, refuse

__all__ = ["Interpretation", "interpret"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Interpretation:
    """What the values of a layer say as multipliers; H heads, M tokens, Dv outputs.

    Attributes
    ----------
    coefficients : array (H, M, Dv)
        a - a* = v h(k), the multipliers that the layer's own values stand for. In a head with a
        scale every token of a window has those of the pooled key.
    C : array (H,)
        The largest of them in size: the smallest C whose box holds the layer's values.
    expansion : SupportVectorExpansion
        The regression, solved at `epsilon`, whose targets are the layer's outputs at its own keys.
    support : bool array (H, M)
        The tokens that it needs: support vectors of at least one output.
    share : array (H, M)
        The share of the outputs in which a token is a support vector.
    needed : array (H,)
        The largest multiplier of that regression, in size.
    error : array (H,)
        The largest difference between its outputs and the layer's, over the layer's queries.
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

    By v = (a - a*) / h(k), any values are an expansion with the multipliers v h(k), though a layer
    learns them freely: b = 0, so they need not sum to 0. Which tokens matter is asked of the
    regression itself: fitted to the layer's own outputs at its keys, errors up to epsilon being
    free, it uses only its support vectors.

    Parameters
    ----------
    q : float64 array (Hq, N, D)
        Queries of one sequence; Hq is a multiple of H.
    k : float64 array (H, M, D)
        Its keys.
    v : float64 array (H, M, Dv)
        Its values.
    spec : str or AttentionSpec
        The layer's attention, with the refusals of `fit`.
    epsilon : float
        The tolerance, from 0, in units of the layer's outputs.
    C : float, optional
        The box of that regression; by default the largest of `Interpretation.C`.
    solver, params
        As in `fit`.

    Returns
    -------
    Interpretation
    """
    spec = as_spec(spec)
    refuse(spec)
    q, k, v = (float64(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    layer = attention(q, k, v, spec, params=params, backend="numpy")  # checks what it is given
    if not (k.size and v.size):
        raise ValueError(
            f"k, v: got shapes {k.shape} and {v.shape}, expected no axis of length 0: there is "
            "no regression without training points and outputs"
        )
    kernels = head_kernels(spec, k, dict(params or {}))
    pairs = [
        (kernel, _over_inverse(pooling(x, spec, head), kernel.inverse_h))
        for head, (kernel, x) in enumerate(zip(kernels, v, strict=True))
    ]
    coefficients = np.stack([kernel.spread(beta) for kernel, beta in pairs])
    outputs = np.stack([kernel.spread(kernel.gram @ beta) for kernel, beta in pairs])
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


def _over_inverse(values: Array, inverse: Array) -> Array:
    """Give v h, (W, Dv); 0 where h = 0, since nothing sees such a point."""
    seen = inverse > 0
    return np.where(seen[:, None], values / np.where(seen, inverse, 1.0)[:, None], 0.0)
