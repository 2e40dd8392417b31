"""`SVRAttentionRegressor`, the regression behind an attention as a scikit-learn estimator.

>>> from sklearn.datasets import load_diabetes
>>> from sklearn.preprocessing import scale
>>> X, y = load_diabetes(return_X_y=True)
>>> model = SVRAttentionRegressor("gaussian(gamma=0.05)").fit(scale(X), scale(y))
>>> model.predict(scale(X)).shape
(442,)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pdcore import AttentionSpec, HeadScaling, UnsupportedError
from pdcore.extend import Convolution, as_spec
from pdcore.svr import check_jobs, check_regression, fit, head_kernels

from .bound import Choice
from .requirements import requires

with requires("svr"):
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.utils.validation import check_is_fitted, validate_data

__all__ = ["SVRAttentionRegressor"]

Array = np.ndarray[Any, Any]


class SVRAttentionRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """Support vector regression whose prediction is an attention over the training samples.

    It is `sklearn.svm.SVR` with the kernel K(x, y) = kappa(T(x), T(y)) / (h(x) h(y)) of a spec.
    The samples of `fit` are the keys, and the samples of `predict` are the queries.

    Parameters
    ----------
    spec : str or AttentionSpec
        The kernel, h and normalization, such as ``"gaussian(gamma=0.1)+h(one)"``; by default
        ``"bn"``, which standardizes the features. Samples have no order, so scales, windows and
        causal are refused.
    C : float or "scale"
        As in `pdcore.svr.fit`. ``"scale"`` is 1 over the mean of K(x, x) over the samples, which
        suits any h if the targets are standardized.
    epsilon : float
        The size of errors that cost nothing.
    solver : {"clarabel", "sklearn"}
        As in `pdcore.svr.fit`.
    backend : str or sequence of str, optional
        As in `pdcore.attention`, for `predict`.
    n_jobs : int, optional
        The number of processes that solve several outputs in parallel; None is 1.

    Attributes
    ----------
    dual_coef_ : array (n_outputs, n_support)
        a - a* of the samples in `support_`.
    support_ : int array (n_support,)
        The samples that are support vectors of at least one output.
    support_vectors_ : array (n_support, n_features)
    intercept_ : array (n_outputs,)
    C_ : float
        The value of C that was used.
    expansion_ : pdcore.svr.SupportVectorExpansion
        The solution, with its certificate.
    n_features_in_ : int

    Raises
    ------
    ValueError
        For arguments that do not make sense.
    UnsupportedError
        For a spec that is not one regression over samples without order.
    """

    def __init__(
        self,
        spec: str | AttentionSpec = "bn",
        *,
        C: float | str = "scale",
        epsilon: float = 0.1,
        solver: str = "clarabel",
        backend: Choice = None,
        n_jobs: int | None = None,
    ) -> None:
        self.spec = spec
        self.C = C
        self.epsilon = epsilon
        self.solver = solver
        self.backend = backend
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any) -> SVRAttentionRegressor:
        """Fit to X (n_samples, n_features) and y (n_samples,) or (n_samples, n_outputs)."""
        spec = as_spec(self.spec)
        _check_spec(spec)
        X, y = validate_data(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        targets = np.asarray(y, dtype=np.float64).reshape(len(X), -1)
        self.C_ = _box(self.C, spec, X)
        jobs = 1 if self.n_jobs is None else self.n_jobs
        check_jobs(jobs, "n_jobs")
        self.expansion_ = fit(
            X, targets, spec, C=self.C_, epsilon=self.epsilon, solver=self.solver, jobs=jobs
        )
        self.support_ = np.flatnonzero(np.any(self.expansion_.support, axis=1))
        self.support_vectors_ = X[self.support_]
        self.dual_coef_ = self.expansion_.coefficients[self.support_].T
        self.intercept_ = self.expansion_.intercept
        self._single = np.ndim(y) == 1
        return self

    def predict(self, X: Any) -> Array:
        """Compute predictions by attention, for X (n_samples, n_features).

        Returns
        -------
        array (n_samples,) or (n_samples, n_outputs)
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        outputs = np.asarray(self.expansion_.attention(X, backend=self.backend))
        return outputs[:, 0] if self._single else outputs


def _check_spec(spec: AttentionSpec) -> None:
    check_regression(spec)
    convolves = isinstance(spec.normalization, Convolution)
    if spec.heads != HeadScaling() or spec.support.restricts or convolves:
        raise UnsupportedError(
            f"spec: {spec} goes by the position of keys, and samples have none; leave scales, "
            "windows and convolutions out"
        )
    for p in spec.parameters():
        raise UnsupportedError(
            f"spec: {spec} takes {p.name!r} from each call, which an estimator does not have; use "
            "pdcore.svr.fit"
        )


def _box(C: float | str, spec: AttentionSpec, X: Array) -> float:
    if not isinstance(C, str):
        return C
    if C != "scale":
        raise ValueError(f"C: got {C!r}, expected a number above 0 or 'scale'")
    [kernel] = head_kernels(spec, X[None], {})
    return 1.0 / (float(np.mean(np.diag(kernel.gram))) or 1.0)
