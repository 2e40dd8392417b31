"""The findings from the cells: means, ratios with intervals, and verdicts on the claims."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pdcore_conformance.bench.timing import interval

from . import ranking
from .data import absent
from .protocol import BASELINE, MEASURES, Cell, of_same_cost
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
    """Compute all that tables, pictures and the page show.

    Parameters
    ----------
    record : mapping
        The complete record of `reproduction.results.Results`.
    names : sequence of str
        The data sets that are included.

    Returns
    -------
    dict
        ``accuracy``, ``redundancy``, ``cost``, ``ranking`` (rows), ``ranks`` (of all together),
        ``claims``, ``sentences``, ``absent``.
    """
    specs = record["protocol"]["specs"]
    # A claim is about all specs, so their intervals must hold together (Bonferroni).
    level = 1.0 - (1.0 - LEVEL) / (len(specs) - 1)
    evaluation = _Evaluation(record, names, level)
    claims = [
        claim
        for spec in specs
        if spec != BASELINE
        for claim in (evaluation.accuracy(spec), evaluation.redundancy(spec), evaluation.cost(spec))
    ]
    return {
        "level": level,
        "accuracy": evaluation.accuracies(),
        "redundancy": evaluation.redundancies(),
        "cost": evaluation.costs(),
        **evaluation.ranked(),
        "claims": claims,
        "sentences": [
            {"spec": spec, "verdict": sentence([c["verdict"] for c in claims if c["spec"] == spec])}
            for spec in specs
            if spec != BASELINE
        ],
        "absent": absent(names),
    }


class _Evaluation:
    """Figures and claims computed from the cells of a record."""

    def __init__(self, record: Mapping[str, Any], names: Sequence[str], level: float) -> None:
        self.cells: Mapping[str, Any] = record["cells"]
        self.protocol: Mapping[str, Any] = record["protocol"]
        self.names, self.level = names, level
        self.specs: list[str] = self.protocol["specs"]

    # --- figures ------------------------------------------------------------------------------

    def runs(self, data: str, spec: str) -> list[dict[str, Any]]:
        """Return the trainings of a spec, seed by seed."""
        return [self.cells[Cell("train", spec, data, seed).name] for seed in self.protocol["seeds"]]

    def differences(self, data: str, spec: str) -> list[float]:
        """Return the test accuracies minus the baseline's, seed by seed."""
        pairs = zip(self.runs(data, spec), self.runs(data, BASELINE), strict=True)
        return [ours["test_accuracy"] - theirs["test_accuracy"] for ours, theirs in pairs]

    def logarithms(self, data: str, spec: str, measure: str, when: str) -> list[float]:
        """Return log ratios to the baseline of a distance averaged over layers, seed by seed."""
        pairs = zip(self.runs(data, spec), self.runs(data, BASELINE), strict=True)
        return [
            math.log(
                statistics.fmean(ours[when][measure]) / statistics.fmean(theirs[when][measure])
            )
            for ours, theirs in pairs
        ]

    def memory(self, spec: str, length: int, dim: int) -> list[float] | None:
        """Return the peak of every process in MiB; None where the system does not report it."""
        peaks = [
            self.cells[Cell("memory", spec, "", repeat, length, dim).name]["mib"]
            for repeat in range(self.protocol["repeats"])
        ]
        return None if None in peaks else peaks

    def seconds(self, length: int, dim: int) -> dict[str, list[float]]:
        """Return the times of a step, by spec."""
        cell = self.cells[Cell("time", length=length, dim=dim).name]
        seconds: dict[str, list[float]] = cell["seconds"]
        return seconds

    def operations(self, spec: str, length: int, dim: int) -> dict[str, int]:
        """Return the operations of a sequence."""
        counts: dict[str, int] = self.cells[Cell("flops", spec, length=length, dim=dim).name]
        return counts

    # --- rows ---------------------------------------------------------------------------------

    def accuracies(self) -> list[dict[str, Any]]:
        rows = []
        for data in self.names:
            for spec in self.specs:
                runs = self.runs(data, spec)
                each = [run["test_accuracy"] for run in runs]
                difference = None
                if spec != BASELINE:
                    difference = combined([self.differences(data, spec)], [1.0], self.level)
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
                        "difference": difference and list(difference),
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
            seconds = self.seconds(length, dim)
            base = self.operations(BASELINE, length, dim)
            for spec in dict.fromkeys(map(of_same_cost, self.specs)):
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
                        "milliseconds": 1e3 * statistics.median(seconds[spec]),
                        "time_ratio": list(self._time(spec, length, dim)),
                        "mib": memory and statistics.fmean(memory),
                        "memory_ratio": memory and list(self._memory(spec, length, dim)),
                    }
                )
        return rows

    def _time(self, spec: str, length: int, dim: int) -> Estimate:
        """Return the median of the ratios of neighbouring steps, with a bootstrap interval."""
        if spec == BASELINE:
            return Estimate(1.0, 1.0, 1.0)
        seconds = self.seconds(length, dim)
        ratios = [
            ours / theirs for ours, theirs in zip(seconds[spec], seconds[BASELINE], strict=True)
        ]
        # Too few steps have no bootstrap interval: their range takes its place.
        low, high = interval(ratios, self.level) or (min(ratios), max(ratios))
        return Estimate(statistics.median(ratios), low, high)

    def _memory(self, spec: str, length: int, dim: int) -> Estimate:
        ours, theirs = (self.memory(name, length, dim) for name in (spec, BASELINE))
        if ours is None or theirs is None or spec == BASELINE:
            return Estimate(1.0, 1.0, 1.0)
        logs = [[math.log(x) for x in group] for group in (ours, theirs)]
        return _exp(combined(logs, [1.0, -1.0], self.level))

    def ranked(self) -> dict[str, Any]:
        """Compare all attentions by their ranks over the data sets, and each with the baseline."""
        from scipy.stats import wilcoxon

        means = np.array(
            [
                [
                    statistics.fmean(run["test_accuracy"] for run in self.runs(data, spec))
                    for spec in self.specs
                ]
                for data in self.names
            ]
        )
        ranks = ranking.mean_ranks(means)
        apart = means[:, 1:] - means[:, :1]
        p = [float(wilcoxon(x, zero_method="zsplit").pvalue) if x.any() else 1.0 for x in apart.T]
        rows: list[dict[str, Any]] = [{"spec": BASELINE, "rank": float(ranks[0])}]
        for place, (spec, alone, adjusted) in enumerate(
            zip(self.specs[1:], p, ranking.holm(p), strict=True)
        ):
            groups = [self.differences(data, spec) for data in self.names]
            least = ranking.detectable(groups, LEVEL)
            rows.append(
                {
                    "spec": spec,
                    "rank": float(ranks[place + 1]),
                    "better": int((apart[:, place] > 0).sum()),
                    "worse": int((apart[:, place] < 0).sum()),
                    "difference": list(ranking.hierarchical(groups, LEVEL)),
                    "wilcoxon": alone,
                    "holm": adjusted,
                    "detectable": least if math.isfinite(least) else None,
                }
            )
        several = len(self.names) > 1 and len(self.specs) > 2
        together = {
            "sets": len(self.names),
            "friedman": ranking.friedman(means) if several else None,
            "critical": ranking.critical_difference(len(self.specs), len(self.names)),
        }
        return {"ranking": sorted(rows, key=lambda row: row["rank"]), "ranks": together}

    # --- claims -------------------------------------------------------------------------------

    def accuracy(self, spec: str) -> dict[str, Any]:
        """Judge the mean difference over all data sets, each with the same weight."""
        groups = [self.differences(data, spec) for data in self.names]
        estimate = ranking.hierarchical(groups, self.level)
        verdict = judge(estimate, 0.0, more=True)
        return _claim("accuracy", spec, [_part("test accuracy, difference", estimate, verdict)])

    def redundancy(self, spec: str) -> dict[str, Any]:
        """Judge the geometric mean of the ratios over all data sets, measure by measure."""
        parts = []
        for measure, what in zip(
            MEASURES, ("attention maps", "outputs", "outputs, over their norm"), strict=True
        ):
            groups = [self.logarithms(d, spec, measure, "trained") for d in self.names]
            estimate = _exp(ranking.hierarchical(groups, self.level))
            before = [self.logarithms(d, spec, measure, "untrained") for d in self.names]
            verdict = judge(estimate, 1.0, more=True)
            part = _part(f"distance of heads: {what}, ratio", estimate, verdict)
            untrained = _exp(ranking.hierarchical(before, self.level))
            parts.append(part | {"untrained": list(untrained)})
        return _claim("redundancy", spec, parts)

    def cost(self, spec: str) -> dict[str, Any]:
        """Judge operations, time and memory at every size."""
        parts, claimed, spec = [], spec, of_same_cost(spec)
        for length, dim in self.protocol["sizes"]:
            where = f"N {length}, D {dim}"
            ours, theirs = (self.operations(name, length, dim) for name in (spec, BASELINE))
            ratio = ours["model"] / theirs["model"]
            estimate = Estimate(ratio, ratio, ratio)
            verdict = judge(estimate, 1.0, more=False, exact=True)
            parts.append(_part(f"operations of the model, {where}", estimate, verdict))
            estimate = self._time(spec, length, dim)
            verdict = judge(estimate, 1.0, more=False)
            parts.append(_part(f"time of a step, {where}", estimate, verdict))
            if self.memory(spec, length, dim) is not None:
                estimate = self._memory(spec, length, dim)
                verdict = judge(estimate, 1.0, more=False)
                parts.append(_part(f"peak memory of a step, {where}", estimate, verdict))
        return _claim("cost", claimed, parts)


def _claim(claim: str, spec: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    verdict = together([part["verdict"] for part in parts])
    return {"claim": claim, "spec": spec, "verdict": verdict, "parts": parts}


def _part(what: str, estimate: Estimate, verdict: str) -> dict[str, Any]:
    return {
        "what": what,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "verdict": verdict,
    }


def _exp(estimate: Estimate) -> Estimate:
    return Estimate(*map(math.exp, estimate))


def _layers(runs: Iterable[Sequence[float]]) -> list[float]:
    """Return the mean over seeds, layer by layer."""
    return [statistics.fmean(layer) for layer in zip(*runs, strict=True)]
