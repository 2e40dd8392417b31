"""pdcore.svr against solvers on explicit kernel matrices, and against its own certificate."""

from __future__ import annotations

import json
import pickle
import re
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import qpsolvers
from hypothesis import given, settings
from hypothesis import strategies as st
from regressions import explicit, next_frames, pooled
from scipy import sparse
from sklearn.svm import SVR

import pdcore
from pdcore import UnsupportedError
from pdcore.reference import reference_keys
from pdcore.spec import Expression
from pdcore.svr import fit, interpret
from pdcore.svr.active_set import Dual, polish

SOLVERS = ["clarabel", "sklearn"]


def scale_of(gram: Any) -> float:
    return 1.0 / float(np.mean(np.diag(gram)))


def relative(found: Any, wanted: Any) -> float:
    return float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))


def by_clarabel(gram: Any, y: Any, C: float, epsilon: float) -> tuple[Any, float]:
    """Solve in (a, a*), as the problem is written down; b from a multiplier inside the box."""
    n, unit = len(y), scale_of(gram)
    K = gram * unit
    found = qpsolvers.solve_qp(
        P=sparse.csc_matrix(np.block([[K, -K], [-K, K]])),
        q=np.concatenate([epsilon - y, epsilon + y]),
        A=sparse.csc_matrix(np.concatenate([np.ones(n), -np.ones(n)])[None]),
        b=np.zeros(1),
        lb=np.zeros(2 * n),
        ub=np.full(2 * n, C / unit),
        solver="clarabel",
        tol_gap_abs=1e-11,
        tol_gap_rel=1e-11,
        tol_feas=1e-11,
    )
    up, low = found[:n], found[n:]
    j = int(np.argmax(np.minimum(up, C / unit - up)))
    return (up - low) * unit, float(y[j] - K[j] @ (up - low) - epsilon)


# --- against solvers on the explicit kernel matrix ------------------------------------------------

CASES = [
    ("softmax", "softmax", {}),
    ("gaussian(gamma=0.05)", "gaussian(gamma=0.05)", {}),
    ("cosine+h(one)", "cosine", {"h": "one"}),
    ("polynomial+h(count)", "polynomial", {"h": "count"}),
    ("h(sum,sink=2.5)", "softmax", {"sink": 2.5}),
    ("linear", "linear", {}),
    ("bn", "softmax", {"bn": True}),
    ("gaussian(gamma=0.05)+bn", "gaussian(gamma=0.05)", {"bn": True}),
    ("sh(3)", "softmax", {"scale": 3}),
    ("linear+sh(2)", "linear", {"scale": 2}),
    ("bn+sh(2)", "softmax", {"bn": True, "scale": 2}),
    ("conv1d(size=5)", "softmax", {"taps": 5}),
    ("gaussian(gamma=0.05)+conv1d+sh(2)", "gaussian(gamma=0.05)", {"taps": 3, "scale": 2}),
]


