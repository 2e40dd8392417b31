"""The error that a backend is allowed: computed from the oracle, never from the backend.

Per sequence and head, and for each output (out, lse, each gradient), an honest computation may
differ from the oracle by

    F * (max|low - oracle| + eps(dtype) * max|oracle|)

where the oracle is the reference in a wider dtype, `low` the reference in the tested dtype, and F
is 10 for float32 and float64, 2 for 16 bit. So an ill-conditioned case widens its own budget by
what the dtype really costs there, and nothing else can widen it. Two outputs have a scale other
than their own maximum, for a reason each:

- lse is a logarithm: a relative error eps of h is an absolute eps of lse, so its scale is at
  least 1. It is float32 for 16-bit inputs too, so its eps and F are those of float32, but where
  normalized (or of unit length, for cosine) or pooled queries and keys are rounded to 16 bits
  before the kernel.
- Gradients cancel, to 0 in a row that sees one key, so their scale is the largest gradient of the
  call; without a cotangent of lse, that of the same call with one, in which the slopes that cancel
  in all rows do not. A backend that does not keep the weights computes them again from lse, whose
  rounding is relative to its size, so the scale of gradients and of weights is multiplied by
  max|lse| where that is over 1; for 16 bits by what that is in units of their eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pdcore.reference import reference_attention, reference_weights
from pdcore.spec import AttentionSpec, Cosine, Identity, as_spec

__all__ = [
    "EPS",
    "FACTORS",
    "Expected",
    "Verdict",
    "expect",
    "judge",
    "judge_array",
    "outputs_and_gradients",
    "widened",
    "worst",
]

Array = np.ndarray[Any, Any]

#: F by tested dtype.
FACTORS: Mapping[str, float] = {"float16": 2.0, "bfloat16": 2.0, "float32": 10.0, "float64": 10.0}

#: The machine epsilon by tested dtype; NumPy does not know that of bfloat16.
EPS: Mapping[str, float] = {
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float32": 2.0**-23,
    "float64": 2.0**-52,
}


class Expected(NamedTuple):
    """The outputs that a call should have.

    Attributes
    ----------
    dtype : str
        The tested dtype: that of q, k and v.
    oracle : mapping of str to array
        The outputs of the reference in float64, or in longdouble where the tested dtype is float64.
    low : mapping of str to array
        The outputs of the reference in the tested dtype.
    lse_dtype : str
        The dtype by whose eps and factor lse is judged.
    slope : float
        The least scale of the gradients, of the same call with a cotangent of lse.
    """

    dtype: str
    oracle: Mapping[str, Array]
    low: Mapping[str, Array]
    lse_dtype: str
    slope: float = 0.0

    @property
    def largest_gradient(self) -> float:
        """The largest gradient of the call, by which errors of all gradients are scaled."""
        gradients = (x for name, x in self.oracle.items() if name.startswith("d_"))
        return max(self.slope, *map(_largest, gradients))


class Verdict(NamedTuple):
    """The error of one output, at the sequence and head where it is largest by its budget.

    Attributes
    ----------
    ratio : float
        Error over budget: up to 1 passes; inf for a NaN or an inf in a wrong place.
    error, budget : float
        The error and the budget of that sequence and head.
    head : tuple of int
        The index of that sequence and head into the leading axes of the output.
    """

    ratio: float
    error: float
    budget: float
    head: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether the error is within its budget."""
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"error {self.error:.3g} is {self.ratio:.3g} of its budget {self.budget:.3g} "
            f"at {self.head}"
        )


