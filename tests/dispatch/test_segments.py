"""Packed sequences on NumPy and array-api-strict: the laws, and what is refused."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
from segment_laws import (
    CALLS,
    DEFECTS,
    IDS,
    SPECS,
    K,
    Q,
    V,
    check_forward,
    check_gradients,
    check_permutation,
    plant,
)

import pdcore
from pdcore.errors import NoBackendError, UnsupportedError

LIBRARIES = {"numpy": np.asarray, "strict": array_api_strict.asarray}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("call", CALLS)
def test_results_are_those_of_the_oracle(backend, spec, call):
    check_forward(backend, spec, call, LIBRARIES[backend])


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("spec", [s for s in SPECS if "batch" not in s])
def test_gradients_are_those_of_separate_calls(backend, spec):
    check_gradients(backend, spec, LIBRARIES[backend])


@pytest.mark.parametrize("spec", SPECS)
def test_permuted_segments_permute_the_result(spec):
    check_permutation("numpy", spec, np.asarray)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("spec", ["softmax", "causal+bn(statistics=prefix)", "sh(2,3)+bn"])
def test_a_planted_defect_breaks_the_laws(monkeypatch, defect, spec):
    plant(monkeypatch, defect)
    with pytest.raises((AssertionError, ValueError)):  # segments that overlap cannot be cut
        check_forward("numpy", spec, "plain", np.asarray)


def test_gradients_of_batch_statistics_are_those_of_the_batch():
    ids = np.repeat([[1, 0, 2]] * 2, 5, axis=1)
    q, k, v = (np.where(np.isnan(x), 0.3, x)[:, :, :15] for x in (Q, K, V))

    def batched(x):
        return np.concatenate(np.split(x, 3, axis=2))

    for spec in ("bn(statistics=batch)", "sh(2,3)+bn(statistics=batch)+gaussian(0.3)"):
        out, lse, pull = pdcore.attention_vjp(q, k, v, spec, segments=ids)
        want, level, pull_batch = pdcore.attention_vjp(*map(batched, (q, k, v)), spec)
        np.testing.assert_allclose(batched(out), want, rtol=1e-12)
        np.testing.assert_allclose(batched(lse), level, rtol=1e-12)
        d = np.random.default_rng(3).standard_normal(out.shape)
        wanted = pull_batch(batched(d))
        for name, g in pull(d).items():
            np.testing.assert_allclose(batched(g), wanted[name], rtol=1e-9, atol=1e-12)


def test_one_segment_is_none():
    q, k, v = (x[1:] for x in (Q, K, V))
    for spec in ("bn", "causal+linear"):
        out = pdcore.attention(q, k, v, spec, segments=np.full((1, 17), 3))
        np.testing.assert_array_equal(out, pdcore.attention(q, k, v, spec))


@pytest.mark.parametrize("bias", [(4, 17, 17), (2, 4, 1, 17), (1, 17, 1), (17, 17), (1,)])
def test_a_bias_and_its_gradient_have_the_axes_of_the_caller(bias):
    q, k, v = (np.where(np.isnan(x), 0.3, x) for x in (Q, K, V))
    b = np.random.default_rng(2).standard_normal(bias)
    same = IDS[:, :, None] == IDS[:, None, :]
    seen = (same & (IDS >= 0)[:, None, :])[:, None]
    out, lse, pull = pdcore.attention_vjp(q, k, v, bias=b, segments=IDS)
    want, level, pull_masked = pdcore.attention_vjp(q, k, v, bias=b, mask=seen)
    np.testing.assert_allclose(out, want, rtol=1e-12)
    np.testing.assert_allclose(lse, level, rtol=1e-12)
    d_out, d_lse = np.ones_like(out) * np.arange(8), np.ones_like(lse)
    wanted = pull_masked(d_out, d_lse)
    for name, g in pull(d_out, d_lse).items():
        assert g.shape == wanted[name].shape
        np.testing.assert_allclose(g, wanted[name], rtol=1e-9, atol=1e-11)


def test_a_pair_of_ids_and_any_leading_axes():
    q_ids, k_ids = np.array([0, 0, 1, -1, 7]), np.array([1, 1, 1, 0, 5, 5])
    q, k, v = Q[1, :, :5], K[1, :, :6], V[1, :, :6]
    out = pdcore.attention(q, k, v, "causal", offset=1, segments=(q_ids, k_ids))
    np.testing.assert_allclose(
        out[:, :2], pdcore.attention(q[:, :2], k[:, 3:4], v[:, 3:4], "causal", offset=1)
    )
    np.testing.assert_allclose(
        out[:, 2:3], pdcore.attention(q[:, 2:3], k[:, :3], v[:, :3], "causal", offset=1)
    )
    assert not out[:, 3:].any()  # padding, and a segment without keys
    wide = [np.stack([np.stack([x, x + 1])] * 3) for x in (q, k, v)]
    ids = tuple(np.broadcast_to(i, (3, 2, len(i))) for i in (q_ids, k_ids))
    stacked = pdcore.attention(*wide, "causal", offset=1, segments=ids)
    np.testing.assert_allclose(stacked[1, 0], out, rtol=1e-12)


def test_grids_are_those_of_a_segment():
    ids = np.array([[2] * 6 + [0] * 6])
    q, k, v = (x[1:, :, :12] for x in (Q, K, V))
    out = pdcore.attention(q, k, v, "conv2d(2,3)", segments=ids)
    want = pdcore.attention(q[:, :, 6:], k[:, :, 6:], v[:, :, 6:], "conv2d(2,3)")
    np.testing.assert_allclose(out[:, :, 6:], want, rtol=1e-12)
    with pytest.raises(ValueError, match="conv2d"):
        pdcore.attention(q, k, v, "conv2d(2,3)", segments=np.array([[0] * 5 + [1] * 7]))


def test_empty_calls():
    empty = np.zeros((0, 2, 3, 4))
    assert pdcore.attention(empty, empty, empty, segments=np.zeros((0, 3), int)).shape == (
        0,
        2,
        3,
        4,
    )
    q, k = np.ones((2, 2, 0, 4)), np.ones((2, 2, 3, 4))
    ids = np.zeros((2, 0), int), np.zeros((2, 3), int)
    out, lse, pull = pdcore.attention_vjp(q, k, k, "bn", segments=ids)
    assert out.shape == q.shape and lse.shape == (2, 2, 0)  # noqa: PT018
    assert not pull(out)["k"].any()
    q, k = np.full((1, 2, 3, 4), np.nan), np.full((1, 2, 2, 4), np.nan)
    ids = np.full((1, 3), -1), np.full((1, 2), -7)
    out, lse, pull = pdcore.attention_vjp(q, k, k, "bn", segments=ids)
    assert not out.any()
    assert (lse == -np.inf).all()
    assert not any(g.any() for g in pull(out).values())


def test_layout():
    q, k, v = (np.where(np.isnan(x), 0.3, x) for x in (Q, K, V))
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    out = pdcore.attention(q, k, v, "bn", segments=IDS)
    other, lse, pull = pdcore.attention_vjp(*swapped, "bn", segments=IDS, layout="bnhd")
    np.testing.assert_array_equal(other.swapaxes(1, 2), out)
    assert lse.shape == out.shape[:-1]
    assert {n: g.shape for n, g in pull(other).items()}["k"] == swapped[1].shape


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"segments": [0] * 17}, ValueError, "got 17 arrays, expected one, or a pair"),
        ({"segments": 3}, TypeError, "segments: got int, expected integer ids"),
        ({"segments": IDS[0]}, ValueError, r"got shape \(17,\), expected \(2, 17\)"),
        ({"segments": IDS * 1.0}, TypeError, "got dtype float64, expected an integer dtype"),
        ({"segments": IDS > 0}, TypeError, "got dtype bool"),
        ({"segments": (IDS, IDS[:, 1:])}, ValueError, r"segments \(k\): got shape \(2, 16\)"),
        ({"segments": IDS % 3}, ValueError, "id . of queries stands at . and again at"),
        ({"segments": IDS, "offset": np.ones(2, int)}, ValueError, "one offset is for all"),
        ({"segments": IDS, "axis_name": "x"}, UnsupportedError, "not with axis_name"),
        ({"segments": array_api_strict.asarray(IDS)}, TypeError, "array of array_api_strict"),
    ],
)
def test_wrong_segments(options, error, message):
    for call in (pdcore.attention, pdcore.bind("softmax")):
        with pytest.raises(error, match=message):
            call(Q, K, V, **options)


def test_one_array_for_other_numbers_of_queries_and_keys():
    with pytest.raises(ValueError, match="expected a pair"):
        pdcore.attention(Q[:, :, :3], K, V, segments=IDS)


def test_a_backend_that_does_not_declare_segments_refuses_them():
    info = pdcore.BackendInfo(
        name="unpacked",
        load="pdcore_backends.numpy.impl:NumpyBackend",
        library="numpy",
        capabilities={"float64": "full", "exponential": "full"},
    )
    pdcore.register_backend(info)
    try:
        with pytest.raises((UnsupportedError, NoBackendError)):
            pdcore.attention(Q, K, V, segments=IDS, backend="unpacked")
    finally:
        pdcore.plugins.unregister_backend("unpacked")


def test_explain_says_that_segments_are_calls():
    explanation = pdcore.explain(Q, K, V, "bn", segments=IDS)
    assert explanation.steps[0].startswith("segments: each is a call of its own")
    assert explanation.to_dict()["request"]["segments"] == "values"


def test_ids_from_lengths():
    ids = pdcore.segments_from_lengths([3, 0, 2], total=7)
    assert ids.tolist() == [0, 0, 0, 2, 2, -1, -1]
    assert pdcore.segments_from_cu_seqlens([0, 3, 3, 5], total=7).tolist() == ids.tolist()
    assert pdcore.segments_from_lengths([]).tolist() == []
    made = pdcore.segments_from_lengths(array_api_strict.asarray([2, 1]))
    assert isinstance(made, type(array_api_strict.asarray(1)))
    for wrong, message in (([-1, 3], "-1 positions"), ([4], "at least the 4")):
        with pytest.raises(ValueError, match=message):
            pdcore.segments_from_lengths(wrong, total=3)
    with pytest.raises(ValueError, match="-1 positions"):
        pdcore.segments_from_cu_seqlens([0, 3, 2])
    with pytest.raises(ValueError, match="expected 0 and the end"):
        pdcore.segments_from_cu_seqlens([3, 5])
    with pytest.raises(TypeError, match="expected integers"):
        pdcore.segments_from_lengths([0.5])


def test_equal_segments_that_tile_the_sequences_are_no_copies(monkeypatch):
    seen = []
    call = pdcore.BoundAttention.__call__

    def spy(self, *args, **named):
        seen.append(named.get("q", args[0] if args else None))
        return call(self, *args, **named)

    monkeypatch.setattr(pdcore.BoundAttention, "__call__", spy)
    x = np.random.default_rng(0).standard_normal((1, 2, 12, 4))
    ids = pdcore.segments_from_lengths([4, 4, 4])[None]
    pdcore.attention(x, x, x, segments=ids)
    assert [q.shape for q in seen] == [(1, 2, 12, 4), (3, 2, 4, 4)]
    assert np.shares_memory(seen[1], x)
