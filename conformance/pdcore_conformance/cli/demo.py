"""The demo: every preset on recorded vowels, judged, timed and drawn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pdcore.attention import attention_weights, bind
from pdcore.cli.files import OutputError
from pdcore.datasets import ATTRIBUTION, JapaneseVowels, japanese_vowels
from pdcore.errors import NoBackendError, UnsupportedError
from pdcore.plugins import list_backends
from pdcore.plugins import registry as plugins

__all__ = ["PRESETS", "Batch", "project", "redundancy", "run_demo", "show"]

Array = np.ndarray[Any, Any]

#: The presets, with numbers that suit utterances of at most 29 frames and four heads.
PRESETS: dict[str, str] = {
    "softmax": "scaled dot-product attention",
    "linear": "feature map elu + 1, O(N + M)",
    "sparse(4,4)": "softmax over 4 frames to either side",
    "bn": "Attention-BN",
    "sh(1,1,2,2)": "Attention-SH: heads 3 and 4 see pairs of frames",
    "bn+sh(1,1,2,2)": "Attention-BN+SH",
    "causal+bn(statistics=prefix)": "causal Attention-BN, statistics of the past only",
}

HEADS, DIM, SEED, ROUNDS = 4, 8, 0, 15


class Batch(NamedTuple):
    """All utterances as one padded call.

    Attributes
    ----------
    q, k, v : float32 array (640, HEADS, 29, DIM)
    key_mask : bool array (640, 29)
        True for a frame, False for padding.
    """

    q: Array
    k: Array
    v: Array
    key_mask: Array


def project(vowels: JapaneseVowels) -> Batch:
    """Make queries, keys and values of the frames by fixed random maps.

    Each of the 12 channels is standardised by the training part's mean and deviation, then
    mapped to `HEADS` heads of `DIM` features by three Gaussian matrices (12, HEADS * DIM) of
    variance 1/12 and seed `SEED`. Nothing is trained, so the weights show what a spec does to a
    head, not what a model learns.

    Examples
    --------
    >>> project(japanese_vowels()).q.shape
    (640, 4, 29, 8)
    """
    frames = vowels.frames[vowels.train][vowels.real[vowels.train]].astype(np.float64)
    standard = (vowels.frames - frames.mean(axis=0)) / frames.std(axis=0)
    standard = np.where(vowels.real[..., None], standard, 0.0)
    channels = vowels.frames.shape[-1]
    maps = np.random.default_rng(SEED).standard_normal((3, channels, HEADS * DIM)) / channels**0.5
    count, length = vowels.real.shape
    q, k, v = (
        np.ascontiguousarray(
            (standard @ m).reshape(count, length, HEADS, DIM).swapaxes(1, 2).astype(np.float32)
        )
        for m in maps
    )
    return Batch(q, k, v, vowels.real)


def redundancy(weights: Array) -> float:
    """Give the mean L2 (Frobenius) distance between the weights of two heads.

    Parameters
    ----------
    weights : array (H, N, M)
        Attention weights of one sequence, H at least 2.

    Returns
    -------
    float
        0 where all heads are the same: the smaller, the more redundant.
    """
    pairs = combinations(weights.astype(np.float64), 2)
    return statistics.fmean(float(np.linalg.norm(a - b)) for a, b in pairs)


def run_demo(folder: Path, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure and draw.

    Parameters
    ----------
    folder : Path
        Where to write ``attention.png`` and ``attention.html``; made if need be.
    say : callable
        Is told what is going on.

    Returns
    -------
    dict
        ``dataset``, ``shape``, ``utterance``, ``presets``, ``within_budget`` and ``files``. For
        each preset: its ``redundancy`` in the drawn utterance, the mean over all of them, and by
        backend ``error_over_budget``, ``milliseconds``, ``spread`` (quartiles) and
        ``versus_softmax``, or why it did not run.
    """
    from pdcore.cli.pictures import (  # before any work: matplotlib may be missing
        write_page,
        write_png,
    )

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write there: {error.strerror}") from error
    vowels = japanese_vowels()
    batch = project(vowels)
    shown = int(np.argmax(vowels.lengths))
    length = int(vowels.lengths[shown])
    names = [b["name"] for b in list_backends() if b["available"]]
    if not names:
        raise NoBackendError("no backend is available; see `pdcore backends`")
    say(f"{len(vowels.lengths)} utterances, {len(PRESETS)} presets on {', '.join(names)}")
    results = _measure(batch, names, say)
    presets, drawn = [], {}
    for spec, meaning in PRESETS.items():
        weights = attention_weights(batch.q, batch.k, batch.v, spec, key_mask=batch.key_mask)
        drawn[spec] = weights[shown, :, :length, :length]
        everywhere = [
            redundancy(w[:, :n, :n]) for w, n in zip(weights, vowels.lengths, strict=True)
        ]
        presets.append(
            {
                "spec": spec,
                "meaning": meaning,
                "redundancy": {
                    "utterance": redundancy(drawn[spec]),
                    "mean": statistics.fmean(everywhere),
                },
                "backends": {name: results[name, spec] for name in names},
            }
        )
    result = {
        "dataset": ATTRIBUTION,
        "shape": {"q": list(batch.q.shape), "dtype": "float32", "frames": int(vowels.real.sum())},
        "projections": f"fixed random maps of the standardised channels, seed {SEED}",
        "utterance": {"index": shown, "frames": length, "speaker": int(vowels.speakers[shown])},
        "presets": presets,
        "within_budget": all(
            r.get("error_over_budget", 0.0) <= 1.0 and "failed" not in r for r in results.values()
        ),
    }
    say("drawing the weights")
    files = [
        write_png(folder / "attention.png", drawn, result),
        write_page(folder / "attention.html", drawn, result),
    ]
    return result | {"files": [str(path) for path in files]}