def expect(
    q: Any,
    k: Any,
    v: Any,
    spec: Any = "softmax",
    *,
    d_out: Any = None,
    d_lse: Any = None,
    weights: bool = False,
    **call: Any,
) -> Expected:
    """Compute the outputs of a call, in the wide dtype of the oracle and in the tested dtype.

    Parameters
    ----------
    q, k, v : array
        NumPy arrays, float16, bfloat16 (of ml_dtypes), float32 or float64.
    spec : str or AttentionSpec
        What to compute.
    d_out : array (*B, Hq, N, Dv), optional
        Cotangent of out, in the dtype of q; with it the gradients are computed too.
    d_lse : array (*B, Hq, N), optional
        Cotangent of lse, with `d_out`; zeros by default.
    weights : bool
        Compute the weights too.
    **call
        `mask`, `key_mask`, `bias`, `offset` and `params` as in `pdcore.attention`.

    Returns
    -------
    Expected
        ``out`` (*B, Hq, N, Dv) and ``lse`` (*B, Hq, N). With `d_out` also ``d_q``, ``d_k``,
        ``d_v``, ``d_bias`` where there is a bias, and ``d_NAME`` for each differentiable
        parameter in `params`, each in the shape and dtype of its array. With `weights` also
        ``weights`` (*B, Hq, N, M).
    """
    dtype = str(q.dtype)
    wide = np.longdouble if dtype == "float64" else np.float64
    rounding = {"round_intermediates": q.dtype} if EPS[dtype] > EPS["float32"] else {}
    arrays = {"q": q, "k": k, "v": v}
    inputs = ({**arrays, **call}, {name: widened(x, wide) for name, x in (arrays | call).items()})
    outputs = []
    for arguments, options in zip(inputs, (rounding, {}), strict=True):
        if d_out is None:
            out, lse = reference_attention(spec=spec, return_lse=True, **arguments, **options)
            by_name = {"out": out, "lse": lse}
        else:
            by_name = outputs_and_gradients(spec, arguments, options, (d_out, d_lse))
        if weights:
            by_name["weights"] = reference_weights(spec=spec, **arguments, **options)
        outputs.append(by_name)
    low, oracle = outputs
    return Expected(dtype, oracle, low, _dtype_of_lse(as_spec(spec), dtype))


def outputs_and_gradients(
    spec: Any,
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
    cotangents: tuple[Any, Any],
) -> dict[str, Array]:
    """Run the reference, and pull cotangents of out and lse back to its arguments.

    Parameters
    ----------
    spec : str or AttentionSpec
        What to compute.
    arguments : mapping
        The arrays of the call by name, `params` a mapping among them; in the dtype to compute in.
    options : mapping
        Further keyword arguments of `reference_attention`.
    cotangents : tuple of array or None
        Of out and lse.

    Returns
    -------
    dict of str to array
        See `expect`.
    """
    # Here, as judging without gradients needs no autograd.
    from .gradients import constants, gradients

    params = dict(arguments.get("params") or {})
    fixed = {p.name for p in as_spec(spec).parameters() if not p.differentiable}
    arrays = {n: arguments[n] for n in ("q", "k", "v", "bias") if arguments.get(n) is not None}
    arrays |= {name: x for name, x in params.items() if name not in fixed}
    others = {name: x for name, x in arguments.items() if name not in (*arrays, "params")}

    def function(x: Mapping[str, Any]) -> Any:
        call = {name: constants(other) for name, other in others.items()}
        call |= {name: x[name] for name in ("q", "k", "v", "bias") if name in x}
        if params:
            call["params"] = {n: x[n] if n in x else constants(p) for n, p in params.items()}
        return reference_attention(spec=spec, return_lse=True, **call, **options)

    (out, lse), by_name = gradients(function, arrays, cotangents)
    return {"out": out, "lse": lse} | {f"d_{name}": x for name, x in by_name.items()}


def judge(got: Mapping[str, Any], expected: Expected) -> dict[str, Verdict]:
    """Judge the outputs of a call.

    Parameters
    ----------
    got : mapping of str to array
        Some of the outputs in `expected`, as the backend returned them, in NumPy.
    expected : Expected
        The outputs that the call should have.

    Returns
    -------
    dict of str to Verdict

    Raises
    ------
    TypeError, ValueError
        When an output has another dtype or shape than that of the reference, which no rounding
        explains.
    """
    return {
        name: judge_array(
            value,
            expected.oracle[name],
            expected.low[name],
            dtype=expected.lse_dtype if name == "lse" else expected.dtype,
            axes=_axes(name, expected.oracle[name]),
            name=name,
            scale=_scale(name, expected),
        )
        for name, value in got.items()
    }


