"""The support vector expansion: the result of `pdcore.svr.fit`, which runs as attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import device_of, dtype_name, library_of
from ..attention import attention
from ..spec import AttentionSpec
from .checks import check_float64
from .head_kernel import HeadKernel

if TYPE_CHECKING:
    from .certificate import Certificate

__all__ = ["HeadFit", "SupportVectorExpansion"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class HeadFit:
    """The solved regression of one head, with W points and Dv outputs.

    Attributes
    ----------
    kernel : HeadKernel
        The kernel K of the head, with its points.
    targets : array (W, Dv)
        The targets, pooled as the points are.
    upper, lower : array (W, Dv)
        The multipliers a and a*; at least one of each pair is 0.
    intercept : array (Dv,)
        b.
    """

    kernel: HeadKernel
    targets: Array
    upper: Array
    lower: Array
    intercept: Array

    @property
    def coefficients(self) -> Array:
        """The differences a - a*, (W, Dv)."""
        return self.upper - self.lower

    @property
    def values(self) -> Array:
        """(a - a*) / h, (W, Dv): the values of the points in attention."""
        return self.coefficients * self.kernel.inverse_h[:, None]


@dataclass(frozen=True, eq=False)
class SupportVectorExpansion:
    """f(x) = sum_j v_j kappa(x, k_j) / h(x) + b, with v and b computed by `fit`.

    Arrays over keys have a leading head axis if the keys have one. In a head with a scale, all
    keys of a window have the multipliers of the window's pooled key.

    Attributes
    ----------
    spec : AttentionSpec
    keys : array (H, M, D) or (M, D)
    C, epsilon : float
    solver : str
    params : mapping of str to array
        The arrays of the spec, as given to `fit`.
    heads : tuple of HeadFit
        The regression of each head.
    """

    spec: AttentionSpec
    keys: Array
    C: float
    epsilon: float
    solver: str
    params: Mapping[str, Array]
    heads: tuple[HeadFit, ...]

    @cached_property
    def values(self) -> Any:
        """The values v, (H, M, Dv) or (M, Dv)."""
        return self._over_keys(lambda head: head.values)

    @cached_property
    def intercept(self) -> Any:
        """b, (H, Dv) or (Dv,)."""
        return self._with_head_axis([head.intercept for head in self.heads])

    @cached_property
    def multipliers(self) -> tuple[Array, Array]:
        """(a, a*), each (H, M, Dv) or (M, Dv), between 0 and C."""
        return self._over_keys(lambda head: head.upper), self._over_keys(lambda head: head.lower)

    @cached_property
    def coefficients(self) -> Any:
        """The differences a - a*, (H, M, Dv) or (M, Dv)."""
        return self._over_keys(lambda head: head.coefficients)

    @cached_property
    def support(self) -> Array:
        """Which keys are support vectors, bool (H, M, Dv) or (M, Dv)."""
        return np.asarray(self.coefficients != 0)

    def predict(self, q: Array, *, offset: int = 0) -> Any:
        """Evaluate the solution by its kernel, sum_j (a_j - a*_j) K(q, k_j) + b.

        Parameters
        ----------
        q : float64 array (Hq, N, D), or (N, D) if the keys have no head axis
            Hq is a multiple of H, as in `pdcore.attention`.
        offset : int
            The position of query 0, for specs with a window.

        Returns
        -------
        array (Hq, N, Dv) or (N, Dv)
        """
        x = self._queries(check_float64("q", q))
        group = len(x) // len(self.heads)
        heads = [head for head in self.heads for _ in range(group)]
        return self._with_head_axis(
            [
                head.kernel.rows(queries, offset) @ head.coefficients + head.intercept
                for queries, head in zip(x, heads, strict=True)
            ]
        )

    def attention(
        self, q: Any, *, backend: Any = None, device: str | None = None, offset: Any = 0
    ) -> Any:
        """Run the expansion as `pdcore.attention`, plus b.

        Parameters
        ----------
        q : array (Hq, N, D), or (N, D) where the keys have no head axis
            Of any library and float dtype, to which keys, values and b are converted.
        backend, device, offset
            As in `pdcore.attention`.

        Returns
        -------
        array (Hq, N, Dv) or (N, Dv)
            In q's library, dtype and device.
        """
        from array_api_compat import array_namespace

        library_of(q, "q")
        x, xp = self._queries(q), array_namespace(q)

        def like(part: Any) -> Any:
            return xp.asarray(part, dtype=q.dtype, device=device_of(q))

        H = len(self.heads)
        largest = max(float(np.max(np.abs(a))) for a in (self.values, self.intercept))
        if largest > float(xp.finfo(q.dtype).max):
            raise ValueError(
                f"q: got {dtype_name(q)}, which cannot hold values of {largest:.3g}; "
                "expected float32 or float64"
            )
        keys, values = (like(a.reshape(H, -1, a.shape[-1])) for a in (self.keys, self.values))
        params = {name: like(p) for name, p in self.params.items()}
        b = np.repeat(self.intercept.reshape(H, 1, -1), x.shape[0] // H, axis=0)
        out = attention(
            x, keys, values, self.spec, offset=offset, params=params, backend=backend, device=device
        ) + like(b)
        return out if self.keys.ndim == 3 else out[0, ...]

    def certificate(self, *, gap: float = 1e-8, residual: float = 1e-6) -> Certificate:
        """Measure how far the solution is from optimal, see `pdcore.svr.certificate`."""
        from .certificate import certificate

        return certificate(self, gap=gap, residual=residual)

    def _queries(self, q: Any) -> Any:
        """Check the shape of q, and return it with a head axis."""
        shape, heads, dim = tuple(q.shape), len(self.heads), self.keys.shape[-1]
        ndim = self.keys.ndim
        expected = f"(Hq, N, {dim}), Hq a multiple of {heads}" if ndim == 3 else f"(N, {dim})"
        if len(shape) != ndim or shape[-1] != dim or (ndim == 3 and shape[0] % heads):
            raise ValueError(
                f"q: got shape {shape}, expected {expected} like the keys that were fitted"
            )
        return q if ndim == 3 else q[None, ...]

    def _over_keys(self, of_points: Callable[[HeadFit], Any]) -> Any:
        """Return an array over the keys of all heads from one over the points of each head."""
        return self._with_head_axis([h.kernel.expand_to_keys(of_points(h)) for h in self.heads])

    def _with_head_axis(self, parts: Sequence[Any]) -> Any:
        """Stack the arrays of the heads if the keys have a head axis, else return the only one."""
        return np.stack(parts) if self.keys.ndim == 3 else parts[0]
