"""The whole demo: data, measurements and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pdcore.attention import attention_weights
from pdcore.cli.files import OutputError
from pdcore.datasets import ATTRIBUTION, JapaneseVowels, japanese_vowels
from pdcore.errors import NoBackendError
from pdcore.plugins import list_backends
from pdcore_adapters.diagnostics import head_distance

from .measuring import measure
from .recordings import PRESETS, SEED, Batch, project

__all__ = ["run_demo"]

Array = np.ndarray[Any, Any]


def run_demo(folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure every preset on every backend, and draw the weights.

    Parameters
    ----------
    folder : Path
        The folder of ``attention.png`` and ``attention.html``; created where it is missing.
    say : callable
        Called with a line about the work that begins.

    Returns
    -------
    dict
        ``dataset``, ``shape``, ``utterance``, ``presets``, ``within_budget`` and ``files``. For
        each preset: its ``redundancy`` in the drawn utterance, the mean over all of them, and by
        backend ``error_over_budget``, ``milliseconds``, ``spread`` (quartiles) and
        ``versus_softmax``, or why it did not run.
    """
    # Before any work: matplotlib may be missing.
    from .page import write_page
    from .pictures import write_png

    _create(folder)
    vowels = japanese_vowels()
    batch = project(vowels)
    names = [b["name"] for b in list_backends() if b["available"]]
    if not names:
        raise NoBackendError("no backend is available; see `pdcore backends`")
    say(f"{len(vowels.lengths)} utterances, {len(PRESETS)} presets on {', '.join(names)}")
    results = measure(batch, names, say)
    longest = int(np.argmax(vowels.lengths))
    presets, drawn = [], {}
    for spec, meaning in PRESETS.items():
        drawn[spec], distances = _weights(batch, vowels, spec, longest)
        presets.append(
            {
                "spec": spec,
                "meaning": meaning,
                "redundancy": distances,
                "backends": {name: results[name, spec] for name in names},
            }
        )
    errors = [r.get("error_over_budget", 0.0) for r in results.values()]
    failures = [r for r in results.values() if "failed" in r]
    result = {
        "dataset": ATTRIBUTION,
        "shape": {"q": list(batch.q.shape), "dtype": "float32", "frames": int(vowels.real.sum())},
        "projections": f"fixed random maps of the standardised channels, seed {SEED}",
        "utterance": {
            "index": longest,
            "frames": int(vowels.lengths[longest]),
            "speaker": int(vowels.speakers[longest]),
        },
        "presets": presets,
        "within_budget": max(errors) <= 1.0 and not failures,
    }
    say("drawing the weights")
    picture = write_png(folder / "attention.png", drawn, result)
    page = write_page(folder / "attention.html", drawn, result)
    return result | {"files": [str(picture), str(page)]}


def _create(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write there: {error.strerror}") from error


def _weights(
    batch: Batch, vowels: JapaneseVowels, spec: str, utterance: int
) -> tuple[Array, dict[str, float]]:
    """Return the weights (H, N, N) of one utterance, and the distances of heads."""
    weights = attention_weights(batch.q, batch.k, batch.v, spec, key_mask=batch.key_mask)
    length = int(vowels.lengths[utterance])
    shown = weights[utterance, :, :length, :length]
    every = [
        float(head_distance(w[:, :n, :n])) for w, n in zip(weights, vowels.lengths, strict=True)
    ]
    return shown, {"utterance": float(head_distance(shown)), "mean": statistics.fmean(every)}
