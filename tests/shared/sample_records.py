"""Build records like those of real runs, for the tests of the page and of the comparison."""

from __future__ import annotations

import random
from typing import Any

from pdcore.backend import FEATURES
from pdcore_conformance.record.writing import KIND, SCHEMA, Record, Run, new_run

GROUPS = {
    "axes": "every_kernel every_normalization every_support heads_on_pooled_keys normalisers",
    "pairs": "kernel_and_normalization normalization_and_heads support_and_heads mask_and_bias",
    "statistics": "variance_is_biased two_passes eps_is_added_once keys_not_queries padding",
    "support": "causal_upper_left window_edges offset_per_sequence empty_rows_are_zero",
    "shapes": "awkward_lengths one_key two_keys strided read_only empty_sizes grouped_queries",
    "conditioning": "offset_keys constant_feature outlier_first_key long_sequences half_scores",
    "lse": "is_the_log_normaliser merges_over_key_blocks",
    "gradients": "by_autodiff by_attention_vjp of_params of_bias zero_for_empty_rows",
    "declared": "deterministic batch_invariant thread_safe refusals",
}
SPECS = [
    "softmax",
    "bn",
    "bn+sh(1,1,2,2)",
    "causal+bn(statistics=prefix)",
    "linear",
    "gaussian(0.2)",
]
DTYPES = ("float16", "bfloat16", "float32", "float64")
BACKENDS = ["numpy:cpu", "strict:cpu", "torch:cpu", "torch:cuda", "jax:cpu", "mine:cpu"]
CPU = "AMD EPYC 9R14 96-Core Processor"


def sample_case(name: str, **more: Any) -> Any:
    """Return a case that passed, with the fields in `more` replaced."""
    ratio = more.pop("ratio", 0.25)
    verdicts = (
        {}
        if ratio is None
        else {
            "out": {"ratio": ratio, "error": 2e-6 * ratio, "budget": 2e-6},
            "lse": {"ratio": ratio / 3, "error": 1e-7 * ratio, "budget": 3e-7},
        }
    )
    return {
        "id": name,
        "group": name.partition("::")[0],
        "level": "core",
        "features": ["float32", "exponential"],
        "outcome": "passed",
        "ratio": ratio,
        "verdicts": verdicts,
        "message": None,
        "seconds": 0.02,
        **more,
    }


def sample_run(name: str, cases: list[Any], **more: Any) -> Run:
    """Return a run of these cases, with the fields in `more` replaced."""
    backend, device = name.split(":")
    run = new_run(backend, device)
    run.update(
        created="2026-11-24T05:00:00Z",
        commit="4f0c2a9d61e87b35c0aa",
        dirty=False,
        seconds=93.1,
        versions={"pdcore": "0.1.0", "python": "3.11.7", "numpy": "2.4.6"},
        environment={
            "cpu": CPU,
            "cores": 2,
            "threads": 2,
            "blas": "openblas 0.3.30",
            "load": 0.31,
            "memory_gib": 15.4,
            "platform": "Linux-6.1-x86_64",
            "gpu": None,
        },
        precision="float32 matrix products in float32; float64 in float64",
        capabilities=dict.fromkeys(FEATURES, "full"),
        cases=sorted(cases, key=lambda case: case["id"]),
    )
    run.update(more)  # type: ignore[typeddict-item]
    for case in run["cases"]:
        run["counts"][case["outcome"]] += 1
    return run


def sample_record(*runs: Run) -> Record:
    """Return a record of these runs."""
    return {"schema": SCHEMA, "kind": KIND, "runs": list(runs)}


