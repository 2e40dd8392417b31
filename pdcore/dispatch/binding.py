"""A spec bound to a backend: select and lower once for each kind of call, then run.

`BoundAttention` is what `pdcore.bind` returns and what `pdcore.attention` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..arrays import compiling, device_name, dtype_name, library_of
from ..backend import Backend, Inputs, Request
from ..errors import UnsupportedError
from ..lowering import Plan
from ..plugins import registry as plugins
from ..spec import AttentionSpec, as_spec
from . import selection
from .tracing import Traced, fixed, settler

__all__ = ["NO_DROPOUT", "NO_PARAMS", "BoundAttention", "Choice", "bound"]

Choice = str | Sequence[str] | None

NO_PARAMS: Mapping[str, Any] = {}
NO_DROPOUT = 0.0  # the very object that is the default, so that no value is compared


class BoundAttention:
    """A spec bound to a backend: a pure function of arrays, made by `bind`.

    Attributes
    ----------
    spec : AttentionSpec
        What it computes.
    """

    # `jax.jit` keeps weak references to what it compiles.
    __slots__ = (
        "__weakref__",
        "_choice",
        "_device",
        "_parameters",
        "_ready",
        "_settle",
        "_traced",
        "spec",
    )

    def __init__(
        self, spec: str | AttentionSpec, backend: Choice = None, device: str | None = None
    ) -> None:
        self.spec = as_spec(spec)
        # Settled now: what surrounds a later call, or a trace, does not matter.
        self._choice: Any = backend
        if backend is None:
            self._choice = selection.ambient() or selection.BY_LIBRARY
        self._device = device
        self._parameters = bool(self.spec.parameters())
        # Signature of a call -> what was found out about it.
        self._ready: dict[Any, tuple[Backend, Plan, str, str | None]] = {}
        self._traced = Traced()
        self._settle = settler(self.spec, self._choice, device, self._traced)

    # What `_settle` closes over is made again, not copied or pickled.
    def __getstate__(self) -> tuple[AttentionSpec, Any, str | None]:
        return self.spec, self._choice, self._device

    def __setstate__(self, state: tuple[AttentionSpec, Any, str | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<pdcore.bind({str(self.spec)!r}, backend={self._choice!r})>"

    @property
    def choice(self) -> Any:
        """The choice of backend that was made when it was bound."""
        return self._choice

    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *,
        mask: Any = None,
        key_mask: Any = None,
        bias: Any = None,
        offset: Any = 0,
        params: Mapping[str, Any] | None = None,
        return_lse: bool = False,
        dropout: float = NO_DROPOUT,
        axis_name: str | None = None,
    ) -> Any:
        """Compute attention; the arguments are those of `attention`."""
        given = NO_PARAMS if params is None else params
        inputs = Inputs(q, k, v, mask, key_mask, bias, offset, given, dropout, axis_name)
        backend, plan, inputs, back = self.prepare(inputs, lse=return_lse)
        if back is None:
            out, lse = backend.attention(plan, inputs, lse=return_lse)
        else:
            with backend.stream_of(q):
                out, lse = backend.attention(plan, inputs, lse=return_lse)
                out, lse = back(out), None if lse is None else back(lse)
        return (out, lse) if return_lse else out

    def vjp(self, inputs: Inputs) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Compute attention and its pullback, see `attention_vjp`."""
        backend, plan, ready, back = self.prepare(inputs, vjp=True)
        if back is not None:
            library = library_of(inputs.q, "q")
            raise UnsupportedError(
                f"attention_vjp: backend {backend.info.name} would take the {library} arrays by "
                f"DLPack, which cuts gradients; convert them to {backend.info.library} yourself, "
                f"or use a {library} backend"
            )
        return backend.attention_vjp(plan, ready)

    def weights(self, inputs: Inputs) -> Any:
        """Compute the weights, see `attention_weights`."""
        backend, plan, ready, back = self.prepare(inputs, weights=True)
        if back is None:
            return backend.attention_weights(plan, ready)
        with backend.stream_of(inputs.q):
            return back(backend.attention_weights(plan, ready))

    def prepare(
        self, inputs: Inputs, *, lse: bool = False, vjp: bool = False, weights: bool = False
    ) -> tuple[Backend, Plan, Inputs, Callable[[Any], Any] | None]:
        """Check a call and find its backend and plan.

        Returns
        -------
        backend : Backend
        plan : Plan
        inputs : Inputs
            In the backend's library, parameters filled in.
        back : callable or None
            Takes a result back to the caller's library and device; None when it is there.
        """
        if compiling():
            return self._prepare_traced(inputs, lse=lse, vjp=vjp, weights=weights)
        key: Any = None
        found = None
        try:
            q, k, v, mask, key_mask, bias, offset, params, dropout, axis_name = inputs
            key = (lse, vjp, weights, _kind(q), _kind(k), _kind(v))
            plain = mask is None and key_mask is None and bias is None and type(offset) is int
            plain = plain and type(params) is dict and not params
            if not (plain and dropout is NO_DROPOUT and axis_name is None):
                key = (*key, *map(_kind, inputs[3:]), dropout)
            found = self._ready.get(key)
        except (AttributeError, TypeError):
            key = None  # `validate` says what is wrong
        if found is None:
            request = self.request(inputs, lse=lse, vjp=vjp, weights=weights)
            chosen = selection.choose(request, self._choice)
            plan = chosen.backend.fuse(request.lower(), request)
            found = (chosen.backend, plan, request.library, self._device or chosen.device)
            if key is not None:
                if len(self._ready) >= 4096:
                    self._ready.clear()
                self._ready[key] = found
        backend, plan, library, device = found
        back = None
        if self._parameters or type(inputs.offset) is not int:
            inputs = _complete(self.spec, inputs, library)
        if backend.info.library != library or device is not None:
            inputs, back = _exchange(backend, inputs, library, device)
        return backend, plan, inputs, back

    def _prepare_traced(
        self, inputs: Inputs, *, lse: bool, vjp: bool, weights: bool
    ) -> tuple[Backend, Plan, Inputs, None]:
        """Do what `prepare` does while ``torch.compile`` or ``torch.export`` traces the call.

        Lengths may be symbols, so nothing is looked up by them: the backend is chosen for the
        number of axes, of heads and of features, whatever the lengths.
        """
        from .validation import finite_dropout, validate

        q, k, v = inputs.q, inputs.k, inputs.v
        given = tuple(
            None if x is None else x.ndim for x in (inputs.mask, inputs.key_mask, inputs.bias)
        )
        dropped = True if finite_dropout(inputs.dropout) else False  # noqa: SIM210 - a symbol
        sizes = (q.shape[-3], k.shape[-3], q.shape[-1], v.shape[-1])
        token = self._settle(
            str(q.dtype),
            str(q.device),
            q.ndim,
            *map(fixed, sizes),
            given,
            _offset_kind(inputs.offset),
            lse,
            vjp,
            weights,
            dropped,
            inputs.axis_name,
        )
        validate(self.spec, inputs, "torch")
        if self._parameters:
            inputs = _complete(self.spec, inputs, "torch")
        backend, plan = getattr(self._traced, token)
        return backend, plan, inputs, None

    def request(
        self, inputs: Inputs, *, lse: bool = False, vjp: bool = False, weights: bool = False
    ) -> Request:
        """Validate a call and describe it for the backends."""
        from .validation import finite_dropout, validate

        q = inputs.q
        library = library_of(q, "q")
        validate(self.spec, inputs, library)
        mask, key_mask, bias = (
            None if x is None else tuple(x.shape)
            for x in (inputs.mask, inputs.key_mask, inputs.bias)
        )
        return Request(
            self.spec,
            library,
            dtype_name(q),
            self._device or device_name(q, library),
            tuple(q.shape),
            tuple(inputs.k.shape),
            tuple(inputs.v.shape),
            mask,
            key_mask,
            bias,
            _offset_kind(inputs.offset),
            bool(lse),
            vjp,
            weights,
            finite_dropout(inputs.dropout),
            inputs.axis_name,
        )


