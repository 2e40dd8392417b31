"""Compare support vector regressions whose kernels are attentions, on scikit-learn's diabetes data.

    python examples/compare_regressors.py
    python examples/compare_regressors.py --kernel gaussian --kernel cosine --repeats 3

Needs the extras ``svr`` and ``cli``.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from itertools import product
from typing import Annotated, Any

import numpy as np
import typer
from comparison import AsJson, command_line, distinct
from rich.markup import escape
from rich.table import Table

import pdcore
from pdcore.cli.reporting import Failed, emit, note, progress, reported, stdout
from pdcore.errors import Exit, nearest

__all__ = ["KERNELS", "app", "main"]

Array = np.ndarray[Any, Any]

#: Of a spec, with the width g / (D var X) or, for the cosine, g; the last three have none.
KERNELS = {
    "softmax": "softmax(scale={width!r})",
    "gaussian": "gaussian(gamma={width!r})",
    "cosine": "cosine(scale={g!r})",
    "polynomial": "polynomial(degree=2,coef0=1,scale={width!r})",
    "linear": "linear",
    "relu": "relu",
    "random_features": "random_features(count=64,scale={width!r})",
}
WIDTHS = (0.1, 0.3, 1.0)
#: C times mean K(x, x), which makes them comparable between kernels and h.
BOXES = (1.0, 10.0)
EPSILON = 0.3
PEER = "SVR(kernel='rbf')"
SOURCE = (
    "Diabetes: B. Efron, T. Hastie, I. Johnstone, R. Tibshirani, Least Angle Regression, Annals of "
    "Statistics 32, 2004; as it comes with scikit-learn, in clinical units."
)
#: Whether the features are standardized, and whether the spec has bn.
INPUTS = {"as they are": (False, False), "bn": (False, True), "standardized": (True, False)}

app = command_line()


@app.command()
@reported
def main(
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", "-k", metavar="NAME", help="Of the seven; all by default."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, help="Outer folds.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="Times the outer folds are drawn.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Print cross-validated R^2 of attention kernels, with and without h and bn.

    Width and C are chosen by three inner folds of each outer fold's training
    part; every cell meets the same folds and the same grid.
    """
    try:
        import sklearn
    except ModuleNotFoundError as error:
        raise Failed(
            Exit.MISSING, f"{error.name} is not installed: pip install 'pdcore[svr,cli]'"
        ) from error
    chosen = distinct("--kernel", kernel or list(KERNELS))
    for name in chosen:
        if name not in KERNELS:
            raise typer.BadParameter(
                f"unknown kernel {name!r}; {nearest(name, KERNELS)}", param_hint="--kernel"
            )
    X, y = _load()
    rows = [(PEER, ""), *product(chosen, ("one", "sum"))]
    scores: dict[str, list[list[float]]] = {}
    with progress("nested cross-validation") as done:
        for index, (name, h) in enumerate(rows):
            title = name if not h else f"{name}+h({h})"
            scores[title] = [
                _nested(X, y, name, h, *INPUTS[label], folds, repeats)
                for label in INPUTS
                if h or label != "bn"
            ]
            means = ", ".join(f"{np.mean(cell):.3f}" for cell in scores[title])
            note(f"{title}: R^2 {means}")
            done((index + 1) / len(rows))
    result = {
        "data": SOURCE,
        "samples": len(X),
        "features": X.shape[1],
        "folds": folds,
        "repeats": repeats,
        "inputs": list(INPUTS),
        "scores": scores,
        "differences": _differences(scores, chosen),
        "versions": {
            "pdcore": pdcore.__version__,
            "scikit-learn": sklearn.__version__,
            "python": platform.python_version(),
        },
    }
    if as_json:
        emit(result)
    else:
        _show(result)


def _load() -> tuple[Array, Array]:
    from sklearn.datasets import load_diabetes

    X, y = load_diabetes(return_X_y=True, scaled=False)
    return np.asarray(X), np.asarray(y)


def _nested(
    X: Array, y: Array, name: str, h: str, standardized: bool, bn: bool, folds: int, repeats: int
) -> list[float]:
    """Return R^2 on each outer fold."""
    from sklearn.model_selection import KFold

    outer = []
    for repeat in range(repeats):
        for fit, test in KFold(folds, shuffle=True, random_state=repeat).split(X):
            total: dict[tuple[float, float], float] = {}
            for part, held in KFold(3, shuffle=True, random_state=repeat).split(fit):
                parts = X[fit[part]], y[fit[part]], X[fit[held]], y[fit[held]]
                for g in WIDTHS:
                    make = _maker(name, h, g, bn, standardized, parts[0])
                    for box in BOXES:
                        score = _score(make(box), standardized, *parts)
                        total[g, box] = total.get((g, box), 0.0) + score
                    if name in KERNELS and "{" not in KERNELS[name]:
                        break  # no width to choose
            g, box = max(total, key=lambda pair: total[pair])
            make = _maker(name, h, g, bn, standardized, X[fit])
            outer.append(_score(make(box), standardized, X[fit], y[fit], X[test], y[test]))
    return outer