def averaged(points: Any, taps: int) -> Any:
    """Compute the moving mean over an odd number of points, zeros beyond them."""
    padded = np.pad(points, ((taps // 2, taps // 2), (0, 0)))
    return np.stack([padded[j : j + taps].mean(axis=0) for j in range(len(points))])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("spec", "kernel", "options"), CASES, ids=[c[0] for c in CASES])
def test_predictions_are_those_of_solvers_on_the_explicit_matrix(
    spec: str, kernel: str, options: dict[str, Any], solver: str
) -> None:
    keys, targets = next_frames(5, 1)
    scale = options.get("scale", 1)
    formula = {name: x for name, x in options.items() if name not in ("scale", "taps")}
    points, y = pooled(keys, scale), pooled(targets, scale)[:, 0]
    points = averaged(points, options.get("taps", 1))
    gram = explicit(kernel, points, points, **formula)
    C, epsilon = 3.0 * scale_of(gram), 0.1
    q = np.random.default_rng(0).standard_normal((20, keys.shape[1]))
    rows = explicit(kernel, q, points, **formula)

    expansion = fit(keys, targets, spec, C=C, epsilon=epsilon, solver=solver)
    found = expansion.predict(q)[:, 0]

    beta, b = by_clarabel(gram, y, C, epsilon)
    assert relative(found, rows @ beta + b) < 1e-7
    unit = scale_of(gram)  # libsvm's stopping rule is absolute, and its matrix is float32
    model = SVR(kernel="precomputed", C=C / unit, epsilon=epsilon, tol=1e-7)
    model.fit(gram * unit, y)
    assert relative(found, model.predict(rows * unit)) < 1e-4
    assert relative(expansion.attention(q)[:, 0], found) < 1e-10
    # Every key of a window has the multipliers of its pooled key.
    assert relative(expansion.coefficients[::scale, 0], beta) < 1e-4


@pytest.mark.parametrize("kernel", ["softmax", "gaussian(gamma=0.05)", "cosine"])
def test_gap_and_residuals_on_real_data_and_two_solvers_agree(kernel: str) -> None:
    keys, targets = next_frames(12, 2)
    gram = explicit(kernel, keys, keys)
    C = 10.0 * scale_of(gram)
    found = [fit(keys, targets, kernel, C=C, epsilon=0.2, solver=s) for s in SOLVERS]
    for expansion in found:
        certificate = expansion.certificate()
        assert certificate.ok
        assert np.max(np.abs(certificate.gap)) < 1e-8
        assert certificate.residual < 1e-6
        assert np.all((certificate.inside >= 0.1) & (certificate.inside <= 0.9))
        # The smallest eigenvalues have errors of the size of the rounding of the largest.
        assert certificate.condition[0] == pytest.approx(np.linalg.cond(gram), rel=1e-3)
    q = np.random.default_rng(0).standard_normal((30, keys.shape[1]))
    assert relative(found[0].predict(q), found[1].predict(q)) < 1e-9
    assert np.array_equal(found[0].support, found[1].support)


# --- the expansion is attention -------------------------------------------------------------------

SPECS = [
    "softmax",
    "softmax(scale=0.5)+h(one)",
    "gaussian(gamma=0.1)+h(count)",
    "cosine(scale=2)",
    "polynomial(degree=4,coef0=1)",
    "linear",
    "relu",
    "random_features(count=32)",
    "bn(beta=0.5)",
    "sh(1,3)",
    "sh(2,1,pool=first)",
    "sh(half=3)",
    "bn+sh(2,3)",
    "linear+bn+sh(1,2)",
    "bn(statistics=batch)",
    "sparse(0,0)",
    "sparse(40,40)",
    "conv1d(4)",
    "linear+conv2d(5,5)",
    "conv1d+sh(1,2)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_attention_is_the_solvers_prediction(spec: str) -> None:
    rng = np.random.default_rng(0)
    keys, targets = rng.standard_normal((2, 25, 4)), rng.standard_normal((2, 25, 3))
    q = rng.standard_normal((4, 9, 4))  # two query heads for each key head
    small = fit(keys, targets, spec, C=1.0, epsilon=0.1, solver="sklearn")
    C = 5.0 * scale_of(small.heads[0].kernel.gram)
    expansion = fit(keys, targets, spec, C=C, epsilon=0.1, solver="sklearn")
    assert expansion.certificate().ok
    found = expansion.attention(q, offset=3)
    assert found.shape == (4, 9, 3)
    assert relative(found, expansion.predict(q, offset=3)) < 1e-10
    # At the keys too, where f is K beta + b.
    for head, own in enumerate(expansion.heads):
        at_points = own.kernel.gram @ own.coefficients + own.intercept
        alone = replace(expansion, keys=keys[head], heads=(own,), spec=own.kernel.spec)
        if len(own.kernel.points) == 25:
            inputs = reference_keys(keys[head][None], own.kernel.spec, own.kernel.params)[0]
            inputs = inputs if "conv" in spec else keys[head]  # T of a query is the query
            assert relative(alone.attention(inputs), at_points) < 1e-10


def test_arrays_of_a_spec() -> None:
    rng = np.random.default_rng(0)
    keys, targets = rng.standard_normal((2, 20, 3)) + 1.0, rng.standard_normal((2, 20, 1))
    params = {"beta": np.array([0.3, 0.9])}
    args = (keys, targets, "bn(beta=param)")
    expansion = fit(*args, C=1e3, epsilon=0.1, params=params)
    for head, beta in enumerate(params["beta"]):
        alone = fit(keys[head], targets[head], f"bn(beta={beta})", C=1e3, epsilon=0.1)
        assert relative(expansion.predict(keys)[head], alone.predict(keys[head])) < 1e-10
    assert relative(expansion.attention(keys), expansion.predict(keys)) < 1e-10
    with pytest.raises(ValueError, match="'beta' is missing"):
        fit(*args, C=1e3, epsilon=0.1)
    with pytest.raises(ValueError, match="no parameter 'gamma'"):
        fit(*args, C=1e3, epsilon=0.1, params={"gamma": np.ones(2)})


def test_a_point_with_phi_0_has_value_0() -> None:
    keys = np.array([[-1.0, -2.0], [1.0, 0.5], [2.0, 0.1]])  # relu sends the first to 0
    targets = np.array([[1.0], [2.0], [-1.0]])
    expansion = fit(keys, targets, "relu", C=1e3, epsilon=0.0)
    assert expansion.values[0, 0] == 0.0
    assert np.array_equal(expansion.attention(keys[:1])[0], expansion.intercept)
    assert relative(expansion.attention(keys), expansion.predict(keys)) < 1e-10


# --- small problems whose solution is known -------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_points_by_hand(solver: str) -> None:
    """K = I for points far apart: beta = (1 - eps, eps - 1) / 1, if C allows, and b = 0."""
    keys, targets = np.array([[0.0], [100.0]]), np.array([[1.0], [-1.0]])
    wide = fit(keys, targets, "gaussian(gamma=1)+h(one)", C=5.0, epsilon=0.25, solver=solver)
    np.testing.assert_allclose(wide.coefficients[:, 0], [0.75, -0.75], rtol=1e-14)
    np.testing.assert_allclose(wide.predict(keys)[:, 0], [0.75, -0.75], rtol=1e-14)
    narrow = fit(keys, targets, "gaussian(gamma=1)+h(one)", C=0.5, epsilon=0.25, solver=solver)
    assert narrow.coefficients[:, 0].tolist() == [0.5, -0.5]
    # Primal: 1/2 |w|^2 = 0.25, slack 0.25 twice at C = 0.5; the dual is the same.
    certificate = narrow.certificate()
    np.testing.assert_allclose([certificate.primal, certificate.dual], 0.5, rtol=1e-14)
    assert certificate.inside.tolist() == [[0.0]]
    assert certificate.support.tolist() == [[1.0]]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("targets", [[3.0, 3.0, 3.0], [1.0, 2.0, 1.5]])
def test_targets_within_the_tube_need_no_support_vector(solver: str, targets: list[float]) -> None:
    keys = np.random.default_rng(0).standard_normal((3, 2))
    y = np.array(targets)[:, None]
    expansion = fit(keys, y, "bn", C=10.0, epsilon=0.5, solver=solver)
    assert not expansion.support.any()
    middle = 0.5 * (y.min() + y.max())
    assert expansion.intercept == pytest.approx(middle, abs=1e-12)
    certificate = expansion.certificate()
    assert certificate.ok
    assert certificate.primal == 0.0


def test_one_key() -> None:
    expansion = fit(np.ones((1, 2)), np.full((1, 1), 7.0), C=1.0, epsilon=0.0)
    assert expansion.predict(np.zeros((2, 2))).tolist() == [[7.0], [7.0]]
    assert expansion.certificate().ok


@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 14),
    epsilon=st.sampled_from([0.0, 0.1, 1.0]),
    C=st.sampled_from([1e-2, 1.0, 1e3]),
    spec=st.sampled_from(["softmax", "linear+bn", "cosine+h(one)"]),
    solver=st.sampled_from(SOLVERS),
    rounded=st.booleans(),
)
@settings(max_examples=60)
def test_any_small_problem_is_certified(
    seed: int, count: int, epsilon: float, C: float, spec: str, solver: str, rounded: bool
) -> None:
    rng = np.random.default_rng(seed)
    keys, targets = rng.standard_normal((count, 3)), rng.standard_normal((count, 2))
    if rounded:  # equal targets and equal keys, multipliers that are not unique
        keys, targets = np.round(keys), np.round(targets)
    certificate = fit(keys, targets, spec, C=C, epsilon=epsilon, solver=solver).certificate()
    assert certificate.ok, certificate


# --- the certificate sees what is wrong -----------------------------------------------------------


def damaged(expansion: Any, **changes: Any) -> Any:
    [head] = expansion.heads
    made = {name: change(getattr(head, name).copy()) for name, change in changes.items()}
    return replace(expansion, heads=(replace(head, **made),)).certificate()


def test_damage_shows_in_the_certificate() -> None:
    keys, targets = next_frames(4, 1)
    C = 10.0 * scale_of(explicit("softmax", keys, keys))
    expansion = fit(keys, targets, C=C, epsilon=0.1)
    assert expansion.certificate().ok
    [head] = expansion.heads
    inside = np.flatnonzero((head.upper[:, 0] > 0) & (head.upper[:, 0] < C))
    other = np.flatnonzero((head.lower[:, 0] > 0) & (head.lower[:, 0] < C))
    assert len(inside)
    assert len(other)

    def moved(x: Any, where: int, by: float) -> Any:
        x[where] += by * C
        return x

    shifted = damaged(expansion, intercept=lambda b: b + 1e-4)
    assert not shifted.ok
    assert shifted.stationarity > 1e-6

    unbalanced = damaged(expansion, upper=lambda a: moved(a, inside[0], -1e-4))
    assert not unbalanced.ok
    assert unbalanced.balance > 1e-7

    balanced = damaged(
        expansion,
        upper=lambda a: moved(a, inside[0], 1e-4),
        lower=lambda a: moved(a, other[0], 1e-4),
    )
    assert balanced.balance < 1e-12
    assert balanced.stationarity > 1e-6
    assert balanced.gap > 1e-9

    outside = damaged(expansion, upper=lambda a: moved(a, inside[0], 2.0))
    assert outside.box >= 1.0
    both = damaged(expansion, lower=lambda a: moved(a, inside[0], 1e-2))
    assert both.complementarity > 1e-6
    assert not damaged(expansion, intercept=lambda b: b * np.nan).ok


def test_a_tolerance_is_stated_and_decides() -> None:
    keys, targets = next_frames(2, 1)
    expansion = fit(keys, targets, C=1e4, epsilon=0.1)
    with pytest.raises(ValueError, match="gap: got -1, expected a finite number from 0"):
        expansion.certificate(gap=-1)
    strict = expansion.certificate(gap=0.0, residual=0.0)
    assert not strict.ok
    assert str(strict).splitlines()[-1].startswith("NOT ok: gap")
    assert "(tolerance 1e-08)" in str(expansion.certificate())


def test_the_certificate_as_text_table_and_data() -> None:
    from rich.console import Console

    keys, targets = next_frames(2, 2)
    expansion = fit(np.stack([keys, keys + 1.0]), np.stack([targets] * 2), C=1e4, epsilon=0.1)
    certificate = expansion.certificate()
    lines = str(certificate).splitlines()
    assert lines[0].split()[:5] == ["head", "output", "primal", "dual", "gap"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["0", "0"],
        ["0", "1"],
        ["1", "0"],
        ["1", "1"],
    ]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(certificate)
    assert re.search(r"condition", capture.get())
    assert "ok: gap" in capture.get()
    data = json.loads(json.dumps(certificate.to_dict()))
    assert data["ok"] is True
    assert np.shape(data["gap"]) == (2, 2)


def test_a_solution_that_is_not_optimal_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from pdcore.svr import solvers

    monkeypatch.setitem(solvers.SOLVERS, "sklearn", lambda dual: np.zeros(len(dual.targets)))
    monkeypatch.setattr("pdcore.svr.active_set.STEPS", 1)
    keys, targets = next_frames(2, 1)
    with pytest.warns(RuntimeWarning, match=r"head 0, output 0: .*certificate\(\)"):
        expansion = fit(keys, targets, C=1e4, epsilon=0.1, solver="sklearn")
    assert not expansion.certificate().ok


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("C", "shift"), [(1e12, 0.0), (1e15, 0.0), (1e20, 0.0), (1e300, 0.0), (1.0, 1e15), (1e9, 1e15)]
)
def test_a_gap_that_float64_cannot_close_is_warned_of(solver: str, C: float, shift: float) -> None:
    rng = np.random.default_rng(0)
    keys, targets = rng.standard_normal((40, 3)), rng.standard_normal((40, 2)) + shift
    with pytest.warns(RuntimeWarning, match="2 of 2 solutions are not optimal .*gap .*residual"):
        expansion = fit(keys, targets, "gaussian(gamma=0.3)", C=C, epsilon=0.1, solver=solver)
    assert not expansion.certificate().ok


