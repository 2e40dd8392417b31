"""Call a backend as a user does, watch the call, and compare its results with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pdcore import attention, attention_vjp, attention_weights
from pdcore.backend import FEATURES
from pdcore.errors import NoBackendError, UnsupportedError
from pdcore.plugins import registry as plugins

from ..frameworks import framework
from .budget import Expected, Verdict, expect, judge
from .calls import Arrays, Call, drawn, dtype_of
from .nonconforming import Nonconforming, no_excuses

__all__ = ["CORE", "PROPERTIES", "Evidence", "Nonconforming", "Subject"]

Array = np.ndarray[Any, Any]

#: The features that every backend must have.
CORE = frozenset(
    {
        "float32",
        "exponential",
        "batch",
        "head_scaling",
        "causal",
        "mask",
        "key_mask",
        "offset",
        "gqa",
        "lse",
    }
)

#: Features that no single call needs: their cases run where a backend declares the feature.
PROPERTIES = frozenset(
    {
        "autodiff",
        "double_backward",
        "vmap",
        "jvp",
        "compile",
        "deterministic",
        "batch_invariant",
        "thread_safe",
    }
)


@dataclass
class Evidence:
    """The verdicts of one case; `outcome` is set where it is neither passed nor failed."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    outcome: str | None = None
    note: str | None = None

    def add(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keep the worst verdict of each output, and raise where one is over its budget."""
        for name, verdict in verdicts.items():
            known = self.verdicts.get(name)
            if known is None or not verdict.ratio <= known.ratio:
                self.verdicts[name] = verdict
        over = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
        if over:
            raise Nonconforming("; ".join(over))


class Subject:
    """A backend on a device, under test.

    Parameters
    ----------
    name : str
        The name of the backend.
    device : str, optional
        The device of its arrays, by default the first that the backend declares.

    Attributes
    ----------
    evidence : Evidence
        The evidence of the current case; the pytest plugin sets a new one before each case.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.info = plugins.registered()[name]
        self.device = device or self.info.devices[0]
        self.backend = plugins.load_backend(name)
        self.framework = framework(self.info.library)
        self.evidence = Evidence()

    def claims(self, feature: str) -> bool:
        """Return whether the backend declares full support for a feature."""
        return self.info.support(feature) == "full"

    def unclaimed(self, features: list[str]) -> list[str]:
        """Return the features that the backend does not declare."""
        return [feature for feature in features if not self.claims(feature)]

    # --- judged calls -----------------------------------------------------------------------------

    def judge(self, call: Call, through: str = "forward") -> None:
        """Run a call and compare its results with the oracle, or verify that it is refused.

        Parameters
        ----------
        call : Call
            The spec and its inputs.
        through : {"forward", "vjp", "autodiff", "weights"}
            `attention` with lse; `attention_vjp`; the framework's reverse mode; the weights.

        Raises
        ------
        Nonconforming
            If a result is wrong, a declared feature is refused, or an undeclared feature runs.
        """
        outputs = {
            "vjp": through == "vjp",
            "weights": through == "weights",
            "lse": through == "forward" and self.claims("lse"),
        }
        features = call.features(**outputs)
        if through == "autodiff":
            features.append("autodiff")
        missing = self.unclaimed(features)
        arrays = drawn(call)
        if missing:
            self.refuses(missing, lambda: self._run(call, arrays, through, outputs["lse"]), call)
            return
        results = self.accepts(lambda: self._run(call, arrays, through, outputs["lse"]))
        self.evidence.add(judge(results, self.expected(call, arrays, through)))

    def expected(self, call: Call, arrays: Arrays, through: str = "forward") -> Expected:
        """Compute the oracle's results for a call, and their budgets."""
        outputs: dict[str, Any] = {}
        if through in ("vjp", "autodiff"):
            outputs = dict(zip(("d_out", "d_lse"), cotangents(call), strict=True))
        elif through == "weights":
            outputs = {"weights": True}
        return expect(arrays.q, arrays.k, arrays.v, call.spec, **arrays.options, **outputs)

    def compute(
        self, arrays: Arrays, spec: str, *, lse: bool = True, **more: Any
    ) -> dict[str, Array]:
        """Compute attention on the backend, from NumPy arrays to NumPy arrays.

        Raises
        ------
        Nonconforming
            If the backend changes its inputs, calls another backend or refuses, or if a result is
            of another library or on another device.
        """
        results: dict[str, Array] = self.accepts(lambda: self.attempt(arrays, spec, lse, **more))
        return results

    # --- refusals ---------------------------------------------------------------------------------

    def refuses(self, features: list[str], attempt: Callable[[], Any], call: Any = None) -> None:
        """Check that the backend refuses features that it does not declare, with a reason."""
        try:
            attempt()
        except (UnsupportedError, NoBackendError) as error:
            reason = str(error)
            if self.name not in reason:
                raise Nonconforming(
                    f"refuses {_named(features)} without naming itself: {reason!r}"
                ) from error
            self.evidence.outcome, self.evidence.note = "refusal verified", reason
        except NoSuchArrayError as error:
            self.evidence.outcome, self.evidence.note = "not claimed", str(error)
        else:
            raise Nonconforming(
                f"declared {', '.join(f'{f}={self.info.support(f)}' for f in features)}, but it "
                f"runs {call or _named(features)}: declare it full, or refuse it"
            )

    def accepts(self, attempt: Callable[[], Any]) -> Any:
        """Run a call that the backend declares, for which a refusal is a failure."""
        try:
            return attempt()
        except (UnsupportedError, NoBackendError) as error:
            raise Nonconforming(f"refuses what it declares full: {error}") from error

    # --- calls ------------------------------------------------------------------------------------

    def _run(self, call: Call, arrays: Arrays, through: str, lse: bool) -> dict[str, Array]:
        match through:
            case "forward":
                return self.attempt(arrays, call.spec, lse)
            case "weights":
                return self._weights(arrays, call.spec)
            case "vjp":
                return self._vjp(call, arrays)
            case "autodiff":
                return self._autodiff(call, arrays)
        raise ValueError(f"through: got {through!r}, expected forward, vjp, autodiff or weights")

    def attempt(self, arrays: Arrays, spec: str, lse: bool = True, **more: Any) -> dict[str, Array]:
        """Compute as `compute` does, but let the error of a refusal pass to the caller."""
        with self.watched(arrays) as (q, k, v, options):
            result = attention(q, k, v, spec, return_lse=lse, backend=self.name, **options, **more)
            out, level = result if lse else (result, None)
            results = {"out": self.back(out, "out")}
            if lse:
                results["lse"] = self.back(level, "lse")
        return results

    def _weights(self, arrays: Arrays, spec: str) -> dict[str, Array]:
        with self.watched(arrays) as (q, k, v, options):
            weights = attention_weights(q, k, v, spec, backend=self.name, **options)
            return {"weights": self.back(weights, "weights")}

    def _vjp(self, call: Call, arrays: Arrays) -> dict[str, Array]:
        with self.watched(arrays) as (q, k, v, options):
            out, lse, vjp = attention_vjp(q, k, v, call.spec, backend=self.name, **options)
            results = {"out": self.back(out, "out"), "lse": self.back(lse, "lse")}
            gradients = vjp(*map(self.there, cotangents(call)))
            wanted = _differentiable(call, arrays)
            absent = [name for name in wanted if name not in gradients]
            if absent:
                raise Nonconforming(f"vjp gives no gradient of {', '.join(absent)}")
            return results | {
                f"d_{name}": self.back(gradients[name], f"d_{name}") for name in wanted
            }

    def _autodiff(self, call: Call, arrays: Arrays) -> dict[str, Array]:
        with self.watched(arrays) as (q, k, v, options):
            names = _differentiable(call, arrays)
            inputs = {"q": q, "k": k, "v": v, "bias": options.get("bias")}
            inputs |= dict(options.get("params", {}))

            def function(x: Mapping[str, Any]) -> tuple[Any, Any]:
                return self.called(x, call.spec, options)

            d = tuple(map(self.there, cotangents(call)))
            (out, lse), gradients = self.framework.vjp(function, {n: inputs[n] for n in names}, d)
            results = {"out": self.back(out, "out"), "lse": self.back(lse, "lse")}
            return results | {
                f"d_{name}": self.back(gradients[name], f"d_{name}") for name in names
            }

    def called(
        self, x: Mapping[str, Any], spec: str, options: Mapping[str, Any], backend: str | None = ""
    ) -> tuple[Any, Any]:
        """Call `attention` on arrays of the framework; those in `x` replace arrays of `options`."""
        options = dict(options)
        if "bias" in x:
            options["bias"] = x["bias"]
        params = {n: x.get(n, value) for n, value in options.get("params", {}).items()}
        if params:
            options["params"] = params
        out, lse = attention(
            x["q"], x["k"], x["v"], spec, return_lse=True, backend=backend or self.name, **options
        )
        return out, lse

    # --- to the backend and back ------------------------------------------------------------------

    def there(self, x: Any) -> Any:
        """Return a NumPy array as an array of the backend's library, on its device."""
        if x is None or not isinstance(x, np.ndarray):
            return x
        return self.framework.asarray(x, self.device)

    def back(self, x: Any, name: str = "out") -> Array:
        """Return a result as a NumPy array, after a check of its library and device."""
        if not self.framework.is_array(x):
            raise Nonconforming(
                f"{name}: got {type(x).__module__}.{type(x).__name__}, expected an array of "
                f"{self.info.library} like the inputs"
            )
        device = self.framework.device_of(x)
        if device.partition(":")[0] != self.device.partition(":")[0]:
            raise Nonconforming(f"{name}: on {device}, expected {self.device} like the inputs")
        array: Array = self.framework.asnumpy(x)
        return array

    @contextmanager
    def watched(self, arrays: Arrays) -> Iterator[tuple[Any, Any, Any, dict[str, Any]]]:
        """Yield the inputs on the backend; check that it keeps their values and runs alone.

        Where the library allows it, new memory in the block is filled with NaN, so that an
        element of a result that the backend never writes is NaN.
        """
        dtype = str(arrays.q.dtype)
        with self.framework.precision(dtype), self._alone():
            try:
                operands = [self.there(x) for x in (arrays.q, arrays.k, arrays.v)]
                options = {
                    name: {n: self.there(p) for n, p in x.items()}
                    if isinstance(x, Mapping)
                    else self.there(x)
                    for name, x in arrays.options.items()
                }
            except (TypeError, ValueError, NotImplementedError) as error:
                raise NoSuchArrayError(
                    f"{self.info.library} takes no {dtype} array: {error}"
                ) from error
            inputs = dict(zip("qkv", operands, strict=True)) | options | options.get("params", {})
            before = self._bits(inputs)
            with self.framework.poisoned(), no_excuses():
                yield (*operands, options)
            for name, bits in self._bits(inputs).items():
                if bits != before[name]:
                    raise Nonconforming(f"{name}: the call changed its input in place")

    def _bits(self, inputs: Mapping[str, Any]) -> dict[str, bytes]:
        """Return a copy of the bytes of every input."""
        return {
            name: np.ascontiguousarray(self.framework.asnumpy(x)).tobytes()
            for name, x in inputs.items()
            if self.framework.is_array(x)
        }

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Raise `Nonconforming` in the block where the backend calls another backend."""
        load, guarded = plugins.load_backend, {}

        def guard(name: str, other: Any) -> None:
            def refuse(*args: Any, **kwargs: Any) -> Any:
                raise Nonconforming(
                    f"it asks backend {name} to do the work: a backend runs a call or refuses it"
                )

            if name not in guarded:
                guarded[name] = other
                for method in ("attention", "attention_vjp", "attention_weights"):
                    setattr(other, method, refuse)

        def watching(name: str) -> Any:
            other = load(name)
            if other is not self.backend:
                guard(name, other)
            return other

        if self.backend is not load("numpy"):
            guard("numpy", load("numpy"))
        plugins.load_backend = watching
        try:
            yield
        finally:
            plugins.load_backend = load
            for other in guarded.values():
                for method in ("attention", "attention_vjp", "attention_weights"):
                    delattr(other, method)


class NoSuchArrayError(Exception):
    """The library has no arrays of a dtype."""


def cotangents(call: Call) -> tuple[Array, Array]:
    """Draw cotangents of out and lse."""
    rng = np.random.default_rng(len(call.label))
    shape = (*call.lead, call.heads, call.rows)
    wide = "float64" if call.dtype == "float64" else "float32"
    return (
        rng.standard_normal((*shape, call.value_dim)).astype(dtype_of(call.dtype)),
        rng.standard_normal(shape).astype(wide),
    )


def _differentiable(call: Call, arrays: Arrays) -> list[str]:
    """Return the names of the arrays that get a gradient: running statistics are constants."""
    constant = {p.name for p in call.parsed.parameters() if not p.differentiable}
    return [name for name in arrays.differentiable if name not in constant]


def _named(features: list[str]) -> str:
    return ", ".join(FEATURES.get(feature, feature) for feature in features)
