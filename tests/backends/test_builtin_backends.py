"""The built-in backends of array-api-strict, PyTorch, JAX and CuPy."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builtin_checks import (  # noqa: F401 - collected here too
    test_a_row_whose_scores_overflow_is_right_or_no_number,
    test_both_ways_to_gradients_agree,
    test_eight_threads,
    test_every_dtype_is_within_its_budget,
    test_exchange_with_numpy,
    test_scores_that_overflow_below_are_not_left_out,
)

import pdcore
from pdcore.backend import FEATURES, BackendInfo, Inputs, Request
from pdcore.dispatch.exchange import exchange
from pdcore.errors import NoBackendError
from pdcore.plugins import registry as plugins

DOCS = Path(__file__).resolve().parents[2] / "docs" / "backends.md"
NAMES = ("numpy", "strict", "torch", "jax", "cupy")
WORDS = {"full": "yes", "unsupported": "no", "not_implemented": "not yet"}


@pytest.fixture(params=["numpy", "strict"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def infos() -> dict[str, BackendInfo]:
    return {name: plugins.registered()[name] for name in NAMES}


# --- declarations ---------------------------------------------------------------------------------


def test_the_built_in_backends_come_by_the_plugins_door() -> None:
    assert not set(NAMES) - set(plugins.registered()), plugins.broken
    for name, info in infos().items():
        assert info.load.startswith(f"pdcore_backends.{name}.impl:")
        assert set(info.capabilities) == set(FEATURES)  # nothing forgotten
        assert plugins._entries[name].owner.built_in
        assert plugins.candidates(info.library)[0] == name


def table() -> str:
    """Write the declarations as the table of docs/backends.md."""
    lines = [f"| feature | meaning | {' | '.join(NAMES)} |", "|---|---|" + "---|" * len(NAMES)]
    for feature, meaning in FEATURES.items():
        cells = [WORDS[info.support(feature)] for info in infos().values()]
        lines.append(f"| `{feature}` | {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_what_is_declared() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), f"put into {DOCS.name}:\n{table()}"


# --- CuPy -----------------------------------------------------------------------------------------


class FakeError(RuntimeError):
    """The error of CUDA's runtime."""


