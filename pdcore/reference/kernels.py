"""The kernels by their formulas, a part of the oracle.

As in `pdcore.reference.attention`, formulas are for one head and any array library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays import constant
from ..errors import UnsupportedError
from ..spec import kernels
from .inputs import ReferenceCall, hook_params, select

__all__ = ["entry", "kappa_of", "pointwise"]

INF = math.inf


def kappa_of(
    kernel: kernels.Kernel,
    x: Any,
    y: Any,
    visible: Any,
    call: ReferenceCall,
    params: Mapping[str, Any],
    places: Mapping[str, Any],
) -> tuple[bool, Any, tuple[Any, ...]]:
    """Evaluate a kernel on every pair of a query x and a key y.

    Returns
    -------
    has_log : bool
        Whether the array is log kappa, not kappa.
    array (*B, N, W)
    units : tuple of array
        Without `has_log`: kappa is the array times these, (*B, N, 1) and (*B, 1, 1).
    """
    if type(kernel) is kernels.Elu:
        return False, *_in_units(
            _elu_plus_one(x, call.xp), _elu_plus_one(y, call.xp), visible, call
        )
    if type(kernel) is kernels.Relu:
        # x <= 0, not x > 0, so that a NaN stays a NaN. The gradient at 0 is 0.
        x, y = (call.xp.where(z <= 0, call.xp.zeros_like(z), z) for z in (x, y))
        return False, *_in_units(x, y, visible, call)
    return *_plain_kappa(kernel, x, y, visible, call, params, places), ()


def _plain_kappa(
    kernel: kernels.Kernel,
    x: Any,
    y: Any,
    visible: Any,
    call: ReferenceCall,
    params: Mapping[str, Any],
    places: Mapping[str, Any],
) -> tuple[bool, Any]:
    """Evaluate a kernel without units, see `kappa_of`."""
    xp = call.xp
    if type(kernel) is kernels.Gaussian:
        square = xp.zeros(visible.shape, dtype=call.dtype, device=call.device)
        for d in range(x.shape[-1]):
            difference = x[..., d][..., :, None] - y[..., d][..., None, :]
            square = square + difference * difference
        return True, -kernel.gamma * square
    if type(kernel) is kernels.Cosine:
        return True, kernel.scale * _inner(_unit(x, xp), _unit(y, xp), xp)
    if type(kernel) is kernels.RandomFeatures:
        dim = x.shape[-1]
        tau = _tau(kernel.scale, dim)
        samples = np.random.RandomState(kernel.seed).standard_normal((kernel.count, dim))
        omega = xp.asarray(samples, dtype=call.dtype, device=call.device)

        def log_phi(z: Any) -> Any:
            square = xp.sum(z * z, axis=-1, keepdims=True)
            projected = math.sqrt(tau) * _inner(z, omega, xp)
            return projected - tau / 2 * square - math.log(kernel.count) / 2

        return True, _log_sum_of_products(log_phi(x), log_phi(y), xp)
    if isinstance(kernel, kernels.FeatureMap):
        shaped = hook_params(kernel, call, params)
        phi_x, phi_y = (
            kernel.features(z[..., None, :, :], xp=xp, params=shaped)[..., 0, :, :] for z in (x, y)
        )
        if kernel.log_domain:
            return True, _log_sum_of_products(phi_x, phi_y, xp)
        return False, _inner(phi_x, phi_y, xp)
    return True, pointwise(kernel, _inner(x, y, xp), visible, call, params, places)


def entry(table: Any, indices: tuple[Any, ...], xp: Any) -> Any:
    """Return the entries (..., N, W) of the table of one head, (1, n) or (1, n, m)."""
    flat: Any = 0
    for index, size in zip(indices, table.shape[1:], strict=True):
        inside = xp.clip(xp.floor(index), 0.0, float(size - 1))
        flat = flat * size + xp.astype(inside, xp.int64)
    picked = xp.take(xp.reshape(table, (-1,)), xp.reshape(flat, (-1,)), axis=0)
    return xp.reshape(picked, flat.shape)


def pointwise(
    kernel: kernels.Kernel,
    s: Any,
    visible: Any,
    call: ReferenceCall,
    params: Mapping[str, Any],
    places: Mapping[str, Any],
) -> Any:
    """Evaluate log kappa from s = x.y, (*B, N, W)."""
    xp = call.xp
    dim = call.q.shape[-1]
    if type(kernel) is kernels.Exponential:
        z = _tau(kernel.scale, dim) * s
        return z if kernel.softcap is None else kernel.softcap * xp.tanh(z / kernel.softcap)
    if type(kernel) is kernels.Polynomial:
        base = _tau(kernel.scale, dim) * s + kernel.coef0
        zero = base == 0
        log = kernel.degree * xp.log(xp.abs(select(zero, xp.ones_like(base), base, xp)))
        return select(zero, xp.full_like(log, -INF), log, xp)
    if not isinstance(kernel, kernels.PointwiseKernel):
        raise UnsupportedError(
            f"{kernel.word}: the reference has no formula for it, as {type(kernel).__name__} is "
            "neither a PointwiseKernel nor a FeatureMap"
        )

    expression = kernel.expression(dim)

    def log_kappa(s: Any) -> Any:
        values: dict[Any, Any] = {"s": s, **places}
        values |= {p.name: params[p.name][0, ...] for p in kernel.parameters()}
        for read in expression.entries:
            at = tuple(index(places, xp) for index in read.args[1:])
            values[read] = entry(params[read.table], at, xp)
        return xp.zeros_like(s) + expression(values, xp)

    if 0 in s.shape:
        return xp.zeros_like(s)
    # Where kappa = 0, the derivative of log kappa is not finite. Such entries, and those that no
    # query sees, are evaluated at the s of another entry; `select` makes their gradient 0.
    log = log_kappa(s)
    good = visible & xp.isfinite(log)
    column = xp.full((*s.shape[:-1], 1), -INF, dtype=s.dtype, device=call.device)
    spare = xp.max(xp.concat([select(good, s, -INF, xp), column], axis=-1))
    spare = select(spare == -INF, xp.ones_like(spare), spare, xp)
    safe = visible & (log != -INF)
    return select(safe, log_kappa(xp.where(safe, s, spare)), -INF, xp)


def _inner(x: Any, y: Any, xp: Any) -> Any:
    return xp.matmul(x, xp.matrix_transpose(y))


def _in_units(
    phi_x: Any, phi_y: Any, visible: Any, call: ReferenceCall
) -> tuple[Any, tuple[Any, Any]]:
    """Compute phi(x).phi(y) in units of the largest feature of each query, and of all keys.

    Products of small features would leave the range of the dtype. Units of 1 or more are 1.
    """
    xp = call.xp
    seen = xp.any(visible, axis=-2)[..., None]
    units = []
    for phi, axes in ((phi_x, (-1,)), (select(seen, phi_y, 0.0, xp), (-2, -1))):
        some = all(phi.shape[axis] for axis in axes)
        most = (xp.max if some else xp.sum)(phi, axis=axes, keepdims=True)
        units.append(constant(select((most > 0) & (most < 1), most, 1.0, xp), xp))
    return _inner(phi_x / units[0], phi_y / units[1], xp), (units[0], units[1])


def _unit(x: Any, xp: Any) -> Any:
    """Divide rows by their Euclidean norm; a zero row stays zero and has gradient 0."""
    square = xp.sum(x * x, axis=-1, keepdims=True)
    zero = square == 0
    return select(zero, xp.zeros_like(x), x / xp.sqrt(select(zero, 1.0, square, xp)), xp)


def _elu_plus_one(x: Any, xp: Any) -> Any:
    negative = x <= 0
    return xp.where(negative, xp.exp(select(negative, x, 0.0, xp)), x + 1.0)


def _log_sum_of_products(log_x: Any, log_y: Any, xp: Any) -> Any:
    """Compute log sum_f exp(log_x_f + log_y_f) for every pair of rows, feature by feature."""
    features = range(log_x.shape[-1])

    def term(f: int) -> Any:
        return log_x[..., f][..., :, None] + log_y[..., f][..., None, :]

    top = xp.full_like(_inner(log_x, log_y, xp), -INF)
    for f in features:
        top = xp.maximum(top, term(f))
    top = select(top == -INF, 0.0, top, xp)
    total = xp.zeros_like(top)
    for f in features:
        total = total + xp.exp(term(f) - top)
    zero = total == 0
    return select(zero, -INF, top + xp.log(select(zero, 1.0, total, xp)), xp)


def _tau(scale: float | None, dim: int) -> float:
    return scale if scale is not None else 1.0 / math.sqrt(max(dim, 1))
