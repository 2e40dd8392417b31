"""The contents of a record's page, in the order of the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from pdcore.backend import FEATURES

from ..record.writing import OUTCOMES, Case, Outcome, Record, Run, run_alone, target
from .heat import largest, step
from .wording import cut, number, over_budget, seconds

__all__ = ["BAD", "Cell", "Conclusion", "Failure", "conclusion", "failures"]

BAD: frozenset[Outcome] = frozenset({"failed", "error"})

DTYPES = ("float16", "bfloat16", "float32", "float64")

#: The most failures, cases and characters of a message on the page. The record has all.
MOST_FAILURES, MOST_CASES, MOST_MESSAGE = 200, 5000, 2000


@dataclass(frozen=True)
class Cell:
    """One entry of a table: its text, and the class that gives it its colour."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Conclusion:
    """The outcome of the whole record in one sentence."""

    good: bool
    text: str


@dataclass(frozen=True)
class Failure:
    """A case that failed or broke, and the command that runs it alone."""

    where: str
    id: str
    outcome: str
    level: str
    ratio: str
    message: str
    command: str
    outputs: tuple[tuple[str, Cell, str, str], ...]
    seconds: str


@dataclass(frozen=True)
class Row:
    """A row of a table, with its heading."""

    name: str
    cells: tuple[Cell, ...]
    note: str = ""
    more: tuple[Row, ...] = ()


@dataclass
class Group:
    """The cases of one group, a line each, with a cell for each run."""

    name: str
    rows: list[Row] = field(default_factory=list)
    left_out: int = 0


def conclusion(record: Record) -> Conclusion:
    """Return the outcome of a record in one sentence."""
    runs = [run for run in record["runs"] if run["available"]]
    ran = sum(sum(run["counts"].values()) for run in runs)
    bad = {target(run): sum(run["counts"][o] for o in BAD) for run in runs}
    failing = {name: count for name, count in bad.items() if count}
    red = [target(run) for run in runs if run["speed"] and run["speed"]["red"]]
    missing = len(record["runs"]) - len(runs)
    if failing:
        listed = ", ".join(f"{cut(name, 60)} {count:,}" for name, count in failing.items())
        text = f"{sum(failing.values()):,} of {ran:,} cases failed: {listed}"
    elif ran:
        text = f"None of {ran:,} cases failed, on {_count(len(runs), 'backend')}"
    else:
        text = "No case ran"
    if red:
        text += f"; numbers over their budget at full size: {', '.join(red)}"
    if missing:
        text += f"; {_count(missing, 'backend')} not available"
    return Conclusion(bool(ran) and not failing and not red, f"{text}.")


def _count(many: int, what: str) -> str:
    return f"{many:,} {what}" if many == 1 else f"{many:,} {what}s"


def failures(record: Record) -> list[Failure]:
    """Return the cases that failed, by backend, the largest error first."""
    failed = []
    for run in record["runs"]:
        cases = [case for case in run["cases"] if case["outcome"] in BAD]
        cases.sort(key=lambda case: (-(largest([case["ratio"]]) or 0.0), case["id"]))
        failed += [_failure(run, case) for case in cases]
    return failed


def _failure(run: Run, case: Case) -> Failure:
    outputs = tuple(
        (
            name,
            Cell(over_budget(v["ratio"]), f"h{step(v['ratio'])}"),
            number(v["error"], 2),
            number(v["budget"], 2),
        )
        for name, v in case["verdicts"].items()
    )
    return Failure(
        target(run),
        case["id"],
        case["outcome"],
        case["level"],
        over_budget(case["ratio"]),
        case["message"] or "no message",
        run_alone(run, case),
        outputs,
        seconds(case["seconds"]),
    )


def with_message(record: Record, outcome: Outcome) -> list[tuple[str, str, str]]:
    """Return the backend, id and message of the cases with an outcome."""
    return [
        (target(run), case["id"], case["message"] or "")
        for run in record["runs"]
        for case in run["cases"]
        if case["outcome"] == outcome
    ]


