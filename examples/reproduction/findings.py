"""What the cells come to: means, ratios with intervals, and the claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pdcore_conformance.bench.timing import interval

from .data import absent
from .protocol import BASELINE, MEASURES, Cell
from .verdict import Estimate, combined, judge, sentence, together

__all__ = ["CLAIMS", "findings"]

#: The parts of the sentence that is judged, as the paper's abstract joins them.
CLAIMS = {
    "accuracy": "raises accuracy",
    "redundancy": "lowers head redundancy",
    "cost": "costs less",
}
LEVEL = 0.95


def findings(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Work out everything that tables, pictures and the page show.

    Parameters
    ----------
    record : mapping
        As `reproduction.results.Results` keeps it, complete.
    names : sequence of str
        The data sets that count.

    Returns
    -------
    dict
        ``accuracy``, ``redundancy``, ``cost`` (rows), ``claims``, ``sentences``, ``absent``.
    """
    specs = record["protocol"]["specs"]
    # One claim is made of every spec, and all of its intervals are to hold together.
    level = 1.0 - (1.0 - LEVEL) / (len(specs) - 1)
    judged = _Judged(record, names, level)
    claims = [
        claim
        for spec in specs
        if spec != BASELINE
        for claim in (judged.accuracy(spec), judged.redundancy(spec), judged.cost(spec))
    ]
    return {
        "level": level,
        "accuracy": judged.accuracies(),
        "redundancy": judged.redundancies(),
        "cost": judged.costs(),
        "claims": claims,
        "sentences": [
            {"spec": spec, "verdict": sentence([c["verdict"] for c in claims if c["spec"] == spec])}
            for spec in specs
            if spec != BASELINE
        ],
        "absent": absent(names),
    }


