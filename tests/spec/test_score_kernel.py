"""`score_kernel`: kernels written as one function."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import pdcore
from pdcore import PluginError, SpecError, UnsupportedError, score_kernel
from pdcore.extend import maximum
from pdcore.spec import vocabulary


@pytest.fixture(autouse=True)
def words():
    known = set(vocabulary.kernel_words())
    yield
    for word in set(vocabulary.kernel_words()) - known:
        vocabulary.unregister(word)


def drawn(rows=6, keys=8):
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(2, n, m, 4)) for n, m in ((4, rows), (2, keys), (2, keys)))


def test_a_function_is_a_kernel():
    @score_kernel
    def scaled(s, *, dim):
        return s / dim**0.5

    np.testing.assert_allclose(
        pdcore.attention(*drawn(), "scaled+bn+sparse(3,1)"),
        pdcore.attention(*drawn(), "softmax+bn+sparse(3,1)"),
        rtol=1e-12,
    )
    assert pdcore.AttentionSpec(kernel=scaled()) == pdcore.parse("scaled")
    assert r"\mathrm{scaled}(x^\top y)" in pdcore.parse("scaled").latex()


def test_a_function_gets_what_it_names():
    @score_kernel(near=5, kinds=(3, 3))
    def placed(s, *, distance, query_label, key_label, near, kinds, slope, shift=0.5):
        pair = kinds[query_label, key_label]
        return s / 2 + near[distance + 2] * pair - slope * abs(distance) + maximum(shift, 0.0)

    rng = np.random.default_rng(1)
    near, kinds, slope = (rng.normal(size=s) for s in ((4, 5), (4, 3, 3), (4,)))
    labels = rng.integers(0, 3, (2, 6)), rng.integers(0, 3, (2, 8))
    apart = np.arange(8) - np.arange(6)[:, None]
    of_pair = np.moveaxis(kinds[:, labels[0][..., :, None], labels[1][..., None, :]], 0, 1)
    bias = near[:, np.clip(apart + 2, 0, 4)] * of_pair - slope[:, None, None] * abs(apart) + 0.5
    params = {"near": near, "kinds": kinds, "slope": slope}
    got = pdcore.attention(*drawn(), "placed", labels=labels, params=params, return_lse=True)
    want = pdcore.attention(*drawn(), "softmax(scale=0.5)", bias=bias, return_lse=True)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    assert "j - p, l_i, l_j" in pdcore.parse("placed").latex()


def test_a_kernel_is_defined_anew():
    def define(factor):
        @score_kernel
        def again(s):
            return factor * s

        return again

    x = drawn()
    first = define(1.0)
    bound = pdcore.bind("again")
    for factor in (1.0, 2.0):
        define(factor)
        np.testing.assert_allclose(
            pdcore.attention(*x, "again"), pdcore.attention(*x, f"softmax(scale={factor})")
        )
    # What was bound before keeps its kernel.
    np.testing.assert_allclose(bound(*x), pdcore.attention(*x, "softmax(scale=1)"))
    assert first is not pdcore.parse("again").kernel.__class__


def test_words_of_others_are_not_replaced():
    for word in ("gaussian", "relative", "bn"):
        with pytest.raises(PluginError, match=f"the word '{word}' is taken"):
            score_kernel(named(word))


def named(word):
    def function(s):
        return s

    function.__name__ = function.__qualname__ = word
    return function


@score_kernel
def of_module(s):
    """The inner product."""
    return s


def test_a_kernel_of_a_module_is_pickled():
    vocabulary.register_kernel(of_module)
    spec = pdcore.parse("of_module+causal")
    assert pickle.loads(pickle.dumps(spec)) == spec  # noqa: S301 - bytes of our own
    assert of_module.__doc__ == "The inner product."


@pytest.mark.parametrize(
    ("function", "tables", "error", "message"),
    [
        (lambda s, other: s, {}, UnsupportedError, "expected one by position"),
        (lambda s: np.tanh(s), {}, UnsupportedError, "cannot be traced"),
        (lambda s, *, t: s + t, {"u": 3}, SpecError, "table 'u' is no argument"),
        (lambda s, *, t: s + t, {"t": 3}, UnsupportedError, "log_kappa reads it whole"),
        (lambda s, *, t, distance: s + t[distance], {}, UnsupportedError, "reads 1 axes of it"),
        (lambda s, *, t: s + t[s], {"t": 3}, UnsupportedError, "one of distance, query_label"),
        (lambda s, *, t=2: s + t, {"t": 3}, SpecError, "the default of t is 2"),
        (lambda s, *, t="x": s + t, {}, SpecError, "the default of t is 'x'"),
        (lambda s, *, t: s, {"t": 0}, SpecError, "got 0, expected a size"),
    ],
)
def test_wrong_functions(function, tables, error, message):
    function.__name__ = "wrong"
    with pytest.raises(error, match=message):
        score_kernel(function, **tables)


def test_pooled_keys_have_no_position():
    @score_kernel
    def nearest(s, *, distance):
        return s - abs(distance)

    with pytest.raises(UnsupportedError, match="nearest: a pooled key has no single position"):
        pdcore.parse("nearest+sh(1,2)")
