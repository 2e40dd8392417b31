"""onnxruntime as a backend that a caller names."""

from __future__ import annotations

import numpy as np
import pytest

import pdcore

rng = np.random.default_rng(0)
Q, K, V = rng.standard_normal((3, 2, 2, 9, 8), dtype=np.float32)


def attend(spec: str, **call: object) -> np.ndarray:
    return pdcore.attention(Q, K, V, spec, backend="onnxruntime", **call)


@pytest.mark.parametrize("spec", ["softmax", "causal", "sparse(2,1)", "softmax(softcap=2)"])
def test_equals_the_numpy_backend(spec: str) -> None:
    expected = pdcore.attention(Q, K, V, spec, backend="numpy")
    np.testing.assert_allclose(attend(spec), expected, rtol=1e-5, atol=1e-6)


def test_one_session_serves_all_sizes() -> None:
    from pdcore_conformance.peer_backends.on_onnxruntime import _session

    attend("softmax(scale=0.3)")
    before = _session.cache_info().misses
    pdcore.attention(
        Q[:, :, :4], K[:, :, :5], V[:, :, :5], "softmax(scale=0.3)", backend="onnxruntime"
    )
    assert _session.cache_info().misses == before


def test_number_of_threads_is_that_of_the_numpy_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDCORE_NUM_THREADS", "none")
    with pytest.raises(ValueError, match="PDCORE_NUM_THREADS"):
        attend("softmax")


def test_refuses_what_the_operator_has_no_argument_for() -> None:
    with pytest.raises(pdcore.UnsupportedError, match="batch normalization"):
        attend("bn")
    with pytest.raises(pdcore.UnsupportedError, match="return_lse"):
        attend("softmax", return_lse=True)
    wide = (x.astype("float64") for x in (Q, K, V))
    with pytest.raises(pdcore.UnsupportedError, match=r"scale 0\.7"):
        pdcore.attention(*wide, "softmax(scale=0.7)", backend="onnxruntime")
