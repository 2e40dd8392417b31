"""A spec bound to a backend: select and lower once for each kind of call, then run.

`BoundAttention` is what `pdcore.bind` returns and what `pdcore.attention` calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Never

import numpy as np

from ..arrays import (
    compiling,
    device_name,
    device_of,
    dtype_name,
    library_of,
    untraced,
)
from ..backend import ArrayBackend, Backend, Inputs, Request
from ..errors import UnsupportedError
from ..lowering import Plan
from ..spec import AttentionSpec, as_spec
from . import selection
from .arguments import check_given, explains_arguments, wrong_arguments
from .exchange import exchange
from .labels import check_label_values
from .layout import HEADS_FIRST, Layout, heads_first, swap_axes, swap_pullback
from .offsets import LARGE, near_offset
from .packed import packed_call
from .segments import segments_kind
from .signatures import offset_kind, signature
from .tracing import TracedSelections, concrete_size, make_traced_selector

__all__ = ["NO_DROPOUT", "NO_PARAMS", "BoundAttention", "Choice"]

Choice = str | Sequence[str] | None

NO_PARAMS: Mapping[str, Any] = {}
# The default itself, compared by identity: the value of a dropout may be traced.
NO_DROPOUT = 0.0


class BoundAttention:
    """A spec bound to a backend: a pure function of arrays, returned by `bind`.

    Attributes
    ----------
    spec : AttentionSpec
        The attention that the function computes.
    """

    # `jax.jit` keeps weak references to what it compiles.
    __slots__ = (
        "__weakref__",
        "_by_label",
        "_choice",
        "_device",
        "_has_parameters",
        "_prepared",
        "_select_traced",
        "_traced",
        "spec",
    )

    def __init__(
        self, spec: str | AttentionSpec, backend: Choice = None, device: str | None = None
    ) -> None:
        self.spec = as_spec(spec)
        if not isinstance(device, str | None):
            raise TypeError(f"device: got {type(device).__name__}, expected a name such as 'cpu'")
        # Read now: a `use_backend` block around a later call, or a trace, has no influence.
        self._choice: Any = backend
        if backend is None:
            self._choice = selection.ambient() or selection.BY_LIBRARY
        self._device = device
        self._has_parameters = bool(self.spec.parameters())
        self._by_label = self.spec.by_label
        # Signature of a call -> backend, plan, library and device for such calls.
        self._prepared: dict[Any, tuple[Backend, Plan, str, str | None]] = {}
        self._traced = TracedSelections()
        self._select_traced = make_traced_selector(self.spec, self._choice, device, self._traced)

    # The closure `_select_traced` and the caches are rebuilt, not copied or pickled.
    def __getstate__(self) -> tuple[AttentionSpec, Any, str | None]:
        return self.spec, self._choice, self._device

    def __setstate__(self, state: tuple[AttentionSpec, Any, str | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<pdcore.bind({str(self.spec)!r}, backend={self._choice!r})>"

    @property
    def choice(self) -> Any:
        """The choice of backend, made when the spec was bound."""
        return self._choice

    @explains_arguments
    def __call__(
        self,
        q: Any,
        k: Any,
        v: Any,
        *extra: Never,
        mask: Any = None,
        key_mask: Any = None,
        bias: Any = None,
        offset: Any = 0,
        segments: Any = None,
        labels: Any = None,
        params: Mapping[str, Any] | None = None,
        return_lse: bool = False,
        dropout: float = NO_DROPOUT,
        seed: Any = None,
        axis_name: str | None = None,
        group: Any = None,
        layout: Layout = HEADS_FIRST,
        **unknown: Never,
    ) -> Any:
        """Compute attention; the arguments are those of `attention`."""
        if extra or unknown:
            raise wrong_arguments(BoundAttention.__call__, extra, unknown)
        params = NO_PARAMS if params is None else params
        given = (mask, key_mask, bias, offset, params, dropout, axis_name, segments, labels, seed)
        inputs = Inputs(q, k, v, *given, group)
        inputs, packed = packed_call(self, inputs, lse=return_lse, layout=layout)
        if packed is not None:
            out, lse = packed.attention(lse=return_lse)
            if layout != HEADS_FIRST:
                out = swap_axes(out)
            return (out, lse) if return_lse else out
        backend, plan, inputs, back = self.prepare(inputs, lse=return_lse, layout=layout)
        if back is None:
            out, lse = backend.attention(plan, inputs, lse=return_lse)
        else:
            with backend.stream_of(q):
                out, lse = backend.attention(plan, inputs, lse=return_lse)
                out, lse = back(out), None if lse is None else back(lse)
        if layout != HEADS_FIRST:
            out = swap_axes(out)
        return (out, lse) if return_lse else out

    def vjp(
        self, inputs: Inputs, layout: Layout = HEADS_FIRST
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Compute attention and its pullback, see `attention_vjp`."""
        inputs, packed = packed_call(self, inputs, vjp=True, layout=layout)
        if packed is not None:
            out, lse, pullback = packed.vjp()
            if layout == HEADS_FIRST:
                return out, lse, pullback
            return swap_axes(out), lse, swap_pullback(pullback)
        backend, plan, prepared, back = self.prepare(inputs, vjp=True, layout=layout)
        if back is not None:
            library = library_of(inputs.q, "q")
            raise UnsupportedError(
                f"attention_vjp: backend {backend.info.name} would take the {library} arrays by "
                f"DLPack, which cuts gradients; convert them to {backend.info.library} yourself, "
                f"or use a {library} backend"
            )
        out, lse, pullback = backend.attention_vjp(plan, prepared)
        if layout == HEADS_FIRST:
            return out, lse, pullback
        return swap_axes(out), lse, swap_pullback(pullback)

    def weights(self, inputs: Inputs, layout: Layout = HEADS_FIRST) -> Any:
        """Compute the weights, see `attention_weights`."""
        inputs, packed = packed_call(self, inputs, weights=True, layout=layout)
        if packed is not None:
            return packed.weights()
        backend, plan, prepared, back = self.prepare(inputs, weights=True, layout=layout)
        if back is None:
            return backend.attention_weights(plan, prepared)
        with backend.stream_of(inputs.q):
            return back(backend.attention_weights(plan, prepared))

    def prepare(
        self,
        inputs: Inputs,
        *,
        lse: bool = False,
        vjp: bool = False,
        weights: bool = False,
        layout: Layout = HEADS_FIRST,
    ) -> tuple[Backend, Plan, Inputs, Callable[[Any], Any] | None]:
        """Check a call and find its backend and plan.

        Returns
        -------
        backend : Backend
        plan : Plan
        inputs : Inputs
            In the backend's library, q, k and v (*B, H, N, D), parameters filled in.
        back : callable or None
            Converts a result to the caller's library and device; None when that is not needed.
        """
        if layout is not HEADS_FIRST:
            inputs = heads_first(inputs, layout)
        if inputs.seed is not None:
            from .validation import checked_seed

            inputs = inputs._replace(seed=checked_seed(inputs.seed))
        if compiling():
            with untraced():
                return self._prepare_traced(
                    inputs, lse=lse, vjp=vjp, weights=weights, layout=layout
                )
        entry = self.entry(inputs, lse, vjp, weights, layout)
        backend, plan, library, device = entry
        back = None
        if isinstance(offset := inputs.offset, np.integer) or (
            isinstance(offset, np.ndarray) and library == "numpy" and not offset.shape
        ):
            offset = int(offset)
            inputs = inputs._replace(offset=offset)
        if type(offset) is int and not -LARGE < offset < LARGE:
            inputs = inputs._replace(offset=near_offset(self.spec, offset, inputs.q, inputs.k))
        if backend.info.library != library or device is not None:
            inputs, back = exchange(backend, inputs, library, device)
        if self._has_parameters:
            inputs = _complete(self.spec, inputs, backend)
        if self._by_label:
            check_label_values(self.spec, inputs, backend.info.library)
        return backend, plan, inputs, back

    def entry(
        self,
        inputs: Inputs,
        lse: bool = False,
        vjp: bool = False,
        weights: bool = False,
        layout: Layout = HEADS_FIRST,
    ) -> tuple[Backend, Plan, str, str | None]:
        """Return backend, plan, library and device of a call, q, k and v (*B, H, N, D)."""
        key: Any = None
        entry = None
        try:
            q, k, v, mask, key_mask, bias, offset, params, *more = inputs
            dropout, axis_name, segments, labels, seed, group = more
            key = (lse, vjp, weights, signature(q), signature(k), signature(v))
            plain = mask is None and key_mask is None and bias is None and type(offset) is int
            plain = plain and type(params) is dict and not params
            plain = plain and segments is None and labels is None and group is None
            if not (plain and dropout is NO_DROPOUT and axis_name is None and seed is None):
                key = (*key, *map(signature, inputs[3:]), dropout)
            entry = self._prepared.get(key)
        except (AttributeError, TypeError, RuntimeError):  # a nested tensor has no shape
            key = None  # `validate` raises the error that describes the argument
        if entry is None:
            request = self.request(inputs, lse=lse, vjp=vjp, weights=weights, layout=layout)
            selected = selection.choose(request, self._choice)
            plan = selected.backend.fuse(request.lower(), request)
            entry = (selected.backend, plan, request.library, self._device or selected.device)
            if key is not None:
                if len(self._prepared) >= 4096:
                    self._prepared.clear()
                self._prepared[key] = entry
        return entry

    def _prepare_traced(
        self, inputs: Inputs, *, lse: bool, vjp: bool, weights: bool, layout: str
    ) -> tuple[Backend, Plan, Inputs, None]:
        """Do what `prepare` does, while PyTorch traces the call, see `arrays.compiling`.

        Lengths may be symbolic, so they are no part of a cache key: the backend is chosen by the
        numbers of axes, heads and features, for any lengths.
        """
        from .validation import finite_dropout, validate

        if inputs.group is not None:
            raise UnsupportedError(
                "group: got a group in a call that PyTorch compiles, expected None: what ranks "
                "send each other is not traced; call attention outside of the compiled function"
            )
        q, k, v = inputs.q, inputs.k, inputs.v
        ranks = tuple(
            None if x is None else x.ndim for x in (inputs.mask, inputs.key_mask, inputs.bias)
        )
        dropped = True if finite_dropout(inputs.dropout) else False  # noqa: SIM210 - it may be symbolic
        sizes = (q.shape[-3], k.shape[-3], q.shape[-1], v.shape[-1])
        name = self._select_traced(
            str(q.dtype),
            str(q.device),
            q.ndim,
            *map(concrete_size, sizes),
            ranks,
            offset_kind(inputs.offset),
            lse,
            vjp,
            weights,
            dropped,
            inputs.axis_name,
            layout,
            inputs.segments is not None,
            isinstance(inputs.seed, str),
        )
        backend, plan = getattr(self._traced, name)
        validate(plan.spec, inputs, "torch", layout)
        if type(inputs.offset) is int and not -LARGE < inputs.offset < LARGE:
            inputs = inputs._replace(offset=near_offset(self.spec, inputs.offset, q, k))
        if self._has_parameters:
            inputs = _complete(self.spec, inputs, backend)
        return backend, plan, inputs, None

    def request(
        self,
        inputs: Inputs,
        *,
        lse: bool = False,
        vjp: bool = False,
        weights: bool = False,
        layout: str = HEADS_FIRST,
    ) -> Request:
        """Validate a call, q, k and v (*B, H, N, D), and describe it for the backends.

        `layout` is that of the caller's arrays, in which messages show their shapes.
        """
        from .validation import finite_dropout, group_size, refuse_arrays, validate

        check_given(inputs)
        q = inputs.q
        library = library_of(q, "q")
        spec = validate(self.spec, inputs, library, layout)
        refuse_arrays(return_lse=lse, axis_name=inputs.axis_name)
        mask, key_mask, bias = (
            None if x is None else tuple(x.shape)
            for x in (inputs.mask, inputs.key_mask, inputs.bias)
        )
        return Request(
            spec,
            library,
            dtype_name(q),
            self._device or device_name(q, library),
            tuple(q.shape),
            tuple(inputs.k.shape),
            tuple(inputs.v.shape),
            mask,
            key_mask,
            bias,
            offset_kind(inputs.offset),
            bool(lse),
            vjp,
            weights,
            finite_dropout(inputs.dropout),
            inputs.axis_name,
            layout,
            segments_kind(inputs.segments),
            None if inputs.group is None else group_size(inputs.group),
            isinstance(inputs.seed, str),
        )


def _complete(spec: AttentionSpec, inputs: Inputs, backend: Backend) -> Inputs:
    """Fill in the defaults of parameters, in the library and on the device of the backend."""
    missing = [p for p in spec.parameters() if p.name not in inputs.params]
    if not missing:
        return inputs
    from ..backend import accumulation
    from .validation import parameter_shape

    q, params = inputs.q, dict(inputs.params)
    if isinstance(backend, ArrayBackend):
        xp = backend.xp  # the caches of `array_namespace` cannot be traced
    else:
        from array_api_compat import array_namespace

        xp = array_namespace(q)
    for p in missing:
        shape = parameter_shape(p.shapes[0], inputs.k.shape[-3], q.shape[-1], q.shape[-3])
        # In the accumulation dtype, since a 16-bit dtype would round the default.
        params[p.name] = p.filled(shape, xp=xp, dtype=accumulation(q, xp), device=device_of(q))
    return inputs._replace(params=params)
