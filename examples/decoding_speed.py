"""Measure a step of decoding with carried state beside a DynamicCache with PyTorch's attention.

One attention layer, (1, 8, 1, 64) a step, float32 on the CPU: new keys and values go into the
cache, and the attention of one query over all of them is computed. Ways are interleaved, and
medians are printed; ``--png`` draws them. Run it on an idle machine:

    python examples/decoding_speed.py --png docs/decoding.png
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import pdcore

SPECS = {
    "softmax": "causal",
    "bn(statistics=prefix)": "causal+bn(statistics=prefix)",
    "linear": "causal+linear",
}
BASELINE = "DynamicCache + SDPA"
HEADS, DIM = 8, 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and draw the picture if asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--past", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--steps", type=int, default=100, help="steps of each way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--png", type=Path, help="where to draw the picture")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        times = {past: measure(past, options.steps) for past in options.past}
    print(table(times))
    if options.png:
        draw(options.png, times)
    return 0


def measure(past: int, steps: int) -> dict[str, float]:
    """Return the median time in seconds of a step after `past` positions, by name."""
    keys, values = torch.randn(2, 1, HEADS, past, DIM)
    q, k, v = torch.randn(3, 1, HEADS, 1, DIM)
    warm = 5
    ways = {BASELINE: dynamic(keys, values, q, k, v)}
    for name, spec in SPECS.items():
        ways[name] = carried(spec, keys, values, q, k, v, past + steps + warm)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + warm):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if step >= warm:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in seconds.items()}


def dynamic(keys: Any, values: Any, q: Any, k: Any, v: Any) -> Callable[[], Any]:
    """Return a step of a DynamicCache with PyTorch's attention."""
    cache = DynamicCache()
    cache.update(keys, values, 0)
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(q, *cache.update(k, v, 0))


def carried(
    spec: str, keys: Any, values: Any, q: Any, k: Any, v: Any, capacity: int
) -> Callable[[], Any]:
    """Return a step of a decoder that writes into its state."""
    decode = pdcore.decoder(spec)
    state = decode.init(1, HEADS, DIM, DIM, capacity, like=keys)
    _, state = decode.extend(state, keys, keys, values, in_place=True)

    def step() -> None:
        nonlocal state
        _, state = decode.extend(state, q, k, v, in_place=True)

    return step


def table(times: dict[int, dict[str, float]]) -> str:
    """Return a Markdown table: microseconds a step, and times over those of the baseline."""
    names = list(next(iter(times.values())))
    lines = ["| past | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for past, row in times.items():
        base = row[BASELINE]
        cells = [f"{row[BASELINE] * 1e6:,.0f} µs"]
        cells += [f"{row[n] * 1e6:,.0f} µs, {row[n] / base:.2f}" for n in names[1:]]
        lines.append(f"| {past:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, times: dict[int, dict[str, float]]) -> None:
    """Draw the time of a step over the number of positions before it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    pasts = list(times)
    styles = zip(times[pasts[0]], ("#000000", "#0072b2", "#d55e00", "#009e73"), "os^D", strict=True)
    for name, colour, marker in styles:
        axes.plot(
            pasts, [times[p][name] * 1e3 for p in pasts], marker=marker, color=colour, label=name
        )
    axes.set(xscale="log", yscale="log", xlabel="positions before the step", ylabel="ms a step")
    axes.set_xticks(pasts, [f"{past:,}" for past in pasts], minor=False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=130)


if __name__ == "__main__":
    raise SystemExit(main())