def _maker(
    name: str, h: str, g: float, bn: bool, standardized: bool, X: Array
) -> Callable[[float], Any]:
    """Return a function from the relative C to a regressor, for these training samples."""
    from sklearn.svm import SVR

    from pdcore_adapters.sklearn import SVRAttentionRegressor

    if standardized or bn:
        X = (X - X.mean(axis=0)) / X.std(axis=0)
    width = float(g / (X.shape[1] * X.var()))
    if name == PEER:
        return lambda box: SVR(gamma=width, C=box, epsilon=EPSILON)
    spec = KERNELS[name].format(g=g, width=width) + f"+h({h})"
    # bn standardizes by the same numbers, so K and its unit are those of standardized features.
    unit = SVRAttentionRegressor(spec).fit(X, np.zeros(len(X))).C_
    full = spec + ("+bn" if bn else "")
    return lambda box: SVRAttentionRegressor(full, C=box * unit, epsilon=EPSILON, solver="sklearn")


def _score(
    model: Any, standardized: bool, X: Array, y: Array, X_test: Array, y_test: Array
) -> float:
    """Fit to standardized targets, and return R^2 on the test part."""
    if standardized:
        mean, deviation = X.mean(axis=0), X.std(axis=0)
        X, X_test = (X - mean) / deviation, (X_test - mean) / deviation
    mean, deviation = y.mean(), y.std()
    with warnings.catch_warnings():
        # A candidate that is not solved to the end has the score that it has.
        warnings.simplefilter("ignore", RuntimeWarning)
        model.fit(X, (y - mean) / deviation)
    return float(model.score(X_test, (y_test - mean) / deviation))


def _differences(scores: dict[str, list[list[float]]], chosen: list[str]) -> dict[str, Any]:
    """Return the changes by h and by bn over the folds: mean and deviation, for bn the largest."""
    changes = {}
    for name in chosen:
        one, total = (np.array(scores[f"{name}+h({h})"]) for h in ("one", "sum"))
        pairs = {
            "h(sum) - h(one)": total[2] - one[2],
            "bn - as they are, h(one)": one[1] - one[0],
            "bn - as they are, h(sum)": total[1] - total[0],
        }
        changes[name] = {k: [float(d.mean()), float(d.std(ddof=1))] for k, d in pairs.items()}
        from_standardized = np.abs(np.stack([one[1] - one[2], total[1] - total[2]]))
        changes[name]["bn - standardized, largest"] = float(from_standardized.max())
    return changes


def _show(result: dict[str, Any]) -> None:
    counted = f"{result['samples']} samples, {result['features']} features"
    about = f"{result['folds']} folds drawn {result['repeats']} x"
    table = Table(title=f"Diabetes, {counted}: R^2, {about}", title_justify="left")
    table.add_column("kernel", overflow="fold")
    for label in INPUTS:
        table.add_column(label, justify="right")
    for title, cells in result["scores"].items():
        shown = [f"{np.mean(c):.3f} ± {np.std(c, ddof=1):.3f}" for c in cells]
        if len(shown) == 2:  # the peer has no bn
            shown.insert(1, "")
        table.add_row(escape(title), *shown)
    stdout().print(table)
    changes = Table(title="Paired differences of R^2 over the folds", title_justify="left")
    kinds = list(next(iter(result["differences"].values())))
    changes.add_column("kernel", overflow="fold")
    for kind in kinds:
        changes.add_column(kind, justify="right")
    for name, pairs in result["differences"].items():
        shown = [f"{mean:+.3f} ± {deviation:.3f}" for mean, deviation in list(pairs.values())[:-1]]
        changes.add_row(name, *shown, f"{pairs[kinds[-1]]:.1e}")
    stdout().print(changes)
    stdout().print("h is compared on standardized features.")
    stdout().print(
        escape(
            f"epsilon {EPSILON} of standardized targets; width from {WIDTHS} and C from {BOXES}, "
            "relative, by three inner folds."
        )
    )
    stdout().print(escape(result["data"]))


if __name__ == "__main__":
    app(prog_name="compare_regressors.py")
