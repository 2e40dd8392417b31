"""The laws of packed sequences, judged on any backend, and defects of cutting that break them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import pdcore
from pdcore.dispatch import packed
from pdcore.reference import reference_attention, reference_weights

__all__ = ["DEFECTS", "SPECS", "check_forward", "check_gradients", "check_permutation", "plant"]

#: Two sequences: runs of 5, 6 and 5, between them padding; and four runs of which two are equal.
IDS = np.array([[4] * 5 + [-1] + [3] * 6 + [9] * 5, [5] * 6 + [1] * 6 + [8] * 2 + [0] * 3])
RNG = np.random.default_rng(0)
Q = RNG.standard_normal((2, 4, 17, 8))
K, V = RNG.standard_normal((2, 2, 2, 17, 8))
#: What padding holds must change nothing.
Q[0, :, 5] = K[0, :, 5] = V[0, :, 5] = np.nan

SPECS = (
    "softmax",
    "bn",
    "causal+bn(statistics=prefix)",
    "sh(2,3)+bn",
    "sh(2,3)+bn(statistics=batch)",
    "bn(statistics=running)",
    "causal+sparse(2,inf)",
    "sparse(2,1)+sh(1,2,pool=first)",
    "conv1d(size=4)",
    "causal+linear",
    "gaussian(0.3)+iebn",
    "mixture(2,eps=0.1)",
    "softmax+h(count)",
    "bn(with_std=false)+h(sum,sink=param)",
)
CALLS = {
    "plain": {},
    "key_mask": {"key_mask": RNG.random((2, 17)) < 0.7},
    "mask": {"mask": RNG.random((2, 1, 17, 17)) < 0.7},
    "end": {"offset": "end"},
    "array": {"offset": np.asarray(1)},
}


def params_of(spec: str) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    names = {p.name: p.shapes[-1] for p in pdcore.parse(spec).parameters()}
    sizes = {"H": 2, "Hq": 4, "D": 8}
    return {n: 0.5 + rng.random([sizes.get(s, s) for s in shape]) for n, shape in names.items()}


def converted(x: Any, asarray: Callable[[Any], Any]) -> Any:
    if isinstance(x, dict):
        return {name: converted(value, asarray) for name, value in x.items()}
    return asarray(x) if isinstance(x, np.ndarray) else x


def check_forward(
    backend: str, spec: str, call: str, asarray: Callable[[Any], Any], ids: Any = IDS
) -> None:
    """Compare out, lse and weights with the oracle."""
    options = {**CALLS[call], "params": params_of(spec)}
    want, level = reference_attention(Q, K, V, spec, segments=ids, return_lse=True, **options)
    arrays = [asarray(x) for x in (Q, K, V)]
    there = converted({**options, "segments": ids}, asarray) | {"backend": backend}
    out, lse = pdcore.attention(*arrays, spec, return_lse=True, **there)
    np.testing.assert_allclose(np.asarray(out), want, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(np.asarray(lse), level, rtol=1e-9, atol=1e-9)
    weights = pdcore.attention_weights(*arrays, spec, **there)
    oracle = reference_weights(Q, K, V, spec, segments=ids, **options)
    np.testing.assert_allclose(np.asarray(weights), oracle, rtol=1e-9, atol=1e-11)


def check_gradients(backend: str, spec: str, asarray: Callable[[Any], Any]) -> None:
    """Compare the gradients of a call with those of separate calls."""
    params = params_of(spec)
    d_out, d_lse = RNG.standard_normal(Q.shape), RNG.standard_normal(Q.shape[:-1])
    d_lse *= (IDS >= 0)[:, None]  # a row of padding has the sink as its lse
    arrays = [asarray(x) for x in (Q, K, V)]
    there = converted({"params": params}, asarray) | {"backend": backend}
    _, _, pull = pdcore.attention_vjp(*arrays, spec, segments=asarray(IDS), **there)
    got = {n: np.asarray(x) for n, x in pull(asarray(d_out), asarray(d_lse)).items()}
    want = {n: np.zeros(x.shape) for n, x in {"q": Q, "k": K, "v": V, **params}.items()}
    for b in range(2):
        for i in set(IDS[b]) - {-1}:
            keep = np.flatnonzero(IDS[b] == i)
            alone = [asarray(np.take(x[b : b + 1], keep, axis=2)) for x in (Q, K, V)]
            _, _, pull = pdcore.attention_vjp(*alone, spec, **there)
            d = (np.take(x[b : b + 1], keep, axis=2) for x in (d_out, d_lse))
            for name, g in pull(*(asarray(x) for x in d)).items():
                if name in params:
                    want[name] += np.asarray(g)
                else:
                    want[name][b][:, keep] = np.asarray(g)[0]
    assert got.keys() == want.keys()
    for name, g in got.items():
        np.testing.assert_allclose(g, want[name], rtol=1e-9, atol=1e-10, err_msg=name)


def check_permutation(backend: str, spec: str, asarray: Callable[[Any], Any]) -> None:
    """Permute the segments of a sequence: the result is permuted."""
    order = np.concatenate([np.flatnonzero(IDS[0] == i) for i in (9, -1, 3, 4)])
    there = converted({"params": params_of(spec)}, asarray) | {"backend": backend}

    def run(*arrays: Any, ids: Any) -> Any:
        x = (asarray(x[:1]) for x in arrays)
        return np.asarray(pdcore.attention(*x, spec, segments=asarray(ids), **there))

    out = run(Q, K, V, ids=IDS[:1])
    moved = run(*(x[:, :, order] for x in (Q, K, V)), ids=IDS[:1, order])
    np.testing.assert_allclose(moved, out[:, :, order], rtol=1e-9, atol=1e-11)


# --- defects of cutting ---------------------------------------------------------------------------


def _one_for_all(ranges: Any) -> Any:
    """Statistics, positions and windows over the whole sequence: no cut at all."""

    def wrong(segments: Any, lead: Any) -> Any:
        first: dict[int, Any] = {}
        for s in ranges(segments, lead):
            ends = {"rows": _length(segments, 0), "keys": _length(segments, 1)}
            first.setdefault(s.sequence, s._replace(first_row=0, first_key=0, **ends))
        return list(first.values())

    return wrong


def _length(segments: Any, which: int) -> int:
    ids = segments[which] if isinstance(segments, tuple) else segments
    return int(ids.shape[-1])


def _changed(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda ranges: lambda segments, lead: [change(s) for s in ranges(segments, lead)]


def _keys_of_the_next(s: Any) -> Any:
    """One key too many at the end of a segment."""
    return s._replace(keys=s.keys + 1) if s.first_key == 0 else s


def _without_the_last(s: Any) -> Any:
    """A segment that ends one key too early."""
    return s._replace(keys=s.keys - 1)


def _from_the_start(s: Any) -> Any:
    """Keys from the beginning of the sequence: positions and statistics do not start anew."""
    return s._replace(first_key=0, keys=s.first_key + s.keys)


#: Defects by name: from `ranges` of pdcore.dispatch.segments to a wrong one.
DEFECTS: dict[str, Callable[[Any], Any]] = {
    "one_for_all": _one_for_all,
    "keys_of_the_next": _changed(_keys_of_the_next),
    "without_the_last": _changed(_without_the_last),
    "from_the_start": _changed(_from_the_start),
}


def plant(monkeypatch: Any, defect: str) -> None:
    """Put a defect in the place of the reading of ids."""
    monkeypatch.setattr(packed, "ranges", DEFECTS[defect](packed.ranges))
