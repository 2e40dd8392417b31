"""The oracle of packed sequences: laws by which cutting, positions and statistics are judged."""

from __future__ import annotations

import numpy as np
import pytest

from pdcore.reference import reference_attention, reference_weights

RNG = np.random.default_rng(0)
#: Two sequences: runs of 5 and 6 with a padded position between, and two runs of 6.
IDS = np.array([[4, 4, 4, 4, 4, -1, 3, 3, 3, 3, 3, 3], [5] * 6 + [1] * 6])
Q = RNG.standard_normal((2, 4, 12, 8))
K, V = RNG.standard_normal((2, 2, 2, 12, 8))
SPECS = (
    "softmax",
    "causal+bn(statistics=prefix)",
    "sh(2,3)+bn",
    "sparse(2,1)+sh(1,2,pool=first)",
    "conv1d(size=4)",
    "causal+linear",
    "gaussian(0.3)+iebn",
    "mixture(2)",
    "softmax+h(count)",
)


def extras(spec):
    shapes = {"conv1d": ("weight", (2, 4, 8)), "iebn": ("slope", (2, 8))}
    params = {n: np.ones(s) for word, (n, s) in shapes.items() if word in spec}
    return {"params": params | ({"shift": np.zeros((2, 8))} if "iebn" in spec else {})}


def cut(x, axis, keep):
    return np.take(x, np.flatnonzero(keep), axis=axis)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("masks", ["", "key_mask", "mask", "end"])
def test_rows_of_a_segment_are_those_of_its_own_call(spec, masks):
    call = {
        "": {},
        "key_mask": {"key_mask": RNG.random((2, 12)) < 0.7},
        "mask": {"mask": RNG.random((1, 12, 12)) < 0.7},
        "end": {"offset": "end", "key_mask": RNG.random((2, 12)) < 0.7},
    }[masks]
    out, lse = reference_attention(
        Q, K, V, spec, segments=IDS, return_lse=True, **call, **extras(spec)
    )
    weights = reference_weights(Q, K, V, spec, segments=IDS, **call, **extras(spec))
    np.testing.assert_allclose(weights @ np.repeat(V, 2, axis=1), out, atol=1e-13)
    for b, i in ((0, 4), (0, 3), (1, 5), (1, 1)):
        keep = IDS[b] == i
        alone = {n: x for n, x in call.items() if n == "offset"}
        if "key_mask" in call:
            alone["key_mask"] = cut(call["key_mask"][b : b + 1], 1, keep)
        if "mask" in call:
            alone["mask"] = cut(cut(call["mask"], 1, keep), 2, keep)
        q, k, v = (cut(x[b : b + 1], 2, keep) for x in (Q, K, V))
        want, level = reference_attention(q, k, v, spec, return_lse=True, **alone, **extras(spec))
        np.testing.assert_array_equal(cut(out[b : b + 1], 2, keep), want)
        np.testing.assert_array_equal(cut(lse[b : b + 1], 2, keep), level)
    assert not out[0, :, 5].any()
    assert (lse[0, :, 5] == -np.inf).all()


def test_batch_statistics_of_equal_segments_are_those_of_the_batch():
    def batched(x):
        return np.concatenate([x[:, :, :6], x[:, :, 6:]])

    ids = np.repeat([[7, 2]] * 2, 6, axis=1)
    for spec in ("bn(statistics=batch)", "sh(2,3)+bn(statistics=batch)+gaussian(0.3)"):
        out = reference_attention(Q, K, V, spec, segments=ids)
        want = reference_attention(batched(Q), batched(K), batched(V), spec)
        np.testing.assert_allclose(batched(out), want, rtol=1e-12)


def test_keys_without_queries_count_in_batch_statistics():
    q_ids, k_ids = np.array([[0] * 4]), np.array([[0] * 4 + [1] * 4])
    q, k, v = Q[:1, :2, :4], K[:1, :, :8], V[:1, :, :8]
    out = reference_attention(q, k, v, "bn(statistics=batch)", segments=(q_ids, k_ids))
    moments = {
        "mean": k[0].mean(axis=1),
        "var": k[0].var(axis=1),
    }
    want = reference_attention(
        q, k[:, :, :4], v[:, :, :4], "bn(statistics=running)", params=moments
    )
    np.testing.assert_allclose(out, want, rtol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_padding_and_other_segments_reach_nothing(spec):
    q, k, v = Q.copy(), K.copy(), V.copy()
    for x in (q, k, v):
        x[0, :, 5] = np.nan
        x[0, :, 6:] = 1e30
        x[0, 0, 7] = np.nan
    with np.errstate(all="ignore"):
        changed = reference_attention(q, k, v, spec, segments=IDS, **extras(spec))
    out = reference_attention(Q, K, V, spec, segments=IDS, **extras(spec))
    np.testing.assert_array_equal(changed[0, :, :6], out[0, :, :6])
    np.testing.assert_array_equal(changed[1], out[1])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([[0, 0, 1, 1, 0]]), "more than one run"),
        (np.zeros((1, 5)), "expected integers"),
        (np.zeros((1, 4), int), "expected integers"),
    ],
)
def test_wrong_ids_are_refused(ids, message):
    x = np.ones((1, 2, 5, 3))
    with pytest.raises(ValueError, match=message):
        reference_attention(x, x, x, segments=ids)


def test_one_offset_for_each_sequence_is_refused():
    x = np.ones((2, 2, 5, 3))
    with pytest.raises(ValueError, match="one for all segments"):
        reference_attention(
            x, x, x, "causal", segments=np.zeros((2, 5), int), offset=np.ones(2, int)
        )