@pytest.mark.nightly
@pytest.mark.parametrize("solver", SOLVERS)
def test_two_thousand_points(solver: str) -> None:
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2000, 6))
    targets = np.sin(keys.sum(1, keepdims=True)) + 0.1 * rng.standard_normal((2000, 1))
    expansion = fit(keys, targets, "gaussian(gamma=0.3)+h(one)", C=10.0, epsilon=0.1, solver=solver)
    assert expansion.certificate().ok


def test_polish_repairs_what_float32_leaves() -> None:
    keys, targets = next_frames(12, 1)
    gram = explicit("gaussian(gamma=0.05)", keys, keys)
    dual = Dual(gram * scale_of(gram), targets[:, 0], 100.0, 0.1)
    model = SVR(kernel="precomputed", C=100.0, epsilon=0.1, tol=1e-3).fit(dual.gram, dual.targets)
    start = np.zeros(len(keys))
    start[model.support_] = model.dual_coef_[0]
    solved = polish(dual, start)
    assert solved.residual < 1e-10
    assert np.max(np.abs(start - solved.coefficients)) > 1e-5  # there was something to repair


# --- what is refused ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bent(pdcore.PointwiseKernel):
    """kappa = exp(-|x.y|): no kernel of a feature space."""

    word = "bent"

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        return -abs(s)

    def latex(self) -> str:
        return r"\exp(-|x^\top y|)"


