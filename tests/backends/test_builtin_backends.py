"""The built-in backends of array-api-strict, PyTorch, JAX and CuPy."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_cases import Case, cotangents, mapped, normal_case

import pdcore
from pdcore.backend import FEATURES, BackendInfo, Inputs, Request
from pdcore.dispatch import FLOATS
from pdcore.dispatch.binding import _exchange
from pdcore.errors import NoBackendError, UnsupportedError
from pdcore.plugins import registry as plugins
from pdcore_conformance.frameworks import framework
from pdcore_conformance.judge.budget import expect, judge

DOCS = Path(__file__).resolve().parents[2] / "docs" / "backends.md"
NAMES = ("numpy", "strict", "torch", "jax", "cupy")
WORDS = {"full": "yes", "unsupported": "no", "not_implemented": "not yet"}

HERE = [
    "strict",
    pytest.param("torch", marks=pytest.mark.torch),
    pytest.param("jax", marks=pytest.mark.jax),
]
SPECS = (
    "softmax(softcap=2)+causal",
    "gaussian(gamma=0.3)+h(count)",
    "linear+causal",
    "bn",
    "causal+bn(statistics=prefix,eps=0.1)",
    "bn(beta=param,eps=0.1)+sh(1,2)",
    "random_features(6,1)+bn",
    "cosine(scale=2)+sparse(2,1)",
)


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


# --- numbers --------------------------------------------------------------------------------------


def calls(text: str, dtype: Any) -> Iterator[Case]:
    case = normal_case(text, n=20, m=23, d=4, dtype=dtype)
    yield case
    real = np.random.default_rng(1).random((2, 23)) < 0.8
    yield replace(case, call={**case.call, "key_mask": real, "offset": np.asarray([2, -1])})


def dtypes(name: str) -> list[str]:
    info = plugins.registered()[name]
    # What takes the time on JAX is compiling; the conformance suite has all of them.
    some = ("float32", "bfloat16") if name == "jax" else FLOATS
    return [dtype for dtype in some if info.support(dtype) == "full"]


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("name", HERE)
def test_every_dtype_is_within_its_budget(name: str, text: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    library = framework(plugins.registered()[name].library)
    for dtype in dtypes(name):
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        with library.precision(dtype):
            for case in calls(text, np.dtype(kind)):
                q, k, v = map(library.asarray, case.qkv)
                out, lse = pdcore.attention(
                    q, k, v, case.spec, **mapped(case.call, library.asarray), return_lse=True
                )
                assert library.dtype_of(out) == dtype
                found = {"out": library.asnumpy(out), "lse": library.asnumpy(lse)}
                for verdict in judge(found, expect(*case.qkv, case.spec, **case.call)).values():
                    assert verdict.ok, f"{case} {dtype}: {verdict}"


@pytest.mark.parametrize("name", HERE)
def test_both_ways_to_gradients_agree(name: str) -> None:
    library = framework(plugins.registered()[name].library)
    for text in ("bn", "causal+bn(statistics=prefix,eps=0.1)", "linear+causal"):
        case = normal_case(text, n=9, m=11)
        with library.precision("float64"):
            arrays = dict(zip("qkv", map(library.asarray, case.qkv), strict=True))
            d = tuple(map(library.asarray, cotangents(case, case.reference()[1])))
            _, _, vjp = pdcore.attention_vjp(*arrays.values(), case.spec)
            want = pdcore.attention_vjp(*case.qkv, case.spec)[2](*map(library.asnumpy, d))
            ways = [vjp(*d)]
            if library.has_autodiff:

                def function(x: Any, spec: Any = case.spec) -> Any:
                    return pdcore.attention(x["q"], x["k"], x["v"], spec, return_lse=True)

                ways.append(library.vjp(function, arrays, d)[1])
            for gradients in ways:
                for n, x in want.items():
                    np.testing.assert_allclose(
                        library.asnumpy(gradients[n]), x, rtol=0, atol=1e-11 * np.max(np.abs(x))
                    )


@pytest.mark.parametrize("name", HERE)
def test_exchange_with_numpy(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 4), dtype=np.float32)
    want = pdcore.attention(*x, "bn")
    for choice in (name, f"{name}:cpu"):
        out = pdcore.attention(*x, "bn", backend=choice)
        assert type(out) is np.ndarray
        np.testing.assert_allclose(out, want, rtol=0, atol=1e-6)
    library = framework(plugins.registered()[name].library)
    with library.precision("float32"):
        back = pdcore.attention(*map(library.asarray, x), "bn", backend="numpy", device="cpu")
        assert library.is_array(back)
        np.testing.assert_allclose(library.asnumpy(back), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_eight_threads(name: str) -> None:
    library = framework(plugins.registered()[name].library)
    with library.precision("float32"):
        cases = [
            normal_case(text, seed=i, n=30, m=29, d=4, dtype=np.float32)
            for i, text in enumerate(SPECS[:4])
        ]
        given = [tuple(map(library.asarray, case.qkv)) for case in cases]
        backend = plugins.load_backend(name)

        def run(index: int) -> Any:
            return pdcore.attention(*given[index], cases[index].spec)

        want = [library.asnumpy(run(i)) for i in range(4)]
        with ThreadPoolExecutor(8) as threads:
            for index, out in zip(
                range(64), threads.map(run, [i % 4 for i in range(64)]), strict=True
            ):
                np.testing.assert_allclose(library.asnumpy(out), want[index % 4], rtol=0, atol=1e-6)
        backend.synchronize()
        assert backend.versions()


# --- PyTorch --------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Iterator[Any]:
    module = pytest.importorskip("torch")
    before = module.backends.mkldnn.matmul.fp32_precision
    yield module
    module.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.torch
@pytest.mark.parametrize("chosen", ["tf32", "bf16"])
def test_torch_refuses_float32_in_less(torch: Any, chosen: str) -> None:
    x = torch.ones(3, 1, 2, 5, 4)
    layer = pdcore.bind("bn")
    layer(*x)  # the choice of a backend is kept, and the switch may be turned after it
    _, _, vjp = pdcore.attention_vjp(*x)
    torch.backends.mkldnn.matmul.fp32_precision = chosen
    reason = f"matrix products on cpu are set to {chosen}, which is not float32"
    with pytest.raises(UnsupportedError, match=reason):
        layer(*x)
    with pytest.raises(UnsupportedError, match=reason):
        vjp(x[0])
    with pytest.raises(NoBackendError, match=reason):
        pdcore.bind("bn")(*x)
    assert any(reason in why for why in pdcore.explain(*x, "bn").reasons["torch"])
    for dtype in (torch.float64, torch.float16):  # these do not depend on it
        assert pdcore.attention(*x.to(dtype), "bn").dtype == dtype
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    assert layer(*x).shape == (1, 2, 5, 4)


@pytest.mark.torch
def test_torch_autocast_does_not_reach_inside(torch: Any) -> None:
    x = torch.randn(3, 1, 2, 30, 8)
    want, level, vjp = pdcore.attention_vjp(*x, "gaussian(gamma=0.3)")
    d = torch.ones_like(want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x[0] @ x[1].mT).dtype == torch.bfloat16
        assert torch.equal(pdcore.attention(*x, "gaussian(gamma=0.3)"), want)
        again, lse, pull = pdcore.attention_vjp(*x, "gaussian(gamma=0.3)")
        assert torch.equal(again, want)
        assert torch.equal(lse, level)
        weights = pdcore.attention_weights(*x, "gaussian(gamma=0.3)")
        assert torch.equal(pull(d)["k"], vjp(d)["k"])
    assert torch.equal(weights, pdcore.attention_weights(*x, "gaussian(gamma=0.3)"))


@pytest.mark.torch
def test_torch_vjp_keeps_the_graph(torch: Any) -> None:
    x = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    d = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    by_hand = pdcore.attention_vjp(*x, "bn")[2](d)["q"]
    (native,) = torch.autograd.grad(pdcore.attention(*x, "bn"), x, d, create_graph=True)
    torch.testing.assert_close(by_hand, native[0], rtol=0, atol=1e-13)
    # And both can be differentiated again, with the same result.
    (a,), (b,) = (
        torch.autograd.grad(g.square().sum(), x, retain_graph=True) for g in (by_hand, native[0])
    )
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert a.abs().max() > 0


@pytest.mark.torch
def test_torch_does_not_cut_gradients_for_others(torch: Any) -> None:
    x = torch.ones(3, 1, 2, 5, 4, requires_grad=True)
    with pytest.raises(UnsupportedError, match="would cut it; detach them"):
        pdcore.attention(*x, backend="numpy")
    beta = torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedError, match="would cut it; detach them"):
        pdcore.attention(*x.detach(), "bn(beta=param)", params={"beta": beta}, backend="numpy")


@pytest.mark.torch
def test_torch_without_a_cuda_device(torch: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UnsupportedError, match=r"device cuda: PyTorch .* sees no CUDA device"):
        pdcore.attention(*np.ones((3, 1, 2, 5, 4)), backend="torch:cuda")
    with pytest.raises(NoBackendError, match=r"device cuda: PyTorch .* sees no CUDA device"):
        pdcore.attention(*torch.ones(3, 1, 2, 5, 4), device="cuda")


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_traces_a_bound_layer_that_has_run(torch: Any) -> None:
    x = torch.randn(3, 2, 2, 20, 8)
    layer = pdcore.bind("bn+sh(1,2)")
    want = layer(*x)
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: layer(q, k, v), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*x), want)


# --- JAX ------------------------------------------------------------------------------------------


@pytest.fixture
def jax() -> Iterator[Any]:
    module = pytest.importorskip("jax")
    before = module.config.jax_enable_x64
    module.config.update("jax_enable_x64", False)
    yield module
    module.config.update("jax_enable_x64", before)


@pytest.mark.jax
def test_jax_without_64_bits(jax: Any) -> None:
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 5, 4))
    with pytest.raises(UnsupportedError, match="float64 inputs: JAX has 64 bits only under"):
        pdcore.attention(*x, backend="jax")
    # Positions are whole numbers of 32 bits then, without a warning.
    y = jax.numpy.asarray(x, dtype=jax.numpy.float32)
    want = pdcore.attention(*x, "causal+sh(1,2)", offset=np.asarray([1, 3]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = pdcore.attention(*y, "causal+sh(1,2)", offset=jax.numpy.asarray([1, 3]))
        pdcore.attention(
            *y, "linear+causal", offset="end", key_mask=jax.numpy.ones((2, 5), dtype=bool)
        )
    np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=1e-6)


@pytest.mark.jax
def test_jax_products_are_marked_highest(jax: Any) -> None:
    x = jax.numpy.ones((3, 1, 2, 5, 4))
    layer = pdcore.bind("bn")

    def loss(x: Any) -> Any:
        return layer(*x).sum()

    for function in (loss, jax.grad(loss)):
        text = str(jax.make_jaxpr(function)(x))
        assert text.count("dot_general[") >= 2
        assert text.count("Precision.HIGHEST, Precision.HIGHEST") == text.count("dot_general[")
    pull = str(jax.make_jaxpr(lambda x: pdcore.attention_vjp(*x, "bn")[2](x[0])["q"])(x))
    assert pull.count("Precision.HIGHEST, Precision.HIGHEST") == pull.count("dot_general[") > 0


@pytest.mark.jax
def test_jax_compiles_once_for_each_shape(jax: Any) -> None:
    from pdcore_backends.jax import impl

    x = jax.numpy.ones((3, 1, 2, 5, 4))
    impl._attention.clear_cache()
    for _ in range(3):
        pdcore.attention(*x, "causal")
        pdcore.attention(*x, "causal", offset=jax.numpy.asarray(2))
    assert impl._attention._cache_size() == 2
    for offset in range(3):
        pdcore.attention(*x, "causal", offset=jax.numpy.asarray(offset))
    assert impl._attention._cache_size() == 2
    pdcore.attention(*x, "causal", offset=1)  # known in Python: what is skipped depends on it
    assert impl._attention._cache_size() == 3


@pytest.mark.jax
def test_jax_devices(jax: Any) -> None:
    x = jax.numpy.ones((3, 1, 2, 5, 4))
    with pytest.raises(UnsupportedError, match=r"device cpu:9: JAX has devices \[0\] of cpu"):
        pdcore.attention(*x, backend="jax:cpu:9")
    if jax.default_backend() == "cpu":
        with pytest.raises(UnsupportedError, match=r"device cuda: .*cuda"):
            pdcore.attention(*x, backend="jax:cuda")


# --- CuPy -----------------------------------------------------------------------------------------


class FakeError(RuntimeError):
    """What CUDA's runtime raises."""


