"""The contract of a backend: its declaration (`BackendInfo`) and its methods (`Backend`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from ..errors import PluginError, nearest
from ..lowering import Plan, Signature, lower
from ..spec import (
    DISTANCE,
    AttentionSpec,
    Batch,
    Cosine,
    Elu,
    Exponential,
    FeatureMap,
    Gaussian,
    Identity,
    Polynomial,
    RandomFeatures,
    Relu,
    Statistics,
)
from .features import FEATURES

__all__ = [
    "LAYOUTS",
    "SPEC_VERSION",
    "Backend",
    "BackendInfo",
    "Inputs",
    "Request",
    "shape_in",
]

#: The version of `Plan` and of `Backend`; a plugin declares the version it was written for.
SPEC_VERSION = 1

Support = Literal["full", "unsupported", "not_implemented"]


@dataclass(frozen=True)
class BackendInfo:
    """A backend's declaration, which holds only data, so that declaring imports no framework.

    Parameters
    ----------
    name : str
        The name that users pass: ``backend="name"``.
    load : str
        ``"package.module:Class"`` of the `Backend`, imported at first use.
    library : str
        The import name of the array library whose arrays the backend takes, such as ``"torch"``.
    requires : sequence of str
        Top-level modules that must be importable.
    install : str
        The command that installs the modules in `requires`.
    devices : sequence of str
        The kinds of devices that the backend runs on.
    priority : int
        The order of backends of one library; built-in backends come first for any priority. A
        backend of negative priority runs only where the caller names it, and listings leave it out.
    capabilities : mapping of str to {"full", "unsupported", "not_implemented"}
        Support by feature, see `FEATURES`; features left out are ``"not_implemented"``.
    spec_version : int
        The `SPEC_VERSION` for which the backend was written.
    """

    name: str
    load: str
    library: str
    requires: Sequence[str] = ()
    install: str = ""
    devices: Sequence[str] = ("cpu",)
    priority: int = 0
    capabilities: Mapping[str, Support] = field(default_factory=dict, hash=False)
    spec_version: int = SPEC_VERSION

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PluginError(f"backend name {self.name!r}: expected an identifier")
        module, colon, cls = self.load.partition(":")
        if not (module and colon and cls):
            raise PluginError(
                f"backend {self.name}: load is {self.load!r}, expected 'package.module:Class'"
            )
        for feature, support in self.capabilities.items():
            if feature not in FEATURES:
                raise PluginError(
                    f"backend {self.name}: unknown capability {feature!r}; "
                    f"{nearest(feature, FEATURES)}"
                )
            if support not in ("full", "unsupported", "not_implemented"):
                raise PluginError(
                    f"backend {self.name}: {feature} is {support!r}, expected full, "
                    "unsupported or not_implemented"
                )

    @property
    def only_if_named(self) -> bool:
        """Whether no call runs on the backend unless the caller names it."""
        return self.priority < 0

    def support(self, feature: str) -> Support:
        """Return the declared support for a feature."""
        return self.capabilities.get(feature, "not_implemented")


class Inputs(NamedTuple):
    """The validated arrays of a call, all of one library: the arguments of `attention`.

    `offset` is an int, an integer array () or (*B,), or ``"end"``; `segments` are traced ids;
    `labels` are integers (*B, N), or a pair of those of queries and of keys; `seed` is None, an
    int, an integer array (), one (2,) of the low and the high 32 bits, or ``"native"``; `group` is
    that of `torch.distributed` over whose ranks the sequence is cut.
    """

    q: Any
    k: Any
    v: Any
    mask: Any = None
    key_mask: Any = None
    bias: Any = None
    offset: Any = 0
    params: Mapping[str, Any] = {}
    dropout: float = 0.0
    axis_name: str | None = None
    segments: Any = None
    labels: Any = None
    seed: Any = None
    group: Any = None

    @property
    def sharding(self) -> str | None:
        """How the caller names the shards of the sequence; None for a whole sequence."""
        if self.group is not None:
            return "group"
        return None if self.axis_name is None else f"axis_name={self.axis_name!r}"


#: The layouts of q, k and v, by name.
LAYOUTS = {"bhnd": "(*B, H, N, D)", "bnhd": "(*B, N, H, D)"}


def shape_in(layout: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Convert a shape (*B, H, N, D) to a layout, or back; shorter shapes stay as they are."""
    if layout == "bhnd" or len(shape) < 3:
        return shape
    return (*shape[:-3], shape[-2], shape[-3], shape[-1])