def sample_speed(seed: int = 0, name: str = "numpy", scale: float = 1.0) -> Any:
    """Return measurements like those of `pdcore bench`."""
    rng = random.Random(seed)
    peers = ["textbook NumPy", "torch SDPA", "literal Attention-BN", "spec softmax"]
    ratios: list[Any] = []
    for peer in peers:
        for spec in ("softmax", "bn") if peer != "literal Attention-BN" else ("bn",):
            for shape in ([1, 8, 1024, 64], [1, 8, 4096, 64]):
                for direction in ("forward", "forward+backward"):
                    if peer == "spec softmax" and spec == "softmax":
                        continue
                    ratio = scale * rng.choice([0.62, 0.95, 1.02, 1.4, 2.39, 5.5])
                    least = 2.0 if peer == "textbook NumPy" else None
                    ratios.append(
                        {
                            "spec": spec,
                            "shape": shape,
                            "dtype": "float32",
                            "direction": direction,
                            "peer": peer,
                            "ratio": ratio,
                            "interval": [ratio * 0.93, ratio * 1.06],
                            "rounds": 11,
                            "seconds": {
                                name: [0.049, 0.05, 0.053],
                                peer: [0.049 * ratio, 0.05 * ratio, 0.06 * ratio],
                            },
                            "at_least": least,
                            "at_most": None,
                            "met": None if least is None else ratio >= least,
                        }
                    )
    growth = []
    for spec, power in (("softmax", 1.96), ("bn", 1.93), ("linear", 1.02)):
        for direction, share in (("forward", 1.0), ("forward+backward", 3.1)):
            lengths = [1024, 4096, 16384]
            middle = [share * 0.012 * (n / 1024) ** power for n in lengths]
            growth.append(
                {
                    "spec": spec,
                    "dtype": "float32",
                    "direction": direction,
                    "lengths": lengths,
                    "seconds": [[0.97 * t, t, 1.05 * t] for t in middle],
                    "factor": 4**power,
                    "interval": [4**power * 0.97, 4**power * 1.04],
                    "from": 4096,
                    "to": 16384,
                    "at_least": 3.4 if spec == "linear" else 13.0,
                    "at_most": 5.0 if spec == "linear" else 18.0,
                    "met": True,
                }
            )
    memory = [
        {
            "spec": spec,
            "shape": [1, 8, 16384, 64],
            "dtype": "float32",
            "direction": direction,
            "way": way,
            "mib": mib,
            "at_most": 64.0,
            "met": mib <= 64.0,
        }
        for spec, direction, way, mib in (
            ("softmax", "forward", "tracemalloc", 35.3),
            ("softmax", "forward", "resident", 41.0),
            ("bn", "forward", "tracemalloc", 36.1),
            ("bn", "forward+backward", "resident", 71.9),
        )
    ]
    return {
        "grid": "full",
        "threads": 2,
        "notes": ["one note"],
        "seconds": 80.0,
        "load": 0.42,
        "numerics": [
            {
                "spec": spec,
                "shape": [1, 8, 1024, 64],
                "dtype": "float32",
                "by": name,
                "error_over_budget": {"out": 0.11, "lse": 0.04},
                "ok": True,
            }
            for spec in SPECS
        ],
        "red": False,
        "ratios": ratios,
        "growth": growth,
        "memory": memory,
        "figures": [
            {
                "name": "attention() at (1, 1, 8, 8): warm overhead",
                "value": 14.2,
                "unit": "us",
                "interval": [13.8, 14.9],
                "at_least": None,
                "at_most": 20.0,
                "met": True,
            },
            {
                "name": "import pdcore: time over import numpy",
                "value": 1.71,
                "unit": "x",
                "interval": [1.66, 1.80],
                "at_least": None,
                "at_most": 1.5,
                "met": False,
            },
        ],
        "missing_peers": [
            {"peer": "onnxruntime Attention", "reason": "not installed: pip install onnxruntime"}
        ],
    }


def sample_cases(seed: int, every: int = 1) -> list[Any]:
    """Return about 700 cases with random errors, or every `every`-th of them."""
    rng = random.Random(seed)
    words = {"softmax": "exponential", "bn": "batch", "linear": "features", "gauss": "gaussian"}
    hints = {
        "window": ["window"],
        "offset": ["offset"],
        "mask": ["mask", "bias"],
        "normal": ["count"],
        "padding": ["key_mask"],
        "grouped": ["gqa"],
        "lse::": ["lse"],
        "vjp": ["vjp"],
        "autodiff": ["autodiff"],
        "every_kernel": ["cosine", "polynomial", "softcap"],
        "determ": ["deterministic"],
        "batch_inv": ["batch_invariant"],
        "thread": ["thread_safe"],
    }
    cases = []
    for group, names in GROUPS.items():
        for name in names.split():
            for spec in SPECS:
                for dtype in DTYPES:
                    features = [dtype, *(f for w, f in words.items() if spec.startswith(w))]
                    features += ["causal", "prefix"] if "causal" in spec else []
                    features += ["head_scaling"] if "sh(" in spec else []
                    for hint, extra in hints.items():
                        features += extra if hint in f"{group}::{name}" else []
                    hard = 0.7 * ("condition" in group) + 0.5 * (dtype == "float16")
                    easy = 1.6 * (group == "lse") + 0.9 * (dtype == "float64")
                    ratio = min(0.97, rng.lognormvariate(-2.6 + hard - easy, 0.5))
                    ratio = None if group == "declared" else ratio
                    level = "core" if group in ("axes", "statistics", "support") else "optional"
                    cases.append(
                        sample_case(
                            f"{group}::{name}[{spec}-{dtype}]",
                            ratio=ratio,
                            features=features,
                            level=level,
                            seconds=rng.random() / 20,
                        )
                    )
    return cases[::every]


