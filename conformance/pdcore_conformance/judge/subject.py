"""Call a backend as a user does, watch the call, and compare its results with the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pdcore import attention
from pdcore.backend import FEATURES
from pdcore.errors import NoBackendError, UnsupportedError
from pdcore.plugins import registry as plugins

from ..frameworks import framework
from . import ways
from .budget import Expected, Verdict, expect, judge
from .calls import Arrays, Call, drawn
from .layouts import Array
from .nonconforming import Nonconforming, no_excuses

__all__ = ["CORE", "PROPERTIES", "Evidence", "Nonconforming", "Subject"]

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

    def add(self, verdicts: Mapping[str, Verdict], way: str = "") -> None:
        """Keep the worst verdict of each output, and raise where one is over its budget.

        Parameters
        ----------
        verdicts : mapping of str to Verdict
        way : str
            How the call ran, for the message.
        """
        for name, verdict in verdicts.items():
            known = self.verdicts.get(name)
            if known is None or not verdict.ratio <= known.ratio:
                self.verdicts[name] = verdict
        over = [f"{name}: {verdict}" for name, verdict in verdicts.items() if not verdict.ok]
        if over:
            raise Nonconforming(f"{way}: " * bool(way) + "; ".join(over))


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
        # The arrays of the call that runs, by the names of the arguments.
        self._operands: dict[str, Any] = {}

    def claims(self, feature: str) -> bool:
        """Return whether the backend declares full support for a feature."""
        return self.info.support(feature) == "full"

    def unclaimed(self, features: list[str]) -> list[str]:
        """Return the features that the backend does not declare."""
        return [feature for feature in features if not self.claims(feature)]

    # --- judged calls -----------------------------------------------------------------------------

    def judge(self, call: Call, through: str = "forward") -> None:
        """Run a call in every way that a user may, and compare each result with the oracle.

        Parameters
        ----------
        call : Call
            The spec and its inputs.
        through : {"forward", "vjp", "autodiff", "weights"}
            `attention` and `bind`, with lse and without, outside of gradients and inside;
            `attention_vjp`; the framework's reverse mode, with lse and without; the weights.

        Raises
        ------
        Nonconforming
            If a result is wrong, a declared feature is refused, or an undeclared feature runs.
        """
        lse = through == "forward" and self.claims("lse")
        missing = self.unclaimed(call.needs(through, lse=lse))
        arrays = drawn(call)
        if missing:
            self.refuses(missing, lambda: ways.first_way(self, call, arrays, through), call)
            return
        expected: dict[bool, Expected] = {}
        # A way that fails must not stay open, or the next cases would be watched by it too.
        with closing(ways.run(self, call, arrays, through)) as results:
            while (result := self.accepts(lambda: next(results, None))) is not None:
                for d_lse in (True, result.d_lse):
                    if d_lse not in expected:
                        expected[d_lse] = self.expected(
                            call, arrays, through, d_lse, expected.get(True)
                        )
                self.evidence.add(judge(result.outputs, expected[result.d_lse]), result.way)

    def expected(
        self,
        call: Call,
        arrays: Arrays,
        through: str = "forward",
        d_lse: bool = True,
        with_lse: Expected | None = None,
    ) -> Expected:
        """Compute the oracle's results for a call, and their budgets.

        Without `d_lse` the gradients are those of out alone; `with_lse` has those of lse too.
        """
        outputs: dict[str, Any] = {}
        if through in ("vjp", "autodiff"):
            outputs = dict(zip(("d_out", "d_lse"), ways.cotangents(call), strict=True))
            if not d_lse:
                del outputs["d_lse"]
        elif through == "weights":
            outputs = {"weights": True}
        expected = expect(arrays.q, arrays.k, arrays.v, call.spec, **arrays.options, **outputs)
        return expected if with_lse is None else expected._replace(slope=with_lse.largest_gradient)

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

    def attempt(self, arrays: Arrays, spec: str, lse: bool = True, **more: Any) -> dict[str, Array]:
        """Compute as `compute` does, but let the error of a refusal pass to the caller."""
        with self.watched(arrays) as (q, k, v, options):
            result = attention(q, k, v, spec, return_lse=lse, backend=self.name, **options, **more)
            out, level = result if lse else (result, None)
            results = {"out": self.returned(out, "out")}
            if lse:
                results["lse"] = self.returned(level, "lse")
        return results

    # --- to the backend and back ------------------------------------------------------------------

    def there(self, x: Any) -> Any:
        """Return a NumPy array, or a pair, as arrays of the backend's library, on its device."""
        if isinstance(x, tuple):
            return tuple(self.there(part) for part in x)
        if x is None or not isinstance(x, np.ndarray):
            return x
        return self.framework.asarray(x, self.device)

    def arrays_of(self, arrays: Arrays) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Return q, k, v and the options of a call as arrays of the backend's library."""
        options = {
            name: {n: self.there(p) for n, p in x.items()}
            if isinstance(x, Mapping)
            else self.there(x)
            for name, x in arrays.options.items()
        }
        return self.there(arrays.q), self.there(arrays.k), self.there(arrays.v), options

    def overwritten(
        self, operands: tuple[Any, Any, Any, dict[str, Any]], arrays: Arrays
    ) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Overwrite the arrays of a call in place; return new ones where arrays are immutable."""
        *qkv, options = operands
        names = {"q": arrays.q, "k": arrays.k, "v": arrays.v}
        pairs = list(zip(qkv, names.values(), strict=True))
        pairs += [(options[n], x) for n, x in arrays.options.items() if n != "params"]
        pairs += [(options["params"][n], x) for n, x in arrays.options.get("params", {}).items()]
        changed = [self.framework.overwrite(x, y) for x, y in pairs if self.framework.is_array(x)]
        return operands if all(changed) else self.arrays_of(arrays)

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

    def returned(self, x: Any, name: str) -> Array:
        """Return a result as `back` does, after a check that a caller may write into it."""
        array = self.back(x, name)
        if not self.framework.is_writeable(x):
            raise Nonconforming(f"{name}: is read-only or broadcast, expected an array of its own")
        for other, operand in self._operands.items():
            if self.framework.shares_memory(x, operand):
                raise Nonconforming(f"{name}: shares memory with the argument {other}")
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
                *operands, options = self.arrays_of(arrays)
            except (TypeError, ValueError, NotImplementedError) as error:
                raise NoSuchArrayError(
                    f"{self.info.library} takes no {dtype} array: {error}"
                ) from error
            inputs = dict(zip("qkv", operands, strict=True)) | options | options.get("params", {})
            before = self._bits(inputs)
            self._operands = {n: x for n, x in inputs.items() if self.framework.is_array(x)}
            try:
                with self.framework.poisoned(), no_excuses():
                    yield (*operands, options)
            finally:
                self._operands = {}
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


def _named(features: list[str]) -> str:
    return ", ".join(FEATURES.get(feature, feature) for feature in features)
