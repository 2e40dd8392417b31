"""Defects of results as arrays, of state between calls, of memory, and excuses in place of work."""

from __future__ import annotations

import unittest
from typing import Any

import numpy as np
import pytest

from pdcore.lowering import Plan

from .changed_inputs import edited
from .registry import Unmutated, planted

KERNEL = "kernels::kernel_is_computed[softmax-float32]"


class ChangedResults(Unmutated):
    """A backend that changes (out, lse) of a forward call after it has computed them."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        raise NotImplementedError

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        return self.results_of(plan, inputs, *super().attention(plan, inputs, lse=lse))


@planted(KERNEL)
class WrongWithoutLse(ChangedResults):
    """The path without lse with its results tripled."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        return (3 * out if level is None else out), level


@planted(KERNEL)
class BoundDiffers(Unmutated):
    """A call by `bind` that differs from the same call before it by `attention`."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        out, level = super().attention(plan, inputs, lse=lse)
        bound = getattr(self, "last", None) == (lse, inputs.q.shape)
        self.last = None if bound else (lse, inputs.q.shape)
        return (1.05 * out).astype(out.dtype) if bound else out, level


@planted(KERNEL)
class ReadOnlyResult(ChangedResults):
    """An output that a caller cannot write into."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        out = np.array(out)
        out.flags.writeable = False
        return out, level


@planted("shapes::features_are_any[softmax-float32-dim=64-value_dim=64]")
class ResultSharesAnInput(ChangedResults):
    """An output in the memory of an input of its shape."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        for x in (inputs.q, inputs.v):
            if x.shape == out.shape and x.dtype == out.dtype:
                return x.view(), level
        return out, level


@planted("behaviour::nan_reaches_rows_that_see_it[softmax-float32-lead=3-heads=4-rows=65-keys=130]")
class NanSpreads(ChangedResults):
    """A NaN of a key in the results of all heads and sequences."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        if inputs.key_mask is None and out.size and np.isnan(inputs.k).any():
            out = np.full_like(out, np.nan)
        return out, level


@planted("behaviour::nan_reaches_rows_that_see_it[softmax-float32-lead=3-heads=4-rows=65-keys=130]")
class NanSwallowed(Unmutated):
    """Keys and values by nan_to_num."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        return super().attention(plan, edited(inputs, k=np.nan_to_num, v=np.nan_to_num), lse=lse)


@planted("behaviour::arrays_may_change_between_calls[softmax-float32]")
class CacheOfPointers(Unmutated):
    """Results that are kept by the addresses of the arrays, not by their contents."""

    def attention(self, plan: Plan, inputs: Any, *, lse: bool = False) -> Any:
        arrays = [x for x in inputs if isinstance(x, np.ndarray)]
        key = (plan.spec, *((x.ctypes.data, x.shape, x.strides, x.dtype) for x in arrays))
        if getattr(self, "key", None) != key:
            # The arrays are kept, so that their addresses are not given to others.
            self.key, self.arrays = key, arrays
            self.kept = super().attention(plan, inputs, lse=True)
        out, level = self.kept
        return out.copy(), level.copy() if lse else None


@planted(
    "behaviour::same_call_twice_gives_the_same_bits[softmax-float32-lead=1-rows=1030-keys=1100-"
    "dim=32-value_dim=32]"
)
class RandomForManyRows(ChangedResults):
    """Sums in an order that changes from call to call, from 1,000 rows on."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        if out.shape[-2] >= 1000:
            noise = np.random.default_rng().integers(0, 2, out.shape).astype(bool)
            out = np.where(noise, np.nextafter(out, np.asarray(9, out.dtype)), out)
        return out, level


@planted(
    "memory::memory_grows_with_the_length[softmax-float32-lead=1-heads=1-key_heads=1-rows=8192-"
    "keys=8192-value_dim=8]"
)
class QuadraticMemory(ChangedResults):
    """An array of N times M numbers in each call."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        shape = (*out.shape[:-1], inputs.k.shape[-2])
        return out + 0 * np.ones(shape, out.dtype)[..., :1], level


@planted("behaviour::results_keep_the_dtype[softmax-float16]")
class LseInSixteenBits(ChangedResults):
    """An lse in float16 for a float16 call."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        if level is not None and inputs.q.dtype == np.float16:
            level = level.astype(np.float16)
        return out, level


@planted("kernels::kernel_is_computed[softmax-float16]")
class LseOfSixteenBitSums(ChangedResults):
    """An lse in float32 of sums in 16 bits."""

    def results_of(self, plan: Plan, inputs: Any, out: Any, level: Any) -> tuple[Any, Any]:
        if level is not None and inputs.q.dtype.itemsize == 2:
            level = level.astype(inputs.q.dtype).astype(level.dtype)
        return out, level


class Excusing(Unmutated):
    """A backend that does not compute, but ends its case in another way."""

    def excuse(self) -> None:
        raise NotImplementedError

    def scores(self, c: Any, o: Any) -> Any:
        self.excuse()
        return super().scores(c, o)


@planted(KERNEL)
class Skips(Excusing):
    """A call that raises unittest.SkipTest."""

    def excuse(self) -> None:
        raise unittest.SkipTest("not today")


@planted(KERNEL)
class ExpectsFailure(Excusing):
    """A call that calls pytest.xfail."""

    def excuse(self) -> None:
        pytest.xfail("not today")