@dataclass(frozen=True)
class Squared(pdcore.PointwiseKernel):
    """kappa = exp(s / 2)^2, positive definite, though it is not declared so."""

    word = "squared"

    def log_kappa(self, s: Expression, dim: int, **params: Expression) -> Expression:
        return 2.0 * (0.5 * s)

    def latex(self) -> str:
        return r"\exp(x^\top y)"


def test_kernels_of_a_user_are_judged_by_their_matrix() -> None:
    rng = np.random.default_rng(0)
    keys, targets = rng.standard_normal((10, 3)), rng.standard_normal((10, 1))
    spec = pdcore.AttentionSpec(kernel=Bent(), normaliser="one")
    lowest = np.linalg.eigvalsh(np.exp(-np.abs(keys @ keys.T)))[0]
    assert lowest < 0
    with pytest.raises(UnsupportedError, match=re.escape(f"smallest eigenvalue is {lowest:.4g}")):
        fit(keys, targets, spec, C=1.0, epsilon=0.1)
    good = pdcore.AttentionSpec(kernel=Squared(), normaliser="one")
    expansion = fit(keys, targets, good, C=1.0, epsilon=0.1)
    same = fit(keys, targets, "softmax(scale=1)+h(one)", C=1.0, epsilon=0.1)
    assert relative(expansion.predict(keys), same.predict(keys)) < 1e-10


