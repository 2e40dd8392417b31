"""NumPy arrays in every layout of memory, given to a backend of another library.

Run as ``python layouts.py BACKEND``: a defect may abort the process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pdcore


def _read_only(x: Any) -> Any:
    x = x.copy()
    x.setflags(write=False)
    return x


def _mapped(x: Any) -> Any:
    file = Path(tempfile.mkdtemp()) / "x.npy"
    np.save(file, x)
    return np.load(file, mmap_mode="r")


def _misaligned(x: Any) -> Any:
    room = np.zeros(x.nbytes + 1, dtype=np.uint8)[1:]
    y = room.view(x.dtype).reshape(x.shape)
    y[...] = x
    return y


def _field(x: Any) -> Any:
    table = np.zeros(x.shape, dtype=[("pad", "u1"), ("x", x.dtype)])
    table["x"] = x
    return table["x"]


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "negative strides": lambda x: x[..., ::-1],
    "negative strides of all axes": lambda x: x[(slice(None, None, -1),) * x.ndim],
    "every second": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "stride 0": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "Fortran order": np.asfortranarray,
    "read-only": _read_only,
    "memory-mapped": _mapped,
    "misaligned": _misaligned,
    "a field": _field,
}


def arguments() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 2, 6, 4)).astype(np.float32)
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": rng.random((2, 2, 6, 6)) < 0.8,
        "key_mask": rng.random((2, 6)) < 0.8,
        "bias": rng.standard_normal((2, 2, 6, 6)).astype(np.float32),
        "offset": np.array([1, 3]),
        "params": rng.standard_normal((2, 4)).astype(np.float32),
    }


def call(x: dict[str, Any], backend: str) -> Any:
    x = dict(x)
    params = {"beta": x.pop("params")}
    q, k, v = (x.pop(name) for name in "qkv")
    spec = "causal+bn(beta=param,allow_leak=true)"
    return pdcore.attention(q, k, v, spec, params=params, backend=backend, **x)


def main(backend: str) -> None:
    for name in arguments():
        for layout, laid in LAYOUTS.items():
            print(name, layout, flush=True)  # the last line names the case of an abort
            x = arguments()
            x[name] = laid(x[name])
            out = call(x, backend)
            assert type(out) is np.ndarray
            assert out.flags.writeable
            np.testing.assert_allclose(out, call(x, "numpy"), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    main(sys.argv[1])
