"""The options of NVRTC with which CuPy compiles the kernels; test_cupy_options.py asks CuPy."""

from __future__ import annotations

from pdcore_backends.cupy.runtime import OPTIONS as OWN

#: The options that CuPy adds to those of the backend. By ``-ftz=true`` float32 arithmetic takes
#: subnormal numbers, those below 1.2e-38, for 0, and gives 0 in their place.
ADDED = ("-ftz=true", "--device-as-default-execution-space")
OPTIONS = (*OWN, *ADDED)
