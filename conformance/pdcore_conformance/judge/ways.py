"""Run one call in every way that a user may, and collect the results.

A backend may take another path without the log-sum-exp, inside of a gradient, or when a pullback
is called again, so a result that was right in one way says nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pdcore import attention, attention_vjp, attention_weights, bind

from .calls import Arrays, Call, dtype_of
from .layouts import Array, laid_out, swap_axes

if TYPE_CHECKING:
    from .subject import Subject

__all__ = ["SHARDS", "Result", "cotangents", "first_way", "run"]


class _Ranks:
    """What a process group says of itself."""

    def size(self) -> int:
        return 2

    def rank(self) -> int:
        return 0


#: How a caller names the shards of a sequence, by feature.
SHARDS: Mapping[str, Any] = {"axis_name": "sequence", "group": _Ranks()}


class Result(NamedTuple):
    """The outputs of one way to run a call.

    Attributes
    ----------
    way : str
        The way, for messages.
    outputs : mapping of str to numpy.ndarray
    d_lse : bool
        Whether the gradients include those of the log-sum-exp.
    """

    way: str
    outputs: Mapping[str, Array]
    d_lse: bool = True


def run(subject: Subject, call: Call, arrays: Arrays, through: str) -> Generator[Result]:
    """Run a call in every way of `through`, see `Subject.judge`."""
    if through not in _WAYS:
        raise ValueError(f"through: got {through!r}, expected {', '.join(_WAYS)}")
    for result in _WAYS[through](subject, call, arrays.in_axes(call.axes)):
        if call.axes:
            outputs = {
                name: swap_axes(x) if name in ("out", "d_q", "d_k", "d_v") else x
                for name, x in result.outputs.items()
            }
            result = result._replace(outputs=outputs)
        yield result


def first_way(subject: Subject, call: Call, arrays: Arrays, through: str) -> None:
    """Run a call in one way, which is enough to see that it is refused."""
    with closing(run(subject, call, arrays, through)) as results:
        next(results)


def _forward(subject: Subject, call: Call, arrays: Arrays) -> Generator[Result]:
    layer = bind(call.spec, backend=subject.name)
    compiles = subject.framework.compiles
    for lse in _levels(subject):
        without = "" if lse else " without lse"
        for name in ("attention", "bind"):
            with subject.watched(arrays) as (q, k, v, options):
                if name == "bind":
                    result = layer(q, k, v, return_lse=lse, **options)
                else:
                    result = attention(
                        q, k, v, call.spec, return_lse=lse, backend=subject.name, **options
                    )
                outputs = result if lse else (result, None)
                yield Result(name + without, _named(subject, outputs))
        # Where this compiles another program, the cases of "autodiff" judge it.
        if subject.claims("autodiff") and subject.framework.has_autodiff and not compiles:
            with subject.watched(arrays) as (q, k, v, options):
                inputs = _inputs_of(call, q, k, v, options)
                function = partial(_called, subject, call, options, lse)
                outputs = subject.framework.recorded(function, inputs)
                yield Result(f"attention{without} inside of a gradient", _named(subject, outputs))


def _weights(subject: Subject, call: Call, arrays: Arrays) -> Generator[Result]:
    with subject.watched(arrays) as (q, k, v, options):
        weights = attention_weights(q, k, v, call.spec, backend=subject.name, **options)
        yield Result("attention_weights", {"weights": subject.returned(weights, "weights")})


def _vjp(subject: Subject, call: Call, arrays: Arrays) -> Generator[Result]:
    from .nonconforming import Nonconforming

    with subject.watched(arrays) as (q, k, v, options):
        out, lse, pull = attention_vjp(q, k, v, call.spec, backend=subject.name, **options)
        outputs = _named(subject, (out, lse))
        names = _differentiable(call, arrays)

        def pulled(way: str, d_lse: bool = True, layout: str = "") -> Result:
            cotangent = [subject.there(laid_out(d, layout)) for d in _cotangents(call)]
            before = [subject.framework.asnumpy(d).tobytes() for d in cotangent]
            gradients = pull(*(cotangent if d_lse else cotangent[:1]))
            if before != [subject.framework.asnumpy(d).tobytes() for d in cotangent]:
                raise Nonconforming(f"{way}: the pullback changed its cotangent in place")
            absent = [name for name in names if name not in gradients]
            if absent:
                raise Nonconforming(f"vjp gives no gradient of {', '.join(absent)}")
            by_name = {f"d_{n}": subject.returned(gradients[n], f"d_{n}") for n in names}
            return Result(way, by_name, d_lse)

        yield Result("attention_vjp", outputs)
        yield pulled("attention_vjp")
        yield pulled("attention_vjp, pulled back without d_lse", d_lse=False)
        yield pulled("attention_vjp, pulled back again by strided cotangents", layout="strided")


def _autodiff(subject: Subject, call: Call, arrays: Arrays) -> Generator[Result]:
    for lse in _levels(subject):
        with subject.watched(arrays) as (q, k, v, options):
            inputs = _inputs_of(call, q, k, v, options)
            d_out, d_lse = map(subject.there, _cotangents(call))
            function = partial(_called, subject, call, options, lse)
            outputs, gradients = subject.framework.vjp(
                function, inputs, (d_out, d_lse if lse else None)
            )
            by_name = {f"d_{n}": subject.back(gradients[n], f"d_{n}") for n in inputs}
            way = "automatic differentiation" + ("" if lse else " without lse")
            yield Result(way, _named(subject, outputs) | by_name, lse)


def _levels(subject: Subject) -> tuple[bool, ...]:
    """Return whether to ask for lse: with and without, where the backend declares it."""
    return (True, False) if subject.claims("lse") else (False,)


def _called(
    subject: Subject, call: Call, options: Mapping[str, Any], lse: bool, x: Mapping[str, Any]
) -> Any:
    """Return (out, lse) of arrays by name, or (out, None)."""
    q, k, v, options = _replaced(x, options)
    result = attention(q, k, v, call.spec, return_lse=lse, backend=subject.name, **options)
    return tuple(result) if lse else (result, None)


def _replaced(x: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Return q, k and v of `x`, and the options with the arrays of `x` in their places."""
    options = dict(options)
    if "bias" in x:
        options["bias"] = x["bias"]
    if "params" in options:
        options["params"] = {n: x.get(n, value) for n, value in options["params"].items()}
    return x["q"], x["k"], x["v"], options


