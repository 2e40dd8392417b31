"""Train a small transformer to classify time series, with any attention that a spec describes.

    python examples/classify_time_series.py
    python examples/classify_time_series.py --spec softmax --spec bn --spec "sh(1,1,2,2)"
    python examples/classify_time_series.py --data Handwriting --spec bn

The first two take the Japanese Vowels that come with pdcore; the last takes a folder of the UEA
archive. Needs the extras ``torch`` and ``cli``.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from time_series import Pair, find_pair, packaged, pair, read_ts

import pdcore
from pdcore.cli import Exit
from pdcore.files import FileError, OutputError, replacing
from pdcore.reporting import Failed, emit, note, progress, reported, stdout

if TYPE_CHECKING:
    from series_model import Settings
    from series_training import Run

__all__ = ["app", "main", "summarize"]

_CODES = (
    "Exit codes: 0 done; 2 usage: an option or a spec does not make sense; 3 a file cannot be "
    "read, is damaged, or does not fit; 4 pdcore does not support the spec; 6 a file exists "
    "already or cannot be written; 7 the loss is not finite; 9 a package is not installed; "
    "128 + n after signal n."
)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(epilog=_CODES)
@reported
def main(
    spec: Annotated[
        list[str] | None,
        typer.Option(
            "--spec",
            "-s",
            metavar="SPEC",
            help="An attention, such as 'bn+sh(1,1,2,2)'; may be repeated, to compare "
            "several on the same seeds and splits. softmax by default.",
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Whole numbers, by commas.")] = "0,1,2",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A folder of the UEA archive: one *_TRAIN.ts, one "
            "*_TEST.ts. The Japanese Vowels of pdcore by default.",
        ),
    ] = None,
    train: Annotated[
        Path | None, typer.Option(metavar="FILE.ts", help="Instead of --data, with --test.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="FILE.ts", help="Instead of --data, with --train.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Where checkpoints, results.json and training.png go.",
        ),
    ] = Path("pdcore-training"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="Start again, over what is in --out.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="At most.")] = 150,
    patience: Annotated[
        int, typer.Option(min=1, help="Stop after so many epochs without a better validation loss.")
    ] = 30,
    validation: Annotated[
        float, typer.Option(help="Share of each class of the training part that chooses the epoch.")
    ] = 0.2,
    batch: Annotated[int, typer.Option(min=1, help="Series of one step.")] = 32,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-3,
    dropout: Annotated[float, typer.Option(help="Of features, outside attention.")] = 0.1,
    noise: Annotated[
        float, typer.Option(help="Added in training, in standard deviations of a channel.")
    ] = 0.3,
    width: Annotated[int, typer.Option(min=1, help="Features of a step.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers of attention.")] = 2,
    heads: Annotated[int, typer.Option(min=1, help="Heads of a layer; must divide --width.")] = 4,
    threads: Annotated[
        int,
        typer.Option(min=1, help="Of PyTorch; one is enough for a model of this size."),
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")
    ] = False,
) -> None:
    """Train a small transformer to classify time series; print its accuracy.

    For each spec and seed, a stratified part of the training series chooses
    the epoch, by its loss. Then a new model is fitted on all training series
    for so many epochs, and meets the test series once. Nothing is chosen by
    the test series.
    """  # fmt: skip
    try:
        import torch
        import training_picture  # noqa: F401 - before any work: matplotlib may be missing
        from series_model import Settings
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Failed(
            Exit.MISSING, "torch is not installed: pip install 'pdcore[torch,cli]'"
        ) from error
    if resume and force:
        raise typer.BadParameter("excludes --force", param_hint="--resume")
    for name, number, good, expected in (
        ("--validation", validation, 0.0 < validation < 1.0, "a share above 0 and below 1"),
        ("--dropout", dropout, 0.0 <= dropout < 1.0, "a share from 0, below 1"),
        ("--noise", noise, 0.0 <= noise < math.inf, "a number from 0"),
        ("--rate", rate, 0.0 < rate < math.inf, "a number above 0"),
    ):
        if not good:
            raise typer.BadParameter(f"got {number}, expected {expected}", param_hint=name)
    if width % heads:
        raise typer.BadParameter(f"{heads} heads do not divide width {width}", param_hint="--heads")
    specs = _distinct("--spec", [_spec(text) for text in spec or ["softmax"]])
    numbers = _distinct("--seeds", _seeds(seeds))
    series = _load(data, train, test)
    torch.set_num_threads(threads)
    chosen = [
        Settings(
            spec=s, seed=n, epochs=epochs, patience=patience, validation=validation, batch=batch,
            rate=rate, dropout=dropout, noise=noise, width=width, layers=layers, heads=heads,
        )
        for s in specs for n in numbers
    ]  # fmt: skip
    for settings in chosen[:: len(numbers)]:
        _try(settings, series)
    runs = _train(chosen, series, out, resume=resume, force=force)
    result = {
        "series": {
            "name": series.name, "source": series.source, "train": len(series.train.labels),
            "test": len(series.test.labels), "channels": series.train.frames.shape[2],
            "length": series.train.frames.shape[1], "classes": len(series.classes),
        },
        "versions": {"pdcore": pdcore.__version__, "torch": str(torch.__version__),
                     "python": platform.python_version()},
        "threads": threads, "summary": summarize(runs), "runs": runs,
    }  # fmt: skip
    result["files"] = _write(result, out)
    if as_json:
        emit(result)
    else:
        _show(result)


def _spec(text: str) -> str:
    try:
        return str(pdcore.parse(text))
    except pdcore.SpecError as error:
        raise typer.BadParameter(str(error), param_hint="--spec") from error
    except pdcore.UnsupportedError as error:
        raise pdcore.UnsupportedError(f"--spec {text}: {error}") from error


def _seeds(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdecimal() and int(word) < 2**32 for word in words):
        raise typer.BadParameter(
            f"got {text!r}, expected whole numbers such as 0,1,2", param_hint="--seeds"
        )
    return [int(word) for word in words]


def _distinct(option: str, values: Sequence[Any]) -> Sequence[Any]:
    for value in values:
        if values.count(value) > 1:
            raise typer.BadParameter(f"{value} is there twice", param_hint=option)
    return values


def _load(data: Path | None, train: Path | None, test: Path | None) -> Pair:
    """Read the series, with the option at fault in every error."""
    if data is not None and (train or test):
        raise typer.BadParameter("excludes --train and --test", param_hint="--data")
    if (train is None) != (test is None):
        given, lacking = ("--train", "--test") if test is None else ("--test", "--train")
        raise typer.BadParameter(f"missing; {given} needs it", param_hint=lacking)
    if data is not None:
        try:
            train, test = find_pair(data)
        except FileError as error:
            raise FileError(f"--data: {error}") from error
    if train is None or test is None:
        return packaged()
    option = "--train"
    try:
        first = read_ts(train)
        if len(set(first.labels)) < 2:
            raise FileError(f"{train}: one class, {first.labels[0]}; expected two or more")
        if len(set(first.labels)) == len(first.labels):
            raise FileError(f"{train}: every class has one series, so none can validate")
        option = "--test"
        second = read_ts(test)
        name = train.stem.removesuffix("_TRAIN")
        try:
            return pair(name, first, second, source=f"{train.name}, {test.name}")
        except FileError as error:
            raise FileError(f"{test}: {error}") from error
    except FileError as error:
        raise FileError(f"{option}: {error}" if data is None else f"--data: {error}") from error


def _try(settings: Settings, series: Pair) -> None:
    """Take one step and throw it away, so that a spec that cannot run says so before any work."""
    from series_training import try_step

    try:
        try_step(settings, series)
    except pdcore.UnsupportedError as error:
        raise pdcore.UnsupportedError(f"--spec {settings.spec}: {error}") from error
    except pdcore.NoBackendError as error:
        raise pdcore.NoBackendError(f"--spec {settings.spec}: {error}", error.reasons) from error
    except ValueError as error:
        raise typer.BadParameter(f"{settings.spec}: {error}", param_hint="--spec") from error


def _train(
    chosen: Sequence[Settings], series: Pair, out: Path, *, resume: bool, force: bool
) -> list[dict[str, Any]]:
    """Do every run, each with a checkpoint of its own, which keeps the trained model too."""
    from series_training import Run

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"--out: {out}: cannot write there: {error.strerror}") from error
    checkpoints = [out / f"{s.spec}-seed{s.seed}.pt" for s in chosen]
    there = [path for path in checkpoints if path.exists()]
    if there and not (resume or force):
        raise OutputError(
            f"--out: {there[0]} exists; --resume goes on from it, --force starts again"
        )
    if resume and not there:
        note(f"--resume: no checkpoint in {out}, so this starts from the beginning")
    if force:
        for path in there:
            path.unlink()
    # All are read before any training: a checkpoint that does not fit says so at once.
    if resume:
        for settings, path in zip(chosen, checkpoints, strict=True):
            if path in there:
                _resumed(Run(settings, series), path)
    results = []
    for settings, path in zip(chosen, checkpoints, strict=True):
        run = Run(settings, series)
        if resume and path in there:
            _resumed(run, path)
        title = f"{settings.spec}, seed {settings.seed}"
        try:
            with progress(title) as done:
                found = run.finish(path, done)
        except FloatingPointError as error:
            raise Failed(Exit.NUMERICS, f"{title}: {error}; try a smaller --rate") from error
        except BaseException:  # a signal too
            if path.exists():
                note(f"--resume goes on from {path}")
            raise
        results.append(found)
        note(
            f"{title}: epoch {found['epoch']} of {found['epochs']} chosen, validation "
            f"{found['validation_accuracy']:.1%}, test {found['test_accuracy']:.1%}, "
            f"{found['seconds']:.0f} s"
        )
    return results


def _resumed(run: Run, path: Path) -> None:
    try:
        run.load(path)
    except FileError as error:
        raise FileError(f"--resume: {error}") from error


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give mean and standard deviation of the test accuracy by spec, in the order of the runs.

    The deviation is that of a sample, over the seeds; None for a single seed.
    """
    found = []
    for spec in dict.fromkeys(run["spec"] for run in runs):
        own = [run for run in runs if run["spec"] == spec]
        accuracies = [run["test_accuracy"] for run in own]
        found.append({
            "spec": spec, "seeds": [run["seed"] for run in own],
            "test_accuracy": statistics.fmean(accuracies),
            "deviation": statistics.stdev(accuracies) if len(own) > 1 else None,
            "validation_accuracy": statistics.fmean(run["validation_accuracy"] for run in own),
            "epochs": [run["epoch"] for run in own],
            "seconds": sum(run["seconds"] for run in own),
        })  # fmt: skip
    return found


