"""Launches of the CuPy backend: on the current stream, without waiting, within the limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from emulated_checks import request_of
from emulated_cupy import EmulatedBackend, EmulatedRuntime
from reference_cases import Case, normal_case

from pdcore.errors import UnsupportedError
from pdcore_backends.cupy.launches import CheckedKernel, Limits, Usage


class OnDevice(np.ndarray):
    """An array that raises when the host reads a value, which would wait for the device."""

    def _read(self, *args: Any) -> Any:
        raise AssertionError("the host reads what the device has computed")

    __bool__ = __int__ = __float__ = __index__ = __complex__ = __iter__ = _read
    item = tolist = tobytes = _read

    def __getitem__(self, key: Any) -> Any:
        _counted(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _counted(key)
        super().__setitem__(key, value)


def _counted(key: Any) -> None:
    """Raise for an index by a mask, because CuPy reads the number of selected entries."""
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, np.ndarray) and part.dtype == np.bool_ and part.ndim:
            raise AssertionError("the host reads how many entries a mask selects")


class Recording(EmulatedRuntime):
    """A runtime that records the keywords of launches; all of its memory is `OnDevice`."""

    def __init__(self) -> None:
        super().__init__()
        self.keywords: list[dict[str, Any]] = []

    def compile(self, code: str, name: str, shared: int = 0) -> Any:
        kernel = super().compile(code, name, shared)

        def launch(grid: Any, block: Any, arguments: Any, **keywords: Any) -> None:
            self.keywords.append(keywords)
            kernel(grid, block, arguments, **keywords)

        return launch

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return super().empty(shape, dtype).view(OnDevice)


def run(backend: EmulatedBackend, case: Case, kind: type = np.ndarray) -> None:
    """Run a call, forward and backward, on arrays of a type."""
    inputs = case.inputs()
    arrays = {
        name: x.view(kind) if isinstance(x, np.ndarray) else x
        for name, x in inputs._asdict().items()
    }
    plan = backend.fuse(case.plan(), request_of(case))
    out, lse, vjp = backend.attention_vjp(plan, inputs._replace(**arrays))
    vjp(out, lse)


def clip(*args: Any, **more: Any) -> Any:
    """Stand for a clip on CuPy, whose bounds are copied from the host and masks counted there."""
    raise AssertionError("a clip waits for the device")


@pytest.mark.parametrize(
    ("spec", "call"),
    [
        (
            "causal",
            {"offset": np.asarray([1, -2]), "key_mask": np.arange(14).reshape(2, 7) % 3 > 0},
        ),
        ("softmax", {"bias": np.ones((4, 5, 7)), "mask": np.arange(7) > 2}),
        ("causal+sh(1,2)", {}),
        ("bn(beta=param)+h(count)", {"offset": "end"}),
        ("causal+bn(statistics=prefix)", {}),
        ("causal+h(count)", {}),
        ("window(2,1)+h(count)", {"offset": np.asarray([1, -2])}),
    ],
)
def test_launches_are_on_the_current_stream_and_nothing_is_read(
    spec: str, call: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Recording()
    backend = EmulatedBackend(runtime)
    monkeypatch.setattr(backend.xp, "clip", clip)
    case = normal_case(spec, n=5, m=7, dtype=np.float32, **call)
    run(backend, case, OnDevice)
    assert runtime.launches
    # CuPy launches on the current stream unless a stream is passed.
    assert all(set(keywords) == {"shared_mem"} for keywords in runtime.keywords)


def test_a_read_on_the_host_is_detected() -> None:
    x = np.ones(3).view(OnDevice)
    with pytest.raises(AssertionError, match="the host reads"):
        bool((x > 0).all())
    with pytest.raises(AssertionError, match="how many entries"):
        x[x > 0]
    with pytest.raises(AssertionError, match="how many entries"):
        x[x > 0] = 1


# --- under capture --------------------------------------------------------------------------------


def test_a_kernel_is_not_compiled_while_its_stream_is_captured() -> None:
    backend = EmulatedBackend()
    case = normal_case("causal", n=5, m=7, dtype=np.float32)
    backend.runtime.captured = True
    once = r"scores_forward<32> is not compiled yet.*make the same call once before"
    with pytest.raises(UnsupportedError, match=once):
        run(backend, case)
    backend.runtime.captured = False
    backend.attention(backend.fuse(case.plan(), request_of(case)), case.inputs())
    backend.runtime.captured = True
    with pytest.raises(UnsupportedError, match="forward and backward if both are captured"):
        run(backend, case)
    backend.runtime.captured = False
    run(backend, case)
    backend.runtime.launches.clear()
    backend.runtime.captured = True
    run(backend, case, OnDevice)
    kinds = [name.partition("<")[0] for name in backend.runtime.launches]
    assert kinds == ["scores_forward", "scores_delta", "scores_rows", "scores_keys", "scores_keys"]


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("sh(1,2,1,2)", "put heads of one scale beside each other"),
        ("random_features(4)+sparse(2,2)", "phi is array calls"),
        ("random_features(4)", "phi is array calls"),
    ],
)
def test_calls_that_cannot_be_captured_are_refused(spec: str, reason: str) -> None:
    backend = EmulatedBackend()
    case = normal_case(spec, n=5, m=7, heads=4, group=1, dtype=np.float32)
    run(backend, case)
    backend.runtime.captured = True
    with pytest.raises(UnsupportedError, match=f"captured into a CUDA graph, and .*{reason}"):
        run(backend, case)


# --- within the limits ----------------------------------------------------------------------------

USAGE = Usage(registers=200, threads=256, shared=1024)
LIMITS = Limits(threads=1024, registers=65536, shared=48 * 1024, grid=(2**31 - 1, 65535, 65535))


@pytest.mark.parametrize(
    ("grid", "block", "shared", "reason"),
    [
        ((2**31 - 1, 65535), (256,), 47 * 1024, ""),
        ((2**31,), (256,), 0, r"a grid of \(2147483648,\) blocks, .* 2147483647 along x"),
        ((1, 65536), (256,), 0, r"a grid of \(1, 65536\) .* 65535 along y"),
        ((1,), (1025,), 0, "a block of 1025 threads, and the device has 1024"),
        ((1,), (16, 32), 0, "512 threads of 200 registers each, and a block .* has 65536"),
        ((1,), (256,), 47 * 1024 + 1, "49153 bytes of shared memory, and a block .* has 49152"),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(
    grid: tuple[int, ...], block: tuple[int, ...], shared: int, reason: str
) -> None:
    launched: list[Any] = []
    kernel = CheckedKernel("k<32>", lambda *given, **_: launched.append(given), USAGE, LIMITS)
    if not reason:
        kernel(grid, block, (), shared_mem=shared)
        assert launched == [(grid, block, ())]
        return
    with pytest.raises(UnsupportedError, match=rf"kernel k<32>: {reason}"):
        kernel(grid, block, (), shared_mem=shared)
    assert not launched


def test_registers_count_even_where_the_driver_allows_the_threads() -> None:
    kernel = CheckedKernel("k", print, USAGE._replace(registers=255, threads=1024), LIMITS)
    assert "512 threads of 255 registers" in kernel.refusal((1,), (512,), 0)


def test_the_limits_of_the_device_are_read_once() -> None:
    backend = EmulatedBackend()
    case = normal_case("causal", n=5, m=7, dtype=np.float32)
    for _ in range(2):
        run(backend, case)
    assert backend.runtime.asked == 1
    small = EmulatedRuntime()
    small.shared = 16 * 1024
    with pytest.raises(UnsupportedError, match="scores_forward<32>: 35840 bytes of shared memory"):
        run(EmulatedBackend(small), case)
    assert not small.launches
