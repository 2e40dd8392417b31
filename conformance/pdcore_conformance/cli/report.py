"""The command ``pdcore report``: records of conformance as a summary, a page, or a comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from pdcore.cli.options import AsJson
from pdcore.cli.reporting import Failed, emit, note, reported, stdout
from pdcore.errors import Exit

from .extra import extra_needed

__all__ = ["report"]


def _print_schema(wanted: bool) -> None:
    """Print the JSON Schema of a record and exit, where the option asks for it."""
    if wanted:
        from ..record import json_schema

        print(json.dumps(json_schema(), indent=2))
        raise typer.Exit


@reported
def report(
    records: Annotated[
        list[Path],
        typer.Argument(metavar="RECORD...", help="Records, as `pdcore conform --report` writes."),
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write one self-contained page of all of them."),
    ] = None,
    merged: Annotated[
        Path | None,
        typer.Option("--merge", metavar="FILE", help="Write one record of all of them."),
    ] = None,
    compact: Annotated[
        bool,
        typer.Option(
            "--compact", help="Let --merge write the small form that a repository can keep."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Replace any FILE, not just a page or a record.")
    ] = False,
    as_json: AsJson = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema",
            help="Print the JSON Schema of a record, and exit.",
            is_eager=True,
            callback=_print_schema,
        ),
    ] = False,
) -> None:
    """Sum up a record, or compare two, or lay records out as a page.

    One RECORD, more than two, or any with --html or --merge: prints how each backend fared, what
    failed, and how to run that alone. Of several runs of one backend the latest counts.

    Two: says what got worse from the first to the second, what got better, what is new and what
    is gone. Exits with 7 where numerics got worse (a case fails, is missing or is refused that
    passed before, an error grew, a capability was withdrawn), else with 8 where speed or memory
    did, else with 0.
    """
    from ..record.writing import load, merge, save

    if html is None and merged is None and len(records) == 2:
        _compare(records[0], records[1], as_json)
        return
    from ..report import summary, write_page

    record = merge([load(path) for path in records], say=note)
    if merged is not None:
        save(merged, record["runs"], replace=force, compact=compact)
    if html is not None:
        with extra_needed("jinja2", "markupsafe"):
            write_page(html, record, force=force)
    if as_json:
        paths = {"html": html and str(html), "merged": merged and str(merged)}
        emit(summary.as_dict(record) | paths)
        return
    console = stdout()
    summary.show(record, console)
    for path in (merged, html):
        if path is not None:
            console.print(f"wrote {escape(str(path))}", soft_wrap=True)


def _compare(before: Path, after: Path, as_json: bool) -> None:
    from ..record.writing import load
    from ..report import summary
    from ..report.comparison import as_dict, compare

    comparison = compare(load(before), load(after))
    if as_json:
        emit({"before": str(before), "after": str(after)} | as_dict(comparison))
    else:
        summary.show_comparison(comparison, (str(before), str(after)), stdout())
    code = comparison.exit_code
    if code is Exit.NUMERICS:
        raise Failed(code, "numerics got worse")
    if code is Exit.UNMET:
        raise Failed(code, "speed or memory got worse")
