"""The CuPy backend on a GPU, beyond the emulator: streams, graphs, arrays of other libraries.

Skipped where CuPy sees no device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pdcore

cupy = pytest.importorskip("cupy")
try:
    cupy.cuda.runtime.getDeviceCount()
except cupy.cuda.runtime.CUDARuntimeError as error:
    pytest.skip(f"no GPU: {error}", allow_module_level=True)

SHAPE = (2, 4, 130, 64)


def drawn(dtype: str = "float32") -> list[Any]:
    return [cupy.random.default_rng(seed).standard_normal(SHAPE).astype(dtype) for seed in range(3)]


def both(q: Any, k: Any, v: Any, spec: str = "causal") -> list[Any]:
    out, lse, vjp = pdcore.attention_vjp(q, k, v, spec)
    return [out, lse, *vjp(out).values()]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("spec", ["causal", "bn", "sh(1,1,2,2)"])
def test_a_graph_has_the_results_of_the_call(spec: str, dtype: str) -> None:
    x = drawn(dtype)
    expected = both(*x, spec)  # compiles
    pool = cupy.cuda.MemoryPool()  # must live as long as the graph
    stream = cupy.cuda.Stream(non_blocking=True)
    with cupy.cuda.using_allocator(pool.malloc), stream:
        stream.begin_capture()
        results = both(*x, spec)
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
    for a, b in zip(results, expected, strict=True):
        assert (a == b).all()
    # Other values in the same arrays.
    for array, other in zip(x, drawn(dtype)[::-1], strict=True):
        array[...] = other
    graph.launch(stream=stream)
    stream.synchronize()
    for a, b in zip(results, both(*x, spec), strict=True):
        assert (a == b).all()


def test_a_kernel_that_is_not_compiled_is_refused_under_capture() -> None:
    x = drawn("float64")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        with pytest.raises(pdcore.UnsupportedError, match="make the same call once before"):
            pdcore.attention(*x, "softmax(softcap=3.25)")
        stream.end_capture()


def test_a_call_does_not_wait_for_its_stream() -> None:
    x = drawn()
    pdcore.attention(*x)
    stream = cupy.cuda.Stream(non_blocking=True)
    busy = cupy.RawKernel(
        'extern "C" __global__ void busy(long long n) { long long t = clock64(); '
        "while (clock64() - t < n) {} }",
        "busy",
    )
    with stream:
        busy((1,), (1,), (np.int64(2 * 10**9),))  # about a second
        both(*x)
        assert not stream.done
    stream.synchronize()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_taken_without_a_copy_and_on_their_stream(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    from pdcore.plugins import load_backend

    x = [torch.randn(SHAPE, device="cuda").to(getattr(torch, dtype)) for _ in range(3)]
    backend = load_backend("cupy")
    assert backend.exchange(x[0]).data.ptr == x[0].data_ptr()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), backend.stream_of(x[0]):
        assert cupy.cuda.get_current_stream().ptr == stream.cuda_stream
    out = pdcore.attention(*x, "causal", backend="cupy")
    assert out.dtype == x[0].dtype
    expected = pdcore.attention(*x, "causal")
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)


def test_a_graph_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    x = [torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and leaves memory in the pool of this stream
            expected = pdcore.attention(*x, "causal", backend="cupy").clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = pdcore.attention(*x, "causal", backend="cupy")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(results, expected)
