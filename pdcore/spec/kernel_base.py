"""Base classes of kernels, and the parameters that kernels and normalizations declare."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

from ..errors import UnsupportedError
from .expression import Expression, trace

__all__ = ["FeatureMap", "FeatureScale", "Kernel", "Parameter", "PointwiseKernel"]


@dataclass(frozen=True)
class Parameter:
    """An array that a kernel or a normalization takes from the call's `params`.

    Attributes
    ----------
    name : str
        The key in `params`.
    shapes : tuple of tuple
        The shapes it may have; ``"H"`` stands for the number of key heads, ``"Hq"`` for that of
        query heads, ``"D"`` for the feature count, an int for itself. A parameter always has a
        head axis first, the same in all of its shapes.
    default : float, callable or None
        The value of every entry when the call does not pass the parameter, or a function from the
        length of its head axis to the values along that axis; None makes the parameter required.
    differentiable : bool
        False for running statistics, which are constants of a call.
    start : float, callable or None
        As `default`, for a new layer; None for `default` itself.
    buffer : str
        The name of the buffer in which a layer keeps the parameter; empty for a parameter that
        the layer learns.
    """

    name: str
    shapes: tuple[tuple[str | int, ...], ...]
    default: float | Callable[[int], tuple[float, ...]] | None = None
    differentiable: bool = True
    start: float | Callable[[int], tuple[float, ...]] | None = None
    buffer: str = ""

    @property
    def running(self) -> bool:
        """Whether a layer updates its buffer in training, by the statistics of each call."""
        return bool(self.buffer) and not self.differentiable

    @property
    def by_query_head(self) -> bool:
        """Whether the first axis is that of the query heads."""
        return any(shape[:1] == ("Hq",) for shape in self.shapes)

    def filled(self, shape: tuple[int, ...], *, xp: Any, **how: Any) -> Any:
        """Return an array of the default; `how` are its dtype and device."""
        if not callable(self.default):
            return xp.full(shape, self.default, **how)
        values = xp.asarray(self.default(shape[0]), **how)
        return xp.broadcast_to(xp.reshape(values, (-1, *(1 for _ in shape[1:]))), shape)


class Kernel(ABC):
    """A kernel: a frozen dataclass whose fields are the arguments of its word in a spec.

    Attributes
    ----------
    word : str
        The name of the kernel in the grammar.
    aliases : tuple of str
        Other names of the kernel.
    has_log : bool
        Whether a bias can be added to log kappa.
    signed : bool
        Whether kappa may be negative; such a kernel needs ``h(one)`` or ``h(count)``.
    places : tuple of str
        Which of ``distance``, ``query_label`` and ``key_label`` a `PointwiseKernel` reads.
    """

    word: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    has_log: ClassVar[bool]
    signed: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ()

    def parameters(self) -> tuple[Parameter, ...]:
        """Return the declarations of the arrays that the kernel takes from `params`."""
        return ()

    @abstractmethod
    def latex(self) -> str:
        """Return kappa(x, y) as LaTeX mathematics."""


class PointwiseKernel(Kernel):
    """A kernel whose logarithm is a function of s = x.y, and maybe of positions and labels."""

    has_log = True

    @abstractmethod
    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        """Return log kappa, written with the operations of `pdcore.spec.expression`.

        Parameters
        ----------
        s : Expression
            The inner product x.y.
        dim : int
            The feature count D.
        **params : Expression
            The declared parameters: one scalar per head, of shape ``("H",)`` or ``("Hq",)``, or a
            table for each query head, ``("Hq", n)`` or ``("Hq", n, m)``, of which ``t[index]`` and
            ``t[query_label, key_label]`` are entries. Those of `places` too: ``distance``, the
            position of the key less that of the query, and ``query_label`` and ``key_label``, from
            the `labels` of the call.
        """

    def expression(self, dim: int) -> Expression:
        """Trace `log_kappa` for vectors of `dim` features; the result is cached."""
        return _trace_log_kappa(self, dim)


@lru_cache(maxsize=1024)
def _trace_log_kappa(kernel: PointwiseKernel, dim: int) -> Expression:
    names = (*kernel.places, *(p.name for p in kernel.parameters()))
    for p in kernel.parameters():
        if any(s not in (("H",), ("Hq",)) and not _of_table(s) for s in p.shapes):
            raise UnsupportedError(
                f"{kernel.word}: parameter {p.name!r} of a pointwise kernel has shapes "
                f"{p.shapes}, expected (('H',),) or (('Hq',),), one scalar a head, or (('Hq', n),) "
                "or (('Hq', n, m),), a table for each query head"
            )
    expression = trace(
        lambda s, *values: kernel.log_kappa(s, dim, **dict(zip(names, values, strict=True))),
        ("s", *names),
        f"{type(kernel).__name__}.log_kappa",
    )
    tables = {entry.table: len(entry.args) for entry in expression.entries}
    for p in kernel.parameters():
        axes = len(p.shapes[0])
        if p.name in expression.inputs and tables.get(p.name, 1) != axes:
            raise UnsupportedError(
                f"{kernel.word}: parameter {p.name!r} has shapes {p.shapes}, and log_kappa reads "
                f"{'it whole' if p.name not in tables else f'{tables[p.name] - 1} axes of it'}; a "
                "table is read entry by entry, t[index] or t[query_label, key_label]"
            )
    return expression


def _of_table(shape: tuple[str | int, ...]) -> bool:
    """Return whether a declared shape is that of a table for each query head."""
    head, *sizes = shape
    return head in ("Hq", 1) and len(sizes) in (1, 2) and all(type(n) is int for n in sizes)


class FeatureScale(NamedTuple):
    """Numbers by which phi(x) = exp(log) phi((x - shift) / divisor).

    Attributes
    ----------
    log : array
        The log of the factor of the features.
    shift, divisor : array or None
        None for 0, and for 1.
    """

    log: Any
    shift: Any = None
    divisor: Any = None


class FeatureMap(Kernel):
    """A kernel given by its features, kappa(x, y) = phi(x).phi(y).

    `log_domain` says that `features` returns log phi; the contraction then subtracts maxima.
    """

    has_log = False
    log_domain: ClassVar[bool] = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "features" in vars(cls) and "feature_scale" not in vars(cls):
            # An inherited scale is that of other features.
            cls.feature_scale = FeatureMap.feature_scale  # type: ignore[method-assign]

    @abstractmethod
    def features(self, x: Any, *, xp: Any, params: Mapping[str, Any]) -> Any:
        """Compute phi(x), in array-API calls.

        Parameters
        ----------
        x : array (*B, H, R, D)
            Rows of queries or keys, in the accumulation dtype.
        xp : namespace
            The array-API namespace of `x`.
        params : mapping of str to array
            The declared parameters: (H, 1, 1) for ``("H",)``, (H, 1, D) for ``("H", "D")``,
            others as given.

        Returns
        -------
        array (*B, H, R, F)
        """

    def features_vjp(
        self, x: Any, cotangent: Any, *, xp: Any, params: Mapping[str, Any]
    ) -> tuple[Any, Mapping[str, Any]]:
        """Pull a cotangent of phi(x) back to x and to the parameters.

        Backends without automatic differentiation refuse gradients of a feature map that does
        not define this method.

        Returns
        -------
        dx : array like `x`
        dparams : mapping of str to array
            Cotangents of the parameters, not yet summed to the shapes of `params`.
        """
        raise UnsupportedError(
            f"{self.word}: features_vjp is not written, so backends without automatic "
            "differentiation (numpy, cupy) cannot give its gradient"
        )

    def feature_scale(self, largest: Any, *, xp: Any) -> FeatureScale:
        """Return a scale of features, so that products of small features do not vanish.

        By default there is none: products of features below the range of the dtype are 0.

        Parameters
        ----------
        largest : array
            The largest entries of sets of rows: for queries of each row, (*B, H, R, 1); for keys
            of each head, (*B, H, 1, 1).
        xp : namespace
            The array-API namespace of `largest`.

        Returns
        -------
        FeatureScale
            The scale of each set, like `largest`: a factor below 1 where all features of the set
            are below 1, else 1.
        """
        return FeatureScale(xp.zeros_like(largest))

    @property
    def has_vjp(self) -> bool:
        """Whether the class defines `features_vjp`."""
        return type(self).features_vjp is not FeatureMap.features_vjp

    @property
    def has_feature_scale(self) -> bool:
        """Whether the class has a scale of its features."""
        return type(self).feature_scale is not FeatureMap.feature_scale
