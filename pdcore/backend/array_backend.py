"""`ArrayBackend`: every plan, in array-API calls, for any array library.

A new plugin names its library and is complete; it then overrides `scores`, `features`,
`statistics` or `pool` (and their pullbacks) with fast code, one at a time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..arrays import device_name, library_of
from ..errors import UnsupportedError
from ..lowering import (
    Features,
    Group,
    Plan,
    Pullback,
    Rows,
    Scores,
    Summary,
    add_into,
    first_real,
    sum_to,
)
from ..spec import (
    FeatureMap,
    Identity,
    Moments,
    Statistics,
    Visibility,
    heads,
    prefix_states,
    reduce_axis,
)
from . import feature_contraction, score_contraction
from .call import Call, Normaliser
from .contract import FEATURES, Backend, Inputs, Request
from .operands import Contracted, Operands

__all__ = ["ArrayBackend"]


@dataclass
class _GroupRun:
    """The heads of one scale on their way through a plan."""

    out: Any
    lse: Any
    vjp: Callable[[Any, Any], dict[str, Any]] | None
    weights: Callable[[], Any]


@dataclass
class _Runs:
    """All head groups on their way, and what their contractions gave."""

    groups: list[_GroupRun]
    contracted: Contracted

    def results(self, call: Call, *, lse: bool) -> tuple[Any, Any]:
        """Give out and lse of the call, which the contraction may have written as they are."""
        out = call.join([run.out for run in self.groups], call.dtype, self._whole("out", 0))
        if not lse:
            return out, None
        parts = [run.lse for run in self.groups]
        return out, call.join(parts, call.accumulate, self._whole("lse", 1))

    def _whole(self, name: str, i: int) -> Any:
        parts, whole = self.contracted
        own = (getattr(run, name) is part[i] for run, part in zip(self.groups, parts, strict=True))
        return whole[i] if whole is not None and all(own) else None


class ArrayBackend(Backend):
    """Runs every plan with array-API calls, blocked over queries and keys.

    Attributes
    ----------
    query_block, key_block : int
        The block of scores that exists at a time, per head.
    """

    query_block: ClassVar[int] = 256
    key_block: ClassVar[int] = 512

    def __init__(self) -> None:
        self._xp: Any = None

    @property
    def xp(self) -> Any:
        """The array-API namespace, by array-api-compat; imported at first use."""
        if self._xp is None:
            library = importlib.import_module(self.info.library)
            try:
                self._xp = importlib.import_module(f"array_api_compat.{self.info.library}")
            except ModuleNotFoundError:
                self._xp = library
        return self._xp

    def refusals(self, request: Request) -> list[str]:
        """Say why the backend cannot run a call, see `Backend.refusals`."""
        reasons = super().refusals(request)
        if request.vjp and self.info.support("autodiff") != "full":
            reasons += _missing_pullbacks(request)
        return reasons

    def versions(self) -> dict[str, str]:
        """Give the array library's version."""
        return {self.info.library: importlib.import_module(self.info.library).__version__}

    def exchange(self, array: Any, device: str | None = None) -> Any:
        """Take an array of another library by DLPack, and move it, see `Backend.exchange`."""
        library = self.info.library
        if library_of(array, "array") != library:
            array = self.xp.from_dlpack(array)
        if device is None or device_name(array, library) == device:
            return array
        from array_api_compat import to_device

        return to_device(array, device)

    # The steps that a plugin may replace.

    def native(self, plan: Plan) -> frozenset[str]:
        """Name the steps that take 16-bit arrays as they are; others get a cast to float32.

        Returns
        -------
        frozenset of {"pool", "statistics", "statistics_vjp", "contraction"}
            A native contraction is given q, k, v and bias in the caller's dtype, as far as no
            step before has made others of them, and ``d_out`` where ``h`` is the sum of all
            visible keys' weights. Its `out` and gradients may be in float32 or in that dtype.
        """
        return frozenset()

    def pool(self, kind: str, x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        """Pool keys or values, see `heads.pool`."""
        return heads.pool(kind, x, weights, xp=self.xp)

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute a finalised state of the keys (*B, H, M, D), mask (*B, 1, M, 1) or None."""
        xp, stats = self.xp, summary.statistics
        if summary.scope == "prefix":
            # Merges of single keys lose digits in proportion to |mean| / sd; relative to the
            # first real key, which every row with keys has seen, the mean is never far.
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
        """Pull cotangents of the states of many prefixes back, see `Moments.prefix_vjp`."""
        assert isinstance(summary.statistics, Moments)
        return summary.statistics.prefix_vjp(keys, mask, rows, cotangent, later, xp=self.xp)

    def merged(self, stats: Statistics, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Merge the state of these keys with those of a sequence's other keys; here, of none."""
        return state

    def first_key(self, keys: Any, real: Any) -> Any:
        """Give the first real key of each head, see `transforms.first_real`."""
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
        """Contract every head group by scores; `heads` are its key heads in the caller's order."""
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

    def dropout(self, p: float) -> Callable[[int, int, int, int, Any], Any]:
        """Draw a dropout of weights, see `pdcore.backend.operands.Operands`."""
        raise UnsupportedError(f"backend {self.info.name}: {FEATURES['dropout']}: not implemented")

    # Running a plan.

    def call(self, plan: Plan, inputs: Inputs) -> Call:
        """Take the arrays of a call, see `call.Call`."""
        return Call(self, plan, inputs)

    def attention(self, plan: Plan, inputs: Inputs, *, lse: bool = False) -> tuple[Any, Any]:
        """Run a plan, see `Backend.attention`."""
        call = self.call(plan, inputs)
        return self._runs(call).results(call, lse=lse)

    def attention_vjp(
        self, plan: Plan, inputs: Inputs
    ) -> tuple[Any, Any, Callable[..., dict[str, Any]]]:
        """Run a plan and give its pullback, see `Backend.attention_vjp`."""
        call = self.call(plan, inputs)
        runs = self._runs(call, vjp=True)
        out, lse = runs.results(call, lse=True)

        def vjp(d_out: Any, d_lse: Any = None) -> dict[str, Any]:
            return call.pull_back([run.vjp for run in runs.groups], d_out, d_lse)

        return out, lse, vjp

    def attention_weights(self, plan: Plan, inputs: Inputs) -> Any:
        """Compute the weights of a plan, see `Backend.attention_weights`."""
        call = self.call(plan, inputs)
        call.native = frozenset()  # the weights are array calls
        return call.join([run.weights() for run in self._runs(call).groups], call.dtype)

    def _runs(self, call: Call, *, vjp: bool = False) -> _Runs:
        """Take all head groups through the plan."""
        plan, c = call.plan, call.plan.contraction
        taken = [self._taken(call, group, vjp=vjp) for group in plan.groups]
        operands = [o for o, _ in taken]
        if isinstance(c, Scores):
            found = self.scores_of_groups(c, operands, [group.heads for group in plan.groups])
        else:
            found = Contracted([self.features(c, o) for o in operands])
        runs = [finished(*part) for (_, finished), part in zip(taken, found.parts, strict=True)]
        return _Runs(runs, found)

    def _taken(
        self, call: Call, group: Group, *, vjp: bool
    ) -> tuple[Operands, Callable[[Any, Any], _GroupRun]]:
        """Take one head group to its contraction, and give what is done with (out, L) of that."""
        xp, plan = self.xp, call.plan
        q, k, v = (
            call.heads(x, group, -4 if x is call.q else -3) for x in (call.q, call.k, call.v)
        )
        params, values = call.group_params(group)
        visibility, weights = call.visibility(group)
        pools = []
        if weights is not None:
            k, pull_k = self.pool(plan.pool, call.taken("pool", k), weights)
            v, pull_v = self.pool(plan.pool, call.taken("pool", v), weights)
            pools = [pull_k, pull_v]
        real = visibility.key_mask
        summary, step_ = plan.summary, "transforms" if plan.transforms else "contraction"
        final: Mapping[str, Any] = {}
        state: Mapping[str, Any] = {}
        if summary is not None:
            counted = call.taken("statistics", k)
            final = self.statistics(summary, counted, None if real is None else real[..., None])
            k = k if step_ in call.native else counted
            state = _at_rows(final, visibility, q.shape, xp) if summary.scope == "prefix" else final
        flat = xp.reshape(q, (*q.shape[:-3], q.shape[-3] * q.shape[-2], q.shape[-1]))
        rows = Rows(call.taken(step_, flat), call.taken(step_, k), key_mask=real)
        pullbacks: list[Pullback] = []
        for step in plan.transforms:
            rows, pullback = step(rows, state, params, xp=xp)
            pullbacks.append(pullback)
        shape = q.shape[:-1]
        bias = None
        if call.bias is not None:
            bias = call.taken("contraction", call.heads(call.bias, group, -4))
        o = Operands(
            xp.reshape(rows.q, (*shape, rows.q.shape[-1])),
            rows.k,
            call.taken("contraction", v),
            rows.key_bias,
            bias,
            values,
            visibility,
            self.dropout(call.inputs.dropout) if call.inputs.dropout else None,
            rows.fold,
        )
        constant = None if rows.row_constant is None else xp.reshape(rows.row_constant, shape)
        c = plan.contraction
        alive = None
        if summary is not None and summary.scope == "prefix":
            alive = xp.reshape(state["n"], shape) > 0

        def finished(out: Any, level: Any) -> _GroupRun:
            finish = Normaliser(plan, o, out, level, constant, alive, xp)

            def pull(d_out: Any, d_lse: Any) -> dict[str, Any]:
                if not finish.plain or d_out.dtype != call.dtype:
                    d_out = call.cast(d_out)
                d = finish.pull_back(call.taken("contraction", d_out), d_lse)
                contract = self.scores_vjp if isinstance(c, Scores) else self.features_vjp
                grads = contract(c, o, out, level, d[0], d[1])  # type: ignore[arg-type]
                flat_shape = rows.row_constant.shape if constant is not None else None
                cotangent = Rows(
                    xp.reshape(grads["q"], rows.q.shape),
                    grads["k"],
                    grads.get("key_bias"),
                    None if constant is None else xp.reshape(d[1], flat_shape),
                )
                dstate: dict[str, Any] = {}
                dparams = {n: sum_to(grads[n], values[n].shape, xp=xp) for n in values}
                for pullback in reversed(pullbacks):
                    before, ds, dp = pullback(cotangent)
                    cotangent = before._replace(key_bias=None, row_constant=None)
                    add_into(dstate, ds)
                    add_into(dparams, dp)
                dk, dv = cotangent.k, grads["v"]
                if dstate:
                    assert summary is not None
                    k_ = call.taken("statistics_vjp", k)
                    seen = None if real is None else real[..., None]
                    if summary.scope == "prefix":
                        dk = dk + self._prefixes_vjp(
                            summary, k_, seen, final, dstate, visibility, q.shape
                        )
                    else:
                        dk = dk + self.statistics_vjp(summary, k_, seen, final, dstate)
                if pools:
                    dk, dv = pools[0](dk), pools[1](dv)
                found = {"q": xp.reshape(cotangent.q, q.shape), "k": dk, "v": dv, **dparams}
                if o.bias is not None:
                    found["bias"] = grads["bias"]
                return found

            return _GroupRun(
                *finish.result(), pull if vjp else None, lambda: finish.weights(c, weights, self)
            )

        return o, finished

    def _prefixes_vjp(
        self,
        summary: Summary,
        keys: Any,
        mask: Any,
        final: Mapping[str, Any],
        dstate: Mapping[str, Any],
        visibility: Visibility,
        shape: tuple[int, ...],
    ) -> Any:
        """Pull back the states that each query row read, (*B, H, G N, D)."""
        xp = self.xp
        cotangent = {
            n: xp.sum(xp.reshape(d, (*shape[:-1], d.shape[-1])), axis=-3) for n, d in dstate.items()
        }
        rows = _at_rows(final, visibility, (*shape[:-3], 1, *shape[-2:]), xp)
        return self.prefix_vjp(summary, keys, mask, rows, cotangent, visibility.later_rows())


def _missing_pullbacks(request: Request) -> list[str]:
    kernel, normalization = request.spec.kernel, request.spec.normalization
    reasons = []
    if isinstance(kernel, FeatureMap) and not kernel.has_vjp:
        reasons.append(f"{FEATURES['vjp']}: {kernel.word} has no features_vjp")
    if not isinstance(normalization, Identity) and not normalization.has_vjp:
        reasons.append(f"{FEATURES['vjp']}: {normalization.word} has no apply_vjp")
    statistics = normalization.statistics_state()
    if statistics is not None and type(statistics).vjp is Statistics.vjp:
        reasons.append(f"{FEATURES['vjp']}: {type(statistics).__name__} has no vjp")
    return reasons


def _at_rows(
    final: Mapping[str, Any], visibility: Visibility, shape: tuple[int, ...], xp: Any
) -> dict[str, Any]:
    """Read each query row's own prefix state, (*B, H, G N, D)."""
    counts = visibility.prefix_counts(0, visibility.rows)
    lead = (*shape[:-3], shape[-3] * shape[-2])
    state = {}
    for name, value in final.items():
        if visibility.static:
            picked = xp.take(value, counts[:, 0], axis=-2)
        else:
            index = xp.broadcast_to(
                counts[..., 0, :, :], (*value.shape[:-2], shape[-2], value.shape[-1])
            )
            picked = xp.take_along_axis(value, index, axis=-2)
        spread = xp.broadcast_to(picked[..., None, :, :], (*shape[:-1], picked.shape[-1]))
        state[name] = xp.reshape(spread, (*lead, picked.shape[-1]))
    return state