def matrix(record: Record) -> list[Row]:
    """Return what each backend declares and what its cases showed, feature by feature."""
    seen = {f for run in record["runs"] for f in run["capabilities"]}
    names = [f for f in FEATURES if f in seen] + sorted(seen - set(FEATURES))
    tallies = [_tally(run) for run in record["runs"]]
    return [
        Row(
            name,
            tuple(
                _support(run, name, tally[name])
                for run, tally in zip(record["runs"], tallies, strict=True)
            ),
            FEATURES.get(name, ""),
        )
        for name in names
    ]


def _tally(run: Run) -> defaultdict[str, dict[Outcome, int]]:
    counts: defaultdict[str, dict[Outcome, int]] = defaultdict(lambda: dict.fromkeys(OUTCOMES, 0))
    for case in run["cases"]:
        for feature in case["features"]:
            counts[feature][case["outcome"]] += 1
    return counts


def _support(run: Run, feature: str, counts: dict[Outcome, int]) -> Cell:
    if not run["available"]:
        return Cell("not there", "off")
    declared = run["capabilities"].get(feature)
    bad, known, passed = (
        counts["failed"] + counts["error"],
        counts["known failure"],
        counts["passed"],
    )
    ran = bad + known + passed
    word = {
        None: "not stated",
        "full": "",
        "unsupported": "unsupported",
        "not_implemented": "not implemented",
    }[declared]
    if bad:
        return Cell(f"✗ {bad:,} of {ran:,} {word}".rstrip(), "bad")
    if declared != "full":
        return Cell(f"{word} ✓" if counts["refusal verified"] else word, "off")
    if known:
        return Cell(f"! {known:,} of {ran:,}", "warn")
    return Cell(f"✓ {passed:,}", "good") if passed else Cell("untested", "none")


def heat_map(record: Record) -> list[Row]:
    """Return the largest error over budget of each group, with a row for each dtype below."""
    ratios: dict[str, dict[str, dict[int, list[float | None]]]] = {}
    for index, run in enumerate(record["runs"]):
        for case in run["cases"]:
            group = ratios.setdefault(case["group"], {})
            dtypes = [d for d in DTYPES if d in case["features"]]
            for name in ("", *(dtypes or ["no dtype"])):
                group.setdefault(name, {}).setdefault(index, []).append(case["ratio"])
    runs = range(len(record["runs"]))

    def row(name: str, by_run: dict[int, list[float | None]]) -> Row:
        return Row(name, tuple(_heat(largest(by_run.get(index, []))) for index in runs))

    rows = []
    for title in sorted(ratios):
        by_dtype = ratios[title]
        more = [row(d, by_dtype[d]) for d in (*DTYPES, "no dtype") if d in by_dtype]
        whole = row(title, by_dtype[""])
        if any(cell.text for cell in whole.cells):
            kept = tuple(r for r in more if any(cell.text for cell in r.cells))
            rows.append(Row(title, whole.cells, more=kept))
    return rows


def _heat(ratio: float | None) -> Cell:
    return Cell("") if ratio is None else Cell(over_budget(ratio), f"h{step(ratio)}")


_WORDS: dict[Outcome, Cell] = {
    "passed": Cell("✓", "good"),
    "failed": Cell("✗ failed", "bad"),
    "error": Cell("✗ error", "bad"),
    "refusal verified": Cell("refuses ✓", "off"),
    "not claimed": Cell("not claimed", "none"),
    "known failure": Cell("! known", "warn"),
}


def _outcome(case: Case) -> Cell:
    word, ratio = _WORDS[case["outcome"]], case["ratio"]
    if case["outcome"] in ("passed", "failed") and ratio is not None:
        # A case that failed for another reason than its error keeps the word.
        if case["outcome"] == "passed" or ratio > 1:
            return _heat(ratio)
        return Cell(f"{word.text}, {over_budget(ratio)}", word.kind)
    return word


