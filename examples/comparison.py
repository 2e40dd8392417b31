"""The common part of the training examples: options, summary, table and files."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

import pdcore
from pdcore.cli.files import OutputError, replacing
from pdcore.cli.reporting import Failed, note, stdout
from pdcore.errors import Exit

__all__ = [
    "CODES",
    "AsJson",
    "Epochs",
    "Heads",
    "Layers",
    "Patience",
    "Rate",
    "Seeds",
    "Specs",
    "Validation",
    "check_heads",
    "check_ranges",
    "command_line",
    "distinct",
    "finite",
    "make_folder",
    "naming",
    "read_seeds",
    "read_spec",
    "show",
    "summarize",
    "tell",
    "write",
]

CODES = (
    "Exit codes: 0 done; 2 usage: an option or a spec does not make sense; 3 a file cannot be "
    "read, is damaged, or does not fit; 4 pdcore does not support the spec; 6 a file exists "
    "already or cannot be written; 7 the loss is not finite; 9 a package is not installed; "
    "128 + n after signal n."
)


#: Options of both commands.
Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--spec",
        "-s",
        metavar="SPEC",
        help="An attention, such as 'bn+sh(1,1,2,2)'; may be repeated, to compare "
        "several on the same seeds and splits. softmax by default.",
    ),
]
Seeds = Annotated[str, typer.Option(metavar="LIST", help="Whole numbers, by commas.")]
Epochs = Annotated[int, typer.Option(min=1, help="At most.")]
Patience = Annotated[
    int, typer.Option(min=1, help="Stop after so many epochs without a better validation loss.")
]
Validation = Annotated[
    float, typer.Option(help="Share of each class of the training part that chooses the epoch.")
]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
Layers = Annotated[int, typer.Option(min=1, help="Layers of attention.")]
Heads = Annotated[int, typer.Option(min=1, help="Heads of a layer; must divide --width.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")
]


def command_line() -> typer.Typer:
    """Return an application that behaves as the command `pdcore` does."""
    return typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def check_ranges(*options: tuple[str, float, bool, str]) -> None:
    """Raise on the first option out of range, from (name, value, in range, expected)."""
    for name, number, in_range, expected in options:
        if not in_range:
            raise typer.BadParameter(f"got {number}, expected {expected}", param_hint=name)


def check_heads(width: int, heads: int) -> None:
    """Raise where the heads do not divide the features of a layer."""
    if width % heads:
        raise typer.BadParameter(f"{heads} heads do not divide width {width}", param_hint="--heads")


def read_spec(text: str) -> str:
    """Return the canonical form of a spec of the command line."""
    try:
        return str(pdcore.parse(text))
    except pdcore.SpecError as error:
        raise typer.BadParameter(str(error), param_hint="--spec") from error
    except pdcore.UnsupportedError as error:
        raise pdcore.UnsupportedError(f"--spec {text}: {error}") from error


def read_seeds(text: str) -> list[int]:
    """Read whole numbers, separated by commas."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) < 2**32 for word in words):
        raise typer.BadParameter(
            f"got {text!r}, expected whole numbers such as 0,1,2", param_hint="--seeds"
        )
    return [int(word) for word in words]


def distinct(option: str, values: Sequence[Any]) -> Sequence[Any]:
    """Return the values of an option; raise where one is repeated."""
    for value in values:
        if values.count(value) > 1:
            raise typer.BadParameter(f"{value} is there twice", param_hint=option)
    return values


def make_folder(out: Path) -> None:
    """Create the folder of the results."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out: {out}: cannot write there: {error.strerror}") from error


@contextmanager
def finite(title: str) -> Iterator[None]:
    """End the command where the loss of a run is no longer finite."""
    try:
        yield
    except FloatingPointError as error:
        raise Failed(Exit.NUMERICS, f"{title}: {error}; try a smaller --rate") from error


def tell(title: str, result: dict[str, Any]) -> None:
    """Print the result of a run on standard error."""
    note(
        f"{title}: epoch {result['epoch']} of {result['epochs']} chosen, validation "
        f"{result['validation_accuracy']:.1%}, test {result['test_accuracy']:.1%}, "
        f"{result['seconds']:.0f} s"
    )


@contextmanager
def naming(spec: str) -> Iterator[None]:
    """Add the option to the message of an error in a spec."""
    try:
        yield
    except pdcore.UnsupportedError as error:
        raise pdcore.UnsupportedError(f"--spec {spec}: {error}") from error
    except pdcore.NoBackendError as error:
        raise pdcore.NoBackendError(f"--spec {spec}: {error}", error.reasons) from error
    except ValueError as error:
        raise typer.BadParameter(f"{spec}: {error}", param_hint="--spec") from error


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation of the test accuracy by spec, in the order of the runs.

    The deviation is that of a sample, over the seeds; None for a single seed.
    """
    rows = []
    for spec in dict.fromkeys(run["spec"] for run in runs):
        of_spec = [run for run in runs if run["spec"] == spec]
        accuracies = [run["test_accuracy"] for run in of_spec]
        rows.append(
            {
                "spec": spec,
                "seeds": [run["seed"] for run in of_spec],
                "test_accuracy": statistics.fmean(accuracies),
                "deviation": statistics.stdev(accuracies) if len(of_spec) > 1 else None,
                "validation_accuracy": statistics.fmean(
                    run["validation_accuracy"] for run in of_spec
                ),
                "epochs": [run["epoch"] for run in of_spec],
                "seconds": sum(run["seconds"] for run in of_spec),
            }
        )
    return rows


def write(result: dict[str, Any], out: Path, title: str) -> list[str]:
    """Write ``training.png`` and ``results.json``, and return their paths."""
    from training_picture import write_png

    picture, written = out / "training.png", out / "results.json"
    write_png(picture, result, title)
    with replacing(written, force=True) as stream:
        stream.write((json.dumps(result, indent=2) + "\n").encode())
    return [str(picture), str(written)]


def show(result: dict[str, Any], title: str, notes: Sequence[str]) -> None:
    """Print the table of accuracies, notes about it, and the files written."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("attention", overflow="fold")
    seeds = ", ".join(map(str, result["summary"][0]["seeds"]))
    for name in ("test %", f"seeds {seeds}", "validation %", "s"):
        table.add_column(name, justify="right")
    for row in result["summary"]:
        deviation = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
        each = [r["test_accuracy"] for r in result["runs"] if r["spec"] == row["spec"]]
        table.add_row(
            escape(row["spec"]),
            f"{100 * row['test_accuracy']:.1f}{deviation}",
            ", ".join(f"{100 * a:.1f}" for a in each),
            f"{100 * row['validation_accuracy']:.1f}",
            f"{row['seconds']:.0f}",
        )
    stdout().print(table)
    for line in notes:
        stdout().print(escape(line))
    for path in result["files"]:
        stdout().print(f"wrote {escape(path)}", soft_wrap=True)