def full_record(every: int = 1) -> Record:
    """Return a record of six runs with failures of every kind, and an unavailable backend."""
    runs = []
    for seed, name in enumerate(BACKENDS):
        run = sample_run(name, sample_cases(seed, every), speed=sample_speed(seed, name))
        _spoil(run, random.Random(seed))
        runs.append(run)
    torch, cuda, mine = runs[2], runs[3], runs[5]
    torch["versions"] = {**torch["versions"], "torch": "2.13.0+cpu"}
    cuda["versions"] = {**torch["versions"], "torch": "2.13.0+cu130"}
    cuda["environment"] = {
        **cuda["environment"],
        "cpu": "Intel Xeon Platinum 8481C",
        "cores": 16,
        "gpu": {
            "name": "NVIDIA H200",
            "memory_gib": 139.8,
            "driver": "580.65",
            "capability": "9.0",
        },
    }
    assert cuda["speed"] is not None
    cuda["speed"]["memory"] = [
        {**entry, "way": "device"}
        for entry in cuda["speed"]["memory"]
        if entry["way"] != "resident"
    ]
    mine["speed"] = None
    runs[1]["speed"] = None
    missing = sample_run(
        "cupy:cuda",
        [],
        available=False,
        reason="not installed: pip install 'pdcore[cupy]'",
        capabilities={},
        precision="",
        seconds=0.1,
    )
    return sample_record(*runs, missing)


def _spoil(run: Run, rng: random.Random) -> None:
    """Change some cases of a run to the outcomes other than passed."""
    name = run["backend"]
    for case in run["cases"]:
        if "compile" not in case["features"] and case["group"] == "declared":
            if "refusals" in case["id"]:
                case.update(outcome="refusal verified", message="refused: dropout is not supported")
                case["features"] = ["dropout"]
            elif rng.random() < 0.4:
                case.update(outcome="not claimed", message="not claimed: batch_invariant")
        if name == "mine" and "two_passes" in case["id"] and "float32" in case["features"]:
            ratio = rng.choice([3.2, 41.0, 2211.0])
            case["verdicts"]["out"].update(ratio=ratio, error=2e-6 * ratio)
            case.update(
                outcome="failed",
                ratio=ratio,
                message=f"error over budget: out {ratio:.3g}, lse 0.083\n"
                "  at (batch 0, head 3): error 6.4e-06, budget 2e-06\n"
                "  a one-pass variance, E[x^2] - E[x]^2, gives such errors",
            )
        if name == "mine" and case["id"] == "support::empty_rows_are_zero[bn-float16]":
            verdict = {"ratio": float("inf"), "error": float("inf"), "budget": 1e-3}
            case.update(
                outcome="failed",
                ratio=float("inf"),
                verdicts={"out": verdict},
                message="NaN in out at (0, 2, 5, 0), where the oracle is 0",
            )
        if name == "mine" and case["id"] == "shapes::strided[linear-float64]":
            case.update(
                outcome="error",
                ratio=None,
                verdicts={},
                message="fixture 'arrays' broke: MemoryError",
            )
        if name == "jax" and "half_scores" in case["id"] and "bfloat16" in case["features"]:
            case.update(
                outcome="known failure",
                message="XLA on CPU sums bfloat16 products in bfloat16: openxla/xla#12345",
            )
    run["capabilities"]["dropout"] = "unsupported"
    run["capabilities"]["axis_name"] = "not_implemented"
    run["counts"] = dict.fromkeys(run["counts"], 0)
    for case in run["cases"]:
        run["counts"][case["outcome"]] += 1