def _write(result: dict[str, Any], out: Path) -> list[str]:
    from training_picture import write_png

    picture, written = out / "training.png", out / "results.json"
    write_png(picture, result)
    with replacing(written, force=True) as stream:
        stream.write((json.dumps(result, indent=2) + "\n").encode())
    return [str(picture), str(written)]


def _show(result: dict[str, Any]) -> None:
    about = result["series"]
    table = Table(
        title=f"{escape(about['name'])}: {about['train']} training and {about['test']} test "
        f"series, {about['channels']} channels, at most {about['length']} steps, "
        f"{about['classes']} classes",
        title_justify="left",
    )
    table.add_column("attention", overflow="fold")
    seeds = ", ".join(map(str, result["summary"][0]["seeds"]))
    for name in ("test %", f"seeds {seeds}", "validation %", "s"):
        table.add_column(name, justify="right")
    for row in result["summary"]:
        deviation = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
        each = [r["test_accuracy"] for r in result["runs"] if r["spec"] == row["spec"]]
        table.add_row(
            escape(row["spec"]), f"{100 * row['test_accuracy']:.1f}{deviation}",
            ", ".join(f"{100 * a:.1f}" for a in each),
            f"{100 * row['validation_accuracy']:.1f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    stdout().print(table)
    stdout().print(
        "Accuracy: mean ± standard deviation over the seeds, and each. The epoch is the one with "
        "the smallest validation loss; the model was then fitted on all training series for so "
        "many epochs."
    )
    stdout().print(escape(about["source"]))
    for path in result["files"]:
        stdout().print(f"wrote {escape(path)}", soft_wrap=True)


if __name__ == "__main__":
    app(prog_name="classify_time_series.py")
