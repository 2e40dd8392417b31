"""Attention-BN folded into the query: statistics and fold in few passes over memory.

Shapes: q (B, H, G, N, D), with the G query heads of a key head on an axis; k (B, H, M, D);
statistics (B, H, 1, D), (1, H, 1, D) over a batch, or (B, H, N, D) for prefixes.

Masked sums over the sequence are matrix products with a row of ones for the real keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pdcore.extend import Moments, compiling, first_real

from . import device
from . import namespace as xp
from .flash import recorded
from .prefix import beta_cotangent, fold_rows, inverted, plain_gradient

__all__ = ["fold", "fold_prefix", "fold_running", "prefix_moments", "row_of_ones"]


#: Keys of a chunk in `prefix_moments`.
CHUNK = 64


class _Sums(NamedTuple):
    """The statistics of the keys that a fold reads.

    Attributes
    ----------
    n : int or Tensor
        The number of real keys.
    mean : Tensor
        The mean of the keys.
    inverse : Tensor
        1 / (var + eps), 0 where there are fewer than two keys.
    centred : Tensor
        k - c, c the mean as computed first.
    rest : Tensor or None
        mean - c, the rounding error of c; None where c is the mean.
    """

    n: Any
    mean: Tensor
    inverse: Tensor
    centred: Tensor
    rest: Tensor | None


def fold(
    q: Tensor,
    k: Tensor,
    real: Tensor | None,
    beta: Any,
    *,
    eps: float,
    split: bool,
    over_batch: bool,
) -> tuple[Tensor, Tensor]:
    """Fold the statistics of a sequence or batch, see `pdcore.lowering.Fold`.

    Parameters
    ----------
    q, k : Tensor
        Finite where a key is not real.
    real : bool Tensor (B, 1, M), optional
        True for a real key.
    beta : float or Tensor (H, 1, 1) or (H, 1, D)
        The weight of the mean.
    eps : float
        Added to the variance.
    split : bool
        Divide queries and keys by sigma instead of queries by sigma^2.
    over_batch : bool
        Compute the statistics over B too.

    Returns
    -------
    q', k' : Tensor
        In the dtype of the inputs.
    """
    if compiling():
        return _plain(q, k, real, beta, eps, split, over_batch)
    record = recorded(q, k, beta if isinstance(beta, Tensor) else None)
    if k.is_cuda and not over_batch and by_triton(k):
        from . import triton_fold

        return triton_fold.fold(q, k, real, beta, eps, split, _plain, record)
    if record:
        rows: tuple[Tensor, Tensor] = _Fold.apply(q, k, real, beta, eps, split, over_batch)
        return rows
    return _apply(q, _sums(k, real, eps, over_batch), beta, split)


def by_triton(k: Tensor) -> bool:
    """Check whether `.triton_fold` folds the statistics of keys on a CUDA device."""
    name = str(k.dtype).removeprefix("torch.")
    return not device.unfolded(str(k.device), name, k.shape[-1])


def row_of_ones(real: Tensor, wide: torch.dtype) -> Tensor:
    """Return 1 for each real key and 0 for the others, (B, 1, 1, M)."""
    return real.to(wide)[:, :, None, :]


def _sums(k: Tensor, real: Tensor | None, eps: float, over_batch: bool) -> _Sums:
    wide = xp.accumulation(k)
    k = k if k.dtype == wide else k.to(wide)
    if real is not None:
        return _masked_sums(k, real, eps, over_batch)
    n = k.shape[-2] * (k.shape[0] if over_batch else 1)
    if n == 1:
        return _Sums(n, k, torch.zeros_like(k), k - k, None)
    axes = (0, 2) if over_batch else 2
    mean = k.mean(axes, keepdim=True)
    centred = k - mean
    var = (centred * centred).mean(axes, keepdim=True)
    return _Sums(n, mean, inverted(var, eps), centred, None)


def _masked_sums(k: Tensor, real: Tensor, eps: float, over_batch: bool) -> _Sums:
    one = row_of_ones(real, k.dtype)
    n = one.sum(-1, keepdim=True)
    n = n.sum(0, keepdim=True) if over_batch else n
    count = torch.where(n > 0, n, 1.0)

    def averaged(x: Tensor) -> Tensor:
        total = one @ x
        return (total.sum(0, keepdim=True) if over_batch else total) / count

    mean = averaged(k)
    centred = k - mean
    rest = averaged(centred)
    # The difference does not cancel, as `rest` is of the size of a rounding error.
    var = averaged(centred * centred) - rest * rest
    inverse = torch.where(n > 1, inverted(var, eps), 0.0)
    return _Sums(n, mean + rest, inverse, centred, rest)


def _apply(q: Tensor, s: _Sums, beta: Any, split: bool) -> tuple[Tensor, Tensor]:
    factor = s.inverse.sqrt() if split else s.inverse
    shift = s.mean * factor * -beta
    wide = q if q.dtype == factor.dtype else q.to(factor.dtype)
    folded = torch.addcmul(shift[:, :, None], wide, factor[:, :, None])
    keys = s.centred * factor if split else s.centred
    if folded.dtype == q.dtype:
        return folded, keys
    return folded.to(q.dtype), keys.to(q.dtype)


class _Fold(torch.autograd.Function):  # type: ignore[misc]
    """The fold with its gradient in few passes; c counts as a constant, which changes no result."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        real: Tensor | None,
        beta: Any,
        eps: float,
        split: bool,
        over_batch: bool,
    ) -> tuple[Tensor, Tensor]:
        s = _sums(k, real, eps, over_batch)
        ctx.plain = (eps, split, over_batch)
        ctx.beta = None if isinstance(beta, Tensor) else beta
        n = s.n if isinstance(s.n, Tensor) else None
        ctx.n = s.n
        ctx.save_for_backward(q, k, real, beta if ctx.beta is None else None, n, *s[1:])
        ctx.set_materialize_grads(False)
        return _apply(q, s, beta, split)

    @staticmethod
    def backward(ctx: Any, *d: Any) -> Any:
        dq, dk = d
        q, k, real, learned, n, mean, inverse, centred, rest = ctx.saved_tensors
        beta = learned if ctx.beta is None else ctx.beta
        dq = torch.zeros_like(q) if dq is None else dq
        dk = torch.zeros_like(k) if dk is None else dk
        if torch.is_grad_enabled():
            grads = plain_gradient(
                lambda q, k, beta: _plain(q, k, real, beta, *ctx.plain), q, k, beta, (dq, dk)
            )
        else:
            s = _Sums(ctx.n if n is None else n, mean, inverse, centred, rest)
            grads = _pull_back(q, k, real, beta, ctx.plain, s, dq, dk)
        return (grads[0], grads[1], None, grads[2], None, None, None)


