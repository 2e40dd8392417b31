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
    from reproduction.training.run import Run

    from pdcore_adapters.time_series.model import Settings

__all__ = ["app", "main"]

_MEANING = (
    "Accuracy: mean ± standard deviation over the seeds, and each. The epoch is the one with the "
    "smallest validation loss; the model was then fitted on all training series for so many epochs."
)

app = command_line()

Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="A folder of the UEA archive: one *_TRAIN.ts, one "
        "*_TEST.ts. The Japanese Vowels of pdcore by default.",
    ),
]
Train = Annotated[
    Path | None, typer.Option(metavar="FILE.ts", help="Instead of --data, with --test.")
]
Test = Annotated[
    Path | None, typer.Option(metavar="FILE.ts", help="Instead of --data, with --train.")
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Where checkpoints, results.json and training.png go."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the checkpoints in --out.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Start again, over what is in --out.")]
Batch = Annotated[int, typer.Option(min=1, help="Series of one step.")]
Dropout = Annotated[float, typer.Option(help="Of features, outside attention.")]
Noise = Annotated[
    float, typer.Option(help="Added in training, in standard deviations of a channel.")
]
Width = Annotated[int, typer.Option(min=1, help="Features of a step.")]
Threads = Annotated[
    int, typer.Option(min=1, help="Of PyTorch; one is enough for a model of this size.")
]


@app.command(epilog=CODES)
@reported
def main(
    spec: Specs = None,
    seeds: Seeds = "0,1,2",
    data: Data = None,
    train: Train = None,
    test: Test = None,
    out: Out = Path("pdcore-training"),
    resume: Resume = False,
    force: Force = False,
    epochs: Epochs = 150,
    patience: Patience = 30,
    validation: Validation = 0.2,
    batch: Batch = 32,
    rate: Rate = 1e-3,
    dropout: Dropout = 0.1,
    noise: Noise = 0.3,
    width: Width = 64,
    layers: Layers = 2,
    heads: Heads = 4,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Train a small transformer to classify time series; print its accuracy.

    For each spec and seed, a stratified part of the training series chooses
    the epoch, by its loss. Then a new model is fitted on all training series
    for so many epochs, and meets the test series once. Nothing is chosen by
    the test series.
    """
    _check_packages()
    if resume and force:
        raise typer.BadParameter("excludes --force", param_hint="--resume")
    options = {
        "epochs": epochs,
        "patience": patience,
        "validation": validation,
        "batch": batch,
        "rate": rate,
        "dropout": dropout,
        "noise": noise,
        "width": width,
        "layers": layers,
        "heads": heads,
    }
    _check(options)
    specs = distinct("--spec", [read_spec(text) for text in spec or ["softmax"]])
    numbers = distinct("--seeds", read_seeds(seeds))
    series = _load(data, train, test)
    runs = _run(specs, numbers, options, series, threads, out, resume=resume, force=force)
    _report(runs, series, threads, out, as_json=as_json)


def _check_packages() -> None:
    try:
        import torch  # noqa: F401
        import training_picture  # noqa: F401 - before any work: matplotlib may be missing
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Failed(
            Exit.MISSING, "torch is not installed: pip install 'pdcore[torch,cli]'"
        ) from error


def _check(options: dict[str, Any]) -> None:
    share, dropout, noise, rate = (
        options[name] for name in ("validation", "dropout", "noise", "rate")
    )
    check_ranges(
        ("--validation", share, 0.0 < share < 1.0, "a share above 0 and below 1"),
        ("--dropout", dropout, 0.0 <= dropout < 1.0, "a share from 0, below 1"),
        ("--noise", noise, 0.0 <= noise < math.inf, "a number from 0"),
        ("--rate", rate, 0.0 < rate < math.inf, "a number above 0"),
    )
    check_heads(options["width"], options["heads"])


def _run(
    specs: Sequence[str],
    seeds: Sequence[int],
    options: dict[str, Any],
    series: Pair,
    threads: int,
    out: Path,
    *,
    resume: bool,
    force: bool,
) -> list[dict[str, Any]]:
    """Do the run of every spec and seed, after a trial step of every spec."""
    import torch

    from pdcore_adapters.time_series.model import Settings

    torch.set_num_threads(threads)
    chosen = [Settings(spec=s, seed=n, **options) for s in specs for n in seeds]
    for settings in chosen[:: len(seeds)]:
        _try(settings, series)
    return _train(chosen, series, out, resume=resume, force=force)


def _report(
    runs: list[dict[str, Any]], series: Pair, threads: int, out: Path, *, as_json: bool
) -> None:
    """Write the files, and print the table or the JSON."""
    import torch

    about = {
        "name": series.name,
        "source": series.source,
        "train": len(series.train.labels),
        "test": len(series.test.labels),
        "channels": series.train.frames.shape[2],
        "length": series.train.frames.shape[1],
        "classes": len(series.classes),
    }
    result = {
        "series": about,
        "versions": {
            "pdcore": pdcore.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "threads": threads,
        "summary": summarize(runs),
        "runs": runs,
    }
    counted = f"{series.name}: {about['train']} training and {about['test']} test series"
    result["files"] = write(result, out, f"{counted}, {about['classes']} classes")
    if as_json:
        emit(result)
        return
    channels = f"{about['channels']} channels, at most {about['length']} steps"
    title = f"{counted}, {channels}, {about['classes']} classes"
    show(result, title, [_MEANING, series.source])


def _load(data: Path | None, train: Path | None, test: Path | None) -> Pair:
    """Read the series; name the option in every error."""
    if data is not None and (train or test):
        raise typer.BadParameter("excludes --train and --test", param_hint="--data")
    if (train is None) != (test is None):
        present, lacking = ("--train", "--test") if test is None else ("--test", "--train")
        raise typer.BadParameter(f"missing; {present} needs it", param_hint=lacking)
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
    """Take one step and discard it, so that a spec that cannot run fails before any work."""
    from reproduction.training.run import try_step

    with naming(settings.spec):
        try_step(settings, series)


def _train(
    chosen: Sequence[Settings], series: Pair, out: Path, *, resume: bool, force: bool
) -> list[dict[str, Any]]:
    """Do every run; the checkpoint of each keeps the trained model too."""
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
                result = run.finish(path, done)
        except Failed:
            raise
        except BaseException:  # a signal too
            if path.exists():
                note(f"--resume goes on from {path}")
            raise
        results.append(result)
        tell(title, result)
    return results


def _resumed(run: Run, path: Path) -> None:
    try:
        run.load(path)
    except FileError as error:
        raise FileError(f"--resume: {error}") from error


if __name__ == "__main__":
    app(prog_name="classify_time_series.py")