@pytest.fixture
def cupy_backend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Give the backend on a CuPy that finds no driver, as it does on a machine without a GPU."""

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
    dropped = request_of("bfloat16")._replace(dropout=0.1)
    assert "dropout in training: unsupported" in cupy_backend.refusals(dropped)
    assert not any("bfloat16" in why for why in cupy_backend.refusals(dropped))


class Entered:
    """A CUDA stream, or a device, that notes when it is entered and left."""

    def __init__(self, said: list[str], *what: Any) -> None:
        self.said, self.what = said, " ".join(map(str, what))

    def __enter__(self) -> None:
        self.said.append(f"enter {self.what}")

    def __exit__(self, *error: object) -> None:
        self.said.append(f"leave {self.what}")


class Place:
    """What the backend sees of a device of PyTorch, the second of its kind."""

    index = 1

    def __init__(self, kind: str) -> None:
        self.type = kind

    def __str__(self) -> str:
        return f"{self.type}:{self.index}"


class Tensor:
    """What the backend sees of an array of PyTorch; its views say what was asked for."""

    def __init__(self, dtype: str, device: str = "cuda") -> None:
        self.dtype, self.shape = f"torch.{dtype}", (2,)
        self.device = Place(device)

    def view(self, dtype: Any) -> tuple[str, Any]:
        return f"bits of {self.dtype}", dtype


Tensor.__module__ = "torch"


@pytest.fixture
def streams(cupy_backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give a CuPy and a PyTorch that note on which stream they are called."""
    said: list[str] = []
    cupy = sys.modules["cupy"]

    def from_dlpack(x: Any) -> Any:
        said.append("from_dlpack")
        return types.SimpleNamespace(taken=x, view=lambda dtype: (x, dtype))

    monkeypatch.setattr(cupy, "from_dlpack", from_dlpack, raising=False)
    monkeypatch.setattr(cupy, "asarray", lambda x: "copied", raising=False)
    for name, made in {
        "Device": lambda index: Entered(said, "device", index),
        "Stream": types.SimpleNamespace(
            null=Entered(said, "default stream"),
            from_external=lambda x: Entered(said, "stream", *x.__cuda_stream__()),
        ),
    }.items():
        monkeypatch.setattr(cupy.cuda, name, made, raising=False)
    torch = types.ModuleType("torch")
    torch.__dict__.update(
        int16="torch's int16",
        compiler=types.SimpleNamespace(is_compiling=lambda: False),
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
    # Also where its own device is named; another one takes a copy.
    cupy_backend.exchange(x, "cuda:1")
    assert streams[2] == "from_dlpack"
    streams.clear()
    assert cupy_backend.exchange(x, "cuda") == "copied"
    assert streams == ["enter device 0", "leave device 0"]


def test_bfloat16_goes_through_dlpack_by_its_bits(cupy_backend: Any, streams: list[str]) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    (taken, bits), dtype = cupy_backend.exchange(Tensor("bfloat16"))
    assert (taken, bits, dtype) == ("bits of torch.bfloat16", "torch's int16", ml_dtypes.bfloat16)
    given = np.asarray([1.0, -2.0], ml_dtypes.bfloat16)
    torch = types.SimpleNamespace(
        from_dlpack=lambda x: np.from_dlpack(x), bfloat16=np.dtype(ml_dtypes.bfloat16)
    )
    back = cupy_backend.give(given, torch)
    assert back.dtype == given.dtype
    assert np.shares_memory(back, given)
    plain = np.ones(3, np.float16)
    assert np.shares_memory(cupy_backend.give(plain, torch), plain)


def test_a_result_that_is_home_is_not_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(plugins.load_backend("numpy"))
    monkeypatch.setattr(kind, "exchange", lambda self, x, device=None: np.asarray(x))
    monkeypatch.setattr(kind, "give", lambda self, x, namespace: pytest.fail("given"))
    strict = pytest.importorskip("array_api_strict")
    inputs = Inputs(*[strict.asarray(np.ones((1, 2, 5, 4)))] * 3)
    backend = plugins.load_backend("numpy")
    _, back = _exchange(backend, inputs, "array_api_strict", None)
    x = strict.asarray(np.ones(2))
    assert back is not None
    assert back(x) is x


def test_a_call_on_foreign_arrays_runs_on_their_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = pytest.importorskip("array_api_strict")
    kind = type(plugins.load_backend("numpy"))
    said: list[str] = []

    def noted(name: str) -> None:
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *given: said.append(name) or method(*given))

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
