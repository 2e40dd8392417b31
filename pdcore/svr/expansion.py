"""The support vector expansion: what `pdcore.svr.fit` gives, and what runs as attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import device_of, dtype_name, library_of
from ..attention import attention
from ..spec import AttentionSpec
from .checks import float64
from .head_kernel import HeadKernel

if TYPE_CHECKING:
    from .certificate import Certificate

__all__ = ["HeadFit", "SupportVectorExpansion"]

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class HeadFit:
    """The regression of one head, solved: W points, Dv outputs.

    Attributes
    ----------
    kernel : HeadKernel
        K over the points.
    targets : array (W, Dv)
        Pooled as the points are.
    upper, lower : array (W, Dv)
        The multipliers a and a*; at most one of a pair is not 0.
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
        """(a - a*) / h, (W, Dv): what attention takes as the values of the points."""
        return self.coefficients * self.kernel.inverse_h[:, None]


@dataclass(frozen=True, eq=False)
class SupportVectorExpansion:
    """f(x) = sum_j v_j kappa(x, k_j) / h(x) + b, solved for by `fit`.

    Arrays over keys have a leading head axis where the keys had one. In a head with a scale every
    key of a window has what the window's pooled key has.

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
        return self._shaped([head.intercept for head in self.heads])

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
        """Evaluate the solver's own solution, sum_j (a_j - a*_j) K(q, k_j) + b.

        Parameters
        ----------
        q : float64 array (Hq, N, D), or (N, D) where the keys have no head axis
            Hq is a multiple of H, as in `pdcore.attention`.
        offset : int
            The position of query 0, for specs with a window.

        Returns
        -------
        array (Hq, N, Dv) or (N, Dv)
        """
        x = self._queries(float64("q", q))
        group = len(x) // len(self.heads)
        return self._shaped(
            [
                fitted.kernel.rows(row, offset) @ fitted.coefficients + fitted.intercept
                for row, fitted in zip(
                    x, [h for h in self.heads for _ in range(group)], strict=True
                )
            ]
        )

    def attention(
        self, q: Any, *, backend: Any = None, device: str | None = None, offset: Any = 0
    ) -> Any:
        """Run the expansion as `pdcore.attention`, plus b.

        Parameters
        ----------
        q : array (Hq, N, D), or (N, D) where the keys have no head axis
            Of any library and float dtype; keys, values and b are brought to both.
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
        """Say how far the solution is from optimal, see `pdcore.svr.certificate`."""
        from .certificate import certificate

        return certificate(self, gap=gap, residual=residual)

    def _queries(self, q: Any) -> Any:
        """Give q a head axis."""
        shape, heads, dim = tuple(q.shape), len(self.heads), self.keys.shape[-1]
        whole = self.keys.ndim
        wanted = f"(Hq, N, {dim}), Hq a multiple of {heads}" if whole == 3 else f"(N, {dim})"
        if len(shape) != whole or shape[-1] != dim or (whole == 3 and shape[0] % heads):
            raise ValueError(
                f"q: got shape {shape}, expected {wanted} like the keys that were fitted"
            )
        return q if whole == 3 else q[None, ...]

    def _over_keys(self, of: Callable[[HeadFit], Any]) -> Any:
        return self._shaped([head.kernel.spread(of(head)) for head in self.heads])

    def _shaped(self, parts: Sequence[Any]) -> Any:
        return np.stack(parts) if self.keys.ndim == 3 else parts[0]
