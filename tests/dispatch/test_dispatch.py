"""Dispatch from the public calls to a backend and back, and its explanation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from fake_backends import REQUEST, SHARDS, fakes, run

import pdcore
from pdcore.backend import FEATURES, ArrayBackend, Request
from pdcore.dispatch import explanation, use_backend
from pdcore.errors import UnsupportedError
from pdcore.lowering import Signature, lower
from pdcore.plugins import registry as plugins
from pdcore.spec import parse


@pytest.fixture
def add(monkeypatch):
    with fakes(monkeypatch) as add:
        yield add


# Explanations


def test_an_explanation_prints(add):
    add("unwilling", answer=("no", "never"))
    add("idle")
    plan = lower(REQUEST.spec, Signature(64, 4, "float32"))
    text = str(explanation.explain_request(REQUEST, None, plan))
    lines = text.splitlines()
    assert lines[:3] == [
        "softmax+bn+sh(1,1,2,2)",
        "  exponential kernel, batch normalization, heads (1, 1, 2, 2)",
        f"  {REQUEST}",
    ]
    assert "backend: numpy, by the arrays' library" in lines
    assert "  idle:      can run" in lines
    assert "  unwilling: no; never" in lines
    for step in plan.steps:
        assert step in text


def test_an_explanation_of_what_cannot_run(add):
    add("unwilling", answer=("no",))
    found = explanation.explain_request(REQUEST, "unwilling")
    assert found.backend is None
    assert found.reasons["unwilling"] == ["no"]
    assert found.reasons["numpy"] == []
    assert "backend: none, by backend= in the call" in str(found)
    with pytest.raises(ValueError, match="unknown backend"):
        explanation.explain_request(REQUEST, "imaginary")


@pytest.mark.parametrize("choice", [None, "two", ["one", "two"], "two:cpu"])
def test_an_explanation_chooses_what_select_chooses(add, choice):
    add("one", answer=("no",))
    add("two")
    found = explanation.explain_request(SHARDS, choice)
    assert found.backend == run(choice, SHARDS) == "two"
    with use_backend(choice):
        assert explanation.explain_request(SHARDS).backend == "two"


@pytest.mark.parametrize(
    "spec",
    [
        "softmax",
        "linear+causal",
        "polynomial(2)+bn",
        "gaussian(0.1)",
        "bn(statistics=prefix)+causal",
    ],
)
def test_an_explanation_is_json(add, spec):
    request = REQUEST._replace(spec=parse(spec), mask=(1024, 1024))
    plan = lower(request.spec, Signature(64, 4, "float32", masked=True))
    found = explanation.explain_request(request, None, plan)
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back == found.to_dict()
    assert back["spec"] == str(parse(spec))
    assert back["request"]["mask"] == [1024, 1024]
    assert back["plan"]["steps"] == list(plan.steps)
    assert back["plan"]["contraction"]["kind"] == type(plan.contraction).__name__.lower()
    assert back["backend"] == "numpy"


@pytest.mark.parametrize("spec", ["linear", "linear+causal", "random_features(8,0)"])
def test_an_explanation_of_feature_maps_is_json(add, spec):
    request = REQUEST._replace(spec=parse(spec))
    plan = explanation.explain_request(request, None, request.lower()).to_dict()["plan"]
    assert json.loads(json.dumps(plan)) == plan
    assert plan["contraction"]["kernel"] == request.spec.kernel.word


# A loopback: everything that the public calls do reaches a backend, once, and comes back


class Loopback(ArrayBackend):
    """Runs plans on NumPy arrays and records the calls."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def attention(self, plan, inputs, *, lse=False):
        self.calls.append(("attention", str(plan.spec), lse))
        return super().attention(plan, inputs, lse=lse)

    def attention_vjp(self, plan, inputs):
        self.calls.append(("attention_vjp", str(plan.spec), True))
        return super().attention_vjp(plan, inputs)

    def attention_weights(self, plan, inputs):
        self.calls.append(("attention_weights", str(plan.spec), False))
        return super().attention_weights(plan, inputs)


@pytest.fixture
def loopback(add):
    add("loopback", base=Loopback, capabilities=dict.fromkeys(FEATURES, "full"))
    return plugins.load_backend("loopback")


@pytest.fixture
def x():
    return np.random.default_rng(5).standard_normal((1, 2, 7, 4))


def test_every_public_call_reaches_the_chosen_backend(loopback, x):
    spec = "softmax+bn"
    # Blocks of other sizes, and so other roundings.
    np.testing.assert_allclose(
        pdcore.attention(x, x, x, spec, backend="loopback"),
        pdcore.attention(x, x, x, spec),
        rtol=1e-12,
    )
    assert loopback.calls == [("attention", spec, False)]
    pdcore.attention(x, x, x, spec, return_lse=True, backend=["loopback", "numpy"])
    with use_backend("loopback"):
        pdcore.attention_vjp(x, x, x, spec)
        pdcore.attention_weights(x, x, x, spec)
        layer = pdcore.bind(spec)
    layer(x, x, x)
    assert [call[::2] for call in loopback.calls[1:]] == [
        ("attention", True),
        ("attention_vjp", True),
        ("attention_weights", False),
        ("attention", False),
    ]


def test_nothing_reaches_a_backend_that_nobody_chose(loopback, x):
    pdcore.attention(x, x, x)
    pdcore.attention(x, x, x, backend="numpy")
    assert loopback.calls == []


def test_a_change_of_choice_between_equal_calls(loopback, x, monkeypatch):
    for _ in range(2):
        pdcore.attention(x, x, x)
        with use_backend("loopback"):
            pdcore.attention(x, x, x)
    assert len(loopback.calls) == 2
    monkeypatch.setenv("PDCORE_BACKEND", "loopback")
    pdcore.attention(x, x, x)
    assert len(loopback.calls) == 3
    monkeypatch.delenv("PDCORE_BACKEND")
    pdcore.attention(x, x, x)
    assert len(loopback.calls) == 3


def test_a_backend_that_is_taken_out_is_not_called(loopback, add, x):
    pdcore.attention(x, x, x, backend="loopback")
    plugins.unregister_backend("loopback")
    with pytest.raises(ValueError, match="unknown backend 'loopback'"):
        pdcore.attention(x, x, x, backend="loopback")
    add("loopback", base=Loopback, capabilities=dict.fromkeys(FEATURES, "full"))
    pdcore.attention(x, x, x, backend="loopback")
    assert len(loopback.calls) == 1
    assert len(plugins.load_backend("loopback").calls) == 1


def test_the_request_describes_the_call(add, x):
    asked = add("asked", answer=("no",))
    mask = np.ones((7, 7), dtype=bool)
    with pytest.raises(
        UnsupportedError, match=r"q \(1, 2, 7, 4\), k .*, mask \(7, 7\), numpy float64"
    ):
        pdcore.attention(
            x, x, x, "causal", mask=mask, offset="end", return_lse=True, backend="asked"
        )
    request = asked.asked[0]
    assert request == Request(
        parse("causal"),
        "numpy",
        "float64",
        "cpu",
        x.shape,
        x.shape,
        x.shape,
        mask=(7, 7),
        offset="end",
        lse=True,
    )


def test_explain_describes_the_same_request(loopback, x):
    found = pdcore.explain(x, x, x, "bn", backend="loopback")
    assert (found.backend, found.source) == ("loopback", "backend= in the call")
    assert found.plan.spec == parse("bn")
    assert loopback.calls == []
    with use_backend("loopback"):
        assert pdcore.explain(x, x, x).source == "use_backend"
    assert pdcore.explain(x, x, x).backend == "numpy"
