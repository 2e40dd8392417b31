"""A record, or the comparison of two, as text on a terminal; needs rich."""

from __future__ import annotations

from typing import Any

from rich.markup import escape
from rich.table import Table

from ..record.writing import OUTCOMES, Record, target
from .comparison import Change, Comparison
from .heat import largest
from .measured import missing_peers
from .view import BAD, Failure, conclusion, end_of, failures
from .wording import aim, cut, number, over_budget, shape, visible

__all__ = ["as_dict", "show", "show_comparison"]

#: The most failures, and changes of each kind, on a terminal; JSON and the page have more.
MOST = 25


def _plain(text: object, length: int = 200) -> str:
    """Return text of a record with escapes for what acts on a terminal or in rich's markup."""
    return escape(visible(cut(text, length)))


def show(record: Record, console: Any) -> None:
    """Print how the runs of a record ended, what failed, and which targets are not met."""
    table = Table()
    longest = max((len(target(run)) for run in record["runs"]), default=0)
    table.add_column("backend", overflow="fold", min_width=min(longest, 20))
    # Columns of zeros would leave too little width for names.
    always = ("passed", "failed")
    outcomes = [
        o for o in OUTCOMES if o in always or any(run["counts"][o] for run in record["runs"])
    ]
    for outcome in outcomes:
        table.add_column(outcome, justify="right", min_width=max(map(len, outcome.split())))
    table.add_column("error / budget", justify="right", min_width=6)
    missing = []
    for run in record["runs"]:
        if not run["available"]:
            missing.append(run)
            continue
        cells = []
        for outcome in outcomes:
            count = run["counts"][outcome]
            cells.append(f"[bold red]{count:,}" if count and outcome in BAD else f"{count:,}")
        worst = over_budget(largest(case["ratio"] for case in run["cases"]))
        table.add_row(_plain(target(run), 40), *cells, worst)
    if table.row_count:
        console.print(table)
    for run in missing:
        reason = run["reason"] or "no reason given"
        console.print(
            f"{_plain(target(run), 40)} is not available: {_plain(reason, 400)}", soft_wrap=True
        )
    for run in record["runs"]:
        if "ended" in run:
            line = f"{target(run)}: the process ended: {end_of(run)}"
            console.print(_plain(line, 400), soft_wrap=True)
    failed = failures(record)
    for failure in failed[:MOST]:
        _show_failure(failure, console)
    if len(failed) > MOST:
        console.print(f"... and {len(failed) - MOST:,} more failures: see --html or --json")
    for line in _unmet(record):
        console.print(escape(line), soft_wrap=True)
    for where, peer, reason in missing_peers(record):
        console.print(
            f"{_plain(where)}: not measured against {_plain(peer)}: {_plain(reason)}",
            soft_wrap=True,
        )
    console.print(_plain(conclusion(record).text, 1000), soft_wrap=True)


def _show_failure(failure: Failure, console: Any) -> None:
    ratio = f", {failure.ratio} x budget" if failure.ratio else ""
    console.print(
        f"[bold red]{failure.outcome}[/]{ratio}: {_plain(failure.message, 400)}", soft_wrap=True
    )
    console.print(f"    {escape(visible(failure.command))}", soft_wrap=True)


def _unmet(record: Record) -> list[str]:
    lines = []
    for run in record["runs"]:
        speed, name = run["speed"], visible(cut(target(run), 40))
        if speed is None:
            continue
        if speed["red"]:
            lines.append(f"{name}: numbers over budget at full size; no claim about its speed")
        figures = [
            (
                f"{r['spec']} {shape(r['shape'])}, {r['direction']}, against {r['peer']}",
                r["ratio"],
                aim(r["at_least"], r["at_most"]),
                r["met"],
            )
            for r in speed["ratios"]
        ]
        figures += [
            (
                f"{g['spec']}, {g['direction']}, growth",
                g["factor"],
                aim(g["at_least"], g["at_most"]),
                g["met"],
            )
            for g in speed["growth"]
        ]
        figures += [
            (
                f"{m['spec']} {shape(m['shape'])}, {m['direction']}, peak MiB ({m['way']})",
                m["mib"],
                aim(None, m["at_most"]),
                m["met"],
            )
            for m in speed["memory"]
        ]
        figures += [
            (f["name"], f["value"], aim(f["at_least"], f["at_most"]), f["met"])
            for f in speed["figures"]
        ]
        lines += [
            f"{name}: target not met: {visible(cut(what))}: {number(value)}, wanted {wanted}"
            for what, value, wanted, met in figures
            if met is False
        ]
    return lines


def as_dict(record: Record) -> dict[str, Any]:
    """Return the summary of a record as plain objects, for JSON."""
    overall = conclusion(record)
    return {
        "verdict": overall.text,
        "good": overall.good,
        "runs": [
            {
                "backend": run["backend"],
                "device": run["device"],
                "available": run["available"],
                "reason": run["reason"],
                "created": run["created"],
                "commit": run["commit"],
                "counts": run["counts"],
                "seconds": run["seconds"],
                "ended": end_of(run) or None,
                "largest_error_over_budget": largest(case["ratio"] for case in run["cases"]),
            }
            for run in record["runs"]
        ],
        "failures": [
            {
                "backend": failure.where,
                "case": failure.id,
                "outcome": failure.outcome,
                "message": failure.message,
                "command": failure.command,
            }
            for failure in failures(record)
        ],
        "targets_not_met": _unmet(record),
        "missing_peers": [
            {"backends": where, "peer": peer, "reason": reason}
            for where, peer, reason in missing_peers(record)
        ],
    }


def show_comparison(comparison: Comparison, names: tuple[str, str], console: Any) -> None:
    """Print what changed between two records, the worse first."""
    before, after = (_plain(name, 100) for name in names)
    console.print(f"before: {before}\nafter:  {after}", soft_wrap=True)
    for way, title in (("worse", "Worse"), ("better", "Better"), ("other", "Otherwise changed")):
        changes = comparison.of(way)  # type: ignore[arg-type]
        if changes:
            console.print(_changes(changes, f"{title}: {len(changes):,}"))
    for way, which in (("new", "after"), ("gone", "before")):
        changes = comparison.of(way)  # type: ignore[arg-type]
        if changes:
            listed = "; ".join(
                f"{c.kind} {_plain(c.what)} of {_plain(c.where)}" for c in changes[:5]
            )
            more = "; ..." if len(changes) > 5 else ""
            console.print(f"Only {which}: {len(changes):,}: {listed}{more}", soft_wrap=True)
    for note in comparison.notes:
        console.print(f"Note: {_plain(note, 600)}", soft_wrap=True)
    worse = comparison.of("worse")
    numerics = sum(change.numerics for change in worse)
    console.print(
        f"{comparison.compared:,} cases compared: "
        + (
            f"{numerics:,} worse in numerics, {len(worse) - numerics:,} in speed or memory."
            if worse
            else "nothing is worse."
        )
    )


def _changes(changes: list[Change], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("backend", "what happened", "to", "before", "after"):
        table.add_column(heading, overflow="fold", min_width=26 if heading == "to" else None)
    for c in changes[:MOST]:
        table.add_row(*(_plain(text) for text in (c.where, c.kind, c.what, c.before, c.after)))
    if len(changes) > MOST:
        table.add_row("...", f"{len(changes) - MOST:,} more: see --json", "", "", "")
    return table
