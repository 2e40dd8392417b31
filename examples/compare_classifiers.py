"""Hold `AttentionClassifier` beside aeon's ROCKET and 1-NN DTW on data sets of the UEA archive.

    python examples/compare_classifiers.py --data UEA
    python examples/compare_classifiers.py --data UEA --spec softmax --spec bn --seeds 0,1,2

Needs the extras ``aeon`` and ``cli``. What is in the file of results is not computed again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from comparison import Seeds, Specs, command_line, distinct, read_seeds, read_spec
from reproduction.training.series import Pair, Series, find_pair, pair, read_ts
from rich.table import Table

from pdcore.cli.files import FileError, replacing
from pdcore.cli.reporting import note, reported, stdout

__all__ = ["app", "main"]

PACKAGES = ("pdcore", "aeon", "torch", "numpy", "numba", "scikit-learn")

app = command_line()

Data = Annotated[
    Path, typer.Option(metavar="DIR", help="A folder of folders NAME, each with NAME_TRAIN.ts.")
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file of results.")]


@app.command()
@reported
def main(
    data: Data, spec: Specs = None, seeds: Seeds = "0", out: Out = Path("classifiers.json")
) -> None:
    """Print the share of right labels on the test part, for each data set and classifier."""
    specs = distinct("--spec", [read_spec(text) for text in spec or ["softmax"]])
    numbers = distinct("--seeds", read_seeds(seeds))
    folders = sorted({path.parent for path in data.glob("*/*_TRAIN.ts")})
    if not folders:
        raise FileError(f"--data: {data}: no folder with a NAME_TRAIN.ts in it")
    record = _opened(out)
    for folder in folders:
        train, test = find_pair(folder)
        series = pair(folder.name, read_ts(train), read_ts(test), train.name)
        record["sizes"][folder.name] = _sizes(series)
        for name, make in _classifiers(specs, numbers):
            if name not in record["accuracy"].setdefault(folder.name, {}):
                note(f"{folder.name}: {name}")
                record["accuracy"][folder.name][name] = _accuracy(make(), series)
                with replacing(out, force=True) as stream:
                    stream.write((json.dumps(record, indent=1) + "\n").encode())
    stdout().print(_table(record))


def _opened(out: Path) -> dict[str, Any]:
    """Return the results so far; raise where they were made with other versions."""
    versions = {name: version(name) for name in PACKAGES} | {"python": platform.python_version()}
    if not out.exists():
        return {"versions": versions, "sizes": {}, "accuracy": {}}
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if record["versions"] != versions:
        raise FileError(f"--out: {out}: made with {record['versions']}, here are {versions}")
    return record


def _classifiers(specs: Any, seeds: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each classifier, and what makes it."""
    from aeon.classification.convolution_based import RocketClassifier
    from aeon.classification.distance_based import KNeighborsTimeSeriesClassifier

    from pdcore_adapters.aeon import AttentionClassifier

    yield "1-NN DTW", lambda: KNeighborsTimeSeriesClassifier(distance="dtw")
    for seed in seeds:
        yield f"ROCKET, seed {seed}", lambda seed=seed: RocketClassifier(random_state=seed)
    for spec in specs:
        for seed in seeds:
            yield (
                f"{spec}, seed {seed}",
                lambda spec=spec, seed=seed: AttentionClassifier(spec, random_state=seed),
            )


def _accuracy(model: Any, series: Pair) -> float:
    """Fit the training part, and return the share of right labels on the test part."""
    pads = not model.get_tag("capability:unequal_length")
    longest = max(part.frames.shape[1] for part in (series.train, series.test))
    train, test = (_arrays(part, longest if pads else 0) for part in (series.train, series.test))
    model.fit(train, np.array(series.train.labels))
    return float(np.mean(model.predict(test) == np.array(series.test.labels)))


def _arrays(part: Series, longest: int) -> Any:
    """Return series as aeon takes them, with zeros at the end up to `longest` if it is not 0."""
    if longest:
        lacking = longest - part.frames.shape[1]
        return np.pad(part.frames, ((0, 0), (0, lacking), (0, 0))).swapaxes(1, 2).astype(float)
    return [x[:n].T.astype(float) for x, n in zip(part.frames, part.lengths, strict=True)]


def _sizes(series: Pair) -> dict[str, int]:
    lengths = series.train.lengths
    return {
        "train": len(series.train.labels),
        "test": len(series.test.labels),
        "channels": series.train.frames.shape[2],
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "classes": len(series.classes),
    }


def _table(record: dict[str, Any]) -> Table:
    """Return the accuracies in percent, a mean over the seeds, and the means over the sets."""
    rows = {}
    for name, found in record["accuracy"].items():
        methods: dict[str, list[float]] = {}
        for method, share in found.items():
            methods.setdefault(method.partition(", seed")[0], []).append(share)
        rows[name] = {method: 100 * float(np.mean(shares)) for method, shares in methods.items()}
    names = list(dict.fromkeys(method for row in rows.values() for method in row))
    table = Table(title="test accuracy, %")
    for column in ("data set", *names):
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[m]:.1f}" if m in row else "" for m in names))
    means = [np.mean([row[m] for row in rows.values() if m in row]) for m in names]
    table.add_row("mean", *(f"{mean:.1f}" for mean in means))
    return table


if __name__ == "__main__":
    app(prog_name="compare_classifiers.py")
