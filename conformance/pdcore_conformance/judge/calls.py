"""Describe the calls of the suite: a spec, and how to draw inputs that try it.

A `Call` is data: it can be listed, selected and named before any array exists, and it draws the
same NumPy arrays on every machine.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from pdcore.backend import Request
from pdcore.dispatch import parameter_shape
from pdcore.spec import AttentionSpec, Parameter, parse

from .layouts import Array, laid_out, swap_axes
from .packing import ids_of

__all__ = ["DROPOUT_SEED", "Arrays", "Call", "drawn", "dtype_of"]


def dtype_of(name: str) -> Any:
    """Return the NumPy dtype of a name; bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


#: The seed of dropout; both its words are used.
DROPOUT_SEED = 0x123456789ABCDEF0

#: The largest number of each dtype; NumPy does not know that of bfloat16.
LARGEST = {"float16": 65504.0, "bfloat16": 3.3e38, "float32": 3.4e38, "float64": 1.7e308}


@dataclass(frozen=True)
class Arrays:
    """The NumPy arrays of a call.

    Attributes
    ----------
    q, k, v : array (*B, Hq, N, D), (*B, Hkv, M, D), (*B, Hkv, M, Dv)
    options : mapping
        The mask, key_mask, bias, offset, segments, labels, params, dropout and seed of the call,
        those that it has.
    """

    q: Array
    k: Array
    v: Array
    options: Mapping[str, Any]

    @property
    def differentiable(self) -> dict[str, Array]:
        """The arrays that may have a gradient, by name: q, k, v, bias and the params."""
        inputs = {"q": self.q, "k": self.k, "v": self.v}
        if "bias" in self.options:
            inputs["bias"] = self.options["bias"]
        return inputs | dict(self.options.get("params", {}))

    def in_axes(self, axes: str) -> Arrays:
        """Return the arrays of the same call with this order of axes, see `Call.axes`."""
        if not axes:
            return self
        q, k, v = (swap_axes(x) for x in (self.q, self.k, self.v))
        return Arrays(q, k, v, {**self.options, "layout": axes})