def judge_array(
    got: Any,
    oracle: Array,
    low: Array,
    *,
    dtype: str,
    axes: int = 2,
    name: str = "out",
    scale: float = 0.0,
) -> Verdict:
    """Judge one output.

    Parameters
    ----------
    got : array
        The output under test.
    oracle, low : array
        Of the shape of `got`, `low` also of its dtype.
    dtype : str
        The tested dtype.
    axes : int
        How many trailing axes belong to one head: 2 for out and the gradients of q, k and v, 1
        for lse. Each index of the leading axes has a budget of its own.
    name : str
        The name of the output, for messages.
    scale : float
        The least factor of eps, used where max|oracle| is smaller.

    Returns
    -------
    Verdict

    Notes
    -----
    Where the oracle, rounded to the output's dtype, is NaN or infinite, the output must be the
    same; a NaN or inf anywhere else is an infinite error. Such entries, and entries where `low`
    overflows, are left out of the maxima, so that they never widen a budget.
    """
    got = np.asarray(got)
    if got.dtype != low.dtype:
        raise TypeError(f"{name}: got dtype {got.dtype}, expected {low.dtype}")
    if got.shape != oracle.shape:
        raise ValueError(f"{name}: got shape {got.shape}, expected {oracle.shape}")
    lead = got.shape[: got.ndim - axes]
    if not got.size:
        return Verdict(0.0, 0.0, 0.0, (0,) * len(lead))
    wide = oracle.dtype
    with np.errstate(all="ignore"):
        rounded = oracle.astype(low.dtype).astype(wide)
        value = got.astype(wide)
        finite = np.isfinite(rounded)
        same = (value == rounded) | (np.isnan(value) & np.isnan(rounded))
        error = np.where(finite, abs(value - oracle), np.where(same, 0.0, np.inf))
        error = np.where(np.isnan(error), np.inf, error)
        cost = abs(low.astype(wide) - oracle)
    usable = finite & np.isfinite(cost)
    trailing = tuple(range(len(lead), got.ndim))
    largest = np.max(error, axis=trailing)
    budget = FACTORS[dtype] * (
        np.max(np.where(usable, cost, 0.0), axis=trailing)
        + EPS[dtype] * np.maximum(np.max(np.where(finite, abs(oracle), 0.0), axis=trailing), scale)
    )
    ratio = np.where(largest == 0.0, 0.0, np.inf)
    np.divide(largest, budget, out=ratio, where=budget > 0.0, casting="unsafe")
    index = np.unravel_index(int(np.argmax(ratio)), lead) if lead else ()
    head = tuple(int(i) for i in index)
    return Verdict(float(ratio[head]), float(largest[head]), float(budget[head]), head)


def _dtype_of_lse(spec: AttentionSpec, dtype: str) -> str:
    """Return float32 for 16 bits, unless queries or keys are rounded before the kernel."""
    normalized = not isinstance(spec.normalization, Identity) or isinstance(spec.kernel, Cosine)
    rounded = normalized or spec.heads.largest > 1
    return dtype if rounded or EPS[dtype] <= EPS["float32"] else "float32"


def _axes(name: str, x: Array) -> int:
    """Return the number of trailing axes of one head: rows and columns, or those of a parameter."""
    if name in ("out", "weights", "d_q", "d_k", "d_v", "d_bias"):
        return min(2, x.ndim)
    return 1


def _scale(name: str, expected: Expected) -> float:
    """Return the least scale of an output, see the module."""
    oracle = expected.oracle
    if name == "lse":
        return 1.0
    if name == "out":
        return 0.0
    rounding = EPS[expected.lse_dtype] / EPS[expected.dtype]
    level = max(1.0, rounding * _largest(oracle["lse"]))
    if name == "weights":
        return level * _largest(oracle["weights"])
    return level * expected.largest_gradient


def _largest(x: Array) -> float:
    """Return the largest finite magnitude, 0 where there is none."""
    with np.errstate(all="ignore"):
        return float(np.max(np.where(np.isfinite(x), abs(x), 0.0), initial=0.0))


def worst(verdicts: Mapping[str, Verdict]) -> float:
    """Return the largest error over budget of some outputs, 0 for none."""
    return max((verdict.ratio for verdict in verdicts.values()), default=0.0)


def widened(value: Any, wide: Any) -> Any:
    """Cast the floating arrays of a call, `params` included, but no mask and no offset."""
    if isinstance(value, Mapping):
        return {name: widened(entry, wide) for name, entry in value.items()}
    if getattr(value, "dtype", None) is None or str(value.dtype) not in EPS:
        return value
    return value.astype(wide)
