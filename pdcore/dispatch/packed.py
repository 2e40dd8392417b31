"""Packed sequences: their segments cut out, run as calls of their own, and joined again.

Segments of equal lengths are the sequences of one call. Under ``batch`` statistics, which are over
all keys, all segments are, padded to the longest. For a backend that compiles a program for every
shape, segments are padded to powers of two. Rows that see no key, those of padding and of segments
without keys, are one more call, on no keys and without a normalization.

All of it is slices and joins of the caller's arrays, which their library differentiates. The ids
are values on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays import compiling, device_of
from ..backend import Inputs
from ..lowering import sum_to
from ..spec import Identity
from .arguments import check_given
from .layout import Layout, heads_first
from .segments import (
    Segment,
    on_host,
    pair_of,
    places,
    ranges,
    segments_kind,
    shares_statistics,
)
from .spans import Cut, Span, all_ranges, entries, power_of_two, split, tiles

if TYPE_CHECKING:
    from .binding import BoundAttention

__all__ = ["PackedCall", "packed_call"]

#: Arrays (H, n, ...) with the places of their axis 1.
Parts = list[tuple[Span, Any]]


def packed_call(
    layer: BoundAttention, inputs: Inputs, *, layout: Layout, **kind: bool
) -> tuple[Inputs, PackedCall | None]:
    """Cut a call into pieces, if it has segments and their values are at hand.

    Parameters
    ----------
    layer : BoundAttention
    inputs : Inputs
        In the caller's layout.
    layout : str
    **kind : bool
        Whether the call returns `lse`, or is one of `vjp` or `weights`.

    Returns
    -------
    inputs : Inputs
        Without segments, if there is no sequence that has any.
    packed : PackedCall or None
    """
    if inputs.segments is None or compiling():
        return inputs, None
    from .cache import cached_bind

    check_given(inputs)
    at_hand = on_host(heads_first(inputs, layout))
    if segments_kind(at_hand.segments) != "values":
        return inputs, None
    backend, _, _, device = layer.entry(at_hand, layout=layout, **kind)
    if 0 in inputs.q.shape[:-3]:
        return inputs._replace(segments=None), None
    unnormalized = replace(layer.spec, normalization=Identity())
    piece, blind = (
        cached_bind(spec, backend.info.name, device) for spec in (layer.spec, unnormalized)
    )
    return inputs, PackedCall(piece, blind, at_hand, pads=backend.pads_segments)


@dataclass(frozen=True)
class _Piece:
    """A call of some segments.

    Attributes
    ----------
    layer : BoundAttention
    inputs : Inputs
        Without segments, q, k and v (S, H, n, D).
    rows, keys : sequence of Span
        The places of the queries and of the keys; without `keys`, all rows are one sequence.
    """

    layer: BoundAttention
    inputs: Inputs
    rows: Sequence[Span]
    keys: Sequence[Span]


class PackedCall:
    """A call with segments, cut into pieces.

    Parameters
    ----------
    layer, blind : BoundAttention
        The attention of a segment, and the same without a normalization.
    inputs : Inputs
        q, k and v (*B, H, N, D), and the ids as arrays of NumPy.
    pads : bool
        Whether the sequences of a piece, and their lengths, are powers of two.
    """

    def __init__(
        self, layer: BoundAttention, blind: BoundAttention, inputs: Inputs, *, pads: bool
    ) -> None:
        from array_api_compat import array_namespace

        self.xp, self.inputs = array_namespace(inputs.q), inputs
        self.cut = partial(Cut, xp=self.xp)
        self.size: Callable[[int], int] = power_of_two if pads else int
        self.lead = tuple(inputs.q.shape[:-3])
        self.q, self.k, self.v = (self._flat(x, 3) for x in inputs[:3])
        self.pieces = list(self._pieces(layer, blind, ranges(inputs.segments, self.lead)))

    def attention(self, *, lse: bool) -> tuple[Any, Any]:
        """Compute out and, with `lse`, the log-sum-exp."""
        outs, lses = [], []
        for piece in self.pieces:
            named = piece.inputs._asdict()
            del named["segments"]
            result = piece.layer(**named, return_lse=lse)
            out, level = result if lse else (result, None)
            outs += self._by_rows(piece, out)
            lses += self._by_rows(piece, level) if lse else []
        return self._rows_joined(outs), self._rows_joined(lses) if lse else None

    def vjp(self) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Compute out, the log-sum-exp and the pullback."""
        outs, lses, pullbacks = [], [], []
        for piece in self.pieces:
            out, level, pullback = piece.layer.vjp(piece.inputs)
            outs += self._by_rows(piece, out)
            lses += self._by_rows(piece, level)
            pullbacks.append(pullback)

        def pull(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            rows = [span for piece in self.pieces for span in piece.rows]
            d = [
                None if x is None else self.cut(self._flat(x, axes), rows, 1)
                for x, axes in ((d_out, 3), (d_lse, 2))
            ]
            gradients = []
            for piece, pullback in zip(self.pieces, pullbacks, strict=True):
                gradients.append(pullback(*(self._rows_of(x, piece) for x in d)))
            return self._gradients(gradients)

        return self._rows_joined(outs), self._rows_joined(lses), pull

    def weights(self) -> Any:
        """Compute the weights, which are 0 for keys of other segments."""
        rows: Parts = []
        for piece in self.pieces:
            keys = piece.keys or [(0, 0, 0)] * len(piece.rows)
            parts = self._by_rows(piece, piece.layer.weights(piece.inputs))
            for (span, x), (_, first, count) in zip(parts, keys, strict=True):
                rows.append((span, self._placed(x[..., :count], first, self.k.shape[-2], 2)))
        return self._rows_joined(rows)

    # Cutting.

    def _pieces(
        self, layer: BoundAttention, blind: BoundAttention, segments: list[Segment]
    ) -> Iterator[_Piece]:
        """Yield the calls of all rows, and of all keys that statistics need."""
        shared = shares_statistics(layer.spec)
        batches: dict[Any, list[Segment]] = {}
        seen: dict[int, list[Span]] = {s: [] for s in range(self.q.shape[0])}
        for s in segments:
            if s.keys and (s.rows or shared):
                lengths = self.size(s.rows), self.size(s.keys)
                batches.setdefault(None if shared else lengths, []).append(s)
                seen[s.sequence].append((s.sequence, s.first_row, s.rows))
        self.one = len(batches) == 1
        cuts = self._cuts([s for batch in batches.values() for s in batch])
        for batch in batches.values():
            yield self._piece(layer, batch, cuts)
        count = self.q.shape[-2]
        rows = [(s, a, n) for s in seen for a, n, gap in all_ranges(seen[s], count) if gap]
        if rows:
            yield self._blind_piece(blind, rows)

    def _cuts(self, segments: list[Segment]) -> dict[str, Cut]:
        """Return the arrays of the call, cut at all segments that are run."""
        rows, keys = places(segments)
        cuts = {"q": self.cut(self.q, rows, 1)}
        cuts |= {"k": self.cut(self.k, keys, 1), "v": self.cut(self.v, keys, 1)}
        for name in ("mask", "bias"):
            if (x := getattr(self.inputs, name)) is not None:
                cuts[name] = self.cut(self._with_all_axes(x), rows, 1)
        if self.inputs.key_mask is not None:
            cuts["key_mask"] = self.cut(self._flat(self.inputs.key_mask, 1), keys, 0)
        if self.inputs.labels is not None:
            of_rows, of_keys = (self._flat(x, 1) for x in pair_of(self.inputs.labels))
            cuts |= {"q_labels": self.cut(of_rows, rows, 0), "k_labels": self.cut(of_keys, keys, 0)}
        return cuts

    def _piece(
        self, layer: BoundAttention, segments: list[Segment], cuts: dict[str, Cut]
    ) -> _Piece:
        """Return the call of some segments, padded to the longest where they differ."""
        inputs, (rows, keys) = self.inputs, places(segments)
        q = self._gathered(cuts["q"], rows)
        k, v = (self._gathered(cuts[name], keys) for name in "kv")
        mask, bias = (self._cut_mask(cuts.get(name), rows, keys) for name in ("mask", "bias"))
        key_mask, offset = None, inputs.offset
        if "key_mask" in cuts:
            key_mask = self._stacked(cuts["key_mask"].of(keys), 0)
        elif any(s.keys != k.shape[-2] for s in segments) or len(segments) != k.shape[0]:
            key_mask = self._real(segments)
        labels = None
        if "q_labels" in cuts:
            labels = tuple(
                self._stacked(cuts[name].of(spans), 0)
                for name, spans in (("q_labels", rows), ("k_labels", keys))
            )
        if isinstance(offset, str) and any(s.rows != q.shape[-2] for s in segments):
            offset = self._ends(key_mask, segments)
        call = inputs._replace(
            q=q, k=k, v=v, mask=mask, key_mask=key_mask, bias=bias, offset=offset, labels=labels
        )._replace(segments=None)
        return _Piece(layer, call, rows, keys)

    def _blind_piece(self, layer: BoundAttention, rows: list[Span]) -> _Piece:
        """Return the call of rows that see no key; those of padding may be NaN, and are 0 here."""
        q, k, v, given = self.q, self.k, self.v, self.inputs.params
        shape = (1, q.shape[1], self.size(sum(n for _, _, n in rows)), q.shape[-1])
        params = {p.name: given[p.name] for p in layer.spec.parameters() if p.name in given}
        call = Inputs(self._zeros(shape, q), k[:1, :, :0, :], v[:1, :, :0, :], params=params)
        if layer.spec.by_label:
            of_rows = self.xp.zeros((1, shape[2]), dtype=self.xp.int64, device=device_of(q))
            call = call._replace(labels=(of_rows, of_rows[:, :0]))
        return _Piece(layer, call, rows, [])

    def _ends(self, key_mask: Any, segments: list[Segment]) -> Any:
        """Return the offset of each segment that puts its last query on its last real key."""
        xp, device = self.xp, device_of(self.q)
        counts = [s.rows for s in segments]
        counts += [0] * (self.size(len(counts)) - len(counts))
        rows = xp.asarray(counts, dtype=xp.int64, device=device)
        if key_mask is None:
            return segments[0].keys - rows
        index = xp.arange(1, key_mask.shape[-1] + 1, dtype=xp.int64, device=device)
        return xp.max(xp.where(key_mask, index, xp.zeros_like(index)), axis=-1) - rows

    def _real(self, segments: list[Segment]) -> Any:
        """Return the key mask of segments that are padded."""
        options = {"dtype": self.xp.bool, "device": device_of(self.q)}
        return self._stacked([self.xp.ones((s.keys,), **options) for s in segments], 0)

    def _gathered(self, cut: Cut, spans: Sequence[Span]) -> Any:
        """Return spans of sequences as sequences; a view where all are of one piece, alike."""
        x = cut.x
        start, count, length = tiles(spans, x.shape[0])
        whole = self.one and count and self.size(length) == length
        if not whole or self.size(len(spans)) != len(spans):
            return self._stacked(cut.of(spans), 1)
        x = entries(x, start, start + count * length, 2)
        sequences, heads, _, *rest = x.shape
        x = self.xp.reshape(x, (sequences, heads, count, length, *rest))
        x = self.xp.permute_dims(x, (0, 2, 1, *range(3, x.ndim)))
        return self.xp.reshape(x, (len(spans), heads, length, *rest))

    def _cut_mask(self, whole: Cut | None, rows: Sequence[Span], keys: Sequence[Span]) -> Any:
        """Cut a mask or bias along the axes of queries and keys, where it has them."""
        if whole is None:
            return None
        x = whole.x
        if x.shape[-2] != 1:
            cut = whole.of(rows)
        else:
            sequences = self.xp.unstack(x, axis=0)
            cut = [sequences[s] for s, _, _ in rows]
        if x.shape[-1] != 1:
            cut = [entries(c, a, a + n, 2) for c, (_, a, n) in zip(cut, keys, strict=True)]
            size = self.size(max(n for _, _, n in keys))
            cut = [self._placed(c, 0, size, 2) for c in cut]
        return self._stacked(cut, 1, x.shape[-2] == 1)

    def _with_all_axes(self, x: Any) -> Any:
        """Return a mask or bias as (sequences, H or 1, N or 1, M or 1)."""
        shape = (*(1,) * (len(self.lead) + 3 - x.ndim), *x.shape)
        x = self.xp.broadcast_to(self.xp.reshape(x, shape), (*self.lead, *shape[-3:]))
        return self._flat(x, 3)

    def _flat(self, x: Any, axes: int) -> Any:
        """Return an array with one leading axis before the last `axes`."""
        if x.ndim == axes + 1:
            return x
        return self.xp.reshape(x, (math.prod(self.lead), *x.shape[x.ndim - axes :]))

    def _stacked(self, parts: list[Any], axis: int, one: bool = False) -> Any:
        """Stack arrays, padded by zeros along an axis, unless all have one entry there."""
        size = 1 if one else self.size(max(part.shape[axis] for part in parts))
        stacked = self._stack([self._placed(part, 0, size, axis) for part in parts])
        return self._placed(stacked, 0, self.size(len(parts)), 0)

    def _stack(self, parts: list[Any]) -> Any:
        """Stack arrays; one alone is not copied."""
        return parts[0][None, ...] if len(parts) == 1 else self.xp.stack(parts, axis=0)

    def _zeros(self, shape: tuple[int, ...], like: Any) -> Any:
        return self.xp.zeros(shape, dtype=like.dtype, device=device_of(self.inputs.q))

    # Joining.

    def _placed(self, x: Any, start: int, size: int, axis: int) -> Any:
        """Put an array at `start` into zeros that have `size` entries along an axis."""
        counts = (start, size - start - x.shape[axis])
        before, after = (
            [self._zeros((*x.shape[:axis], n, *x.shape[axis + 1 :]), x)] if n else []
            for n in counts
        )
        return self.xp.concat([*before, x, *after], axis=axis) if before or after else x

    def _by_rows(self, piece: _Piece, result: Any) -> Parts:
        """Return the parts of the result of a piece, with the places of their rows."""
        if piece.keys:
            return self._by_span(piece.rows, result)
        counts = [n for _, _, n in piece.rows]
        parts = split(entries(result[0, ...], 0, sum(counts), 1), counts, 1)
        return list(zip(piece.rows, parts, strict=True))

    def _by_span(self, spans: Sequence[Span], x: Any) -> Parts:
        """Return the sequences of an array, less the padding at their end, with their places."""
        parts = self.xp.unstack(x, axis=0)  # those of padding come last
        return [(span, entries(p, 0, span[2], 1)) for span, p in zip(spans, parts, strict=False)]

    def _rows_of(self, d: Cut | None, piece: _Piece) -> Any:
        """Return the cotangent of the result of a piece, the inverse of `_by_rows`."""
        if d is None:
            return None
        if piece.keys:
            return self._gathered(d, piece.rows)
        rows = self.xp.concat(d.of(piece.rows), axis=1)
        return self._placed(rows, 0, self.size(rows.shape[1]), 1)[None, ...]

    def _rows_joined(self, parts: Parts) -> Any:
        """Join results at their rows, with the leading axes of the caller."""
        whole = self._joined(parts, self.q.shape[-2])
        return self.xp.reshape(whole, (*self.lead, *whole.shape[1:]))

    def _joined(self, parts: Parts, length: int) -> Any:
        """Join parts to (sequences, H, length, ...), with zeros between them."""
        places: dict[int, dict[int, Any]] = {s: {} for s in range(self.q.shape[0])}
        spans: dict[int, list[Span]] = {s: [] for s in places}
        for span, x in parts:
            spans[span[0]].append(span)
            if span[2]:
                places[span[0]][span[1]] = x
        like = parts[0][1]
        sequences = []
        for s, found in places.items():
            whole = [
                self._zeros((like.shape[0], n, *like.shape[2:]), like) if gap else found[a]
                for a, n, gap in all_ranges(spans[s], length)
            ]
            sequences.append(whole[0] if len(whole) == 1 else self.xp.concat(whole, axis=1))
        return self._stack(sequences)

    def _gradients(self, found: list[dict[str, Any]]) -> dict[str, Any]:
        """Join the gradients of the pieces."""
        xp, inputs, total = self.xp, self.inputs, {}
        seen = [(p, g) for p, g in zip(self.pieces, found, strict=True) if p.keys]
        for name, x in (("q", inputs.q), ("k", inputs.k), ("v", inputs.v)):
            parts: Parts = []
            for piece, g in seen:
                parts += self._by_span(piece.rows if name == "q" else piece.keys, g[name])
            joined = self._joined(parts, x.shape[-2]) if parts else xp.zeros_like(x)
            total[name] = xp.reshape(joined, x.shape)
        if inputs.bias is not None:
            total["bias"] = self._bias_gradient([(p, g["bias"]) for p, g in seen])
        names = {n for g in found for n in g} | set(inputs.params)
        for name in names - {"q", "k", "v", "bias"}:
            parts_of = [g[name] for g in found if name in g]
            total[name] = (
                sum(parts_of[1:], parts_of[0]) if parts_of else xp.zeros_like(inputs.params[name])
            )
        return total

    def _bias_gradient(self, found: list[tuple[_Piece, Any]]) -> Any:
        """Join the gradients of the cut bias, summed over what was broadcast."""
        xp, bias = self.xp, self.inputs.bias
        by_row, by_key = (bias.ndim > a and bias.shape[-1 - a] != 1 for a in (1, 0))
        parts: Parts = []
        for piece, gradient in found:
            rows = piece.rows if by_row else [(s, 0, 1) for s, _, _ in piece.rows]
            for (span, x), (_, first, n) in zip(
                self._by_span(rows, gradient), piece.keys, strict=True
            ):
                if by_key:
                    x = self._placed(entries(x, 0, n, 2), first, bias.shape[-1], 2)
                parts.append((span, x))
        if not parts:
            return xp.zeros_like(bias)
        if by_row:
            whole = self._joined(parts, bias.shape[-2])
        else:
            zeros = xp.zeros_like(parts[0][1])
            whole = xp.stack(
                [
                    sum((x for (s, _, _), x in parts if s == index), zeros)
                    for index in range(self.q.shape[0])
                ],
                axis=0,
            )
        whole = xp.reshape(whole, (*self.lead, *whole.shape[1:]))
        return sum_to(whole, bias.shape, xp=xp)