class Request(NamedTuple):
    """A call without the values of its arrays, as selection shows it to backends.

    Attributes
    ----------
    spec : AttentionSpec
    library, dtype, device : str
        The library, dtype and device of q, k and v, such as ``"numpy"``, ``"float32"``, ``"cpu"``.
    q, k, v : tuple of int
        Their shapes.
    mask, key_mask, bias : tuple of int or None
        Their shapes; None for an argument that the caller leaves out.
    offset : {"int", "array", "sequence", "end"}
        The kind of the offset.
    lse, vjp, weights : bool
        Whether the call returns the log-sum-exp; is `attention_vjp`; is `attention_weights`.
    dropout : float
    axis_name : str or None
    group : int or None
        The number of ranks over which the sequence is cut.
    segments : {"values", "traced", "traced_pair", "compiled"} or None
        Whether ids have values, or are traced, by PyTorch's compiler or by others.
    layout : str
        The layout of the caller's arrays, for messages only: the arrays of a backend, and the
        shapes here, are (*B, H, N, D) in any case.
    native_dropout : bool
        Whether dropout has the random numbers of the library's own kernel.
    """

    spec: AttentionSpec
    library: str
    dtype: str
    device: str
    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    mask: tuple[int, ...] | None = None
    key_mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    offset: str = "int"
    lse: bool = False
    vjp: bool = False
    weights: bool = False
    dropout: float = 0.0
    axis_name: str | None = None
    layout: str = "bhnd"
    segments: str | None = None
    group: int | None = None
    native_dropout: bool = False

    @property
    def sharding(self) -> str | None:
        """How the caller names the shards of the sequence; None for a whole sequence."""
        if self.group is not None:
            return f"a group of {self.group}"
        return None if self.axis_name is None else f"axis_name={self.axis_name!r}"

    def __str__(self) -> str:
        q, k, v = (shape_in(self.layout, shape) for shape in (self.q, self.k, self.v))
        layout = "" if self.layout == "bhnd" else f", layout {self.layout}"
        optional = "".join(
            f", {name} {getattr(self, name)}"
            for name in ("mask", "key_mask", "bias")
            if getattr(self, name) is not None
        )
        return (
            f"q {q}, k {k}, v {v}{optional}{layout}, {self.library} {self.dtype} on {self.device}"
        )

    def lower(self) -> Plan:
        """Lower the spec of the call, see `pdcore.lowering.lower`."""
        signature = Signature(self.q[-1], self.k[-3], self.dtype, self.mask is not None)
        return lower(self.spec, signature)

    def features(self) -> list[str]:
        """List the `FEATURES` that the call needs."""
        spec, needed = self.spec, [self.dtype]
        match spec.kernel:
            case Exponential(softcap=None):
                needed.append("exponential")
            case Exponential():
                needed.append("softcap")
            case Gaussian() | Cosine() | Polynomial() as kernel:
                needed.append(kernel.word)
            case kernel if type(kernel) in (Elu, Relu, RandomFeatures):
                needed.append("features")
            case _:
                needed.append("user_kernel")
        match spec.normalization:
            case Identity():
                pass
            case Batch(statistics="sequence" | "batch"):
                needed.append("batch")
            case Batch() as batch:
                needed.append(batch.statistics)
            case _:
                needed.append("user_normalization")
        terms = {term.word for term in spec.terms}
        optional = {
            "head_scaling": spec.heads.largest > 1,
            "count": spec.normaliser != "sum",
            "sink": spec.sink is not None,
            "alibi": "alibi" in terms,
            "relative": "relative" in terms or DISTANCE in spec.kernel.places,
            "labels": spec.by_label,
            "causal": spec.support.causal,
            "window": min(spec.support.left, spec.support.right) < float("inf"),
            "mask": self.mask is not None,
            "key_mask": self.key_mask is not None,
            "bias": self.bias is not None,
            "offset": self.offset != "int",
            "gqa": self.q[-3] != self.k[-3],
            "lse": self.lse,
            "vjp": self.vjp,
            "weights": self.weights,
            "dropout": self.dropout > 0,
            "axis_name": self.axis_name is not None,
            "group": self.group is not None,
            "segments": self.segments is not None,
        }
        return needed + [name for name, used in optional.items() if used]

    @property
    def feature_map(self) -> str:
        """The word of the kernel if the kernel is a feature map; otherwise empty."""
        return self.spec.kernel.word if isinstance(self.spec.kernel, FeatureMap) else ""

    def missing_pullbacks(self) -> list[str]:
        """List the steps of the call that have no pullback, for backends without autodiff."""
        kernel, normalization = self.spec.kernel, self.spec.normalization
        what, reasons = FEATURES["vjp"], []
        if isinstance(kernel, FeatureMap) and not kernel.has_vjp:
            reasons.append(f"{what}: {kernel.word} has no features_vjp")
        if not isinstance(normalization, Identity) and not normalization.has_vjp:
            reasons.append(f"{what}: {normalization.word} has no apply_vjp")
        statistics = normalization.statistics_state()
        if statistics is not None and type(statistics).vjp is Statistics.vjp:
            reasons.append(f"{what}: {type(statistics).__name__} has no vjp")
        return reasons


