"""Redundancy of heads: how far apart their maps and their outputs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from pdcore import AttentionSpec, bind
from pdcore.extend import Inputs, library_of

from .rows import blocks, some_rows

__all__ = ["HeadDistances", "head_distance", "head_distances", "of_call"]

#: Queries whose weights are in memory at once.
ROWS = 128


@dataclass(frozen=True)
class HeadDistances:
    """Distances of heads, float64 (*B,) each: the smaller, the more redundant the heads.

    Attributes
    ----------
    maps : numpy array (*B,)
        The mean over pairs of heads of ||A_i - A_j||, A_i (N, M) the weights of head i: the head
        redundancy of the paper, an average L2 distance between heads.
    outputs : numpy array (*B,)
        The same of the outputs of the heads, (N, Dv); a measure of this project.
    relative : numpy array (*B,)
        `outputs` over the mean norm of a head's outputs, which does not depend on their size; a
        measure of this project. NaN where all outputs are 0.
    """

    maps: Any
    outputs: Any
    relative: Any

    def mean(self) -> dict[str, float]:
        """Return the mean over the sequences, by measure."""
        return {name: float(np.mean(x)) for name, x in vars(self).items()}


def head_distance(x: Any) -> Any:
    """Compute the mean L2 (Frobenius) distance between two heads.

    Parameters
    ----------
    x : array (*B, H, N, F)
        One matrix for each of two or more heads: weights, or outputs.

    Returns
    -------
    numpy array (*B,)
        float64: mean over i < j of sqrt(sum (x_i - x_j)^2); 0 where all heads are the same.

    Raises
    ------
    ValueError
        For fewer than three axes, and fewer than two heads.

    Examples
    --------
    >>> import numpy as np
    >>> float(head_distance(np.stack([np.zeros((2, 2)), np.ones((2, 2))])))
    2.0
    """
    _check_heads("x", x)
    return _mean_root(_squares(x, None))


def head_distances(
    q: Any,
    k: Any,
    v: Any,
    spec: str | AttentionSpec = "softmax",
    *,
    query_mask: Any = None,
    rows: int = ROWS,
    backend: Any = None,
    mask: Any = None,
    key_mask: Any = None,
    bias: Any = None,
    offset: Any = 0,
    labels: Any = None,
    params: Mapping[str, Any] | None = None,
) -> HeadDistances:
    """Compute the distances of the heads of an attention, without an (N, M) array.

    Parameters
    ----------
    q, k, v, spec, backend, mask, key_mask, bias, offset, labels, params
        As in `pdcore.attention`, with two or more query heads.
    query_mask : bool array (*B, N), optional
        True for queries that count; padding should not.
    rows : int
        Queries whose weights are in memory at once, (*B, H, rows, M).

    Returns
    -------
    HeadDistances

    Raises
    ------
    TypeError, ValueError, UnsupportedError
        For a wrong argument, as in `pdcore.attention`.
    """
    params = {} if params is None else params
    inputs = Inputs(q, k, v, mask, key_mask, bias, offset, params, labels=labels)
    return of_call(bind(spec, backend=backend), inputs, query_mask, rows)


def of_call(attend: Any, inputs: Inputs, query_mask: Any, rows: int) -> HeadDistances:
    """Compute the distances of a call of a bound attention; see `head_distances`."""
    q = inputs.q
    _check_heads("q", q)
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"rows: got {type(rows).__name__}, expected an int, 1 or more")
    if rows < 1:
        raise ValueError(f"rows: got {rows}, expected 1 or more queries at once")
    lead, n = tuple(q.shape[:-3]), q.shape[-2]
    if query_mask is not None and tuple(query_mask.shape) != (*lead, n):
        raise ValueError(
            f"query_mask: got shape {tuple(query_mask.shape)}, expected (*B, N) = {(*lead, n)}"
        )
    maps: Any = 0.0
    outputs: Any = 0.0
    norms: Any = 0.0
    for part in blocks(n, rows):
        real = None if query_mask is None else query_mask[..., part]
        call = some_rows(inputs, part)
        maps = maps + _squares(attend.weights(call), real)
        out = attend(*call[:3], **_keywords(call))
        outputs = outputs + _squares(out, real)
        norms = norms + _sums(_counted(out, real), 0.0)
    apart = _mean_root(outputs)
    size = np.mean(np.sqrt(norms), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return HeadDistances(_mean_root(maps), apart, apart / size)


def _keywords(call: Inputs) -> dict[str, Any]:
    """Return the arguments of a call by name, but q, k and v."""
    names = ("mask", "key_mask", "bias", "offset", "params", "segments", "labels")
    return {name: getattr(call, name) for name in names}


def _check_heads(name: str, x: Any) -> None:
    if x.ndim < 3 or x.shape[-3] < 2:
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected (*B, H, N, D) with two or more heads H, "
            "since a distance is between two"
        )


def _mean_root(squares: Any) -> Any:
    """Return the mean over pairs of heads, on the last axis, of the roots."""
    return np.mean(np.sqrt(squares), axis=-1)


def _counted(x: Any, real: Any) -> Any:
    """Return x in the widest float that its library has here, 0 for queries that do not count."""
    xp: Any = array_namespace(x)
    # JAX has float64 only where it is enabled.
    wide = xp.float32 if "float64" not in _floats(xp) else xp.float64
    x = xp.astype(x.detach() if library_of(x, "x") == "torch" else x, wide)
    return x if real is None else xp.where(real[..., None, :, None], x, xp.zeros_like(x))


def _floats(xp: Any) -> set[str]:
    return set(xp.__array_namespace_info__().dtypes(kind="real floating"))


def _squares(x: Any, real: Any) -> Any:
    """Return the sums of squared differences of two heads, (*B, pairs), as NumPy's float64."""
    x = _counted(x, real)
    pairs = combinations(range(x.shape[-3]), 2)
    return np.stack([_sums(x[..., i, :, :], x[..., j, :, :]) for i, j in pairs], axis=-1)


def _sums(x: Any, y: Any) -> Any:
    """Return sum (x - y)^2 over the last two axes, as NumPy's float64."""
    xp: Any = array_namespace(x)
    library = library_of(x, "x")
    total = xp.sum((x - y) ** 2, axis=(-2, -1))
    if library == "torch":
        total = total.cpu()
    elif library == "cupy":
        total = total.get()
    return np.asarray(total, dtype=np.float64)
