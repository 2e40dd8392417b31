"""A class like `cupy.RawModule`, whose kernels run on the CPU, on NumPy arrays."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from .arguments import Parameter, Pointer, Region, Values, take
from .build import build, flushes, load
from .settings import SCHEDULES, SHARED_DEFAULT, Settings, settings
from .source import kernel_names, shared_alignment

__all__ = ["EmulationError", "Kernel", "RawModule", "empty"]

_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_BLOCK_LIMITS = (1024, 1024, 64)
_MAX_PARAMETERS = 256
# The state of the runtime and the signal handlers are global to the process.
_LOCK = threading.Lock()


class EmulationError(RuntimeError):
    """Undefined behaviour of a kernel; the message states the thread, and what it did."""


class _Launch(ctypes.Structure):
    """A launch, as in native/runtime.h."""

    _fields_ = [
        ("body", ctypes.c_void_p),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
        ("regions", ctypes.POINTER(Region)),
        ("pointers", ctypes.POINTER(Pointer)),
        ("n_regions", ctypes.c_int),
        ("n_pointers", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("shared_limit", ctypes.c_size_t),
        ("alignment", ctypes.c_size_t),
        ("schedule", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("flushes", ctypes.c_int),
    ]


def empty(shape: int | Sequence[int], dtype: Any = np.float32) -> np.ndarray:
    """Return an array of NaN, or of -1, so that entries that no kernel wrote can be recognised."""
    x = np.empty(shape, dtype)
    x.view(np.uint8 if x.ndim else x.dtype)[...] = 0xFF if x.ndim else np.nan
    return x


class RawModule:
    """CUDA C++ source, compiled for the CPU at the first use of a kernel.

    Parameters
    ----------
    code : str
        The source, as for NVRTC.
    options : sequence of str
        NVRTC's options. Definitions, include paths and ``-ftz=true`` are used, options that only
        matter on a device are not, and others are refused.
    name_expressions : sequence of str
        Instances of templates, ``"scores<float, 64>"``. Kernels declared `extern "C"` need none.
    """

    def __init__(
        self,
        code: str | None = None,
        *,
        options: Sequence[str] = (),
        name_expressions: Sequence[str] | None = None,
        backend: str = "nvrtc",
    ) -> None:
        if code is None:
            raise TypeError("code: the emulator compiles source, not a cubin or PTX")
        if backend != "nvrtc":
            raise ValueError(f"backend: got {backend!r}, expected 'nvrtc'")
        if isinstance(options, str):
            raise TypeError("options: expected a tuple of str")
        self.code = code
        self.options = tuple(options)
        self.name_expressions = list(name_expressions or ())
        self._names = kernel_names(code, self.name_expressions)
        self._libraries: dict[Settings, ctypes.CDLL] = {}

    def compile(self, log_stream: Any = None) -> None:
        """Compile now, to raise compile errors early."""
        self._library(settings())

    def get_function(self, name: str) -> Kernel:
        """Return a kernel by its name or name expression."""
        if name not in self._names:
            raise ValueError(f"no kernel {name!r}; known: {', '.join(self._names) or 'none'}")
        return Kernel(self, name)

    def _library(self, use: Settings) -> ctypes.CDLL:
        key = Settings(compute_capability=use.compute_capability, sanitize=use.sanitize)
        if key not in self._libraries:
            path = build(self.code, self._names, self.options, key)
            self._libraries[key] = load(path, use.sanitize)
        return self._libraries[key]


class Kernel:
    """A kernel of a `RawModule`, called as ``kernel(grid, block, args, shared_mem=...)``."""

    def __init__(self, module: RawModule, name: str) -> None:
        self.name = name
        self._module = module
        self._index = module._names.index(name)
        self._max_dynamic = SHARED_DEFAULT

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """The limit of dynamic shared memory of a launch; above 48 KiB it must be set."""
        return self._max_dynamic

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        use = settings()
        if not 0 <= size <= use.shared_limit:
            raise ValueError(
                f"{self.name}: {size} bytes of dynamic shared memory; sm_{use.compute_capability} "
                f"has {use.shared_limit} for a block"
            )
        self._max_dynamic = size

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        """Run the kernel until it ends.

        Parameters
        ----------
        grid, block : tuple of 1 to 3 ints
        args : sequence of ndarray or NumPy numbers
        shared_mem : int
            Bytes of dynamic shared memory.
        stream : object
            Accepted as by CuPy; every launch ends before the call does.
        """
        use = settings()
        launch = _Launch(
            grid=_extent("grid", grid, _GRID_LIMITS),
            block=_extent("block", block, _BLOCK_LIMITS),
            shared=self._shared(shared_mem),
            shared_limit=use.shared_limit if self._max_dynamic > SHARED_DEFAULT else SHARED_DEFAULT,
            alignment=shared_alignment(self._module.code),
            schedule=SCHEDULES.index(use.schedule),
            seed=use.seed,
            flushes=flushes(self._module.options),
        )
        if (threads := int(np.prod(list(launch.block)))) > 1024:
            raise ValueError(
                f"block: {tuple(launch.block)} are {threads} threads; 1024 are allowed"
            )
        library = self._module._library(use)
        values = take(self.name, args, self._parameters(library))
        self._run(library, launch, values)

    def _shared(self, size: int) -> int:
        if not 0 <= size <= self._max_dynamic:
            raise ValueError(
                f"{self.name}: shared_mem={size}, allowed are {self._max_dynamic}; set the "
                "kernel's max_dynamic_shared_size_bytes"
            )
        return int(size)

    def _parameters(self, library: ctypes.CDLL) -> list[Parameter]:
        parameters = (Parameter * _MAX_PARAMETERS)()
        count = getattr(library, f"cuda_on_cpu_describe_{self._index}")(parameters)
        return list(parameters[:count])

    def _run(self, library: ctypes.CDLL, launch: _Launch, values: Values) -> None:
        addresses = [ctypes.addressof(slot) for slot in values.slots]
        addresses += [addresses[slot] + at for slot, at in values.places]
        launch.arguments = (ctypes.c_void_p * max(1, len(addresses)))(*addresses)
        launch.regions = (Region * max(1, len(values.regions)))(*values.regions)
        launch.pointers = (Pointer * max(1, len(values.pointers)))(*values.pointers)
        launch.n_regions, launch.n_pointers = len(values.regions), len(values.pointers)
        function = getattr(library, f"cuda_on_cpu_launch_{self._index}")
        function.restype = ctypes.c_char_p
        with _LOCK:
            message = function(ctypes.byref(launch))
        if message is not None:
            raise EmulationError(f"{self.name}: {message.decode()}")


def _extent(what: str, sizes: Sequence[int], limits: Sequence[int]) -> Any:
    if not isinstance(sizes, tuple) or not 1 <= len(sizes) <= 3:
        raise TypeError(f"{what}: got {sizes!r}, expected a tuple of 1 to 3 ints")
    full = tuple(map(int, sizes)) + (1,) * (3 - len(sizes))
    for size, limit, axis in zip(full, limits, "xyz", strict=True):
        if not 1 <= size <= limit:
            raise ValueError(f"{what}: {axis} is {size}, expected 1 to {limit}")
    return (ctypes.c_uint * 3)(*full)
