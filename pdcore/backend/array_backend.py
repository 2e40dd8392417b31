"""`ArrayBackend`, which runs every plan in array-API calls on any array library.

A subclass that names its library is a complete backend. Its author then overrides `scores`,
`features`, `statistics` or `pool` (and their pullbacks) with fast code, one at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from ..arrays import device_name, library_of
from ..lowering import Features, Group, Plan, Scores, Summary, first_real
from ..spec import Mean, Statistics, heads, prefix_states, reduce_axis
from . import feature_contraction, score_contraction
from .call import Call
from .contract import Backend, Inputs, Request
from .group_run import GroupRun
from .operands import Carried, Contracted, Operands

__all__ = ["ArrayBackend"]


class ArrayBackend(Backend):
    """A backend that runs every plan with array-API calls, blocked over queries and keys.

    Attributes
    ----------
    compiles : bool
        Whether the library compiles a program for every shape; `program` then returns one.
    query_block, key_block : int
        The rows and columns of the one block of scores that is in memory, per head.
    words : {"int64", "uint32"}
        The integers that compute the stream of dropout; uint32 where its sums and products wrap.
    """

    compiles: ClassVar[bool] = False
    query_block: ClassVar[int] = 256
    key_block: ClassVar[int] = 512
    words: ClassVar[str] = "int64"

    def __init__(self) -> None:
        self._xp: Any = None

    @property
    def xp(self) -> Any:
        """The array-API namespace from array-api-compat, imported at first use."""
        if self._xp is None:
            library = importlib.import_module(self.info.library)
            try:
                self._xp = importlib.import_module(f"array_api_compat.{self.info.library}")
            except ModuleNotFoundError:
                self._xp = library
        return self._xp

    def refusals(self, request: Request) -> list[str]:
        """Return why the backend cannot run a call, see `Backend.refusals`."""
        reasons = super().refusals(request)
        if request.vjp and self.info.support("autodiff") != "full":
            reasons += request.missing_pullbacks()
        return reasons + (_without_weights(request) if request.dropout else [])

    def versions(self) -> dict[str, str]:
        """Return the version of the array library."""
        return {self.info.library: importlib.import_module(self.info.library).__version__}

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Import an array of another library by DLPack, see `Backend.exchange`."""
        library = self.info.library
        if library_of(array, "array") != library:
            array = self.xp.from_dlpack(array)
        if device is None or device_name(array, library) == device:
            return array
        from array_api_compat import to_device

        return to_device(array, device)

    # The steps that a plugin may replace.

    def native(self, plan: Plan) -> frozenset[str]:
        """Return the steps that read 16-bit arrays; arrays of other steps are cast to float32.

        Returns
        -------
        frozenset of {"pool", "statistics", "statistics_vjp", "contraction"}
            A native contraction reads q, k, v and bias in the caller's dtype unless an earlier
            step has replaced them, and ``d_out`` too where ``h`` is the sum of the weights of all
            visible keys. Its `out` and gradients may be in float32 or in the caller's dtype.
        """
        return frozenset()

    def pool(self, kind: str, x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool keys or values, see `heads.pool`."""
        return heads.pool(kind, x, weights, xp=self.xp)

    def pool_of(self, plan: Plan) -> Callable[..., tuple[Any, Callable[[Any], Any]]]:
        """Return the function that pools keys and values; a backend may read `plan.pool_choice`."""
        return self.pool

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute the finalised state of keys (*B, H, M, D), with mask (*B, 1, M, 1) or None."""
        xp, stats = self.xp, summary.statistics
        if summary.scope == "prefix":
            # Merging single keys loses digits in proportion to |mean| / sd, so keys are relative
            # to the first real key: every prefix with a key holds it, so the mean is near.
            origin = self.first_key(keys, None if mask is None else mask[..., 0])
            final = stats.finalize(self.prefix_states(stats, keys - origin, mask), xp=xp)
            return {**final, "mean": final["mean"] + origin}
        previous: Mapping[str, Any] | None = None
        for _ in range(stats.rounds):
            state = stats.of(keys, mask, xp=xp, previous=previous)
            if summary.scope == "batch":
                for axis in range(keys.ndim - 3):
                    state = reduce_axis(stats, state, axis, xp=xp)
            previous = stats.finalize(self.merged(stats, state), xp=xp)
        assert previous is not None
        return previous

    def statistics_vjp(
        self,
        summary: Summary,
        keys: Any,
        mask: Any,
        final: Mapping[str, Any],
        cotangent: Mapping[str, Any],
    ) -> Any:
        """Pull a cotangent of a state back to the keys, see `Statistics.vjp`."""
        return summary.statistics.vjp(keys, mask, final, cotangent, xp=self.xp)

    def prefix_vjp(
        self,
        summary: Summary,
        keys: Any,
        mask: Any,
        rows: Mapping[str, Any],
        cotangent: Mapping[str, Any],
        later: Any,
    ) -> Any:
        """Pull cotangents of the states of many prefixes back, see `Mean.prefix_vjp`."""
        assert isinstance(summary.statistics, Mean)
        return summary.statistics.prefix_vjp(keys, mask, rows, cotangent, later, xp=self.xp)

    def merged(self, stats: Statistics, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge the state with those of the sequence's other shards; without shards, return it."""
        return state

    def first_key(self, keys: Any, real: Any) -> Any:
        """Return the first real key of each head, see `transforms.first_real`."""
        return first_real(keys, real, xp=self.xp)

    def prefix_states(self, stats: Statistics, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute the state of every prefix, see `statistics.prefix_states`."""
        return prefix_states(stats, keys, mask, xp=self.xp)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores, see `score_contraction.scores`."""
        return score_contraction.scores(
            c, o, xp=self.xp, query_block=self.query_block, key_block=self.key_block
        )

    def scores_of_groups(
        self, c: Scores, operands: list[Operands], heads: list[tuple[int, ...]]
    ) -> Contracted:
        """Contract every head group by scores; `heads` holds the key heads of each group."""
        return Contracted([self.scores(c, o) for o in operands])

    def scores_vjp(
        self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Pull back, see `score_contraction.scores_vjp`."""
        return score_contraction.scores_vjp(
            c,
            o,
            out,
            level,
            d_out,
            d_level,
            xp=self.xp,
            query_block=self.query_block,
            key_block=self.key_block,
        )

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, see `feature_contraction.features`."""
        return feature_contraction.features(c, o, xp=self.xp)

    def features_vjp(
        self, c: Features, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Pull back, see `feature_contraction.features_vjp`."""
        return feature_contraction.features_vjp(c, o, out, level, d_out, d_level, xp=self.xp)

    def drawn_seed(self, like: Any) -> Any:
        """Return a seed for a call with dropout and without a seed, where the library draws one."""
        raise ValueError(
            "seed: got None with dropout, expected an int from 0 to 2**64 - 1, or an integer array "
            f"(): backend {self.info.name} draws no random numbers, so give each step a seed of "
            "its own"
        )

    # Running a plan.

    def call(self, plan: Plan, inputs: Inputs, *, level: bool = True) -> Call:
        """Return the arrays of a call, cast and reshaped, see `call.Call`."""
        return Call(self, plan, inputs, level=level)

    def group_run(self, call: Call, group: Group) -> GroupRun:
        """Return the steps of a head group, see `group_run.GroupRun`."""
        return GroupRun(self, call, group)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        call = self.call(plan, inputs, level=lse or plan.rescales)
        return self.results(call, *self.run(call), lse=lse)

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and return its pullback, see `Backend.attention_vjp`."""
        call = self.call(plan, inputs)
        runs, contracted = self.run(call)
        out, lse = self.results(call, runs, contracted, lse=True)

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            return call.pull_back([run.pull_back for run in runs], d_out, d_lse)

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        call = self.call(plan, inputs)
        call.native = frozenset()  # the weights are computed by array-API calls
        runs, _ = self.run(call)
        return call.join([run.attention_weights() for run in runs], call.dtype)

    def run(self, call: Call) -> tuple[list[GroupRun], Contracted]:
        """Run the plan of a call for all its head groups."""
        plan, c = call.plan, call.plan.contraction
        runs, operands, heads_ = [], [], []
        for group in plan.groups:
            run = self.group_run(call, group)
            runs.append(run)
            operands.append(run.prepare())
            heads_.append(group.heads)
        if isinstance(c, Scores):
            contracted = self.scores_of_groups(c, operands, heads_)
        else:
            contracted = Contracted([self._features(c, o) for o in operands])
        for run, part in zip(runs, contracted.parts, strict=True):
            run.finish(*part)
        return runs, contracted

    def _features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, after the sums over earlier keys that a decoder carries."""
        if o.before is None:
            return self.features(c, o)
        size = max(1, min(feature_contraction.CHUNK, o.q.shape[-2]))
        return feature_contraction.features(c, o, xp=self.xp, size=size)

    def decode(
        self, plan: Plan, inputs: Inputs, carried: Sequence[Carried], *, lse: bool = False
    ) -> tuple[Any, Any, list[GroupRun]]:
        """Run a plan on what a decoder carries, of each head group: `pdcore.decoding`.

        Returns
        -------
        out, lse
            As `attention` does.
        runs : list of GroupRun
            The steps of each group, whose operands are the rows after the transforms.
        """
        call = self.decoding_call(plan, inputs, level=lse or plan.rescales)
        call.carried = dict(zip(plan.groups, carried, strict=True))
        runs, contracted = self.run(call)
        return *self.results(call, runs, contracted, lse=lse), runs

    def decoding_call(self, plan: Plan, inputs: Inputs, *, level: bool) -> Call:
        """Return the call of `decode`, by default as any other."""
        return self.call(plan, inputs, level=level)

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of arrays, and of mappings of arrays, as one program."""
        return function

    def computing(self, x: Any) -> AbstractContextManager[Any]:
        """Return the context of array calls outside of `attention`: silent, in full precision."""
        return nullcontext()

    def results(
        self, call: Call, runs: list[GroupRun], contracted: Contracted, *, lse: bool
    ) -> tuple[Any, Any]:
        """Return out and lse of a call: `contracted.whole` as far as it is final, else joined."""
        whole_out, whole_lse = contracted.whole or (None, None)
        if whole_out is not None:
            pairs = zip(runs, contracted.parts, strict=True)
            changed = [(run.out is not out, run.lse is not level) for run, (out, level) in pairs]
            whole_out = None if any(out for out, _ in changed) else whole_out
            whole_lse = None if any(level for _, level in changed) else whole_lse
        out = call.join([run.out for run in runs], call.dtype, whole_out)
        if not lse:
            return out, None
        return out, call.join([run.lse for run in runs], call.accumulate, whole_lse)


def _without_weights(request: Request) -> list[str]:
    """Return why no weights of a call can be dropped."""
    what = f"dropout {request.dropout}"
    if request.feature_map:
        return [f"{what}: {request.feature_map} has no weights to drop; use a kernel of scores"]
    if request.segments in ("values", "compiled"):
        return [f"{what}: not with segments, which run as calls of their own; pad the sequences"]
    return []
