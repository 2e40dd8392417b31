"""Decoding with carried state: `decoder`, which a language model calls for every new token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Never

from ..arrays import device_of, library_of
from ..dispatch import BoundAttention, Choice, explains_arguments, signature, wrong_arguments
from ..errors import UnsupportedError
from ..spec import AttentionSpec, FeatureMap
from .checks import (
    check_capacity,
    check_counts,
    check_lengths,
    checked_sizes,
    entries,
    values_at_hand,
)
from .prepared import BEYOND, Prepared
from .rows import place
from .specs import check_spec

__all__ = ["Decoder", "decoder"]

_WORDS = {
    "dropout": "a decoder drops no weights, since it is not for training; use attention",
    "segments": "a state holds one sequence; give each sequence of a batch its own lengths=",
    "key_mask": "use lengths=, the number of real positions, or a bool mask (*B, N) of them",
    "offset": "leave it out: the state holds the lengths",
    "mask": "leave it out: a decoder's rows see what the spec says",
    **dict.fromkeys(("axis_name", "group"), "a decoder does not run in shards"),
}
State = Mapping[str, Any]


@explains_arguments
def decoder(
    spec: str | AttentionSpec = "causal",
    *extra: Never,
    params: Mapping[str, Any] | None = None,
    backend: Choice = None,
    **unknown: Never,
) -> Decoder:
    """Return a decoder: attention of a growing sequence, whose past is carried in a state.

    Each call computes the rows of new positions, at the cost of those rows, and returns the next
    state. The rows are those of one call of `attention` on the whole sequence.

    Parameters
    ----------
    spec : str or AttentionSpec
        A causal attention, or one with a window that ends at the query's position. Statistics of
        prefixes and running ones, causal convolutions, head scaling, features, sinks, `alibi` and
        `relative` are carried. Refused is what depends on keys that are still to come: other
        statistics, mixtures, ``iebn``, ``allow_leak``, and labels.
    params : mapping of str to array, optional
        The arrays that the spec declares.
    backend : str or sequence of str, optional
        As in `bind`.

    Returns
    -------
    Decoder

    Raises
    ------
    SpecError, UnsupportedError
        For a spec that makes no sense, or that a decoder does not compute.

    Examples
    --------
    >>> import numpy as np
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 4, 10, 8))
    >>> d = decoder("causal+bn(statistics=prefix)")
    >>> state = d.init(2, 4, 8, 8, capacity=16, like=k)
    >>> prompt, state = d.extend(state, q[:, :, :9], k[:, :, :9], v[:, :, :9])
    >>> token, state = d.extend(state, q[:, :, 9:], k[:, :, 9:], v[:, :, 9:])
    >>> token.shape, int(state["lengths"][0])
    ((2, 4, 1, 8), 10)
    """
    if extra or unknown:
        raise wrong_arguments(decoder, extra, unknown, _WORDS)
    return Decoder(spec, params, backend)


class Decoder:
    """An attention whose past is carried in a state, returned by `decoder`.

    A state is a dict of arrays whose leading axes are those of the batch. Its entries are private,
    but for ``lengths`` (*B,), the number of positions so far. `extend`, `truncate` and `reorder`
    are pure functions of arrays, and compile: one program serves all lengths.

    Attributes
    ----------
    spec : AttentionSpec
    """

    def __init__(
        self, spec: str | AttentionSpec, params: Mapping[str, Any] | None, backend: Choice
    ) -> None:
        self._bound = BoundAttention(spec, backend)
        self.spec = self._bound.spec
        check_spec(self.spec)
        self._params = dict(params or {})
        self._prepared: dict[Any, Prepared] = {}

    def __repr__(self) -> str:
        return f"<pdcore.decoder({str(self.spec)!r}, backend={self._bound.choice!r})>"

    def init(
        self,
        batch: int | tuple[int, ...],
        key_heads: int,
        dim: int,
        value_dim: int,
        capacity: int | None,
        *,
        undo: int = 0,
        like: Any,
    ) -> dict[str, Any]:
        """Return the state of empty sequences.

        Parameters
        ----------
        batch : int or tuple of int
            The leading axes *B.
        key_heads, dim, value_dim : int
            Hkv, D and Dv.
        capacity : int or None
            The most positions of a sequence. None for any number, of a spec whose state does not
            grow with it: features without a window, and windows.
        undo : int
            How many of the last positions `truncate` can take back. A state of nothing but keys
            and values, of an identity normalization at scales of 1, can be cut anywhere.
        like : array
            An array of the library, dtype and device of q, k and v.

        Returns
        -------
        dict of str to array
        """
        lead = checked_sizes(batch, key_heads, dim, value_dim, undo)
        check_capacity(capacity)
        heads = key_heads
        for p in self.spec.parameters():
            if p.by_query_head and p.name in self._params:
                heads = max(heads, self._params[p.name].shape[0])
        library_of(like, "like")
        from array_api_compat import array_namespace

        xp = array_namespace(like)
        q, k, v = (
            xp.zeros((*lead, h, 0, size), dtype=like.dtype, device=device_of(like))
            for h, size in ((heads, dim), (key_heads, dim), (key_heads, value_dim))
        )
        prepared = self._prepare(q, k, v)
        xp, device = prepared.backend.xp, device_of(like)
        if capacity is None and self.grows():
            raise ValueError(
                f"capacity: got None, expected a number of positions: {self.spec} keeps every key"
            )
        state: dict[str, Any] = {}
        with prepared.backend.computing(k):
            state["lengths"] = xp.zeros(lead, dtype=xp.int64, device=device)
            room = BEYOND if capacity is None else capacity
            state["room"] = xp.full(lead, room, dtype=xp.int64, device=device)
            if undo:
                state["undo"] = xp.zeros((*lead, undo), dtype=xp.bool, device=device)
            for g in prepared.groups:
                params = prepared.params[g.group]
                state |= g.zero(prepared.plan, params, k, v, capacity, undo, xp)
        return state

    @explains_arguments
    def extend(
        self,
        state: State,
        q: Any,
        k: Any,
        v: Any,
        *extra: Never,
        lengths: Any = None,
        return_lse: bool = False,
        in_place: bool = False,
        **unknown: Never,
    ) -> Any:
        """Compute the rows of new positions, and return them with the next state.

        Parameters
        ----------
        state : mapping of str to array
        q : array (*B, Hq, N, D)
            Queries of the new positions, any number of them.
        k, v : array (*B, Hkv, N, D) and (*B, Hkv, N, Dv)
        lengths : integer array (*B,), or bool array (*B, N), optional
            How many of the N positions of each sequence are real, the first ones; or which of them
            are, such as a prompt with padding on the left. Rows of padding are zeros.
        return_lse : bool
            Also return log h of each row; -inf in padding.
        in_place : bool
            Write keys and values into the arrays of `state`, which is invalid afterwards. For
            NumPy, PyTorch and CuPy.

        Returns
        -------
        out : array (*B, Hq, N, Dv), or tuple (out, lse)
            lse is (*B, Hq, N).
        state : dict of str to array

        Raises
        ------
        TypeError, ValueError
            For arrays that do not fit each other or the state; and for more positions than the
            capacity, where lengths are at hand, in the memory of the CPU. Elsewhere the rows
            beyond the capacity, and all later ones, are NaN.
        """
        if extra or unknown:
            raise wrong_arguments(Decoder.extend, extra, unknown, _WORDS, spec_of="decoder")
        prepared = self._prepare(q, k, v)
        prepared.check(state, q)
        backend = prepared.backend
        if in_place and backend.info.library not in ("numpy", "torch", "cupy"):
            raise UnsupportedError(
                f"in_place: got True with arrays of {backend.info.library}, which are not written; "
                "donate the state to jax.jit instead"
            )
        with backend.computing(q):
            return self._extend(prepared, state, (q, k, v), lengths, bool(return_lse), in_place)

    def _extend(
        self,
        prepared: Prepared,
        state: State,
        arrays: tuple[Any, Any, Any],
        lengths: Any,
        lse: bool,
        in_place: bool,
    ) -> Any:
        """Check what is at hand, and run the call with what is then known in Python."""
        backend, n = prepared.backend, arrays[0].shape[-2]
        if lengths is not None:
            check_lengths(lengths, arrays[0], backend.info.library)
        known = values_at_hand(state["lengths"], backend)
        at: Any = state["lengths"]
        longest = None
        if known is not None:
            added = _added(lengths, state, n, backend)
            check_counts(added, n, values_at_hand(state["room"], backend) or [], known)
            if not backend.compiles:  # else each length would be a program to compile
                longest = max(map(sum, zip(known, added, strict=True)), default=0)
                if lengths is None and len(set(known)) == 1:
                    at = known[0]
        if not backend.compiles:
            return prepared.rows(state, *arrays, lengths, at, longest, known is None, lse, in_place)
        program = prepared.programs.get(lse)
        if program is None:

            def rows(state: State, q: Any, k: Any, v: Any, lengths: Any) -> Any:
                at = state["lengths"]
                return prepared.rows(state, q, k, v, lengths, at, None, True, lse, False)

            program = prepared.programs[lse] = backend.program(rows)
        return program(state, *arrays, lengths)

    def grows(self) -> bool:
        """Return whether a state keeps every key, so that `init` needs a capacity."""
        return not isinstance(self.spec.kernel, FeatureMap) and self.spec.support.left == math.inf

    def resize(self, state: State, capacity: int) -> dict[str, Any]:
        """Return the state with room for another number of positions.

        Parameters
        ----------
        state : mapping of str to array
        capacity : int
            The most positions of a sequence, at least as many as before.

        Returns
        -------
        dict of str to array
        """
        check_capacity(capacity)
        prepared = self._prepared_of(state)
        xp = prepared.backend.xp
        before = values_at_hand(state["lengths"] + state["room"], prepared.backend)
        if before is not None and before and max(before) > capacity:
            raise ValueError(
                f"capacity: got {capacity}, expected at least {max(before)}, that of the state"
            )
        new = dict(state)
        for group in prepared.groups:
            new |= group.resized(state, capacity, xp)
        room = xp.full_like(state["room"], capacity) - state["lengths"]
        return {**new, "room": room}

    def truncate(self, state: State, lengths: Any, *, in_place: bool = False) -> dict[str, Any]:
        """Return the state of the first positions, as it was then, bit for bit.

        Parameters
        ----------
        state : mapping of str to array
        lengths : int or integer array (*B,)
            How many positions to keep of each sequence, at most as many as there are.
        in_place : bool
            As in `extend`.

        Returns
        -------
        dict of str to array

        Raises
        ------
        ValueError
            For more positions than there are, and for more to take back than `undo` of `init`
            keeps, where lengths are at hand. Elsewhere all later rows are NaN.
        """
        prepared = self._prepared_of(state)
        with prepared.backend.computing(state["lengths"]):
            return prepared.truncated(state, lengths, self.spec, in_place)

    def reorder(self, state: State, index: Any) -> dict[str, Any]:
        """Return the state of other sequences of the batch, such as beams.

        Parameters
        ----------
        state : mapping of str to array
        index : integer array (B',) or (*B, B')
            For each new sequence the old one that it continues, along the last axis of the batch.

        Returns
        -------
        dict of str to array
        """
        prepared = self._prepared_of(state)
        xp, lead = prepared.backend.xp, state["lengths"].ndim
        if not lead:
            raise ValueError("index: the state has no batch, expected one of init(batch=...)")
        library = library_of(index, "index")
        if library != prepared.backend.info.library:
            raise TypeError(
                f"index: got an array of {library}, expected {prepared.backend.info.library}"
            )
        if index.ndim not in (1, lead) or tuple(index.shape[:-1]) != (
            tuple(state["lengths"].shape[:-1]) if index.ndim > 1 else ()
        ):
            raise ValueError(
                f"index: got shape {tuple(index.shape)}, expected (B',) or "
                f"{(*state['lengths'].shape[:-1], 'Bprime')}, along the last axis of the batch"
            )
        index = xp.astype(index, xp.int64)
        if index.ndim == 1:
            return {name: xp.take(x, index, axis=lead - 1) for name, x in state.items()}
        new = {}
        for name, x in state.items():
            where = xp.broadcast_to(place(index, x.ndim - lead), (*index.shape, *x.shape[lead:]))
            new[name] = xp.take_along_axis(x, where, axis=lead - 1)
        return new

    def _prepare(self, q: Any, k: Any, v: Any) -> Prepared:
        """Check arrays and find the backend and the plans for arrays like them."""
        try:
            key = tuple(map(signature, (q, k, v)))
            found = self._prepared.get(key)
        except (AttributeError, TypeError):
            key, found = (), None  # the check below says what is wrong
        if found is None:
            found = Prepared(self._bound, q, k, v, self._params)
            if key:
                self._prepared[key] = found
        return found

    def _prepared_of(self, state: State) -> Prepared:
        """Return what was prepared for arrays of a state."""
        for found in self._prepared.values():
            if found.names == entries(state):
                return found
        raise ValueError(
            f"state: got the entries {', '.join(sorted(state))}, expected a state that init or "
            "extend of this decoder returned"
        )


def _added(lengths: Any, state: State, rows: int, backend: Any) -> list[int]:
    """Return the number of new positions of each sequence, where it is at hand."""
    if lengths is None:
        return [rows] * math.prod(state["lengths"].shape)
    if lengths.ndim > state["lengths"].ndim:
        xp = backend.xp
        lengths = xp.sum(xp.astype(lengths, xp.int64), axis=-1)
    return values_at_hand(lengths, backend) or []
