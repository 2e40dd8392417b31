"""The cost of a training step: time, peak memory, and floating-point operations."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pdcore_conformance.bench.memory import run_python, status
from pdcore_conformance.bench.timing import interleaved

__all__ = ["BATCH", "CHANNELS", "CLASSES", "flops", "peak", "peak_here", "times"]

#: Sizes of the random series of a step.
BATCH, CHANNELS, CLASSES = 2, 12, 10

#: Variables of the environment that set the number of threads.
THREADS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def _step(spec: str, length: int, dim: int) -> Callable[[], None]:
    """Return a training step, on `BATCH` series, of a model whose heads have `dim` features."""
    import torch

    from pdcore_adapters.time_series.model import Classifier
    from pdcore_adapters.time_series.training import adamw, descend

    settings = sized(spec, dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(settings, CHANNELS, CLASSES).train()
        frames = torch.randn(BATCH, length, CHANNELS)
        targets = torch.randint(CLASSES, (BATCH,))
    real = torch.ones(BATCH, length, dtype=torch.bool)
    optimizer = adamw(model, settings)
    return lambda: descend(model, optimizer, settings, frames, real, targets)


def sized(spec: str, dim: int) -> Any:
    """Return the settings of a model whose heads have `dim` features."""
    from pdcore_adapters.time_series.model import Settings

    return Settings(spec=spec, width=Settings.heads * dim)


def times(specs: Sequence[str], length: int, dim: int, rounds: int) -> dict[str, list[float]]:
    """Time a training step of each spec, interleaved; seconds, by spec."""
    return interleaved({spec: _step(spec, length, dim) for spec in specs}, rounds)


def peak(spec: str, length: int, dim: int) -> float | None:
    """Measure the peak memory of a training step, in a separate process.

    Returns
    -------
    float or None
        MiB of weights, optimizer, activations and gradients; None where the system reports none.
    """
    code = f"from {__name__} import peak_here; peak_here({spec!r}, {length!r}, {dim!r})"
    variables = dict.fromkeys(THREADS, "1")
    # The folder of the examples is on the path of a script in it, not of a fresh interpreter.
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    mebibytes = json.loads(run_python(code, **variables))
    return None if mebibytes is None else float(mebibytes)


def peak_here(spec: str, length: int, dim: int) -> None:
    """Measure in this process, and print the figure as JSON.

    A tiny step comes before, which imports and starts all that stays.
    """
    _step(spec, 8, 4)()
    # From here on the peak counts anew; where that is not allowed, that of the imports stands.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = status("VmRSS")
    _step(spec, length, dim)()
    highest = status("VmHWM")
    print(json.dumps(None if before is None or highest is None else highest - before))


def flops(spec: str, length: int, dim: int) -> dict[str, int]:
    """Count the operations of one sequence, forward; a multiplication with its addition is two.

    Returns
    -------
    dict
        ``attention`` of all layers and ``model``, the matrix products that run, counted by
        PyTorch. Statistics are products too there; other elementwise work, the exponential
        included, is not counted.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    from pdcore_adapters.time_series.model import Classifier

    def fused(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
        return int(sdpa_flop_count(q, k, v))

    # The fused kernel of the CPU is not among those that PyTorch counts.
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused}
    settings = sized(spec, dim)
    model = Classifier(settings, CHANNELS, CLASSES).eval()
    attention = model.layers[0].attention
    q, k, v = torch.zeros(3, 1, settings.heads, length, dim)
    frames, real = torch.zeros(1, length, CHANNELS), torch.ones(1, length, dtype=torch.bool)
    params = dict(attention.arrays.items())

    def counted(call: Callable[[], Any]) -> int:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            call()
        return int(counter.get_total_flops())

    one_layer = counted(lambda: attention.attend(q, k, v, params=params))
    whole = counted(lambda: model(frames, real))
    return {"attention": settings.layers * one_layer, "model": whole}