def _offset_kind(offset: Any) -> str:
    """Say what an offset is, see `Request`."""
    if isinstance(offset, str):
        return "end"
    if not hasattr(offset, "shape") or isinstance(offset, np.integer):
        return "int"
    return "sequence" if len(offset.shape) else "array"


def _kind(x: Any) -> Any:
    """Give all that validation reads of an argument, hashable; values do not matter."""
    kind = type(x)
    if kind is np.ndarray:  # the quickest first
        return kind, x.shape, x.dtype
    if x is None or kind is int:
        return kind
    if kind is str or kind is float:
        return x
    if not hasattr(x, "shape") and isinstance(x, Mapping):
        return tuple((name, *_kind(value)) for name, value in x.items())
    return kind, x.shape, x.dtype, x.device


def _complete(spec: AttentionSpec, inputs: Inputs, library: str) -> Inputs:
    """Fill in parameters that have a default, and make host offsets Python ints."""
    offset = inputs.offset
    if isinstance(offset, np.integer) or (
        isinstance(offset, np.ndarray) and library == "numpy" and not offset.shape
    ):
        offset = int(offset)
    params = dict(inputs.params)
    for p in spec.parameters():
        if p.name not in params:
            from array_api_compat import array_namespace

            from ..backend import accumulation
            from .validation import parameter_shape

            shape = parameter_shape(p.shapes[0], inputs.k.shape[-3], inputs.q.shape[-1])
            xp = array_namespace(inputs.q)
            # 16 bit would round the default.
            params[p.name] = xp.full(
                shape, p.default, dtype=accumulation(inputs.q, xp), device=inputs.q.device
            )
    return inputs._replace(offset=offset, params=params)


