"""The certificate of a solution: objectives, duality gap, and residuals of optimality."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .checks import check_number

if TYPE_CHECKING:
    from .expansion import HeadFit, SupportVectorExpansion

__all__ = ["Certificate", "certificate", "missed"]

#: The tolerances of the relative duality gap and of the other residuals.
GAP, RESIDUAL = 1e-8, 1e-6

Array = np.ndarray[Any, Any]

_COLUMNS = (
    ("primal", "primal"),
    ("dual", "dual"),
    ("gap", "gap"),
    ("stationarity", "stationarity"),
    ("complementarity", "slackness"),
    ("box", "box"),
    ("balance", "sum"),
    ("inside", "inside %"),
    ("support", "support %"),
)


@dataclass(frozen=True, eq=False)
class Certificate:
    """Measures of how far a solution is from optimal, each (H, Dv); prints as a table.

    Below, r = y - f at the points, in units of the largest distance of a target from the mean of
    the targets.

    Attributes
    ----------
    primal : array
        1/2 |w|^2 + C sum max(0, |r| - epsilon).
    dual : array
        -1/2 beta.K beta + y.beta - epsilon |beta|_1, beta = a - a*.
    gap : array
        (primal - dual) / max(|primal|, |dual|); 0 where no point is a support vector and no error
        exceeds epsilon by more than rounding, 4 eps max |y| with the eps of float64.
    stationarity : array
        The largest violation of the condition of a multiplier on r: |r| <= epsilon for a
        multiplier 0, r = epsilon or -epsilon inside the box, and r >= epsilon or r <= -epsilon for
        a multiplier a or a* equal to C.
    complementarity : array
        The largest of a (epsilon + xi - r), a* (epsilon + xi* + r), (C - a) xi and (C - a*) xi*,
        over C.
    box : array
        The largest distance of a multiplier from the range 0 to C, over C.
    balance : array
        |sum beta| over sum |beta|.
    inside, support : array
        The shares of points for which the larger of a and a* is strictly between 0 and C, and
        above 0.
    condition : array (H,)
        The condition number of each Gram matrix; inf where it exceeds what float64 resolves.
    gap_tolerance, residual_tolerance : float
        The tolerances of `ok`.
    """

    primal: Array
    dual: Array
    gap: Array
    stationarity: Array
    complementarity: Array
    box: Array
    balance: Array
    inside: Array
    support: Array
    condition: Array
    gap_tolerance: float
    residual_tolerance: float

    @property
    def residual(self) -> float:
        """The largest residual of the optimality conditions."""
        parts = (self.stationarity, self.complementarity, self.box, self.balance)
        return max(float(np.max(x)) for x in parts)

    @property
    def ok(self) -> bool:
        """Whether gap and residuals are within the tolerances; NaN is not."""
        gap = float(np.max(np.abs(self.gap)))
        return gap <= self.gap_tolerance and self.residual <= self.residual_tolerance

    def to_dict(self) -> dict[str, Any]:
        """Return the certificate as plain values, with arrays as lists."""
        columns = {name: getattr(self, name).tolist() for name, _ in _COLUMNS}
        return columns | {
            "condition": self.condition.tolist(),
            "residual": self.residual,
            "ok": self.ok,
            "gap_tolerance": self.gap_tolerance,
            "residual_tolerance": self.residual_tolerance,
        }

    def __str__(self) -> str:
        header, rows = self._table()
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True))
            for row in (header, *rows)
        ]
        return "\n".join([*lines, self._verdict()])

    def __rich__(self) -> Any:
        from rich.table import Table

        header, rows = self._table()
        table = Table(caption=self._verdict(), caption_justify="left")
        for name in header:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*row)
        return table

    def _table(self) -> tuple[list[str], list[list[str]]]:
        header = ["head", "output", *(title for _, title in _COLUMNS), "condition"]
        rows = []
        for head, output in np.ndindex(self.primal.shape):
            cells = [getattr(self, name)[head, output] for name, _ in _COLUMNS]
            numbers = [f"{x:.6g}" for x in cells[:2]] + [f"{x:.1e}" for x in cells[2:7]]
            shares = [f"{100 * x:.0f}" for x in cells[7:]]
            condition = self.condition[head]
            shown = f"{condition:.1e}" if np.isfinite(condition) else "unresolved"
            rows.append([str(head), str(output), *numbers, *shares, shown])
        return header, rows

    def _verdict(self) -> str:
        return (
            f"{'ok' if self.ok else 'NOT ok'}: gap {np.max(np.abs(self.gap)):.1e} "
            f"(tolerance {self.gap_tolerance:.0e}), residuals {self.residual:.1e} "
            f"(tolerance {self.residual_tolerance:.0e})"
        )


def missed(heads: Sequence[HeadFit], C: float, epsilon: float) -> list[str]:
    """Describe the outputs whose gap or residual exceeds the default tolerances; NaN does."""
    found = []
    for index, head in enumerate(heads):
        parts = _head(head, C, epsilon)
        names = ("stationarity", "complementarity", "box", "balance")
        residual = np.max([parts[name] for name in names], axis=0)
        for output, (gap, rest) in enumerate(zip(np.abs(parts["gap"]), residual, strict=True)):
            if not (gap <= GAP and rest <= RESIDUAL):
                found.append(f"head {index}, output {output}: gap {gap:.1e}, residual {rest:.1e}")
    return found


def certificate(
    expansion: SupportVectorExpansion, *, gap: float = GAP, residual: float = RESIDUAL
) -> Certificate:
    """Measure how far a solution is from optimal, by its multipliers and b alone.

    Parameters
    ----------
    expansion : SupportVectorExpansion
    gap : float
        The tolerance of the relative duality gap.
    residual : float
        The tolerance of the other residuals.

    Returns
    -------
    Certificate

    Raises
    ------
    TypeError, ValueError
        If `expansion` is no expansion, or a tolerance is not a finite number >= 0.
    """
    # Here, since `expansion` imports this module.
    from .expansion import SupportVectorExpansion

    if not isinstance(expansion, SupportVectorExpansion):
        raise TypeError(
            f"expansion: got {type(expansion).__name__}, expected what pdcore.svr.fit gives"
        )
    check_number("gap", gap, zero=True)
    check_number("residual", residual, zero=True)
    C, epsilon = expansion.C, expansion.epsilon
    heads = [_head(head, C, epsilon) for head in expansion.heads]
    stacked = {name: np.stack([head[name] for head in heads]) for name in heads[0]}
    condition = np.array([head.kernel.condition for head in expansion.heads])
    return Certificate(
        **stacked, condition=condition, gap_tolerance=gap, residual_tolerance=residual
    )


@np.errstate(all="ignore")  # what overflows or is no number is not optimal
def _head(head: HeadFit, C: float, epsilon: float) -> dict[str, Array]:
    """Compute the certificate of one head; each array is (Dv,)."""
    up, low, y = head.upper, head.lower, head.targets
    beta = up - low
    inner = head.kernel.gram @ beta
    r = y - inner - head.intercept
    slack_up, slack_low = np.maximum(0.0, r - epsilon), np.maximum(0.0, -r - epsilon)
    norm = np.sum(beta * inner, axis=0)
    primal = 0.5 * norm + C * np.sum(slack_up + slack_low, axis=0)
    dual = -0.5 * norm + np.sum(y * beta - epsilon * (up + low), axis=0)
    unit = np.max(np.abs(y - np.mean(y, axis=0)), axis=0)
    unit = np.where(unit > 0, unit, 1.0)
    size, total = np.maximum(up, low), np.sum(up + low, axis=0)
    products = [
        up * (epsilon + slack_up - r),
        low * (epsilon + slack_low + r),
        (C - up) * slack_up,
        (C - low) * slack_low,
    ]
    larger = np.maximum(np.abs(primal), np.abs(dual))
    ulps = 4.0 * np.finfo(np.float64).eps * np.max(np.abs(y), axis=0)
    rounding = (total == 0) & np.all(slack_up + slack_low <= ulps, axis=0)
    return {
        "primal": primal,
        "dual": dual,
        "gap": np.where(rounding, 0.0, primal - dual) / np.where(rounding, 1.0, larger),
        "stationarity": _violation(beta, r, C, epsilon) / unit,
        "complementarity": np.max(np.abs(products), axis=(0, 1)) / (C * unit),
        "box": np.max(np.maximum(0.0, [-up, -low, up - C, low - C]), axis=(0, 1)) / C,
        "balance": np.abs(np.sum(beta, axis=0)) / np.where(total > 0, total, 1.0),
        "inside": np.mean((size > 0) & (size < C), axis=0),
        "support": np.mean(size > 0, axis=0),
    }


def _violation(beta: Array, r: Array, C: float, epsilon: float) -> Array:
    """Compute the largest violation of stationarity of each output, see `Certificate`."""
    outside = np.maximum(0.0, np.abs(r) - epsilon)
    along = np.sign(beta) * r
    violation = np.where(beta == 0, outside, np.abs(along - epsilon))
    violation = np.where(np.abs(beta) >= C, np.maximum(0.0, epsilon - along), violation)
    return np.asarray(np.max(violation, axis=0))
