"""Read a trained attention layer as a regression: which frames of a word are support vectors.

    python examples/interpret_attention.py
    python examples/interpret_attention.py --spec "bn+sh(1,1,2,2)" --layer 2 --epsilon 0.3

Trains the model of ``classify_time_series.py`` on the Japanese Vowels that come with pdcore, or
takes its checkpoint. Needs the extras ``torch``, ``svr`` and ``cli``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from comparison import CODES, AsJson, Epochs, check_ranges, command_line, finite, make_folder
from comparison import read_spec as canonical
from reproduction.training.series import packaged
from rich.markup import escape

from pdcore.cli.files import replacing
from pdcore.cli.reporting import Failed, emit, note, progress, reported, stdout
from pdcore.errors import Exit

if TYPE_CHECKING:
    from reproduction.training.run import Run

__all__ = ["app", "layer_arrays", "main", "read"]

Array = np.ndarray[Any, Any]

#: Shares at which the support vectors are counted, beside --epsilon.
SHARES = (0.01, 0.03, 0.1, 0.3, 1.0)

app = command_line()

SpecText = Annotated[
    str, typer.Option("--spec", "-s", metavar="SPEC", help="The attention of both layers.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.pt",
        help="Of an earlier run, or of classify_time_series.py, with the same --spec, --seed "
        "and --epochs; instead of training.",
    ),
]
Utterance = Annotated[
    int | None, typer.Option(min=0, help="Of the test part; its longest by default.")
]
Epsilon = Annotated[
    float, typer.Option(help="In standard deviations of the layer's outputs at its keys.")
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Where the results go.")]


@app.command(epilog=CODES)
@reported
def main(
    spec: SpecText = "softmax",
    seed: Annotated[int, typer.Option(min=0, help="Of the training.")] = 0,
    epochs: Epochs = 150,
    checkpoint: Checkpoint = None,
    layer: Annotated[int, typer.Option(min=1, max=2, help="Which layer to read.")] = 1,
    utterance: Utterance = None,
    epsilon: Epsilon = 0.3,
    out: Out = Path("pdcore-interpretation"),
    as_json: AsJson = False,
) -> None:
    """Train a layer, and say what its values are as multipliers of its regression.

    Writes interpretation.png, interpretation.json and the checkpoint.
    """
    try:
        import interpretation_picture
        import torch
        from reproduction.training.run import Run

        from pdcore_adapters.time_series.model import Settings

        import qpsolvers  # noqa: F401 isort: skip - before any work
    except ModuleNotFoundError as error:
        raise Failed(
            Exit.MISSING, f"{error.name} is not installed: pip install 'pdcore[torch,svr,cli]'"
        ) from error
    check_ranges(("--epsilon", epsilon, 0.0 < epsilon < math.inf, "a number above 0"))
    settings = Settings(spec=canonical(spec), seed=seed, epochs=epochs)
    torch.set_num_threads(1)
    run = Run(settings, packaged())
    index = _choose_utterance(run, utterance)
    make_folder(out)
    _train(run, checkpoint, out)
    interpretation, result = _interpret(run, layer, index, epsilon)
    picture, written = out / "interpretation.png", out / "interpretation.json"
    interpretation_picture.write_png(picture, interpretation, result)
    with replacing(written, force=True) as stream:
        stream.write((json.dumps(result, indent=2) + "\n").encode())
    result["files"] = [str(picture), str(written)]
    if as_json:
        emit(result)
        return
    stdout().print(escape(str(interpretation)), soft_wrap=True)
    stdout().print(escape(run.series.source))
    for path in result["files"]:
        stdout().print(f"wrote {escape(path)}", soft_wrap=True)


def _choose_utterance(run: Run, utterance: int | None) -> int:
    """Return the index of an utterance of the test part, the longest by default."""
    count = len(run.series.test.labels)
    if utterance is not None and utterance >= count:
        raise typer.BadParameter(
            f"got {utterance}, expected one of the {count} of the test part, from 0",
            param_hint="--utterance",
        )
    return int(np.argmax(run.series.test.lengths)) if utterance is None else utterance


def _interpret(run: Run, layer: int, utterance: int, epsilon: float) -> tuple[Any, dict[str, Any]]:
    """Return the interpretation at `epsilon`, and the content of ``interpretation.json``."""
    settings = run.settings
    q, k, v, params = layer_arrays(run, layer - 1, utterance)
    shares = sorted({*SHARES, epsilon})
    read_at = {share: read(q, k, v, settings.spec, share, params) for share in shares}
    interpretation = read_at[epsilon]
    return interpretation, {
        "spec": settings.spec,
        "seed": settings.seed,
        "layer": layer,
        "utterance": utterance,
        "speaker": run.series.test.labels[utterance],
        "frames": k.shape[1],
        "test_accuracy": run.result["test_accuracy"] if run.result else None,
        "epsilon": interpretation.expansion.epsilon,
        "share": epsilon,
        "C": interpretation.C.tolist(),
        "needed": interpretation.needed.tolist(),
        "error": interpretation.error.tolist(),
        "support": interpretation.support.tolist(),
        "counts": {str(s): r.support.sum(axis=1).tolist() for s, r in read_at.items()},
        "certified": interpretation.expansion.certificate().ok,
        "source": run.series.source,
    }


def _train(run: Run, checkpoint: Path | None, out: Path) -> None:
    if checkpoint is not None:
        run.load(checkpoint)
    if run.result is not None:
        return
    title = f"{run.settings.spec}, seed {run.settings.seed}"
    with progress(title) as done, finite(title):
        result = run.finish(out / f"{run.settings.spec}-seed{run.settings.seed}.pt", done)
    note(f"{title}: test accuracy {result['test_accuracy']:.1%}, {result['seconds']:.0f} s")


def layer_arrays(run: Run, layer: int, utterance: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return q, k, v (H, N, D) of a layer for one test utterance, and its arrays, in float64."""
    import torch

    from pdcore_adapters.time_series.model import layer_calls

    length = int(run.series.test.lengths[utterance])
    frames = torch.from_numpy(run.series.test.frames[utterance, :length]).double()
    model = run.averaged.double()
    heads = layer_calls(model, frames)[layer].inputs[:3]
    q, k, v = (np.ascontiguousarray(x[0].numpy()) for x in heads)
    arrays = model.layers[layer].attention.arrays
    return q, k, v, {name: p.detach().numpy() for name, p in arrays.items()}


def read(q: Array, k: Array, v: Array, spec: str, share: float, params: dict[str, Array]) -> Any:
    """Interpret a layer at an epsilon that is a share of its outputs' standard deviation."""
    import pdcore
    from pdcore.svr import interpret

    outputs = pdcore.attention(k, k, v, spec, params=params)
    return interpret(q, k, v, spec, epsilon=share * float(outputs.std()), params=params)


if __name__ == "__main__":
    app(prog_name="interpret_attention.py")