def test_a_window_is_refused_where_its_matrix_is_not_definite() -> None:
    keys, targets = np.zeros((6, 2)), np.arange(6.0)[:, None]  # kappa = 1: the mask itself
    mask = np.abs(np.subtract.outer(np.arange(6), np.arange(6))) <= 1
    lowest = np.linalg.eigvalsh(mask / np.outer(mask.sum(axis=1), mask.sum(axis=1)))[0]
    assert lowest < 0
    with pytest.raises(UnsupportedError, match=re.escape(f"smallest eigenvalue is {lowest:.4g}")):
        fit(keys, targets, "sparse(1,1)", C=1.0, epsilon=0.1)


def test_parallel_jobs_give_the_same_solution() -> None:
    keys, targets = next_frames(2, 3)
    one = fit(keys, targets, C=1e4, epsilon=0.1)
    two = fit(keys, targets, C=1e4, epsilon=0.1, jobs=2)
    assert np.array_equal(one.coefficients, two.coefficients)
    assert np.array_equal(one.intercept, two.intercept)


def test_progress_only_when_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, targets = next_frames(2, 3)
    fit(keys, targets, C=1e4, epsilon=0.1)
    assert capsys.readouterr() == ("", "")
    fit(keys, targets, C=1e4, epsilon=0.1, progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "3 regressions by clarabel" in err
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ModuleNotFoundError, match=r"progress: rich.*pip install 'pdcore\[cli\]'"):
        fit(keys, targets, C=1e4, epsilon=0.1, progress=True)