def all_cases(record: Record) -> list[Group]:
    """Return the cases of each group; of more than `MOST_CASES`, those with the largest errors."""
    by_id: dict[str, dict[int, Case]] = {}
    for index, run in enumerate(record["runs"]):
        for case in run["cases"]:
            by_id.setdefault(case["id"], {})[index] = case
    shown = set(by_id)
    if len(by_id) > MOST_CASES:
        shown = set(sorted(by_id, key=lambda name: _weight(by_id[name].values()))[-MOST_CASES:])
    groups: dict[str, Group] = {}
    for name in sorted(by_id):
        by_run = by_id[name]
        first = next(iter(by_run.values()))
        group = groups.setdefault(first["group"], Group(first["group"]))
        if name not in shown:
            group.left_out += 1
            continue
        cells = tuple(
            _outcome(by_run[index]) if index in by_run else Cell("")
            for index in range(len(record["runs"]))
        )
        short = name.removeprefix(f"{first['group']}::")
        group.rows.append(Row(short, cells, first["level"]))
    return [groups[name] for name in sorted(groups)]


def _weight(cases: Iterable[Case]) -> tuple[bool, float]:
    listed = list(cases)
    bad = any(case["outcome"] in BAD or case["outcome"] == "known failure" for case in listed)
    return bad, largest(case["ratio"] for case in listed) or 0.0


def environment(record: Record) -> list[tuple[str, list[str]]]:
    """Return the lines about machine and versions: a name, and the text of each run."""
    runs = record["runs"]
    lines: list[tuple[str, list[str]]] = []

    def add(name: str, texts: Sequence[str]) -> None:
        if any(texts):
            lines.append((name, list(texts)))

    add("began", [run["created"].replace("T", " ").replace("Z", " UTC") for run in runs])
    add("commit", [commit(run) for run in runs])
    add("asked for", [asked(run) for run in runs])
    add("suite took", [seconds(run["seconds"]) for run in runs])
    add("speed took", [seconds(run["speed"]["seconds"]) if run["speed"] else "" for run in runs])
    add("combinations", [combinations(run) for run in runs])
    add("process ended", [end_of(run) for run in runs])
    add("precision", [run["precision"] for run in runs])
    where = [run["environment"] for run in runs]
    add("processor", [e["cpu"] for e in where])
    add("cores", [f"{e['cores']:,}" for e in where])
    add("threads", ["not limited" if e["threads"] is None else f"{e['threads']:,}" for e in where])
    add("BLAS", [e["blas"] or "" for e in where])
    add("load", [number(e["load"]) for e in where])
    add("memory", ["" if e["memory_gib"] is None else f"{e['memory_gib']:.1f} GiB" for e in where])
    add("platform", [e["platform"] for e in where])
    gpus = [e["gpu"] for e in where]
    add("GPU", [g["name"] if g else "" for g in gpus])
    add("GPU memory", [f"{g['memory_gib']:.1f} GiB" if g else "" for g in gpus])
    add("driver", [(g["driver"] or "") if g else "" for g in gpus])
    add("compute capability", [(g["capability"] or "") if g else "" for g in gpus])
    names = list(dict.fromkeys(name for run in runs for name in run["versions"]))
    names_above = {name for name, _ in lines}
    for name in names:
        # A backend may report a version under the name of another line.
        label = f"{name} (the backend's own)" if name in names_above else name
        add(label, [run["versions"].get(name, "") for run in runs])
    return lines


def commit(run: Run) -> str:
    if run["commit"] is None:
        return "not from a checkout"
    return run["commit"][:10] + (" with changes" if run["dirty"] else "")


def combinations(run: Run) -> str:
    """Return how many combinations of the axes' values passed; else nothing."""
    covered = run.get("coverage")
    if covered is None:
        return ""
    (pairs, all_pairs), (triples, all_triples) = covered["pairs"], covered["triples"]
    return (
        f"{pairs} of {all_pairs} pairs of values and {triples} of {all_triples} triples of axes "
        "that meet in one kernel"
    )


def end_of(run: Run) -> str:
    """Return how and where the process of a run ended before its time; else nothing."""
    end = run.get("ended")
    if end is None:
        return ""
    where = f"in {end['case']}" if end["case"] else "outside of a case"
    return f"{end['how']}, {where}"


def asked(run: Run) -> str:
    if run["selection"] is not None:
        return f"{_count(len(run['selection']), 'selected case')}, {run['grid']} grid"
    return f"level {run['level']}, {run['grid']} grid"