def _pull_back(
    q: Tensor,
    k: Tensor,
    real: Tensor | None,
    beta: Any,
    plain: tuple[float, bool, bool],
    s: _Sums,
    dq: Tensor,
    dk: Tensor,
) -> tuple[Tensor, Tensor, Any]:
    _, split, over_batch = plain
    wide = s.mean.dtype
    q_dtype, q, dq, dk = q.dtype, q.to(wide), dq.to(wide), dk.to(wide)
    factor = s.inverse.sqrt() if split else s.inverse

    def total(x: Tensor) -> Tensor:
        x = x.sum(2)  # over the query heads of a key head
        return x.sum(0, keepdim=True) if over_batch else x

    level, slope = (total(x.sum(-2, keepdim=True)) for x in (dq, dq * q))
    d_factor = slope - beta * s.mean * level
    if split:
        turned = dk * s.centred
        if real is None:
            turned = turned.sum(-2, keepdim=True)
        else:
            turned = row_of_ones(real, wide) @ turned
        d_factor = d_factor + (turned.sum(0, keepdim=True) if over_batch else turned)
        d_var = -0.5 * factor * factor * factor * d_factor
        dk = dk * factor
    else:
        d_var = -factor * factor * d_factor
    moved = factor * level
    d_mean = -beta * moved
    count = s.n if not isinstance(s.n, Tensor) else torch.where(s.n > 0, s.n, 1.0)
    steep = 2.0 / count * d_var
    base = d_mean / count if s.rest is None else d_mean / count - steep * s.rest
    more = torch.addcmul(base, steep, s.centred)
    if real is not None:
        more = more * real[:, :, :, None]
    d_beta = beta_cotangent(-s.mean * moved, beta) if isinstance(beta, Tensor) else None
    return (dq * factor[:, :, None]).to(q_dtype), (dk + more).to(k.dtype), d_beta