def test_an_expansion_keeps_copies_of_its_inputs() -> None:
    keys, targets = next_frames(2, 1)
    expansion = fit(keys, targets, C=1e4, epsilon=0.1)
    before, solved = expansion.attention(keys), expansion.predict(keys)
    keys *= 2.0
    targets *= 3.0
    copy = pickle.loads(pickle.dumps(expansion))  # noqa: S301 - our own bytes
    assert np.array_equal(copy.attention(expansion.keys), before)
    assert np.array_equal(copy.predict(expansion.keys), solved)
    assert expansion.certificate().ok
    up, low = expansion.multipliers
    assert np.all((up >= 0) & (up <= 1e4) & (low >= 0) & (low <= 1e4) & (up * low == 0))
    with pytest.raises(ValueError, match=r"q: got shape \(3, 5\), expected \(N, 12\)"):
        expansion.predict(np.ones((3, 5)))
    with pytest.raises(TypeError, match="q: got a numpy array of float32"):
        expansion.predict(np.ones((3, 12), dtype=np.float32))
    low_precision = expansion.attention(expansion.keys.astype(np.float32))
    assert low_precision.dtype == np.float32
    assert relative(low_precision, before) < 1e-3
    large = fit(expansion.keys, 1e6 * targets, C=1e10, epsilon=1e5)
    with pytest.raises(ValueError, match="q: got float16, which cannot hold values of"):
        large.attention(expansion.keys.astype(np.float16))


# --- a trained layer read as a regression ---------------------------------------------------------


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,2)", "sh(half=2)", "linear+h(one)", "conv1d"])
def test_the_values_of_a_layer_are_multipliers(spec: str) -> None:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, 8, 3))
    k, v = rng.standard_normal((2, 12, 3)), rng.standard_normal((2, 12, 2))
    found = interpret(q, k, v, spec, epsilon=0.05)
    for head, own in enumerate(found.expansion.heads):
        scale = 12 // len(own.kernel.points)
        # v h(k), by the formula; a pooled key has the mean of the values.
        h = np.exp(own.kernel.log_h)[:, None]
        wanted = pooled(v[head], scale) * h
        assert relative(found.coefficients[head, ::scale], wanted) < 1e-12
        # With these multipliers and b = 0 the expansion is the layer.
        rows = own.kernel.rows(q[2 * head])
        layer = pdcore.attention(q, k, v, spec)[2 * head]
        assert relative(rows @ found.coefficients[head, ::scale], layer) < 1e-12
    assert np.array_equal(found.C, np.max(np.abs(found.coefficients), axis=(1, 2)))
    assert found.C.max() == found.expansion.C
    assert np.array_equal(found.support, found.share > 0)


def test_epsilon_decides_which_tokens_are_needed() -> None:
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((1, 20, 3)), rng.standard_normal((1, 20, 2))
    counts = []
    for epsilon in (0.0, 0.05, 0.3, 10.0):
        found = interpret(k, k, v, epsilon=epsilon, C=1e6)
        counts.append(int(found.support.sum()))
        # C is large, so the tube is kept at the keys, which are the queries here.
        assert found.error[0] <= epsilon + 1e-6
        assert found.needed[0] == np.max(np.abs(found.expansion.coefficients))
    assert counts[0] == 20
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 0
    assert "0 of 20 tokens are support vectors" in str(found)


def test_a_layer_without_queries_has_no_error() -> None:
    k, v = np.random.default_rng(0).standard_normal((2, 2, 6, 4))
    found = interpret(np.ones((2, 0, 4)), k, v, epsilon=0.1)
    assert not found.error.any()
