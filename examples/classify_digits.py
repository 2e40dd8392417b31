"""Train a small transformer on handwritten digits, with any attention that a spec describes.

    python examples/classify_digits.py
    python examples/classify_digits.py --spec softmax --spec bn --spec "sh(1,1,2,2)"

The images come with scikit-learn. The model is Flax's (NNX), trained with Optax. Needs the extras
``flax``, ``svr`` and ``cli``.
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
from reproduction.training.series import DIGITS

import pdcore
from pdcore.cli.files import OutputError
from pdcore.cli.reporting import Failed, emit, progress, reported
from pdcore.errors import Exit
from pdcore_adapters.time_series.arrays import stratified_split

if TYPE_CHECKING:
    from digits_training import Digits, Settings

__all__ = ["app", "main"]

_MEANING = (
    "Accuracy: mean ± standard deviation over the seeds, and each. The weights are those of the "
    "epoch with the smallest validation loss."
)

app = command_line()


@app.command(epilog=CODES)
@reported
def main(
    spec: Specs = None,
    seeds: Seeds = "0,1,2",
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Where results.json and training.png go."),
    ] = Path("pdcore-digits"),
    force: Annotated[bool, typer.Option("--force", "-f", help="Write over what is there.")] = False,
    epochs: Epochs = 30,
    patience: Patience = 6,
    validation: Validation = 0.2,
    batch: Annotated[int, typer.Option(min=1, help="Images of one step.")] = 64,
    rate: Rate = 4e-3,
    width: Annotated[int, typer.Option(min=1, help="Features of a token.")] = 64,
    layers: Layers = 2,
    heads: Heads = 4,
    as_json: AsJson = False,
) -> None:
    """Train a small transformer to read digits; print its accuracy.

    For each spec and seed, a stratified part of the training images chooses
    the epoch, by its loss. The weights of that epoch meet the test images
    once. Nothing is chosen by the test images.
    """
    _check_packages()
    from digits_training import Settings, load

    check_ranges(
        ("--validation", validation, 0.0 < validation < 1.0, "a share above 0 and below 1"),
        ("--rate", rate, 0.0 < rate < math.inf, "a number above 0"),
    )
    check_heads(width, heads)
    specs = distinct("--spec", [read_spec(text) for text in spec or ["softmax"]])
    numbers = distinct("--seeds", read_seeds(seeds))
    digits = load()
    _check_batch(batch, digits, validation, numbers[0])
    options: dict[str, Any] = {
        "epochs": epochs,
        "patience": patience,
        "validation": validation,
        "batch": batch,
        "rate": rate,
        "width": width,
        "layers": layers,
        "heads": heads,
    }
    chosen = [Settings(spec=s, seed=n, **options) for s in specs for n in numbers]
    runs = _train(chosen, len(numbers), digits, out, force=force)
    _report(runs, digits, out, as_json=as_json)


def _check_packages() -> None:
    try:
        import digits_training  # noqa: F401
        import flax  # noqa: F401
        import jax  # noqa: F401
        import training_picture  # noqa: F401 - before any work: matplotlib may be missing
    except ModuleNotFoundError as error:
        if error.name not in ("flax", "jax", "optax", "sklearn"):
            raise
        raise Failed(
            Exit.MISSING, f"{error.name} is not installed: pip install 'pdcore[flax,svr,cli]'"
        ) from error


def _check_batch(batch: int, digits: Digits, validation: float, seed: int) -> None:
    """Raise where a batch has more images than the part that is fitted."""
    fitted = len(stratified_split(digits.train_targets, validation, seed)[0])
    if batch > fitted:
        raise typer.BadParameter(
            f"got {batch}, expected at most the {fitted} images that are fitted",
            param_hint="--batch",
        )


def _report(runs: list[dict[str, Any]], digits: Digits, out: Path, *, as_json: bool) -> None:
    """Write the files, and print the table or the JSON."""
    import flax
    import jax

    result: dict[str, Any] = {
        "images": {"source": DIGITS, "train": len(digits.train), "test": len(digits.test)},
        "versions": {
            "pdcore": pdcore.__version__,
            "jax": jax.__version__,
            "flax": flax.__version__,
            "python": platform.python_version(),
        },
        "summary": summarize(runs),
        "runs": runs,
    }
    title = f"Digits: {len(digits.train)} training and {len(digits.test)} test images, 10 classes"
    result["files"] = write(result, out, title)
    if as_json:
        emit(result)
    else:
        show(result, title, [_MEANING, DIGITS])


def _train(
    chosen: Sequence[Settings], seeds: int, digits: Digits, out: Path, *, force: bool
) -> list[dict[str, Any]]:
    """Do every run, after checks that each spec can run and the results can be written."""
    from digits_training import fit, try_spec

    for settings in chosen[::seeds]:
        with naming(settings.spec):
            try_spec(settings)
    make_folder(out)
    there = out / "results.json"
    if there.exists() and not force:
        raise OutputError(f"--out: {there} exists; --force writes over it")
    results = []
    for settings in chosen:
        title = f"{settings.spec}, seed {settings.seed}"
        with progress(title) as done, finite(title):
            _, result = fit(settings, digits, done)
        results.append(result)
        tell(title, result)
    return results


if __name__ == "__main__":
    app(prog_name="classify_digits.py")