def _plain(
    q: Tensor, k: Tensor, real: Tensor | None, beta: Any, eps: float, split: bool, over_batch: bool
) -> tuple[Tensor, Tensor]:
    """Fold in plain differentiable calls, which a compiler fuses."""
    wide = xp.accumulation(k)
    dtype, q, k = q.dtype, q.to(wide), k.to(wide)
    axes = (0, 2) if over_batch else (2,)
    if real is None:
        var, mean = torch.var_mean(k, axes, correction=0, keepdim=True)
        several: Any = k.shape[2] * (k.shape[0] if over_batch else 1) > 1
        inverse = inverted(var, eps) if several else torch.zeros_like(var)
    else:
        keep = real[:, :, :, None]
        n = keep.to(wide).sum(axes, keepdim=True)
        count = torch.where(n > 0, n, 1.0)
        mean = torch.where(keep, k, 0.0).sum(axes, keepdim=True) / count
        away = torch.where(keep, k - mean, 0.0)
        var = (away * away).sum(axes, keepdim=True) / count
        inverse = torch.where(n > 1, inverted(var, eps), 0.0)
    factor = torch.where(inverse != 0, inverse, 1.0).sqrt() * (inverse != 0) if split else inverse
    folded = (q - (beta * mean)[:, :, None]) * factor[:, :, None]
    keys = k - mean.detach()
    return folded.to(dtype), (keys * factor if split else keys).to(dtype)


def fold_running(
    q: Tensor, k: Tensor, mean: Tensor, var: Tensor, beta: Any, *, eps: float, split: bool
) -> tuple[Tensor, Tensor]:
    """Fold running statistics, parameters (H, 1, D) of the call."""
    wide = xp.accumulation(k)
    dtype, mean, var = q.dtype, mean.to(wide), var.to(wide)
    inverse = 1.0 / (var + eps)
    factor = inverse.sqrt() if split else inverse
    folded = torch.addcmul((-beta * mean * factor)[:, None], q.to(wide), factor[:, None])
    keys = k.to(wide) - mean
    return folded.to(dtype), (keys * factor if split else keys).to(dtype)


