"""The calls that are made first on a GPU: each kernel once, and each code path once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from ..judge.calls import Call
from ..judge.subject import Evidence, Subject
from ..judge.ways import run
from ..runner.plugin import parse_backend

__all__ = [
    "ALL_PATHS",
    "KERNELS",
    "PATHS",
    "PROFILED",
    "UNDER_TOOLS",
    "Judged",
    "judge",
    "make",
]


class Judged(NamedTuple):
    """A call, and by which function it is judged, see `Subject.judge`."""

    call: Call
    through: str

    @property
    def name(self) -> str:
        """The name of the step."""
        return f"{self.through}-{self.call.label}"


def _by_name(*judged: Judged) -> dict[str, Judged]:
    return {one.name: one for one in judged}


# One full tile and a partial one, of rows and of keys.
_SMALL = Call(lead=(1,), heads=4, key_heads=2, rows=70, keys=83, dim=40, value_dim=24)
_WIDE = _SMALL.but(dim=64, value_dim=64)

#: Calls that together run every CUDA kernel of the CuPy backend.
KERNELS: Mapping[str, Judged] = _by_name(
    Judged(_SMALL.but(spec="causal+sh(1,2)"), "vjp"),
    Judged(_SMALL.but(dtype="float16", bias="rows"), "vjp"),
    Judged(_SMALL.but(spec="sparse(20,3)", dtype="bfloat16"), "vjp"),
    Judged(_SMALL.but(spec="bn"), "vjp"),
    Judged(_SMALL.but(spec="linear+sparse(9,2)", dtype="float64"), "vjp"),
    Judged(_SMALL.but(spec="polynomial", key_mask="right"), "vjp"),
    Judged(_WIDE.but(spec="causal+sh(1,2)", dtype="bfloat16"), "vjp"),
    Judged(_SMALL.but(dtype="float16", dim=128, value_dim=128, bias="rows"), "vjp"),
    Judged(_WIDE.but(spec="bn", dtype="bfloat16"), "forward"),
    Judged(_SMALL.but(spec="linear"), "vjp"),
    Judged(_SMALL.but(spec="causal+linear"), "vjp"),
    Judged(_SMALL.but(spec="causal+random_features(8)"), "vjp"),
    # Every row sees several keys: two keys that nearly agree in a feature have no variance there.
    Judged(_SMALL.but(spec="causal+bn(statistics=prefix)", offset=13), "vjp"),
)

#: Those of `KERNELS` that run under a sanitizer: scores on both kinds of cores, statistics, scans.
UNDER_TOOLS = tuple(list(KERNELS)[i] for i in (0, 3, 6, 10))

#: Calls under Nsight Compute, of which only whole grids tell something.
PROFILED: Mapping[str, Judged] = _by_name(
    Judged(
        _WIDE.but(dtype="bfloat16", lead=(2,), heads=16, key_heads=16, rows=4096, keys=4096), "vjp"
    )
)

# Several blocks of rows and keys, and a partial one.
_LONG = Call(lead=(2,), heads=4, key_heads=4, rows=520, keys=520, dim=64, value_dim=64)
_HALF = tuple(_LONG.but(dtype=dtype) for dtype in ("bfloat16", "float16"))
_FUSED = tuple(
    Judged(call.but(spec=spec), through)
    for call in (*_HALF, _LONG)
    for spec in ("softmax", "causal", "bn", "sh(1,1,2,2)")
    for through in ("forward", "autodiff")
)
#: Code paths of each backend, those of the speed first.
PATHS: Mapping[str, Mapping[str, Judged]] = {
    "torch": _by_name(
        *_FUSED,
        *(
            Judged(_HALF[0].but(**words), through)
            for words in (
                {"dim": 128, "value_dim": 128, "spec": "bn"},
                {"spec": "causal+bn(statistics=prefix)", "keys": 536, "offset": 16},
                {"spec": "sparse(100,20)"},
                {"bias": "rows"},
                {"key_mask": "right"},
                {"heads": 8, "key_heads": 2},
                {"rows": 1, "keys": 2060},
            )
            for through in ("forward", "autodiff")
        ),
        Judged(_LONG.but(spec="linear"), "autodiff"),
        Judged(_LONG.but(spec="causal+linear"), "autodiff"),
        Judged(_HALF[0].but(spec="bn"), "vjp"),
    ),
    "jax": _by_name(
        *_FUSED,
        *(
            Judged(_HALF[0].but(**words), "autodiff")
            for words in (
                {"spec": "causal+bn(statistics=prefix)", "keys": 536, "offset": 16},
                {"bias": "rows"},
                {"heads": 8, "key_heads": 2},
                {"rows": 1, "keys": 2060},
            )
        ),
        Judged(_LONG.but(spec="causal+linear"), "autodiff"),
    ),
    "cupy": _by_name(
        *(Judged(one.call, "vjp") for one in _FUSED if one.through == "autodiff"),
        Judged(_HALF[0].but(spec="bn", dim=128, value_dim=128), "forward"),
        Judged(_HALF[0].but(heads=8, key_heads=2), "vjp"),
        Judged(_HALF[0].but(rows=1, keys=2060), "vjp"),
    ),
}

#: All of them by name.
ALL_PATHS: Mapping[str, Judged] = {
    name: judged for paths in PATHS.values() for name, judged in paths.items()
}


def judge(target: str, judged: Judged) -> tuple[Evidence, dict[str, Any]]:
    """Compare a call with the oracle; return the evidence, and the steps of the plan that ran.

    Raises
    ------
    Nonconforming
        Where a result is wrong.
    """
    subject = Subject(*parse_backend(target))
    gradients = judged.through != "forward"
    request = judged.call.request(
        subject.info.library, subject.device, lse=gradients, vjp=judged.through == "vjp"
    )
    plan = subject.backend.fuse(request.lower(), request)
    subject.judge(judged.call, judged.through)
    return subject.evidence, {"plan": list(plan.steps)}


def make(target: str, names: list[str]) -> int:
    """Make calls of `KERNELS` or `PROFILED`, every array in an allocation of its own."""
    from ..judge.calls import drawn

    subject = Subject(*parse_backend(target))
    with subject.framework.unpooled():
        for name in names:
            call, through = {**KERNELS, **PROFILED}[name]
            with closing(run(subject, call, drawn(call), through)) as results:
                for _ in islice(results, 2):  # the second of "vjp" is the pullback
                    pass
    subject.framework.synchronize()
    return len(names)
