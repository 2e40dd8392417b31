"""Test pdcore_adapters.sklearn by scikit-learn's checks and by its SVR on the kernel matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from regressions import explicit
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVR
from sklearn.utils.estimator_checks import parametrize_with_checks

import pdcore
from pdcore import UnsupportedError
from pdcore_adapters.sklearn import SVRAttentionRegressor


@parametrize_with_checks(
    [
        SVRAttentionRegressor(),
        SVRAttentionRegressor("gaussian(gamma=0.1)+h(one)+bn", solver="sklearn", C=10.0),
    ]
)
def test_checks_of_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def diabetes(count: int = 200) -> tuple[Any, Any]:
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:count] / X.std(axis=0), y[:count]
    return X, (y - y.mean()) / y.std()


@pytest.mark.parametrize("bn", [False, True])
@pytest.mark.parametrize("h", ["sum", "count", "one"])
@pytest.mark.parametrize("kernel", ["softmax", "gaussian(gamma=0.05)", "polynomial"])
def test_it_is_svr_on_the_normalised_kernel(kernel: str, h: str, bn: bool) -> None:
    X, y = diabetes()
    train, test = X[:150], X[150:]
    gram = explicit(kernel, train, train, bn=bn, h=h)
    unit = 1.0 / np.mean(np.diag(gram))
    spec = f"{kernel}+h({h})" + ("+bn" if bn else "")
    model = SVRAttentionRegressor(spec, C=2.0 * unit).fit(train, y[:150])
    # The same problem with K of size 1: libsvm stops by an absolute rule.
    peer = SVR(kernel="precomputed", C=2.0, epsilon=0.1, tol=1e-7).fit(gram * unit, y[:150])
    rows = explicit(kernel, test, train, bn=bn, h=h) * unit
    np.testing.assert_allclose(model.predict(test), peer.predict(rows), atol=1e-5)
    assert np.array_equal(model.support_, np.sort(peer.support_))
    order = np.argsort(peer.support_)
    np.testing.assert_allclose(
        model.dual_coef_[0], peer.dual_coef_[0][order] * unit, atol=1e-3 * unit
    )
    assert model.intercept_ == pytest.approx(peer.intercept_, abs=1e-5)
    assert np.array_equal(model.support_vectors_, train[model.support_])
    assert model.expansion_.certificate().ok


def test_the_box_of_scale() -> None:
    X, y = diabetes()
    model = SVRAttentionRegressor("softmax").fit(X, y)
    gram = explicit("softmax", X, X)
    assert pytest.approx(1.0 / np.mean(np.diag(gram)), rel=1e-12) == model.C_
    assert np.max(np.abs(model.dual_coef_)) == model.C_


def test_several_outputs_are_fits_of_their_own() -> None:
    X, y = diabetes(80)
    Y = np.stack([y, -2.0 * y, X[:, 0]], axis=1)
    model = SVRAttentionRegressor(n_jobs=2).fit(X, Y)
    assert model.predict(X).shape == Y.shape
    assert model.dual_coef_.shape == (3, len(model.support_))
    for d in range(3):
        alone = SVRAttentionRegressor().fit(X, Y[:, d])
        np.testing.assert_allclose(model.predict(X)[:, d], alone.predict(X), rtol=1e-9)


def test_it_is_searched_cloned_and_run_on_a_named_backend() -> None:
    X, y = diabetes(90)
    search = GridSearchCV(SVRAttentionRegressor(epsilon=0.2), {"spec": ["bn", "linear+bn"]}, cv=3)
    search.fit(X, y)
    assert clone(search.best_estimator_).get_params() == search.best_estimator_.get_params()
    strict = SVRAttentionRegressor(backend="nobody").fit(X, y)
    with pytest.raises(ValueError, match="nobody"):
        strict.predict(X)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"spec": "sh(2)"}, UnsupportedError, "samples have none"),
        ({"spec": "sparse(2,2)"}, UnsupportedError, "samples have none"),
        ({"spec": "conv1d"}, UnsupportedError, "samples have none"),
        ({"spec": "causal"}, UnsupportedError, "keys of its own"),
        ({"spec": "bn(beta=param)"}, UnsupportedError, "takes 'beta' from each call"),
        ({"spec": "softmax(softcap=3)"}, UnsupportedError, "softcap"),
        ({"spec": "sofmax"}, pdcore.SpecError, "did you mean 'softmax'"),
        ({"C": "scaled"}, ValueError, "C: got 'scaled', expected a number above 0 or 'scale'"),
        ({"C": -1.0}, ValueError, "C: got -1.0"),
        ({"n_jobs": 0}, ValueError, "n_jobs: got 0"),
    ],
)
def test_what_does_not_make_sense(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    X, y = diabetes(20)
    with pytest.raises(error, match=message):
        SVRAttentionRegressor(**options).fit(X, y)


def test_features_that_are_too_large_say_so() -> None:
    X, y = diabetes(20)
    with pytest.raises(ValueError, match="log h of head 0 goes from"):
        SVRAttentionRegressor("softmax").fit(100.0 * X, y)
    assert SVRAttentionRegressor("bn").fit(100.0 * X, y).score(100.0 * X, y) > 0.3