def fold_prefix(
    q: Tensor, k: Tensor, real: Tensor | None, beta: Any, offset: int, *, eps: float, closed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fold prefix statistics, those of the keys up to each row; the offset is not negative.

    Returns
    -------
    q', k' : Tensor
        In the accumulation dtype, as q' of a short prefix leaves the range of float16.
    alive : bool Tensor (B, 1, N), or None
        Whether a row's prefix has a real key; None where every prefix has one.
    """
    aligned = offset == 0 and q.shape[-2] == k.shape[-2]
    if closed and aligned and k.shape[-2] == 1 and real is None:  # as of the sequence
        return *fold(q, k, None, beta, eps=eps, split=False, over_batch=False), None
    wide = xp.accumulation(k)
    q, k = q.to(wide), k.to(wide)
    if not aligned or compiling():
        return _prefix_plain(q, k, real, beta, offset, eps=eps, closed=closed)
    record = recorded(q, k, beta if isinstance(beta, Tensor) else None)
    return fold_rows(q, k, real, beta, eps, closed, _prefix_plain, record)


def _prefix_plain(
    q: Tensor, k: Tensor, real: Tensor | None, beta: Any, offset: int, *, eps: float, closed: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fold in plain differentiable calls on whole arrays."""
    n, mean, var = prefix_moments(k, real)
    rows, keys = q.shape[-2], k.shape[-2]
    if offset or rows != keys:
        past = torch.arange(offset, offset + rows, device=k.device).clamp(max=keys - 1)
        n, mean, var = (x.index_select(-2, past) for x in (n, mean, var))
    inverse = inverted(var, eps)
    if closed:  # see `pdcore.lowering.Fold`
        inverse = torch.where(n > 1, inverse, 0.0)
    folded = (q - (beta * mean)[:, :, None]) * inverse[:, :, None]
    origin = first_real(k, real, xp=xp).detach()  # the shift changes no result
    return folded, k - origin, None if real is None else n[..., 0] > 0


def prefix_moments(k: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Compute count, mean and biased variance of the first j + 1 keys, for every j.

    Within a chunk, sums are products with a triangular matrix of ones, relative to the chunk's
    first real key: it lies at most sqrt(CHUNK) standard deviations from the mean of any prefix of
    the chunk, so little cancels. Chunks are combined by Chan's merge.

    Parameters
    ----------
    k : Tensor (B, H, M, D)
        In the accumulation dtype.
    real : bool Tensor (B, 1, M), optional
        True for a real key.

    Returns
    -------
    n : Tensor (B, 1, M, 1)
    mean, var : Tensor (B, H, M, D)
    """
    length = k.shape[-2]
    short = -length % CHUNK
    # Padding at the end enters no prefix that is returned.
    x = (pad(k, (0, 0, 0, short)) if short else k).unflatten(-2, (-1, CHUNK))
    triangle = torch.ones(CHUNK, CHUNK, dtype=k.dtype, device=k.device).tril()
    if real is None:
        first = x[..., :1, :]
        y = x - first
        n = torch.arange(1, CHUNK + 1, dtype=k.dtype, device=k.device)[:, None]
        n = n.expand(k.shape[0], 1, x.shape[2], CHUNK, 1)
    else:
        keep = pad(real, (0, short)).unflatten(-1, (-1, CHUNK))[..., None]
        at = keep.to(torch.uint8).argmax(-2, keepdim=True)
        first = torch.take_along_dim(x, at, -2)
        y = torch.where(keep, x - first, 0.0)
        n = triangle @ keep.to(k.dtype)
    total = triangle @ y
    count = n if real is None else torch.where(n > 0, n, 1.0)
    away = total / count
    m2 = (triangle @ (y * y) - total * away).clamp_min(0.0)
    mean = first + away
    whole = {"n": n[..., -1:, :], "mean": mean[..., -1:, :], "m2": m2[..., -1:, :]}
    before = _before(whole)
    both = before["n"] + n
    divisor = both if real is None else torch.where(both > 0, both, 1.0)
    share = n / divisor
    delta = mean - before["mean"]
    var = (before["m2"] + m2 + delta * delta * (before["n"] * share)) / divisor
    mean = before["mean"] + delta * share
    return tuple(s.flatten(2, 3)[..., :length, :] for s in (both, mean, var))


def _before(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge, for each chunk (axis 2), the states of all chunks before it."""
    moments, step, length = Moments(), 1, state["n"].shape[2]
    while step < length:
        merged = moments.merge(
            {name: x[:, :, :-step] for name, x in state.items()},
            {name: x[:, :, step:] for name, x in state.items()},
            xp=xp,
        )
        state = {name: torch.cat([x[:, :, :step], merged[name]], 2) for name, x in state.items()}
        step *= 2
    return {
        name: torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
        for name, x in state.items()
    }