class _Judged:
    """The cells of a record, with the questions that are put to them."""

    def __init__(self, record: Mapping[str, Any], names: Sequence[str], level: float) -> None:
        self.cells: Mapping[str, Any] = record["cells"]
        self.protocol: Mapping[str, Any] = record["protocol"]
        self.names, self.level = names, level
        self.specs: list[str] = self.protocol["specs"]

    # --- figures ------------------------------------------------------------------------------

    def runs(self, data: str, spec: str) -> list[dict[str, Any]]:
        """Give the trainings of a spec, seed by seed."""
        return [self.cells[Cell("train", spec, data, seed).name] for seed in self.protocol["seeds"]]

    def differences(self, data: str, spec: str) -> list[float]:
        """Give the test accuracies less the baseline's, seed by seed."""
        pairs = zip(self.runs(data, spec), self.runs(data, BASELINE), strict=True)
        return [own["test_accuracy"] - other["test_accuracy"] for own, other in pairs]

    def logarithms(self, data: str, spec: str, measure: str, when: str) -> list[float]:
        """Give log ratios to the baseline of a distance, its mean over layers, seed by seed."""
        pairs = zip(self.runs(data, spec), self.runs(data, BASELINE), strict=True)
        return [
            math.log(statistics.fmean(own[when][measure]) / statistics.fmean(other[when][measure]))
            for own, other in pairs
        ]

    def memory(self, spec: str, length: int, dim: int) -> list[float] | None:
        """Give the peaks of every process in MiB; None where the system does not tell."""
        found = [
            self.cells[Cell("memory", spec, "", repeat, length, dim).name]["mib"]
            for repeat in range(self.protocol["repeats"])
        ]
        return None if None in found else found

    def seconds(self, length: int, dim: int) -> dict[str, list[float]]:
        """Give the times of a step, by spec."""
        found: dict[str, list[float]] = self.cells[Cell("time", length=length, dim=dim).name][
            "seconds"
        ]
        return found

    def operations(self, spec: str, length: int, dim: int) -> dict[str, int]:
        """Give the operations of a sequence."""
        found: dict[str, int] = self.cells[Cell("flops", spec, length=length, dim=dim).name]
        return found

    # --- rows ---------------------------------------------------------------------------------

    def accuracies(self) -> list[dict[str, Any]]:
        rows = []
        for data in self.names:
            for spec in self.specs:
                runs = self.runs(data, spec)
                each = [run["test_accuracy"] for run in runs]
                found = None
                if spec != BASELINE:
                    found = combined([self.differences(data, spec)], [1.0], self.level)
                rows.append(
                    {
                        "data": data,
                        "spec": spec,
                        "mean": statistics.fmean(each),
                        "deviation": statistics.stdev(each),
                        "each": each,
                        "validation": statistics.fmean(run["validation_accuracy"] for run in runs),
                        "epochs": [run["epoch"] for run in runs],
                        "seconds": sum(run["seconds"] for run in runs),
                        "difference": found and list(found),
                    }
                )
        return rows

    def redundancies(self) -> list[dict[str, Any]]:
        rows = []
        for data in self.names:
            for spec in self.specs:
                runs = self.runs(data, spec)
                row: dict[str, Any] = {"data": data, "spec": spec}
                for when in ("trained", "untrained"):
                    row[when] = {
                        measure: _layers(run[when][measure] for run in runs) for measure in MEASURES
                    }
                rows.append(row)
        return rows

    def costs(self) -> list[dict[str, Any]]:
        rows = []
        for length, dim in self.protocol["sizes"]:
            taken = self.seconds(length, dim)
            base = self.operations(BASELINE, length, dim)
            for spec in self.specs:
                memory = self.memory(spec, length, dim)
                counted = self.operations(spec, length, dim)
                rows.append(
                    {
                        "length": length,
                        "dim": dim,
                        "spec": spec,
                        "flops": counted,
                        "attention_ratio": counted["attention"] / base["attention"],
                        "model_ratio": counted["model"] / base["model"],
                        "milliseconds": 1e3 * statistics.median(taken[spec]),
                        "time_ratio": list(self._time(spec, length, dim)),
                        "mib": memory and statistics.fmean(memory),
                        "memory_ratio": memory and list(self._memory(spec, length, dim)),
                    }
                )
        return rows

    def _time(self, spec: str, length: int, dim: int) -> Estimate:
        """Give the median of the ratios of neighbouring steps, with a bootstrap interval."""
        if spec == BASELINE:
            return Estimate(1.0, 1.0, 1.0)
        taken = self.seconds(length, dim)
        ratios = [own / other for own, other in zip(taken[spec], taken[BASELINE], strict=True)]
        # Of so few steps that there is no interval, all are.
        low, high = interval(ratios, self.level) or (min(ratios), max(ratios))
        return Estimate(statistics.median(ratios), low, high)

    def _memory(self, spec: str, length: int, dim: int) -> Estimate:
        own, other = (self.memory(name, length, dim) for name in (spec, BASELINE))
        if own is None or other is None or spec == BASELINE:
            return Estimate(1.0, 1.0, 1.0)
        logs = [[math.log(x) for x in group] for group in (own, other)]
        return _exp(combined(logs, [1.0, -1.0], self.level))

    # --- claims -------------------------------------------------------------------------------

    def accuracy(self, spec: str) -> dict[str, Any]:
        """Judge the mean difference over all data sets, each with the same weight."""
        groups = [self.differences(data, spec) for data in self.names]
        found = combined(groups, [1.0 / len(groups)] * len(groups), self.level)
        verdict = judge(found, 0.0, more=True)
        return _claim("accuracy", spec, [_part("test accuracy, difference", found, verdict)])

    def redundancy(self, spec: str) -> dict[str, Any]:
        """Judge the geometric mean of the ratios over all data sets, measure by measure."""
        parts = []
        for measure, what in zip(
            MEASURES, ("attention maps", "outputs", "outputs, over their norm"), strict=True
        ):
            groups = [self.logarithms(d, spec, measure, "trained") for d in self.names]
            weights = [1.0 / len(groups)] * len(groups)
            found = _exp(combined(groups, weights, self.level))
            before = [self.logarithms(d, spec, measure, "untrained") for d in self.names]
            part = _part(f"distance of heads: {what}, ratio", found, judge(found, 1.0, more=True))
            parts.append(part | {"untrained": list(_exp(combined(before, weights, self.level)))})
        return _claim("redundancy", spec, parts)

    def cost(self, spec: str) -> dict[str, Any]:
        """Judge operations, time and memory at every size."""
        parts = []
        for length, dim in self.protocol["sizes"]:
            where = f"N {length}, D {dim}"
            own, other = (self.operations(name, length, dim) for name in (spec, BASELINE))
            ratio = own["model"] / other["model"]
            found = Estimate(ratio, ratio, ratio)
            verdict = judge(found, 1.0, more=False, exact=True)
            parts.append(_part(f"operations of the model, {where}", found, verdict))
            found = self._time(spec, length, dim)
            parts.append(_part(f"time of a step, {where}", found, judge(found, 1.0, more=False)))
            if self.memory(spec, length, dim) is not None:
                found = self._memory(spec, length, dim)
                verdict = judge(found, 1.0, more=False)
                parts.append(_part(f"peak memory of a step, {where}", found, verdict))
        return _claim("cost", spec, parts)


def _claim(claim: str, spec: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    verdict = together([part["verdict"] for part in parts])
    return {"claim": claim, "spec": spec, "verdict": verdict, "parts": parts}


def _part(what: str, found: Estimate, verdict: str) -> dict[str, Any]:
    return {
        "what": what,
        "value": found.value,
        "low": found.low,
        "high": found.high,
        "verdict": verdict,
    }


def _exp(found: Estimate) -> Estimate:
    return Estimate(*map(math.exp, found))


def _layers(runs: Iterable[Sequence[float]]) -> list[float]:
    """Give the mean over seeds, layer by layer."""
    return [statistics.fmean(own) for own in zip(*runs, strict=True)]
