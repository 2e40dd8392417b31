"""The measurements of the demo: error over budget, and time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pdcore.attention import bind
from pdcore.errors import NoBackendError, UnsupportedError
from pdcore.plugins import registry as plugins

from .recordings import PRESETS, Batch

__all__ = ["measure"]

#: Timed calls of each preset on each backend, after two that warm up.
ROUNDS = 15

#: Backend and spec.
Key = tuple[str, str]


def measure(
    batch: Batch, names: Sequence[str], say: Callable[[str], None]
) -> dict[Key, dict[str, Any]]:
    """Judge every preset on every backend, and time those that run, interleaved.

    Parameters
    ----------
    batch : Batch
        The call.
    names : sequence of str
        The backends.
    say : callable
        Called with a line about the work that begins.

    Returns
    -------
    dict
        By backend and spec: ``error_over_budget``, ``milliseconds``, ``spread`` (quartiles) and
        ``versus_softmax``, or the reason under ``refused`` or ``failed``.
    """
    results, calls = _judge(batch, names)
    say(f"timing {len(calls)} calls, {ROUNDS} rounds")
    times = _time(calls)
    for (name, spec), milliseconds in times.items():
        low, middle, high = statistics.quantiles(milliseconds, n=4)
        base = times.get((name, "softmax"))
        results[name, spec] |= {
            "milliseconds": middle,
            "spread": [low, high],
            "versus_softmax": middle / statistics.median(base) if base else None,
        }
    return results


def _judge(
    batch: Batch, names: Sequence[str]
) -> tuple[dict[Key, dict[str, Any]], dict[Key, Callable[..., Any]]]:
    """Return errors over budgets or refusals, and the calls that ran."""
    from ...judge.budget import expect, judge, worst

    results: dict[Key, dict[str, Any]] = {}
    calls: dict[Key, Callable[..., Any]] = {}
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
    return results, calls


def _time(calls: Mapping[Key, Callable[..., Any]]) -> dict[Key, list[float]]:
    """Return the milliseconds of each call, round by round."""
    times: dict[Key, list[float]] = {key: [] for key in calls}
    gc.collect()
    for turn in range(ROUNDS + 2):
        for key, call in calls.items():
            began = time.perf_counter()
            call()
            seconds = time.perf_counter() - began
            if turn >= 2:  # the first two warm up
                times[key].append(1e3 * seconds)
    return times