def _inputs_of(call: Call, q: Any, k: Any, v: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays that get a gradient, by name: running statistics are constants."""
    arrays = Arrays(q, k, v, options)
    return {name: arrays.differentiable[name] for name in _differentiable(call, arrays)}


def _differentiable(call: Call, arrays: Arrays) -> list[str]:
    constant = {p.name for p in call.parsed.parameters() if not p.differentiable}
    return [name for name in arrays.differentiable if name not in constant]


def _named(subject: Subject, outputs: tuple[Any, Any]) -> dict[str, Array]:
    return {
        name: subject.returned(x, name)
        for name, x in zip(("out", "lse"), outputs, strict=True)
        if x is not None
    }


def _cotangents(call: Call) -> tuple[Array, Array]:
    """Return the cotangents in the order of axes of the call."""
    d_out, d_lse = cotangents(call)
    return swap_axes(d_out) if call.axes else d_out, d_lse


def cotangents(call: Call) -> tuple[Array, Array]:
    """Draw cotangents of out and lse."""
    rng = np.random.default_rng(len(call.label))
    shape = (*call.lead, call.heads, call.rows)
    wide = "float64" if call.dtype == "float64" else "float32"
    return (
        call.signed(rng.standard_normal((*shape, call.value_dim))).astype(dtype_of(call.dtype)),
        rng.standard_normal(shape).astype(wide),
    )


_WAYS: Mapping[str, Callable[[Subject, Call, Arrays], Generator[Result]]] = {
    "forward": _forward,
    "weights": _weights,
    "vjp": _vjp,
    "autodiff": _autodiff,
}
