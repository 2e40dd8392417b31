"""What the suite asks of JAX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from framework_checks import (  # noqa: F401 - collected here too
    arrays,
    test_availability,
    test_forward_mode,
    test_map_and_compiler,
    test_poisoned_memory,
    test_reverse_mode,
    test_second_derivatives,
    test_there_and_back,
    test_what_is_no_array_of_the_library,
)

from pdcore_conformance.frameworks import Framework, framework


@pytest.fixture
def library() -> Framework:
    return framework("jax")


def test_jax_precision_is_the_processs() -> None:
    from concurrent.futures import ThreadPoolExecutor

    import jax

    def seen() -> tuple[Any, ...]:
        return jax.config.jax_enable_x64, jax.config.jax_default_matmul_precision

    before = seen()
    library = framework("jax")
    with ThreadPoolExecutor(1) as thread:
        for dtype in ("float64", "float32"):
            with library.precision(dtype):
                assert seen() == thread.submit(seen).result() == (dtype == "float64", "highest")
    assert seen() == before
    with library.precision("float32"):
        assert library.dtype_of(library.asarray(np.zeros(2, np.int64))) == "int32"
        with pytest.raises(TypeError, match="float64 only under precision"):
            library.asarray(np.zeros(2))


def test_jax_forgets_its_programs_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from pdcore_conformance.frameworks import on_jax

    monkeypatch.setattr(on_jax, "CLEARING", 3)
    library = on_jax.JaxFramework("jax")
    double = jax.jit(lambda x: 2 * x)
    sizes = []
    for _ in range(4):
        with library.precision("float32"):
            double(jax.numpy.ones(2))
        sizes.append(double._cache_size())
    assert sizes == [1, 1, 0, 1]