def _exchange(
    backend: Backend, inputs: Inputs, library: str, device: str | None
) -> tuple[Inputs, Callable[[Any], Any] | None]:
    """Bring the arrays of a call to the backend, which the caller named, by DLPack."""
    q = inputs.q
    home = device_name(q, library)
    target = device or home
    own = backend.info.library == library
    if own and target == home:
        return inputs, None
    # A move within a library is a step that it differentiates.
    if not own and any(
        getattr(x, "requires_grad", False) for x in (*inputs, *inputs.params.values())
    ):
        raise UnsupportedError(
            f"backend {backend.info.name}: taking {library} arrays that require a gradient to "
            f"{backend.info.library} would cut it; detach them, or use a {library} backend"
        )

    def there(x: Any) -> Any:
        if x is None or isinstance(x, (int, float, str)):
            return x
        try:
            return backend.exchange(x, target if own else device)
        except Exception as error:
            raise UnsupportedError(
                f"backend {backend.info.name} cannot take a {library} array of dtype "
                f"{dtype_name(x)} on {device_name(x, library)}"
                f"{'' if own else ' by DLPack'}: {error}"
            ) from error

    from array_api_compat import array_namespace

    namespace = array_namespace(q)

    def back(x: Any) -> Any:
        if device is not None:
            x = backend.exchange(x, home)
        # An array of NumPy has come home already.
        return x if own or library_of(x, "out") == library else backend.give(x, namespace)

    moved = {name: there(x) for name, x in inputs._asdict().items() if name != "params"}
    return Inputs(**moved, params={n: there(x) for n, x in inputs.params.items()}), back


_BOUND: dict[Any, BoundAttention] = {}


def bound(spec: str | AttentionSpec, backend: Choice, device: str | None) -> BoundAttention:
    """Return the bound function of a call, kept from call to call."""
    named: Any = backend
    if backend is not None and not isinstance(backend, str) and isinstance(backend, Sequence):
        named = tuple(backend)
    try:
        ambient = selection.ambient() if named is None else None
        key = (spec, named, device, ambient, plugins.generation())
        layer = _BOUND.get(key)
    except TypeError:
        return BoundAttention(spec, named, device)
    if layer is None:
        plugins.discover()  # it counts as a change, which would make the layer old at once
        key = (*key[:-1], plugins.generation())
        layer = BoundAttention(spec, named, device)
        if len(_BOUND) >= 1024:  # specs made in a loop must not grow it without end
            _BOUND.clear()
        _BOUND[key] = layer
    return layer
