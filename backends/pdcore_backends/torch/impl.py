"""Plans on PyTorch tensors: `ArrayBackend`, with PyTorch's own gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from pdcore.extend import (
    ArrayBackend,
    Call,
    Features,
    Group,
    GroupRun,
    Inputs,
    Operands,
    Plan,
    Request,
    Scores,
    UnsupportedError,
    compiling,
    constants_held,
    register_array_type,
    shard_refusals,
)

from . import INFO, namespace
from .blocked import blocked_scores
from .choice import Flexed, Fused, Termed, chosen, not_native
from .features import chosen_features, features
from .flash import transformed
from .flex import flex_scores
from .fused import (
    FusedCall,
    FusedRun,
    direct,
    fused_inputs,
    fused_out,
    fused_scores,
    reads_no_level,
)
from .operators import BLOCKS
from .packed import compiled_segments, segments_attention
from .rows import chosen_rows
from .terms import scores_with_terms
from .torchscript import with_fixed_lengths

__all__ = ["TorchBackend"]


class TorchBackend(ArrayBackend):
    """A backend that runs plans on PyTorch tensors, on the CPU or a CUDA device."""

    info = INFO
    drops_natively = True
    query_block, key_block = BLOCKS

    def __init__(self) -> None:
        super().__init__()
        self._xp = namespace
        _keep_freed_memory()
        for kind in (torch.Tensor, torch.nn.Parameter):
            register_array_type(kind, "torch")

    def refusals(self, request: Request) -> list[str]:
        """Return why the backend cannot run a call, see `Backend.refusals`."""
        reasons = super().refusals(request)
        device = request.device
        if device.startswith("cuda") and not torch.cuda.is_available():
            reasons.append(f"device {device}: PyTorch {torch.__version__} sees no CUDA device")
        if request.dtype == "float32":
            reasons += _reduced_precision(device.partition(":")[0])
        if request.group is not None:
            reasons += shard_refusals(request)
        if (
            request.native_dropout
            and request.dropout
            and not reasons
            and (why := not_native(request))
        ):
            reasons.append(f"seed 'native': PyTorch's kernel drops no weights for {why}")
        return reasons

    def traced_segments(self, request: Request) -> list[str]:
        """Return why the backend cannot run traced segments, see `Backend.traced_segments`."""
        if request.segments == "compiled":
            return compiled_segments(request)
        return super().traced_segments(request)

    def drawn_seed(self, like: Any) -> Any:
        """Draw a seed of 63 bits from PyTorch's generator, see `ArrayBackend.drawn_seed`."""
        return torch.randint(2**63 - 1, (), device=like.device)

    def fuse(self, plan: Plan, request: Request) -> Plan:
        """Choose the kernel that runs a plan, see `Backend.fuse`."""
        if request.group is not None:
            from .sharded import chosen_in_shards

            return chosen_in_shards(plan, request)
        plan = chosen_features(chosen(plan, request))
        if not request.device.startswith("cpu"):
            return plan
        level = request.lse or request.vjp or request.weights or plan.rescales
        return chosen_rows(plan, level=level)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        if inputs.group is not None:
            from . import sharded  # which loads torch.distributed

            return sharded.attention(plan, inputs, lse=lse)
        if inputs.segments is not None:
            held = constants_held(plan, inputs, torch.Tensor.detach)
            out, level = segments_attention(plan, held)
            return out, level if lse else None
        c: Any = plan.contraction
        whole = isinstance(c.choice, Fused) and c.choice.whole and not (lse or transformed())
        if whole and c.choice.direct and not (compiling() or torch.is_autocast_enabled("cpu")):
            q, k, v = inputs[:3]
            if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
                _check_precision(q)
                out = direct(c, inputs)
                if out is not None:
                    return out, None
        inputs = constants_held(plan, with_fixed_lengths(plan, inputs), torch.Tensor.detach)
        with _without_autocast(inputs.q):
            prepared = fused_inputs(plan, inputs) if whole else None
            if prepared is None:
                if inputs.dropout and isinstance(inputs.seed, str):
                    raise UnsupportedError(_NOT_NATIVE)
                return super().attention(plan, inputs, lse=lse)
            call = FusedCall(self, plan, prepared)
            out, _ = self.results(call, *self.run(call), lse=False)
            lead = inputs.q.shape[:-3]
            return (out if len(lead) == 1 else out.reshape(*lead, *out.shape[-3:])), None

    def call(self, plan: Plan, inputs: Inputs, *, level: bool = True) -> Call:
        """Return a call that reads L for a contraction by scores but in a `FusedCall`."""
        return super().call(plan, inputs, level=level or isinstance(plan.contraction, Scores))

    def decoding_call(self, plan: Plan, inputs: Inputs, *, level: bool) -> Call:
        """Return a call that reads L unless the fused kernel can do without."""
        if not level and reads_no_level(plan, inputs):
            return super().call(plan, inputs, level=False)
        return self.call(plan, inputs, level=level)

    def group_run(self, call: Call, group: Group) -> GroupRun:
        """Return the steps of a head group, those of `FusedRun` for a `FusedCall`."""
        steps = FusedRun if isinstance(call, FusedCall) else GroupRun
        return steps(self, call, group)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, by a fused kernel where one computes it."""
        if not o.level:
            return fused_out(c, o), None
        result = None
        if isinstance(c.choice, Fused) and not transformed():
            result = fused_scores(c, o)
        elif isinstance(c.choice, Flexed):
            result = flex_scores(c, o)
        elif isinstance(c.choice, Termed):
            result = scores_with_terms(c, o)
        return blocked_scores(c, o) if result is None else result

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and return its pullback, see `Backend.attention_vjp`."""
        with _without_autocast(inputs.q):
            out, lse, pull = super().attention_vjp(plan, inputs)

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            with _without_autocast(d_out):
                return pull(d_out, d_lse)

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        inputs = with_fixed_lengths(plan, inputs, weights=True)
        inputs = constants_held(plan, inputs, torch.Tensor.detach)
        with _without_autocast(inputs.q):
            return super().attention_weights(plan, inputs)

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, by `.features.features` where it computes the call."""
        result = features(c, o)
        return super().features(c, o) if result is None else result

    def computing(self, x: Any) -> AbstractContextManager[Any]:
        """Return a context in which autocast changes no dtype, see `ArrayBackend.computing`."""
        return _without_autocast(x)

    def synchronize(self) -> None:
        """Wait for the current CUDA device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def versions(self) -> dict[str, str]:
        """Return the versions of PyTorch and of the CUDA that it was built for."""
        versions = {"torch": str(torch.__version__)}
        if torch.version.cuda is not None:
            versions["cuda"] = str(torch.version.cuda)
        return versions


