"""Derivatives of the reference, and of its gradients, along a direction: in longdouble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from autograd import make_vjp
from autograd.builtins import dict as traced_dict

from pdcore.reference import reference_attention

from .gradients import pullback

__all__ = ["gradient_derivatives", "output_derivatives"]

Array = np.ndarray[Any, Any]


def output_derivatives(
    q: Array, k: Array, v: Array, spec: str, directions: Mapping[str, Array]
) -> dict[str, Array]:
    """Differentiate out and lse along directions of q, k and v.

    Parameters
    ----------
    q, k, v : array (*B, Hq, N, D), (*B, Hkv, M, D), (*B, Hkv, M, Dv)
        As in `pdcore.attention`.
    spec : str
        What to compute.
    directions : mapping of str to array
        For ``q``, ``k`` and ``v``, in their shapes.

    Returns
    -------
    dict of str to array
        ``out`` and ``lse``, in longdouble.
    """
    outputs, pull = pullback(_attention(spec), _wide({"q": q, "k": k, "v": v}))
    # The gradients are linear in the cotangents, so their derivative by the cotangents is the
    # transpose of the map from cotangents to gradients: the derivative along a direction.
    zeros = tuple(np.zeros_like(x) for x in outputs)
    with np.errstate(all="ignore"):
        push, _ = make_vjp(lambda cotangents: traced_dict(pull(cotangents)))(zeros)
        return dict(zip(("out", "lse"), push(_wide(directions)), strict=True))


def gradient_derivatives(
    q: Array,
    k: Array,
    v: Array,
    spec: str,
    directions: Mapping[str, Array],
    d_out: Array,
    d_lse: Array,
) -> dict[str, Array]:
    """Differentiate the gradients by q, k and v along directions of q, k and v.

    Parameters
    ----------
    q, k, v, spec, directions
        As in `output_derivatives`.
    d_out, d_lse : array (*B, Hq, N, Dv), (*B, Hq, N)
        Cotangents of out and lse.

    Returns
    -------
    dict of str to array
        ``q``, ``k`` and ``v``: the derivative of each gradient, in longdouble.
    """

    def gradient(arrays: Any) -> Any:
        _, pull = pullback(_attention(spec), {name: arrays[name] for name in ("q", "k", "v")})
        return traced_dict(pull((d_out, d_lse)))

    # The Hessian is symmetric: its product with the directions is a vector-Jacobian product.
    with np.errstate(all="ignore"):
        product, _ = make_vjp(gradient)(_wide({"q": q, "k": k, "v": v}))
        second: dict[str, Array] = product(_wide(directions))
    return second


def _attention(spec: str) -> Any:
    """Return the reference as a function of q, k and v by name."""
    return lambda x: reference_attention(x["q"], x["k"], x["v"], spec, return_lse=True)


def _wide(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Cast the arrays to longdouble."""
    return {name: x.astype(np.longdouble) for name, x in arrays.items()}
