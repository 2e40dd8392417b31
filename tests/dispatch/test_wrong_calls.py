"""Wrong calls: each raises the right type of error, with a message that names the argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import array_api_strict
import numpy as np
import pytest
from reference_cases import plain_info

import pdcore
from pdcore.errors import NoBackendError, SpecError, UnsupportedError
from pdcore.spec import AttentionSpec, FeatureMap

LEAD, HQ, HKV, N, M, D, DV = (2,), 4, 2, 3, 5, 6, 7


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype=dtype)


def operands() -> dict[str, Any]:
    return {"q": ones(2, HQ, N, D), "k": ones(2, HKV, M, D), "v": ones(2, HKV, M, DV)}


def strict(*shape: int) -> Any:
    return array_api_strict.ones(shape, dtype=array_api_strict.float32)


@dataclass(frozen=True)
class Wrong:
    """A call with some arguments exchanged, the error, and what its text must say."""

    error: type[Exception]
    says: tuple[str, ...]
    given: Mapping[str, Any]


def wrong(error: type[Exception], *says: str, **given: Any) -> Wrong:
    return Wrong(error, says, given)


CALLS: dict[str, Wrong] = {
    # types
    "q is a list": wrong(TypeError, "q: got builtins.list", "numpy.asarray(q)", q=[[1.0]]),
    "q is None": wrong(TypeError, "q: got builtins.NoneType", q=None),
    "q is a number": wrong(TypeError, "q: got builtins.float", q=1.0),
    "k is None": wrong(TypeError, "k: got builtins.NoneType", k=None),
    "v is a string": wrong(TypeError, "v: got builtins.str", v="values"),
    "q is a numpy scalar": wrong(TypeError, "q: got numpy.float32", q=np.float32(1.0)),
    "k is a masked array": wrong(
        TypeError, "k: got MaskedArray", "key_mask", k=np.ma.masked_array(ones(2, HKV, M, D))
    ),
    "q is a matrix": wrong(TypeError, "q: got matrix", "plain", q=ones(3, 4).view(np.matrix)),
    "mask is a list": wrong(TypeError, "mask: got builtins.list", mask=[True] * M),
    "key_mask is a list": wrong(TypeError, "key_mask: got builtins.list", key_mask=[[True] * M]),
    "bias is a number": wrong(TypeError, "bias: got builtins.float", bias=0.5),
    "params is a list": wrong(
        TypeError, "params: got list", "mapping", spec="bn(beta=param)", params=[ones(HKV)]
    ),
    "params is an array": wrong(
        TypeError, "params: got ndarray", "mapping", spec="conv1d", params=ones(HKV, 3, D)
    ),
    "params is an empty list": wrong(TypeError, "params: got list", "mapping", params=[]),
    "params is 0": wrong(TypeError, "params: got int", "mapping", params=0),
    "a param is a number": wrong(
        TypeError, "params['beta']: got builtins.float", spec="bn(beta=param)", params={"beta": 0.5}
    ),
    "spec is a number": wrong(TypeError, "spec: got int", "AttentionSpec", spec=3),
    "spec is None": wrong(TypeError, "spec: got NoneType", spec=None),
    "backend is a number": wrong(TypeError, "backend=", "got 3", "name", backend=3),
    "dropout is a string": wrong(TypeError, "dropout: got str", "float", dropout="0.1"),
    "dropout is a bool": wrong(TypeError, "dropout: got bool", dropout=True),
    # mixed libraries
    "k of another library": wrong(
        TypeError, "k: got an array of array_api_strict", "numpy like q", k=strict(2, HKV, M, D)
    ),
    "v of another library": wrong(
        TypeError, "v: got an array of array_api_strict", v=strict(2, HKV, M, DV)
    ),
    "bias of another library": wrong(
        TypeError, "bias: got an array of array_api_strict", bias=strict(N, M)
    ),
    "key_mask of another library": wrong(
        TypeError,
        "key_mask: got an array of array_api_strict",
        key_mask=array_api_strict.ones((2, M), dtype=array_api_strict.bool),
    ),
    "offset of another library": wrong(
        TypeError,
        "offset: got an array of array_api_strict",
        offset=array_api_strict.ones((2,), dtype=array_api_strict.int64),
    ),
    "a param of another library": wrong(
        TypeError,
        "params['beta']: got an array of array_api_strict",
        spec="bn(beta=param)",
        params={"beta": strict(HKV)},
    ),
    # dtypes
    "integer q": wrong(
        TypeError,
        "q: got dtype int64",
        "float16, bfloat16, float32, float64",
        q=ones(2, HQ, N, D, dtype=np.int64),
    ),
    "complex q": wrong(
        TypeError, "q: got dtype complex64", q=ones(2, HQ, N, D, dtype=np.complex64)
    ),
    "longdouble q": wrong(TypeError, "q: got dtype", q=ones(2, HQ, N, D, dtype=np.longdouble)),
    "object q": wrong(TypeError, "q: got dtype object", q=ones(2, HQ, N, D, dtype=object)),
    "k of another dtype": wrong(
        TypeError,
        "k: got dtype float64",
        "expected float32 like q",
        k=ones(2, HKV, M, D, dtype=np.float64),
    ),
    "v of another dtype": wrong(
        TypeError,
        "v: got dtype float16",
        "expected float32 like q",
        v=ones(2, HKV, M, DV, dtype=np.float16),
    ),
    "float mask": wrong(TypeError, "mask: got dtype float32", "bool", "bias", mask=ones(N, M)),
    "integer mask": wrong(TypeError, "mask: got dtype int64", mask=ones(N, M, dtype=np.int64)),
    "float key_mask": wrong(TypeError, "key_mask: got dtype float32", key_mask=ones(2, M)),
    "bool bias": wrong(TypeError, "bias: got dtype bool", "float32", bias=ones(N, M, dtype=bool)),
    "float64 bias": wrong(TypeError, "bias: got dtype float64", bias=ones(N, M, dtype=np.float64)),
    "float64 param": wrong(
        TypeError,
        "params['beta']: got dtype float64",
        "float32",
        spec="bn(beta=param)",
        params={"beta": ones(HKV, dtype=np.float64)},
    ),
    "float offset": wrong(TypeError, "offset: got float", "int", offset=1.5),
    "float offset array": wrong(TypeError, "offset: got dtype float32", offset=ones(2)),
    "bool offset": wrong(TypeError, "offset: got bool", offset=True),
    "bool offset array": wrong(TypeError, "offset: got dtype bool", offset=ones(2, dtype=bool)),
    "offset is a list": wrong(TypeError, "offset: got list", offset=[1, 2]),
    # shapes
    "q without heads": wrong(
        ValueError, "q: got shape (3, 6)", "at least three axes", q=ones(N, D)
    ),
    "k without heads": wrong(ValueError, "k: got shape (5, 6)", k=ones(M, D)),
    "other leading axes": wrong(
        ValueError, "q, k, v: got shapes", "(3, 2, 5, 6)", "leading axes", k=ones(3, HKV, M, D)
    ),
    "leading axis of 1": wrong(
        ValueError, "q, k, v: got shapes", "(1, 4, 3, 6)", q=ones(1, HQ, N, D)
    ),
    "v of another rank": wrong(ValueError, "q, k, v: got shapes", v=ones(HKV, M, DV)),
    "other features": wrong(
        ValueError, "k: got 5 features", "expected 6 like q", k=ones(2, HKV, M, 5)
    ),
    "no features": wrong(
        ValueError, "k: got 0 features", "at least 1", q=ones(2, HQ, N, 0), k=ones(2, HKV, M, 0)
    ),
    "v with fewer keys": wrong(
        ValueError, "v: got shape (2, 2, 4, 7)", "(2, 5) heads and keys", v=ones(2, HKV, 4, DV)
    ),
    "v with other heads": wrong(ValueError, "v: got shape (2, 4, 5, 7)", v=ones(2, 4, M, DV)),
    "heads that do not divide": wrong(
        ValueError,
        "q: got 4 heads",
        "multiple of the 3 heads of k",
        k=ones(2, 3, M, D),
        v=ones(2, 3, M, DV),
    ),
    "no key heads": wrong(
        ValueError, "multiple of the 0 heads", k=ones(2, 0, M, D), v=ones(2, 0, M, DV)
    ),
    "no query heads": wrong(ValueError, "q: got 0 heads", q=ones(2, 0, N, D)),
    "key_mask of other keys": wrong(
        ValueError, "key_mask: got shape (2, 4)", "expected (2, 5)", key_mask=ones(2, 4, dtype=bool)
    ),
    "key_mask with heads": wrong(
        ValueError, "key_mask: got shape (2, 2, 5)", key_mask=ones(2, HKV, M, dtype=bool)
    ),
    "key_mask that broadcasts": wrong(
        ValueError, "key_mask: got shape (1, 5)", "expected (2, 5)", key_mask=ones(1, M, dtype=bool)
    ),
    "mask of other keys": wrong(
        ValueError,
        "mask: got shape (3, 4)",
        "broadcasts to (2, 4, 3, 5)",
        mask=ones(N, 4, dtype=bool),
    ),
    "mask of key heads": wrong(
        ValueError, "mask: got shape (2, 3, 5)", mask=ones(HKV, N, M, dtype=bool)
    ),
    "mask of too many axes": wrong(
        ValueError, "mask: got shape (1, 2, 4, 3, 5)", mask=ones(1, 2, HQ, N, M, dtype=bool)
    ),
    "bias of other rows": wrong(
        ValueError, "bias: got shape (4, 5)", "broadcasts to (2, 4, 3, 5)", bias=ones(4, M)
    ),
    "offset for other sequences": wrong(
        ValueError, "offset: got shape (3,)", "() or (2,)", offset=ones(3, dtype=np.int64)
    ),
    "offset word": wrong(ValueError, "offset: got 'start'", "'end'", offset="start"),
    # params
    "missing param": wrong(
        ValueError, "params: 'beta' is missing", "(2,) or (2, 6)", spec="bn(beta=param)"
    ),
    "missing running variance": wrong(
        ValueError,
        "params: 'var' is missing",
        spec="bn(statistics=running)",
        params={"mean": ones(HKV, D)},
    ),
    "unknown param": wrong(
        ValueError,
        "no parameter 'bta'",
        "did you mean 'beta'?",
        spec="bn(beta=param)",
        params={"bta": ones(HKV)},
    ),
    "param for a spec without": wrong(
        ValueError, "softmax has no parameter 'beta'", params={"beta": ones(HKV)}
    ),
    "param of another shape": wrong(
        ValueError,
        "params['beta']: got shape (6,)",
        "(2,) or (2, 6)",
        spec="bn(beta=param)",
        params={"beta": ones(D)},
    ),
    "param per query head": wrong(
        ValueError,
        "params['beta']: got shape (4,)",
        spec="bn(beta=param)",
        params={"beta": ones(HQ)},
    ),
    "running mean per head": wrong(
        ValueError,
        "params['mean']: got shape (2,)",
        "expected (2, 6)",
        spec="bn(statistics=running)",
        params={"mean": ones(HKV), "var": ones(HKV, D)},
    ),
    # spec
    "unknown word": wrong(
        SpecError, "unknown word 'sofmax'", "did you mean 'softmax'?", spec="sofmax"
    ),
    "two kernels": wrong(
        SpecError, "'softmax' and 'relu' both set the kernel", spec="softmax+relu"
    ),
    "scales for other heads": wrong(
        ValueError, "3 scales", "softmax+sh(1,2,3)", "2 heads of k", spec="sh(1,2,3)"
    ),
    "scales for query heads": wrong(ValueError, "4 scales", spec="sh(1,1,2,2)"),
    "leak": wrong(UnsupportedError, "future leaks", "allow_leak=true", spec="causal+bn"),
    "prefix statistics of another kernel": wrong(
        UnsupportedError, "needs a kernel of inner products", spec="linear+bn(statistics=prefix)"
    ),
    "windows wider than the support": wrong(
        UnsupportedError, "never fits in sparse(1,0)", spec="sh(1,3)+sparse(1,0)"
    ),
    "bias without log": wrong(
        UnsupportedError,
        "bias: linear has no log kappa",
        "gaussian",
        spec="linear",
        bias=ones(N, M),
    ),
    "bias of random features": wrong(
        UnsupportedError,
        "bias: random_features has no log kappa",
        spec="random_features",
        bias=ones(N, M),
    ),
    "bias of pooled keys": wrong(
        UnsupportedError, "bias:", "softmax+sh(1,2) pools keys", spec="sh(1,2)", bias=ones(N, M)
    ),
    # what is asked for
    "unknown backend": wrong(
        ValueError, "unknown backend 'nmpy'", "did you mean 'numpy'?", backend="nmpy"
    ),
    "no backend named": wrong(ValueError, "empty list", backend=[]),
    "backend without a device": wrong(ValueError, "'numpy:'", backend="numpy:"),
    "dropout without a seed": wrong(
        ValueError, "seed: got None with dropout", "backend numpy draws no", dropout=0.1
    ),
    "shards anywhere": wrong(
        NoBackendError, "sequence shards along a mapped axis: unsupported", axis_name="rows"
    ),
    "a seed that is no number": wrong(ValueError, "seed: got '1'", dropout=0.1, seed="1"),
    "a seed that is true": wrong(TypeError, "seed: got bool", dropout=0.1, seed=True),
    "a negative seed": wrong(ValueError, "seed: got -1", "0 to 2**64 - 1", dropout=0.1, seed=-1),
    "a seed of more than 64 bits": wrong(ValueError, "seed: got", dropout=0.1, seed=2**64),
    "a seed that is a float": wrong(
        TypeError, "seed: got dtype float64", dropout=0.1, seed=np.zeros(())
    ),
    "several seeds": wrong(
        ValueError, "seed: got int64 (3,)", dropout=0.1, seed=np.zeros(3, np.int64)
    ),
    "dropout of 1": wrong(ValueError, "dropout: got 1.0", "0 <= p < 1", dropout=1.0),
    "negative dropout": wrong(ValueError, "dropout: got -0.1", dropout=-0.1),
    "dropout of nan": wrong(ValueError, "dropout: got nan", dropout=math.nan),
    "shards on numpy": wrong(
        UnsupportedError,
        "sequence shards along a mapped axis: unsupported",
        backend="numpy",
        axis_name="rows",
    ),
    "a device numpy has not": wrong(
        UnsupportedError, "numpy", "runs on cpu", backend="numpy", device="cuda"
    ),
}


def raised(call: Callable[[], Any], case: Wrong) -> None:
    with pytest.raises(case.error) as caught:
        call()
    # Not a subclass of another meaning, such as UnsupportedError for a wrong shape.
    assert caught.type is case.error, repr(caught.value)
    for text in case.says:
        assert text in str(caught.value), str(caught.value)


def test_there_are_enough_of_them() -> None:
    assert len(CALLS) >= 60


@pytest.mark.parametrize("name", CALLS)
def test_attention(name: str) -> None:
    case = CALLS[name]
    raised(lambda: pdcore.attention(**{**operands(), **case.given}), case)


ONLY_ATTENTION = {"dropout", "seed", "axis_name", "group"}


@pytest.mark.parametrize("name", [n for n in CALLS if not ONLY_ATTENTION & set(CALLS[n].given)])
def test_the_other_calls_say_the_same(name: str) -> None:
    case = CALLS[name]
    given = {**operands(), **case.given}
    raised(lambda: pdcore.attention_vjp(**given), case)
    raised(lambda: pdcore.attention_weights(**given), case)
    named = {n: given.pop(n) for n in ("spec", "backend", "device") if n in given}
    raised(lambda: pdcore.bind(named.pop("spec", "softmax"), **named)(**given), case)


def test_the_same_call_fails_again() -> None:
    # A refused call must not be cached as valid.
    bound = pdcore.bind("bn(beta=param)")
    good = {**operands(), "params": {"beta": ones(HKV)}}
    for _ in range(2):
        assert bound(**good).shape == (2, HQ, N, DV)
        raised(
            lambda: bound(**{**good, "params": {"beta": ones(3)}}),
            wrong(ValueError, "params['beta']: got shape (3,)"),
        )
        raised(lambda: bound(**{**good, "params": {}}), wrong(ValueError, "'beta' is missing"))
        raised(lambda: bound(**{**good, "offset": 1.5}), wrong(TypeError, "offset: got float"))
        raised(lambda: bound(**{**good, "mask": ones(N, M)}), wrong(TypeError, "mask"))
        raised(
            lambda: bound(**{**good, "offset": ones(3, dtype=np.int64)}),
            wrong(ValueError, "offset: got shape (3,)"),
        )
    plain = pdcore.bind("softmax")
    assert plain(**operands()).shape == (2, HQ, N, DV)
    raised(lambda: plain(**operands(), params=[]), wrong(TypeError, "params: got list"))


# --- attention_vjp --------------------------------------------------------------------------------

COTANGENTS: dict[str, Wrong] = {
    "shape": wrong(
        ValueError,
        "d_out: got",
        "(2, 4, 3, 6)",
        "expected",
        "(2, 4, 3, 7)",
        d_out=ones(2, HQ, N, D),
    ),
    "rank": wrong(ValueError, "d_out: got", d_out=ones(N, DV)),
    "lse shape": wrong(ValueError, "d_lse: got", "(2, 4, 3)", d_lse=ones(2, HQ, N, 1)),
    "library": wrong(
        TypeError, "d_out: got an array of array_api_strict", "numpy", d_out=strict(2, HQ, N, DV)
    ),
    "None": wrong(TypeError, "d_out: got builtins.NoneType", d_out=None),
    "number": wrong(TypeError, "d_out: got builtins.float", d_out=1.0),
    "lse list": wrong(TypeError, "d_lse: got builtins.list", d_lse=[0.0]),
    "dtype": wrong(
        TypeError, "d_out: got dtype float64", "float32", d_out=ones(2, HQ, N, DV, dtype=np.float64)
    ),
    "integer": wrong(TypeError, "d_out: got dtype int64", d_out=ones(2, HQ, N, DV, dtype=np.int64)),
    "lse dtype": wrong(
        TypeError, "d_lse: got dtype float16", d_lse=ones(2, HQ, N, dtype=np.float16)
    ),
}


@pytest.mark.parametrize("name", COTANGENTS)
def test_cotangents(name: str) -> None:
    _, _, vjp = pdcore.attention_vjp(**operands())
    case = COTANGENTS[name]
    raised(lambda: vjp(**{"d_out": ones(2, HQ, N, DV), **case.given}), case)
    assert set(vjp(ones(2, HQ, N, DV), ones(2, HQ, N))) == {"q", "k", "v"}


@dataclass(frozen=True)
class Forward(FeatureMap):
    """A feature map without a pullback."""

    word = "forward_only"

    def features(self, x: Any, *, xp: Any, params: Any) -> Any:
        return xp.exp(x)

    def latex(self) -> str:
        return "e^x"


def test_gradients_that_nobody_wrote_are_refused_at_the_call() -> None:
    spec = AttentionSpec(Forward())
    assert pdcore.attention(**operands(), spec=spec).shape == (2, HQ, N, DV)
    raised(
        lambda: pdcore.attention_vjp(**operands(), spec=spec, backend="numpy"),
        wrong(UnsupportedError, "forward_only has no features_vjp", "numpy"),
    )
    raised(
        lambda: pdcore.attention_vjp(**operands(), spec=spec),
        wrong(NoBackendError, "forward_only has no features_vjp"),
    )


# --- libraries without a backend ------------------------------------------------------------------


class Tensor:
    """An object with the attributes that are read before a backend is chosen."""

    __module__ = "elsewhere.tensors"
    shape, dtype, device = (1, 2, 3), "elsewhere.float32", "cpu"


def test_a_library_without_a_backend() -> None:
    with pytest.raises(TypeError, match="no backend takes arrays of elsewhere") as caught:
        pdcore.attention(Tensor(), Tensor(), Tensor())
    assert "q: got elsewhere.tensors.Tensor" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_declarations_of_backends() -> None:
    with pytest.raises(pdcore.PluginError, match=r"'no name'.*identifier"):
        plain_info("no name", "Strict", "numpy")
    with pytest.raises(pdcore.PluginError, match=r"load is 'strategies'.*package.module:Class"):
        pdcore.BackendInfo("x", "strategies", "numpy")
    with pytest.raises(pdcore.PluginError, match=r"unknown capability 'mesk'.*'mask'"):
        pdcore.BackendInfo("x", "a:B", "numpy", capabilities={"mesk": "full"})
    with pytest.raises(pdcore.PluginError, match="mask is 'yes', expected full"):
        pdcore.BackendInfo("x", "a:B", "numpy", capabilities={"mask": "yes"})


class Quantity(np.ndarray):
    """An array with semantics of its own, such as units."""


class Variable:
    """What keras.Variable, a dask array or an h5py dataset look like."""

    shape, dtype, device, ndim = (2, HQ, N, D), np.dtype("float32"), "cpu", 4


Variable.__module__ = "keras.src"


class WithValue(Variable):
    value = np.ones(Variable.shape, dtype=np.float32)


class Lazy(Variable):
    def compute(self) -> Any:
        return np.ones(self.shape, dtype=np.float32)


ARGUMENTS = [
    "q",
    "k",
    "v",
    "mask",
    "key_mask",
    "bias",
    "offset",
    "params['beta']",
    "d_out",
    "d_lse",
]


def given(name: str, x: Any) -> Any:
    """Call attention, or its pullback, with `x` for one argument."""
    arguments: dict[str, Any] = {**operands(), "params": {"beta": ones(HKV)}}
    if name.startswith("d_"):
        out, _, vjp = pdcore.attention_vjp(**arguments, spec="bn(beta=param)")
        return vjp(x, None) if name == "d_out" else vjp(out, x)
    if name.startswith("params"):
        arguments["params"] = {"beta": x}
    else:
        arguments[name] = x
    return pdcore.attention(**arguments, spec="bn(beta=param)")


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    ("x", "says"),
    [
        (np.ma.masked_array(ones(2, HQ, N, D)), "got MaskedArray, whose semantics .*key_mask"),
        (ones(3, 4).view(np.matrix), "got matrix, whose semantics .*numpy.asarray"),
        (ones(2, HQ, N, D).view(Quantity), "got Quantity, whose semantics .*numpy.asarray"),
        (np.rec.array([(1.0,)]), "got recarray, whose semantics"),
    ],
    ids=["masked", "matrix", "subclass", "records"],
)
def test_subclasses_of_ndarray_are_refused(name: str, x: Any, says: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(name)}: {says}") as caught:
        given(name, x)
    assert "\n" not in str(caught.value)


def test_memory_mapped_arrays_are_arrays(tmp_path: Any) -> None:
    x = ones(2, HQ, N, D)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert np.array_equal(given("q", mapped), given("q", x))


@pytest.mark.parametrize("backend", [None, "numpy"])
@pytest.mark.parametrize(
    ("kind", "way"), [(Variable, "numpy.asarray(q)"), (WithValue, "q.value"), (Lazy, "q.compute()")]
)
def test_objects_of_a_library_without_backend(kind: type, way: str, backend: Any) -> None:
    x = [kind()] * 3
    with pytest.raises(TypeError, match=r"^q: got .*, expected an array of NumPy") as caught:
        pdcore.attention(*x, backend=backend)
    assert way in str(caught.value)
    assert "\n" not in str(caught.value)