@pytest.fixture
def cupy_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the backend on a fake CuPy without a driver, as on a machine without a GPU."""

    def count() -> int:
        raise FakeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    runtime = types.SimpleNamespace(getDeviceCount=count, CUDARuntimeError=FakeError)
    cupy = types.ModuleType("cupy")
    cupy.__dict__.update(__version__="0.0", cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.delitem(sys.modules, "pdcore_backends.cupy.impl", raising=False)
    module = importlib.import_module("pdcore_backends.cupy.impl")
    monkeypatch.delitem(sys.modules, "pdcore_backends.cupy.impl")
    return module.CupyBackend()


def request_of(dtype: str, device: str = "cuda:0") -> Request:
    shape = (1, 2, 5, 4)
    return Request(pdcore.parse("bn"), "cupy", dtype, device, shape, shape, shape)


def test_cupy_without_a_device_refuses_with_what_cuda_says(cupy_backend: Any) -> None:
    [reason] = cupy_backend.refusals(request_of("float32"))
    assert reason.startswith("CuPy 0.0 sees no CUDA device: cudaErrorInsufficientDriver: CUDA")
    assert "device cpu: runs on cuda" in cupy_backend.refusals(request_of("float32", "cpu"))
    assert cupy_backend.versions() == {"cupy": "0.0"}


def test_cupy_refuses_tf32_and_what_is_not_there(
    cupy_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUPY_TF32", "1")
    assert any("CUPY_TF32=1" in why for why in cupy_backend.refusals(request_of("float32")))
    assert not any("CUPY_TF32" in why for why in cupy_backend.refusals(request_of("float64")))
    cut = request_of("bfloat16")._replace(axis_name="rows")
    assert "sequence shards along a mapped axis: unsupported" in cupy_backend.refusals(cut)
    assert not any("bfloat16" in why for why in cupy_backend.refusals(cut))


class Entered:
    """A CUDA stream or device whose context records when it is entered and left."""

    def __init__(self, said: list[str], *what: Any) -> None:
        self.said, self.what = said, " ".join(map(str, what))

    def __enter__(self) -> None:
        self.said.append(f"enter {self.what}")

    def __exit__(self, *error: object) -> None:
        self.said.append(f"leave {self.what}")


class Place:
    """A fake PyTorch device, the second of its kind."""

    index = 1

    def __init__(self, kind: str) -> None:
        self.type = kind

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


class Tensor:
    """A fake PyTorch tensor, whose views return the dtype that the caller asks for."""

    def __init__(self, dtype: str, device: str = "cuda") -> None:
        self.dtype, self.shape = f"torch.{dtype}", (2,)
        self.device = Place(device)

    def view(self, dtype: Any) -> tuple[str, Any]:
        return f"bits of {self.dtype}", dtype


Tensor.__module__ = "torch"


@pytest.fixture
def streams(cupy_backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install a fake CuPy and PyTorch, and return the list in which they record their calls."""
    said: list[str] = []
    cupy = sys.modules["cupy"]

    def from_dlpack(x: Any) -> Any:
        said.append("from_dlpack")
        return types.SimpleNamespace(taken=x, view=lambda dtype: (x, dtype))

    monkeypatch.setattr(cupy, "from_dlpack", from_dlpack, raising=False)
    monkeypatch.setattr(cupy, "asarray", lambda x: "copied", raising=False)
    for name, fake in {
        "Device": lambda index: Entered(said, "device", index),
        "Stream": types.SimpleNamespace(
            null=Entered(said, "default stream"),
            from_external=lambda x: Entered(said, "stream", *x.__cuda_stream__()),
        ),
    }.items():
        monkeypatch.setattr(cupy.cuda, name, fake, raising=False)
    torch = types.ModuleType("torch")
    torch.__dict__.update(
        int16="torch's int16",
        compiler=types.SimpleNamespace(is_compiling=lambda: False),
        jit=types.SimpleNamespace(is_tracing=lambda: False),
        cuda=types.SimpleNamespace(
            current_stream=lambda device: types.SimpleNamespace(cuda_stream=STREAMS[device.index])
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(STREAMS, 1, 1234)
    return said


STREAMS: dict[int, int] = {}


def test_cupy_takes_tensors_on_the_current_stream_of_pytorch(
    cupy_backend: Any, streams: list[str]
) -> None:
    x = Tensor("float16")
    assert cupy_backend.exchange(x).taken is x
    on = [
        "enter device 1",
        "enter stream 0 1234",
        "from_dlpack",
        "leave stream 0 1234",
        "leave device 1",
    ]
    assert streams == on
    streams.clear()
    with cupy_backend.stream_of(x):
        streams.append("from_dlpack")
    assert streams == on
    streams.clear()
    STREAMS[1] = 0
    cupy_backend.exchange(x)
    assert streams[1:3] == ["enter default stream", "from_dlpack"]
    streams.clear()
    with cupy_backend.stream_of(Tensor("float16", "cpu")), cupy_backend.stream_of(np.ones(2)):
        assert streams == []
    # The same where the caller names the tensor's device; another device needs a copy.
    cupy_backend.exchange(x, "cuda:1")
    assert streams[2] == "from_dlpack"
    streams.clear()
    assert cupy_backend.exchange(x, "cuda") == "copied"
    assert streams == ["enter device 0", "leave device 0"]


def test_bfloat16_goes_through_dlpack_by_its_bits(cupy_backend: Any, streams: list[str]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    (taken, bits), dtype = cupy_backend.exchange(Tensor("bfloat16"))
    assert (taken, bits, dtype) == ("bits of torch.bfloat16", "torch's int16", ml_dtypes.bfloat16)
    result = np.asarray([1.0, -2.0], ml_dtypes.bfloat16)
    torch = types.SimpleNamespace(
        from_dlpack=lambda x: np.from_dlpack(x), bfloat16=np.dtype(ml_dtypes.bfloat16)
    )
    back = cupy_backend.give(result, torch)
    assert back.dtype == result.dtype
    assert np.shares_memory(back, result)
    plain = np.ones(3, np.float16)
    assert np.shares_memory(cupy_backend.give(plain, torch), plain)


def test_a_result_that_is_home_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(plugins.load_backend("numpy"))
    monkeypatch.setattr(kind, "exchange", lambda self, x, device=None: np.asarray(x))
    monkeypatch.setattr(kind, "give", lambda self, x, namespace: pytest.fail("given"))
    import array_api_strict as strict

    inputs = Inputs(*[strict.asarray(np.ones((1, 2, 5, 4)))] * 3)
    backend = plugins.load_backend("numpy")
    _, back = exchange(backend, inputs, "array_api_strict", None)
    x = strict.asarray(np.ones(2))
    assert back is not None
    assert back(x) is x


def test_a_call_on_foreign_arrays_runs_on_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    import array_api_strict as strict

    kind = type(plugins.load_backend("numpy"))
    said: list[str] = []

    def noted(name: str) -> None:
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *arguments: said.append(name) or method(*arguments))

    noted("attention_weights")
    noted("give")
    monkeypatch.setattr(kind, "stream_of", lambda self, x: Entered(said, type(x).__module__))
    x = [strict.asarray(np.ones((1, 2, 5, 4)))] * 3
    module = type(x[0]).__module__
    out, _ = pdcore.attention(*x, backend="numpy", return_lse=True)
    assert isinstance(out, type(x[0]))
    pdcore.attention_weights(*x, backend="numpy")
    assert said == [
        f"enter {module}",
        "give",
        "give",
        f"leave {module}",
        f"enter {module}",
        "attention_weights",
        "give",
        f"leave {module}",
    ]


def test_cupy_that_is_not_installed_is_a_reason() -> None:
    if importlib.util.find_spec("cupy") is not None:
        pytest.skip("it is installed")
    x = np.ones((3, 1, 2, 5, 4))
    with pytest.raises(NoBackendError, match=r"not installed: pip install 'pdcore\[cupy\]'"):
        pdcore.attention(*x, backend="cupy")