@dataclass(frozen=True)
class Call:
    """A spec and how its inputs are drawn; the defaults are a small call without options.

    Parameters
    ----------
    spec : str
        The specification of the attention.
    dtype : str
        The dtype of q, k and v.
    lead : tuple of int
        The leading axes (*B).
    heads, key_heads : int
        Hq and Hkv.
    rows, keys, dim, value_dim : int
        N, M, D and Dv.
    key_mask : {"", "right", "left", "holes", "one", "none"}
        Which keys are real: all; all but padding at the right, at the left, in the middle; one
        key; no key of the last sequence. Padding holds NaN.
    mask : {"", "random", "keys", "heads", "sequences", "rows", "strided", "empty"}
        No mask; one of full shape; one row for all rows, (1, M); one for each head, (H, N, M); one
        for each sequence, (*B, 1, N, M); one for each row, (N, 1); of full shape and not
        contiguous; with rows that see no key.
    bias : {"", "full", "keys", "rows", "heads", "batch", "sequences", "strided", "inf", "float32"}
        No bias; one of full shape; broadcast over rows, (*B, H, 1, M); over batch and heads,
        (N, M); over the batch, (H, N, M) or (1, H, N, M); over heads, (*B, 1, N, M); of full shape
        and not contiguous; with -inf and rows that see no key; in float32 whatever the dtype.
    offset : int or {"array", "sequence", "end"}
        The offset of the queries: an int, an integer array of shape (), one for each sequence, or
        the end of the keys.
    offset_dtype : str
        The dtype of an offset that is an array; with another than int64 the offsets are near 100,
        and near 200 where it is unsigned, so that positions exceed the range of 8 bits.
    given : bool
        Whether `params` has the parameters that have a default too. (The ids of cases contain the
        name of this field.)
    draw : {"normal", "far", "away", "constant", "outlier", "loud", "zeros", "equal", "growing",
            "tiny", "negative", "rising", "opposed", "nan", "positive", "vast", "vast_keys",
            "largest", "removed"}
        The distribution of queries and keys: standard normal; mean 100 and deviation 0.1; mean 100
        and deviation 1; with a constant feature; with an outlier as the first key; logits in the
        hundreds; with rows of zeros; all keys equal; norms growing along the sequence; of size
        1e-19; mean -50; queries of mean -50, and keys whose mean rises from -60 to 0 along the
        sequence; queries of mean 10 and keys of mean -10, so that every logit is in the hundreds
        below 0; with a NaN in one real key and in one real value, of different sequences and key
        heads; standard normal with positive values and cotangents, whose sums do not cancel; of a
        size whose square overflows, in queries and keys or in keys alone; up to the largest number
        of the dtype; standard normal with -inf in every third entry of tables.
    layout : {"", "transposed", "sliced", "reversed", "broadcast", "packed", "readonly"}
        How the arrays lie in memory.
    axes : {"", "bnhd"}
        The argument ``layout`` of the call, with q, k and v in this order of axes; "" leaves the
        argument out, and the order is (*B, H, N, D).
    segments : {"", "ragged", "equal", "padded", "pair"}
        Packed sequences, see `.packing`; padding, as ids of "padded" and "pair" have, holds NaN.
    dropout : float
        The probability that a weight is dropped.
    """

    spec: str = "softmax"
    dtype: str = "float32"
    lead: tuple[int, ...] = (2,)
    heads: int = 2
    key_heads: int = 2
    rows: int = 9
    keys: int = 11
    dim: int = 8
    value_dim: int = 5
    key_mask: str = ""
    mask: str = ""
    bias: str = ""
    offset: int | str = 0
    given: bool = True
    draw: str = "normal"
    layout: str = ""
    axes: str = ""
    seed: int = field(default=0, compare=True)
    offset_dtype: str = "int64"
    segments: str = ""
    dropout: float = 0.0

    def but(self, **changes: Any) -> Call:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    @property
    def parsed(self) -> AttentionSpec:
        """The parsed spec."""
        return parse(self.spec)

    @property
    def label(self) -> str:
        """The spec, the dtype, and every field that is not the default, as the id of a case."""
        words = [self.spec.replace(" ", ""), self.dtype]
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("spec", "dtype") or value == f.default:
                continue
            if isinstance(value, tuple):
                text = "x".join(map(str, value)) or "none"
            else:
                text = str(value).lower() if isinstance(value, bool) else str(value)
            words.append(f"{f.name}={text}")
        return "-".join(words)

    def request(self, library: str, device: str, **outputs: Any) -> Request:
        """Return the request that a backend judges; `outputs` are lse, vjp, weights..."""
        full = (*self.lead, self.heads, self.rows, self.keys)
        present = self.shapes
        kind = self.offset if isinstance(self.offset, str) else "int"
        return Request(
            self.parsed.for_heads(self.key_heads),
            library,
            self.dtype,
            device,
            (*full[:-1], self.dim),
            present["k"],
            present["v"],
            present.get("mask"),
            present.get("key_mask"),
            present.get("bias"),
            kind,
            dropout=self.dropout,
            segments="values" if self.segments else None,
            **outputs,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays, by name."""
        shapes: dict[str, tuple[int, ...]] = {
            "q": (*self.lead, self.heads, self.rows, self.dim),
            "k": (*self.lead, self.key_heads, self.keys, self.dim),
            "v": (*self.lead, self.key_heads, self.keys, self.value_dim),
        }
        full = (*self.lead, self.heads, self.rows, self.keys)
        if self.key_mask:
            shapes["key_mask"] = (*self.lead, self.keys)
        if self.mask:
            shapes["mask"] = {
                "keys": (1, self.keys),
                "rows": (self.rows, 1),
                "heads": full[-3:],
                "sequences": (*self.lead, 1, *full[-2:]),
            }.get(self.mask, full)
        if self.bias:
            shapes["bias"] = {
                "keys": (*self.lead, self.heads, 1, self.keys),
                "rows": full[-2:],
                "heads": full[-3:],
                "batch": (*(1 for _ in self.lead), *full[-3:]),
                "sequences": (*self.lead, 1, *full[-2:]),
            }.get(self.bias, full)
        return shapes

    def features(self, **outputs: Any) -> list[str]:
        """Return the features that the call needs, see `pdcore.backend.FEATURES`."""
        return self.request("", "cpu", **outputs).features()

    def needs(self, through: str, *, lse: bool = False) -> list[str]:
        """Return the features that the call needs in a way of `Subject.judge`."""
        outputs = {through: True} if through in ("vjp", "weights") else {}
        features = self.features(lse=lse, **outputs)
        return [*features, "autodiff"] if through == "autodiff" else features

    def arrays(self) -> Arrays:
        """Draw the inputs."""
        # The seed leaves out dtype, layout and axes, so that values are the same in all of them.
        plain = self.but(dtype="float32", layout="", axes="").label
        rng = np.random.default_rng(zlib.crc32(plain.encode()))
        shapes = self.shapes
        q, k = self._queries_and_keys(rng)
        v = self.signed(rng.standard_normal(shapes["v"]))
        options: dict[str, Any] = {}
        dtype = dtype_of(self.dtype)
        if self.key_mask:
            real = options["key_mask"] = self._real(rng)
            padding = ~real[..., None, :, None]
            k, v = (np.where(padding, math.nan, x) for x in (k, v))
        if self.mask:
            mask = rng.random(shapes["mask"]) < 0.6
            if self.mask == "empty":
                mask[..., ::3, :] = False
            options["mask"] = laid_out(mask, self.mask if self.mask == "strided" else "")
        if self.bias:
            bias = rng.standard_normal(shapes["bias"])
            if self.bias == "inf":
                bias[..., ::2] = -math.inf
                bias[..., ::3, :] = -math.inf
            bias = bias.astype("float32" if self.bias == "float32" else dtype)
            options["bias"] = laid_out(bias, self.bias if self.bias == "strided" else "")
        if self.offset in ("array", "sequence"):
            shape = () if self.offset == "array" else self.lead
            signed = (-2, 5) if self.offset_dtype == "int64" else (90, 121)
            low, high = (150, 221) if self.offset_dtype.startswith("u") else signed
            options["offset"] = np.asarray(rng.integers(low, high, shape), self.offset_dtype)
        elif self.offset != 0:
            options["offset"] = self.offset
        if self.segments:
            q_ids, k_ids = ids_of(self.segments, self.lead, self.rows, self.keys)
            options["segments"] = (q_ids, k_ids) if self.segments == "pair" else q_ids
            q, k, v = (
                np.where((ids < 0)[..., None, :, None], math.nan, x)
                for ids, x in ((q_ids, q), (k_ids, k), (k_ids, v))
            )
        if self.dropout:
            options |= {"dropout": self.dropout, "seed": DROPOUT_SEED}
        if self.parsed.by_label:
            options["labels"] = self._labels(rng, options)
        params = {
            p.name: self._parameter(rng, p).astype(dtype)
            for p in self.parsed.parameters()
            if self.given or p.default is None
        }
        if params:
            options["params"] = params
        if self.draw == "nan":
            self._put_nan(k, v, options.get("key_mask"))
        q, k, v = (laid_out(x.astype(dtype), self.layout) for x in (q, k, v))
        return Arrays(q, k, v, options)

    def signed(self, x: Array) -> Array:
        """Return standard normal values or cotangents as they are, or made positive."""
        return 1 + x / 8 if self.draw == "positive" else x

    def _queries_and_keys(self, rng: np.random.Generator) -> tuple[Array, Array]:
        q, k = (rng.standard_normal(self.shapes[name]) for name in "qk")
        match self.draw:
            case "normal" | "nan" | "positive" | "removed":
                pass
            case "far":
                q, k = 100 + 0.1 * q, 100 + 0.1 * k
            case "away":
                q, k = 100 + q, 100 + k
            case "constant":
                k[..., 0] = 3.0
            case "outlier":
                k[..., :1, :] = 1e4
                q *= 1e-2
            case "loud":
                q, k = 16 * q, 16 * k
            case "zeros":
                q[..., ::2, :], k[..., 1::3, :] = 0.0, 0.0
            case "equal":
                k = np.broadcast_to(k[..., :1, :], k.shape).copy()
            case "growing":
                k *= np.linspace(0.1, 4.0, self.keys)[:, None]
            case "tiny":
                q, k = 1e-19 * q, 1e-19 * k
            case "negative":
                q, k = q - 50, k - 50
            case "rising":
                q, k = q - 50, k + np.linspace(-60.0, 0.0, self.keys)[:, None]
            case "opposed":
                q, k = q + 10, k - 10
            case "vast":
                q, k = (2.0 * math.sqrt(LARGEST[self.dtype]) * x for x in (q, k))
            case "vast_keys":
                k *= 2.0 * math.sqrt(LARGEST[self.dtype])
            case "largest":
                q, k = (0.9 * LARGEST[self.dtype] * (x / np.max(abs(x))) for x in (q, k))
            case _:
                raise ValueError(f"draw: got {self.draw!r}, expected one that Call describes")
        return q, k

    def _put_nan(self, k: Array, v: Array, real: Array | None) -> None:
        """Put a NaN in the last real key of the first head, and in a value of the last head."""
        first, last = (0,) * len(self.lead), (-1,) * len(self.lead)
        places = np.arange(self.keys) if real is None else np.flatnonzero(real[first])
        k[(*first, 0, places[-1], 0)] = math.nan
        places = np.arange(self.keys) if real is None else np.flatnonzero(real[last])
        v[(*last, -1, places[len(places) // 2], 0)] = math.nan

    def _real(self, rng: np.random.Generator) -> Array:
        real = np.ones((*self.lead, self.keys), bool)
        lengths = np.arange(math.prod(self.lead)).reshape(self.lead) % 3
        places = np.arange(self.keys)
        match self.key_mask:
            case "right":
                real = places < self.keys - 2 - lengths[..., None]
            case "left":
                real = places >= 2 + lengths[..., None]
            case "holes":
                real = rng.random(real.shape) < 0.6
            case "one":
                real = np.broadcast_to(places == 1, real.shape).copy()
            case "none":
                real[lengths == np.max(lengths, initial=0)] = False
            case _:
                raise ValueError(f"key_mask: got {self.key_mask!r}, expected what Call describes")
        return real

    def _labels(self, rng: np.random.Generator, options: Mapping[str, Any]) -> Any:
        """Draw labels 0..2, but for those of padding, which are not looked at."""
        shapes = ((*self.lead, self.rows), (*self.lead, self.keys))
        of_queries, of_keys = (rng.integers(0, 3, shape) for shape in shapes)
        if self.key_mask:
            of_keys = np.where(options["key_mask"], of_keys, -7)
        return (of_queries, of_keys)

    def _parameter(self, rng: np.random.Generator, p: Parameter) -> Array:
        shape = parameter_shape(p.shapes[-1], self.key_heads, self.dim, self.heads)
        if p.name == "slopes":  # far keys have small weights, also where h is no sum
            return rng.uniform(0.05, 0.5, shape)
        if p.name == "var":
            return rng.uniform(0.5, 2.0, shape)
        value = rng.standard_normal(shape)
        if p.name == "sink" and len(value) > 3:
            value[-1] = -math.inf  # no sink
        if self.draw == "removed" and value.ndim > 1:
            value.reshape(-1)[::3] = -math.inf
        return value


@lru_cache(maxsize=8)
def drawn(call: Call) -> Arrays:
    """Draw the inputs of a call; a cache serves consecutive cases of the same inputs."""
    return call.arrays()