def _measure(
    batch: Batch, names: list[str], say: Callable[[str], None]
) -> dict[tuple[str, str], dict[str, Any]]:
    """Judge every preset on every backend, and time those that run, interleaved."""
    from ..judge.budget import expect, judge, worst

    results: dict[tuple[str, str], dict[str, Any]] = {}
    calls: dict[tuple[str, str], Callable[..., Any]] = {}
    for spec in PRESETS:
        expected = expect(batch.q, batch.k, batch.v, spec, key_mask=batch.key_mask)
        for name in names:
            devices = plugins.registered()[name].devices
            bound = bind(spec, backend=name, device=None if "cpu" in devices else devices[0])

            def call(bound: Any = bound, lse: bool = False) -> Any:
                return bound(batch.q, batch.k, batch.v, key_mask=batch.key_mask, return_lse=lse)

            try:
                outputs = dict(zip(("out", "lse"), call(lse=True), strict=True))
                results[name, spec] = {"error_over_budget": worst(judge(outputs, expected))}
                calls[name, spec] = call
            except (UnsupportedError, NoBackendError) as error:
                results[name, spec] = {"refused": str(error).splitlines()[0]}
            except Exception as error:  # noqa: BLE001 - one backend's defect is a row, not the end
                results[name, spec] = {"failed": f"{type(error).__name__}: {error}"}
    say(f"timing {len(calls)} calls, {ROUNDS} rounds")
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    gc.collect()
    for turn in range(ROUNDS + 2):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            taken = time.perf_counter() - began
            if turn >= 2:  # the first two warm up
                times[key].append(1e3 * taken)
    for (name, spec), taken_ms in times.items():
        low, middle, high = statistics.quantiles(taken_ms, n=4)
        base = times.get((name, "softmax"))
        results[name, spec] |= {
            "milliseconds": middle,
            "spread": [low, high],
            "versus_softmax": middle / statistics.median(base) if base else None,
        }
    return results


def show(result: dict[str, Any], console: Console) -> None:
    """Print the table, and where the pictures are."""
    q = tuple(result["shape"]["q"])
    table = Table(title=f"Japanese vowels, q {q} float32", title_justify="left")
    for name in ("preset", "backend"):
        table.add_column(name, overflow="fold")
    for name in ("error / budget", "ms", "x softmax", "head distance"):
        table.add_column(name, justify="right")
    for preset in result["presets"]:
        for name, r in preset["backends"].items():
            distance = f"{preset['redundancy']['mean']:.3f}"
            row = [escape(preset["spec"]), escape(name)]
            if "milliseconds" in r:
                ratio = r["versus_softmax"]
                error = r["error_over_budget"]
                colour = "" if error <= 1.0 else "[bold red]"
                row += [
                    f"{colour}{error:.3f}",
                    f"{r['milliseconds']:.2f}",
                    "" if ratio is None else f"{ratio:.2f}",
                    distance,
                ]
            else:
                row += [escape(r.get("refused") or r["failed"]), "", "", distance]
            table.add_row(*row)
    console.print(table)
    console.print(
        "error / budget: up to 1 is what rounding explains. head distance: mean L2 distance "
        "between two heads' weights, over all utterances; the smaller, the more redundant. "
        "Short sequences: the times are mostly overhead; `pdcore bench` has long ones."
    )
    console.print(escape(result["dataset"]))
    for path in result["files"]:
        console.print(f"wrote {escape(path)}", soft_wrap=True)
