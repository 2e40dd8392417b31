"""What the peers share: a call of pdcore as the arguments of the usual attention functions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, NamedTuple

from pdcore.extend import (
    ArrayBackend,
    AttentionSpec,
    Call,
    Exponential,
    Inputs,
    Plan,
    Request,
    UnsupportedError,
    Visibility,
    default_scale,
)

__all__ = ["Asked", "PeerBackend", "by_row"]


class Asked(NamedTuple):
    """A call as attention functions take it, with one leading axis.

    Attributes
    ----------
    q, k, v : array (B, Hq, N, D), (B, Hkv, M, D), (B, Hkv, M, Dv)
    spec : AttentionSpec
        The spec, for functions of other kernels than softmax.
    scale : float
    softcap : float or None
    causal : bool
        Whether query i sees the keys up to i only, by the function's own argument.
    window : tuple of float or None
        The keys that a query sees before and after its own position, by the function's own
        argument; `math.inf` for all.
    key_mask : bool array (B, M) or None
        Real keys, for a function that has an argument for them.
    mask : bool array broadcastable to (B, Hq, N, M), of that rank, or None
        True: may attend. What the function has no argument for is in the mask too.
    bias : array broadcastable to (B, Hq, N, M), of that rank, or None
    lse : bool
        Whether the log-sum-exp is wanted.
    """

    q: Any
    k: Any
    v: Any
    spec: AttentionSpec = AttentionSpec()
    scale: float = 1.0
    softcap: float | None = None
    causal: bool = False
    window: tuple[float, float] | None = None
    key_mask: Any = None
    mask: Any = None
    bias: Any = None
    lse: bool = False

    def features(self, xp: Any) -> tuple[Any, Any]:
        """Return the features of queries and keys, for functions that take them."""
        phi = self.spec.kernel.features  # type: ignore[attr-defined]
        return phi(self.q, xp=xp, params={}), phi(self.k, xp=xp, params={})

    def bias_or_mask(self, xp: Any) -> Any:
        """Return the one array of functions that take either a bias or a boolean mask."""
        if self.bias is None or self.mask is None:
            return self.mask if self.bias is None else self.bias
        return xp.where(self.mask, self.bias, xp.full_like(self.bias, -math.inf))


class PeerBackend(ArrayBackend):
    """A backend around one function of a library, which gets the arrays as the caller has them.

    Attributes
    ----------
    arguments : frozenset of {"causal", "window", "key_mask"}
        What the function has arguments for, beside a mask.
    packages : tuple of str
        The distributions whose versions belong to a result, beside the array library.
    """

    arguments: ClassVar[frozenset[str]] = frozenset({"causal"})
    packages: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def attend(self, asked: Asked) -> tuple[Any, Any]:
        """Call the function: out (B, Hq, N, Dv), and lse (B, Hq, N) or None."""

    def limits(self, request: Request) -> list[str]:
        """Return why the function does not take a call, for reasons that no feature states."""
        return []

    def refusals(self, request: Request) -> list[str]:
        """Return why the backend cannot run a call, see `Backend.refusals`."""
        return super().refusals(request) + self.limits(request)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Call the function, see `Backend.attention`."""
        asked = self.asked(plan, inputs, lse)
        if asked.mask is not None and self.info.support("mask") != "full":
            raise UnsupportedError(
                f"backend {self.info.name}: offset {inputs.offset}: the function has no argument "
                "for it, and none for a mask"
            )
        if asked.bias is not None and asked.bias.dtype != asked.q.dtype:
            raise UnsupportedError(
                f"backend {self.info.name}: bias is {asked.bias.dtype} and q is {asked.q.dtype}; "
                "the function takes a bias of q's dtype: cast the bias"
            )
        out, level = self.attend(asked)
        lead = inputs.q.shape[:-3]
        if len(lead) != 1:
            out = self.xp.reshape(out, (*lead, *out.shape[1:]))
            level = None if level is None else self.xp.reshape(level, (*lead, *level.shape[1:]))
        return out, level if lse else None

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Refuse: the gradients of a peer are those of its framework."""
        raise UnsupportedError(f"backend {self.info.name}: attention_vjp is this project's own")

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Refuse: the functions return no weights."""
        raise UnsupportedError(f"backend {self.info.name}: attention_weights is this project's own")

    def asked(self, plan: Plan, inputs: Inputs, lse: bool = False) -> Asked:
        """Return the arguments of the function for a call."""
        xp, own, spec = self.xp, self.arguments, plan.spec
        call, support = Call(self, plan, inputs), plan.support
        # The arguments of the functions have query i at position i.
        aligned = isinstance(inputs.offset, int) and inputs.offset == 0
        causal = support.causal and aligned and "causal" in own
        window = (support.left, support.right)
        windowed = window != (math.inf, math.inf) and aligned and "window" in own
        rest = replace(support, causal=support.causal and not causal)
        if windowed:
            rest = replace(rest, left=math.inf, right=math.inf)
        padding = inputs.key_mask if "key_mask" in own else None
        hidden = padding is None
        seen = Visibility(
            rest,
            xp,
            call.q.shape[-2],
            call.k.shape[-2],
            1,
            call.offset,
            call.key_mask if hidden else None,
            inputs.key_mask if hidden else None,
            call.mask,
            call.device,
        ).block(0, call.q.shape[-2], 0, call.k.shape[-2])
        kernel = spec.kernel
        scale, softcap = 1.0, None
        if isinstance(kernel, Exponential):
            scale, softcap = default_scale(kernel.scale, inputs.q.shape[-1]), kernel.softcap
        lead = inputs.q.shape[:-3]
        q, k, v = (_one_axis(x, 3, xp) for x in inputs[:3])
        return Asked(
            q,
            k,
            v,
            spec,
            scale,
            softcap,
            causal,
            window if windowed else None,
            None if padding is None else _one_axis(padding, 1, xp),
            _four_axes(seen, lead, call.grouped, xp),
            _four_axes(call.bias, lead, call.grouped, xp),
            lse,
        )

    def versions(self) -> dict[str, str]:
        """Return the versions of the array library and of the peer's own packages."""
        return super().versions() | {name: _version(name) for name in self.packages}


def by_row(x: Any, xp: Any) -> Any:
    """Return an array (B, H, N, D) as (B, N, H, D), or back."""
    return xp.permute_dims(x, (0, 2, 1, 3))


def _one_axis(x: Any, trailing: int, xp: Any) -> Any:
    """Return an array with its leading axes joined to one."""
    if x.ndim == trailing + 1:
        return x
    lead = x.shape[: x.ndim - trailing]
    return xp.reshape(x, (math.prod(lead), *x.shape[x.ndim - trailing :]))


def _four_axes(x: Any, lead: tuple[int, ...], grouped: tuple[int, ...], xp: Any) -> Any:
    """Return an array broadcastable to (*B, H, G, N, M) as one broadcastable to (B, Hq, N, M)."""
    if x is None:
        return None
    shape = (1,) * (len(grouped) + 2 - x.ndim) + tuple(x.shape)
    batch, (heads, group), last = shape[: len(lead)], shape[len(lead) : -2], shape[-2:]
    if any(n != 1 for n in batch) and batch != tuple(lead):
        batch = tuple(lead)
        x = xp.broadcast_to(xp.reshape(x, shape), (*batch, *shape[len(lead) :]))
    return xp.reshape(x, (math.prod(batch), heads * group, *last))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