class Backend(ABC):
    """The base class of backends. A plugin usually subclasses `ArrayBackend`, which is complete."""

    info: ClassVar[BackendInfo]
    pads_segments: ClassVar[bool] = False  # to powers of two: fewer programs to compile
    drops_natively: ClassVar[bool] = False  # by a kernel of its library, with seed="native"

    def refusals(self, request: Request) -> list[str]:
        """Return why the backend cannot run a call; an empty list means that it can.

        Both selection and `explain` call this method. The default refuses every feature that is
        not declared ``"full"``, and devices that are not declared.
        """
        reasons = []
        for feature in request.features():
            support = self.info.support(feature)
            if support != "full":
                reasons.append(f"{FEATURES.get(feature, feature)}: {support.replace('_', ' ')}")
        kind = request.device.partition(":")[0]
        if kind not in self.info.devices:
            reasons.append(f"device {request.device}: runs on {', '.join(self.info.devices)}")
        if request.native_dropout and not self.drops_natively:
            reasons.append("seed 'native': no kernel of the library drops weights; give a number")
        return reasons + self.traced_segments(request)

    def traced_segments(self, request: Request) -> list[str]:
        """Return why the backend cannot run a call if its segments are traced, see `refusals`."""
        traced = request.segments not in (None, "values")
        return ["segments: the ids are traced; pass them as NumPy arrays"] if traced else []

    def fuse(self, plan: Plan, request: Request) -> Plan:
        """Return a plan that computes the same and runs fastest on this backend.

        `pdcore.attention` calls this method once for each kind of call, and `explain` shows the
        steps of the result. A backend must also run plans that have not been through this method.
        """
        return plan

    @abstractmethod
    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan.

        Returns
        -------
        out : array (*B, Hq, N, Dv)
        lse : array (*B, Hq, N) or None
            None unless `lse`.
        """

    @abstractmethod
    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and return its pullback ``vjp(d_out, d_lse=None) -> {name: cotangent}``."""

    @abstractmethod
    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights (*B, Hq, N, M) of a plan."""

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Import an array of another library by DLPack, without a copy where the device allows.

        Parameters
        ----------
        array : array
            An array of another library, or one of the backend's library to move to `device`.
        device : str, optional
            The device of the result: such as ``"cuda"``, or ``"cpu"`` for results going back.
        """
        raise NotImplementedError(f"{self.info.name} does not take arrays of other libraries")

    def give(self, array: Any, namespace: Any) -> Any:
        """Export a result to another library by DLPack; the inverse of `exchange`.

        Parameters
        ----------
        array : array
            An array of the backend's library.
        namespace : module
            The namespace of the other library, which has a ``from_dlpack``.
        """
        return namespace.from_dlpack(array)

    def stream_of(self, array: Any) -> AbstractContextManager[Any]:
        """Return a context that runs on the stream another library currently uses for an array.

        Entered around a call on arrays from `exchange`, and `give`, so that neither library waits.
        """
        return nullcontext()

    def synchronize(self) -> None:  # noqa: B027 - CPU backends need no override
        """Wait until the device has finished; a no-op on the CPU."""

    def versions(self) -> dict[str, str]:
        """Return the versions of the libraries that the backend runs on, for records."""
        return {}