def _keep_freed_memory() -> None:
    """Let glibc keep up to 64 MiB of freed memory, so that the arrays of a call find it mapped.

    It keeps twice the largest mapped block that was freed so far, of at most 32 MiB, and returns
    the rest to the system; each page that is taken again costs a page fault. This block is never
    written, so it takes no memory. On other systems it changes nothing.
    """
    torch.empty(2**25 - 2**13, dtype=torch.uint8)


_NOT_NATIVE = (
    "seed: got 'native', and PyTorch's kernel does not run this call: one of torch.func, with an "
    "empty array, with a bias that requires a gradient, or of causal rows at another offset than "
    "0; give a number"
)
_AS_IT_IS: AbstractContextManager[Any] = nullcontext()

#: The settings that hold the precision of float32 matrix products, by kind of device.
_SWITCHES: dict[str, Any] = {
    "cpu": getattr(torch.backends.mkldnn, "matmul", None),
    "cuda": getattr(torch.backends.cuda, "matmul", None),
}


def _without_autocast(x: Any) -> AbstractContextManager[Any]:
    """Return a context in which autocast changes no dtype; raise where TF32 is switched on."""
    _check_precision(x)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        declared: AbstractContextManager[Any] = torch.autocast(kind, enabled=False)
        return declared
    return _AS_IT_IS


def _check_precision(x: Any) -> None:
    """Raise where PyTorch's precision was reduced after the backend was selected."""
    if x.dtype == torch.float32 and (reasons := _reduced_precision(x.device.type)):
        raise UnsupportedError(f"backend torch: {reasons[0]}")


def _reduced_precision(kind: str) -> list[str]:
    """Return why float32 matrix products would lose precision; empty if they would not."""
    precision = getattr(_SWITCHES["cpu" if kind == "cpu" else "cuda"], "fp32_precision", None)
    if precision is None:  # a release of PyTorch with one setting for all devices
        precision = torch.get_float32_matmul_precision()
    if precision in ("none", "ieee", "highest"):
        return []
    reason = (
        f"float32 inputs: matrix products on {kind} are set to {precision}, which is not float32; "
        "torch.set_float32_matmul_precision('highest') takes that back"
    )
    return [reason]


# The compiler cannot trace the reading of these settings, so the result is a constant of a trace.
# `torch.compiler.assume_constant_result` sets the same, and imports the compiler to do so.
_reduced_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
