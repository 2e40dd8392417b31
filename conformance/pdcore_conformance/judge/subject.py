"""The backend under test: called as a user calls it, watched, and held against the oracle."""

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

__all__ = ["CORE", "PROPERTIES", "Evidence", "Nonconforming", "Subject"]

Array = np.ndarray[Any, Any]

#: What every backend has to have.
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

#: Features that no single call asks for: a backend claims them, or nothing is asked of it.
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


class Nonconforming(AssertionError):  # noqa: N818 - pytest reports it as a failed assertion
    """A backend does not do what the specification says."""


@dataclass
class Evidence:
    """What one case found out; `outcome` is filled in where it is not simply passed or failed."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    outcome: str | None = None
    note: str | None = None

    def add(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keep the worst verdict of each output, and fail on one over its budget."""
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
        Of the backend.
    device : str, optional
        Where its arrays are; the first that it declares by default.

    Attributes
    ----------
    evidence : Evidence
        Of the case that runs now; the plugin puts a new one before each.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.info = plugins.registered()[name]
        self.device = device or self.info.devices[0]
        self.backend = plugins.load_backend(name)
        self.framework = framework(self.info.library)
        self.evidence = Evidence()

    def claims(self, feature: str) -> bool:
        """Whether the backend declares full support for a feature."""
        return self.info.support(feature) == "full"

    def unclaimed(self, features: list[str]) -> list[str]:
        """List the features that the backend does not declare."""
        return [feature for feature in features if not self.claims(feature)]

    # --- judged calls -----------------------------------------------------------------------------

    def judge(self, call: Call, through: str = "forward") -> None:
        """Run a call and hold its results against the oracle, or verify that it is refused.

        Parameters
        ----------
        call : Call
            The spec and its inputs.
        through : {"forward", "vjp", "autodiff", "weights"}
            `attention` with lse; `attention_vjp`; the framework's reverse mode; the weights.

        Raises
        ------
        Nonconforming
            When a result is wrong, when something declared is refused, or something runs that is
            not declared.
        """
        asked = {
            "vjp": through == "vjp",
            "weights": through == "weights",
            "lse": through == "forward" and self.claims("lse"),
        }
        features = call.features(**asked)
        if through == "autodiff":
            features.append("autodiff")
        missing = self.unclaimed(features)
        arrays = drawn(call)
        if missing:
            self.refuses(missing, lambda: self._run(call, arrays, through, asked["lse"]), call)
            return
        found = self.accepts(lambda: self._run(call, arrays, through, asked["lse"]))
        self.evidence.add(judge(found, self.expected(call, arrays, through)))

    def expected(self, call: Call, arrays: Arrays, through: str = "forward") -> Expected:
        """Run the oracle on the inputs of a call."""
        asked: dict[str, Any] = {}
        if through in ("vjp", "autodiff"):
            asked = dict(zip(("d_out", "d_lse"), cotangents(call), strict=True))
        elif through == "weights":
            asked = {"weights": True}
        return expect(arrays.q, arrays.k, arrays.v, call.spec, **arrays.options, **asked)

    def compute(
        self, arrays: Arrays, spec: str, *, lse: bool = True, **more: Any
    ) -> dict[str, Array]:
        """Call `attention` on NumPy arrays taken to the backend, and bring the results back.

        Raises
        ------
        Nonconforming
            When it changes its inputs, asks another backend, refuses, or gives results in
            another library, dtype or device.
        """
        found: dict[str, Array] = self.accepts(lambda: self.attempt(arrays, spec, lse, **more))
        return found

    # --- refusals ---------------------------------------------------------------------------------

    def refuses(self, features: list[str], attempt: Callable[[], Any], call: Any = None) -> None:
        """Verify that the backend refuses, with a reason, what it does not declare."""
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
        """Run what the backend declares: a refusal is a failure."""
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
        """Do as `compute`, and let a refusal pass on to the caller."""
        with self.watched(arrays) as (q, k, v, options):
            result = attention(q, k, v, spec, return_lse=lse, backend=self.name, **options, **more)
            out, level = result if lse else (result, None)
            found = {"out": self.back(out, "out")}
            if lse:
                found["lse"] = self.back(level, "lse")
        return found

    def _weights(self, arrays: Arrays, spec: str) -> dict[str, Array]:
        with self.watched(arrays) as (q, k, v, options):
            weights = attention_weights(q, k, v, spec, backend=self.name, **options)
            return {"weights": self.back(weights, "weights")}

    def _vjp(self, call: Call, arrays: Arrays) -> dict[str, Array]:
        with self.watched(arrays) as (q, k, v, options):
            out, lse, vjp = attention_vjp(q, k, v, call.spec, backend=self.name, **options)
            found = {"out": self.back(out, "out"), "lse": self.back(lse, "lse")}
            gradients = vjp(*map(self.there, cotangents(call)))
            wanted = _differentiable(call, arrays)
            absent = [name for name in wanted if name not in gradients]
            if absent:
                raise Nonconforming(f"vjp gives no gradient of {', '.join(absent)}")
            return found | {f"d_{name}": self.back(gradients[name], f"d_{name}") for name in wanted}

    def _autodiff(self, call: Call, arrays: Arrays) -> dict[str, Array]:
        with self.watched(arrays) as (q, k, v, options):
            names = _differentiable(call, arrays)
            given = {"q": q, "k": k, "v": v, "bias": options.get("bias")}
            given |= dict(options.get("params", {}))

            def function(x: Mapping[str, Any]) -> tuple[Any, Any]:
                return self.called(x, call.spec, options)

            d = tuple(map(self.there, cotangents(call)))
            (out, lse), gradients = self.framework.vjp(function, {n: given[n] for n in names}, d)
            found = {"out": self.back(out, "out"), "lse": self.back(lse, "lse")}
            return found | {f"d_{name}": self.back(gradients[name], f"d_{name}") for name in names}

    def called(
        self, x: Mapping[str, Any], spec: str, options: Mapping[str, Any], backend: str | None = ""
    ) -> tuple[Any, Any]:
        """Call `attention` on arrays of the framework, some of them given by name in `x`."""
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
        """Take a NumPy array to the library and device of the backend."""
        if x is None or not isinstance(x, np.ndarray):
            return x
        return self.framework.asarray(x, self.device)

    def back(self, x: Any, name: str = "out") -> Array:
        """Bring a result back to NumPy, after a look at whose array it is and where it lies."""
        if not self.framework.is_array(x):
            raise Nonconforming(
                f"{name}: got {type(x).__module__}.{type(x).__name__}, expected an array of "
                f"{self.info.library} like the inputs"
            )
        device = self.framework.device_of(x)
        if device.partition(":")[0] != self.device.partition(":")[0]:
            raise Nonconforming(f"{name}: on {device}, expected {self.device} like the inputs")
        found: Array = self.framework.asnumpy(x)
        return found

    @contextmanager
    def watched(self, arrays: Arrays) -> Iterator[tuple[Any, Any, Any, dict[str, Any]]]:
        """Take the inputs to the backend, and see that it leaves them and the others alone.

        Fresh memory is NaN in the block, where the library allows it, so that what a backend
        never writes shows.
        """
        dtype = str(arrays.q.dtype)
        with self.framework.precision(dtype), self._alone():
            try:
                taken = [self.there(x) for x in (arrays.q, arrays.k, arrays.v)]
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
            inputs = dict(zip("qkv", taken, strict=True)) | options | options.get("params", {})
            before = self._bits(inputs)
            with self.framework.poisoned():
                yield (*taken, options)
            for name, bits in self._bits(inputs).items():
                if bits != before[name]:
                    raise Nonconforming(f"{name}: the call changed its input in place")

    def _bits(self, taken: Mapping[str, Any]) -> dict[str, bytes]:
        """Copy what the inputs hold, bit by bit."""
        return {
            name: np.ascontiguousarray(self.framework.asnumpy(x)).tobytes()
            for name, x in taken.items()
            if self.framework.is_array(x)
        }

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other backend be asked to run anything: a backend runs, or refuses."""
        load, guarded = plugins.load_backend, {}

        def guard(name: str, other: Any) -> None:
            def asked(*args: Any, **kwargs: Any) -> Any:
                raise Nonconforming(
                    f"it asks backend {name} to do the work: a backend runs a call or refuses it"
                )

            if name not in guarded:
                guarded[name] = other
                for method in ("attention", "attention_vjp", "attention_weights"):
                    setattr(other, method, asked)

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
    """The library has no arrays of the kind."""


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
    """Name what the call has a gradient of: running statistics are constants."""
    constant = {p.name for p in call.parsed.parameters() if not p.differentiable}
    return [name for name in arrays.differentiable if name not in constant]


def _named(features: list[str]) -> str:
    return ", ".join(FEATURES.get(feature, feature) for feature in features)
