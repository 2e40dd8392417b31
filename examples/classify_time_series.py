"""Train a small transformer to classify time series, with any attention that a spec describes.

    python examples/classify_time_series.py
    python examples/classify_time_series.py --spec softmax --spec bn --spec "sh(1,1,2,2)"
    python examples/classify_time_series.py --data Handwriting --spec bn

The first two take the Japanese Vowels that come with pdcore; the last takes a folder of the UEA
archive. Needs the extras ``torch`` and ``cli``.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from comparison import (
    CODES,
    AsJson,
    Epochs,
    Heads,
    Layers,
    Patience,
    Rate,
    Seeds,
    Specs,
    Validation,
    check_heads,
    check_ranges,
    command_line,
    distinct,
    finite,
    make_folder,
    naming,
    read_seeds,
    read_spec,
    show,
    summarize,
    tell,
    write,
)
from reproduction.training.series import Pair, find_pair, packaged, pair, read_ts

import pdcore
from pdcore.cli.files import FileError, OutputError
from pdcore.cli.reporting import Failed, emit, note, progress, reported
from pdcore.errors import Exit

if TYPE_CHECKING:
    from reproduction.training.model import Settings
    from reproduction.training.run import Run

__all__ = ["app", "main"]

_MEANING = (
    "Accuracy: mean ± standard deviation over the seeds, and each. The epoch is the one with the "
    "smallest validation loss; the model was then fitted on all training series for so many epochs."
)

app = command_line()


@app.command(epilog=CODES)
@reported
def main(
    spec: Specs = None,
    seeds: Seeds = "0,1,2",
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
    epochs: Epochs = 150,
    patience: Patience = 30,
    validation: Validation = 0.2,
    batch: Annotated[int, typer.Option(min=1, help="Series of one step.")] = 32,
    rate: Rate = 1e-3,
    dropout: Annotated[float, typer.Option(help="Of features, outside attention.")] = 0.1,
    noise: Annotated[
        float, typer.Option(help="Added in training, in standard deviations of a channel.")
    ] = 0.3,
    width: Annotated[int, typer.Option(min=1, help="Features of a step.")] = 64,
    layers: Layers = 2,
    heads: Heads = 4,
    threads: Annotated[
        int,
        typer.Option(min=1, help="Of PyTorch; one is enough for a model of this size."),
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Train a small transformer to classify time series; print its accuracy.

    For each spec and seed, a stratified part of the training series chooses
    the epoch, by its loss. Then a new model is fitted on all training series
    for so many epochs, and meets the test series once. Nothing is chosen by
    the test series.
    """
    try:
        import torch
        import training_picture  # noqa: F401 - before any work: matplotlib may be missing
        from reproduction.training.model import Settings
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Failed(
            Exit.MISSING, "torch is not installed: pip install 'pdcore[torch,cli]'"
        ) from error
    if resume and force:
        raise typer.BadParameter("excludes --force", param_hint="--resume")
    check_ranges(
        ("--validation", validation, 0.0 < validation < 1.0, "a share above 0 and below 1"),
        ("--dropout", dropout, 0.0 <= dropout < 1.0, "a share from 0, below 1"),
        ("--noise", noise, 0.0 <= noise < math.inf, "a number from 0"),
        ("--rate", rate, 0.0 < rate < math.inf, "a number above 0"),
    )
    check_heads(width, heads)
    specs = distinct("--spec", [read_spec(text) for text in spec or ["softmax"]])
    numbers = distinct("--seeds", read_seeds(seeds))
    series = _load(data, train, test)
    torch.set_num_threads(threads)
    chosen = [
        Settings(
            spec=s,
            seed=n,
            epochs=epochs,
            patience=patience,
            validation=validation,
            batch=batch,
            rate=rate,
            dropout=dropout,
            noise=noise,
            width=width,
            layers=layers,
            heads=heads,
        )
        for s in specs
        for n in numbers
    ]
    for settings in chosen[:: len(numbers)]:
        _try(settings, series)
    runs = _train(chosen, series, out, resume=resume, force=force)
    result = {
        "series": {
            "name": series.name,
            "source": series.source,
            "train": len(series.train.labels),
            "test": len(series.test.labels),
            "channels": series.train.frames.shape[2],
            "length": series.train.frames.shape[1],
            "classes": len(series.classes),
        },
        "versions": {
            "pdcore": pdcore.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "threads": threads,
        "summary": summarize(runs),
        "runs": runs,
    }
    about = result["series"]
    counted = f"{series.name}: {about['train']} training and {about['test']} test series"
    result["files"] = write(result, out, f"{counted}, {about['classes']} classes")
    if as_json:
        emit(result)
        return
    channels = f"{about['channels']} channels, at most {about['length']} steps"
    title = f"{counted}, {channels}, {about['classes']} classes"
    show(result, title, [_MEANING, series.source])


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
    from reproduction.training.run import try_step

    with naming(settings.spec):
        try_step(settings, series)


def _train(
    chosen: Sequence[Settings], series: Pair, out: Path, *, resume: bool, force: bool
) -> list[dict[str, Any]]:
    """Do every run, each with a checkpoint of its own, which keeps the trained model too."""
    from reproduction.training.run import Run

    make_folder(out)
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
            with progress(title) as done, finite(title):
                found = run.finish(path, done)
        except Failed:
            raise
        except BaseException:  # a signal too
            if path.exists():
                note(f"--resume goes on from {path}")
            raise
        results.append(found)
        tell(title, found)
    return results


def _resumed(run: Run, path: Path) -> None:
    try:
        run.load(path)
    except FileError as error:
        raise FileError(f"--resume: {error}") from error


if __name__ == "__main__":
    app(prog_name="classify_time_series.py")
