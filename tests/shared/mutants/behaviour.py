"""Defects of declarations, dtypes, and relations between calls."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from pdcore.lowering import Plan, Scores
from pdcore.plugins import registry as plugins

from .registry import Unmutated, planted


@planted("refusals::feature[bias]", bias="unsupported")
class SilentFallBack(Unmutated):
    """A bias that is declared unsupported, but computed."""

    def refusals(self, request: Any) -> list[str]:
        return [reason for reason in super().refusals(request) if "bias" not in reason]


@planted("behaviour::no_other_backend_is_asked[linear-float32]")
class WorkHandedOn(Unmutated):
    """Feature maps that another backend computes."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        if isinstance(plan.contraction, Scores):
            return super().attention(plan, inputs, lse=lse)
        return plugins.load_backend("numpy").attention(plan, inputs, lse=lse)


@planted("refusals::feature[gaussian]")
class UndeclaredRefusal(Unmutated):
    """A kernel that is declared, but refused."""

    def refusals(self, request: Any) -> list[str]:
        gaussian = request.spec.kernel.word == "gaussian"
        return [*super().refusals(request), *(["no gaussian kernel yet"] if gaussian else [])]


@planted("behaviour::results_keep_the_dtype[softmax-float64]")
class Float64InFloat32(Unmutated):
    """float64 computed in float32, and cast back."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        if inputs.q.dtype != np.float64:
            return super().attention(plan, inputs, lse=lse)

        def narrow(x: Any) -> Any:
            floating = getattr(x, "dtype", None) == np.float64
            return x.astype(np.float32) if floating else x

        params = {name: narrow(x) for name, x in inputs.params.items()}
        less = type(inputs)(*map(narrow, inputs))._replace(params=params)
        out, level = super().attention(plan, less, lse=lse)
        return out.astype("float64"), None if level is None else level.astype("float64")


@planted("behaviour::results_keep_the_dtype[softmax-float16]")
class Float32ForFloat16(Unmutated):
    """A float16 call whose result is float32."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        return (out.astype(np.float32) if out.dtype == np.float16 else out), level


@planted("behaviour::inputs_are_left_alone[bn+sh(1,2)-float32]")
class InputChanged(Unmutated):
    """Keys that are centred in place."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        if plan.summary is not None and inputs.k.flags.writeable:
            inputs.k[...] += np.asarray(1, inputs.k.dtype)
        return super().attention(plan, inputs, lse=lse)


@planted("shapes::lengths_are_any[softmax-float32-lead=1-rows=65-keys=63]")
class LastRowNotWritten(Unmutated):
    """A kernel that leaves the rows of a short last block unwritten."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        rows = out.shape[-2] // 4 * 4 if out.shape[-2] > 60 else out.shape[-2]
        result = np.empty(out.shape, out.dtype)
        result[..., :rows, :] = out[..., :rows, :]
        return result, level


@planted("behaviour::same_call_twice_gives_the_same_bits[softmax-float32]")
class RandomLastBit(Unmutated):
    """Sums in an order that changes from call to call."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        noise = np.random.default_rng().integers(0, 2, out.shape).astype(bool)
        return np.where(noise, np.nextafter(out, np.asarray(9, out.dtype)), out), level


@planted(
    "behaviour::row_does_not_depend_on_its_batch[softmax-float32-lead=5-rows=70-keys=700-"
    "dim=32-value_dim=32]"
)
class RowDependsOnBatch(Unmutated):
    """Another order of sums when there are several sequences."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        if inputs.q.ndim > 3 and inputs.q.shape[0] > 1 and out.dtype.name != "bfloat16":
            out = np.nextafter(out, np.asarray(9, out.dtype))
        return out, level


@planted("behaviour::eight_threads_share_a_backend")
class SharedScratch(Unmutated):
    """Inputs stored in the backend during a call, where another thread replaces them."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        self.scratch = inputs
        time.sleep(1e-3)
        return super().attention(plan, self.scratch, lse=lse)
