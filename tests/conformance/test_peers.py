"""The attentions of other libraries as backends, without these libraries."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.backend import BackendInfo, Inputs
from pdcore.plugins import list_backends
from pdcore.plugins import registry as plugins
from pdcore_conformance.peer_backends import PEERS
from pdcore_conformance.peer_backends.__main__ import unsettled
from pdcore_conformance.peer_backends.base import Asked, PeerBackend
from pdcore_conformance.peer_backends.page import page
from pdcore_conformance.runner.plugin import parse_backend

rng = np.random.default_rng(0)
Q, K, V = rng.standard_normal((3, 2, 3, 4, 5, 8))


class Textbook(PeerBackend):
    info = BackendInfo(
        "textbook", "test_peers:Textbook", "numpy", priority=-1, capabilities={"mask": "full"}
    )

    def attend(self, asked: Asked) -> tuple[Any, Any]:
        s = asked.scale * asked.q @ asked.k.swapaxes(-1, -2)
        if asked.causal:
            s = np.where(np.tri(*s.shape[-2:], dtype=bool), s, -np.inf)
        extra = asked.bias_or_mask(np)
        if extra is not None:
            s = np.where(extra, s, -np.inf) if extra.dtype == bool else s + extra
        w = np.exp(s - s.max(-1, keepdims=True))
        return w / w.sum(-1, keepdims=True) @ asked.v, None


def computed(spec: str, **call: Any) -> Any:
    plan = pdcore.explain(Q, K, V, spec, backend="numpy", **call).plan
    return Textbook().attention(plan, Inputs(Q, K, V, **call))[0]


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        ("softmax(scale=0.3)", {}),
        ("causal", {}),
        ("causal+sparse(2,0)", {"offset": 1}),
        ("softmax", {"mask": rng.random((3, 1, 5)) < 2, "key_mask": np.ones((2, 3, 5), bool)}),
        ("softmax", {"bias": rng.standard_normal((4, 5, 5)), "mask": np.tri(5, dtype=bool)}),
        ("softmax", {"bias": rng.standard_normal((2, 1, 1, 1, 5))}),
    ],
)
def test_a_call_as_arguments(spec: str, call: dict[str, Any]) -> None:
    if call.get("mask") is not None and call["mask"].shape == (3, 1, 5):
        call = {**call, "mask": np.ones((4, 1, 5), bool)}
    expected = pdcore.attention(Q, K, V, spec, backend="numpy", **call)
    np.testing.assert_allclose(computed(spec, **call), expected, rtol=1e-10, atol=1e-12)


def test_padding_reaches_the_function_as_it_is() -> None:
    k = K.copy()
    k[..., -1, :] = np.nan
    real = np.arange(5) < np.full((2, 3, 1), 4)
    plan = pdcore.explain(Q, K, V).plan
    asked = Textbook().asked(plan, Inputs(Q, k, V, key_mask=real))
    assert np.isnan(asked.k[..., -1, :]).all()
    assert asked.mask.shape == (6, 1, 1, 5)


def test_peers_run_only_where_they_are_named() -> None:
    assert set(PEERS) <= set(plugins.registered())
    assert not set(PEERS) & set(plugins.candidates("numpy") + plugins.candidates("torch"))
    assert not set(PEERS) & {b["name"] for b in list_backends()}
    with pytest.raises(pdcore.NoBackendError) as error:
        pdcore.attention(Q, K, V, axis_name="rows")
    assert "onnxruntime" not in str(error.value)


def test_names_on_the_command_line() -> None:
    assert parse_backend("peer:torch_sdpa:cuda") == ("torch_sdpa", "cuda")
    assert parse_backend("peer:onnxruntime") == ("onnxruntime", "cpu")
    with pytest.raises(ValueError, match="unknown backend 'numpy'"):
        parse_backend("peer:numpy")


def test_declaring_the_peers_imports_no_library() -> None:
    code = (
        "import sys, pdcore_conformance.peer_backends; names = {'torch', 'jax', 'keras', 'onnx'};"
        "sys.exit(bool(names & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def case(**changes: Any) -> dict[str, Any]:
    one = {"topic": "float64", "case": "softmax-float64", "outcome": "wrong", "message": "<b>"}
    return {**one, "ratio": "inf", **changes}


def test_every_disagreement_needs_an_entry_and_every_entry_one() -> None:
    peer = {"date": "", "unavailable": "", "versions": {}}
    [problem] = unsettled({"performer": {**peer, "cases": [case()]}})
    assert problem.startswith("not settled: performer, float64")
    [problem] = unsettled({"fla_naive": {**peer, "cases": [case(outcome="right")]}})
    assert problem.startswith("explains nothing of fla_naive")


def test_page_escapes_and_shows_who_is_right() -> None:
    peer = {"date": "2026-11-30", "unavailable": "", "versions": {"torch": "2"}}
    peers = {
        "performer": {**peer, "cases": [case()]},
        "jax_nn": {**peer, "cases": [], "unavailable": "not installed"},
    }
    text = page(peers)
    assert "0 of 1" in text
    assert "not settled" in text
    assert "<b>" not in text.replace("<b>performer</b>", "")
    assert "jax_nn (not installed)" in text
