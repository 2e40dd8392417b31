"""Packed sequences whose ids are traced: ids are compared inside the blocks of the scores.

Where ids have values, each segment is cut out instead, as a call of its own. Here queries and keys
have the same ids, so the difference of two positions in a segment is that of their indices, and
causal rows, windows and terms of positions need nothing more. Statistics of the sequence are those
of the segment of each row and of each key.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pdcore.extend import (
    FEATURES,
    GroupRun,
    Inputs,
    Moments,
    Plan,
    Request,
    Rows,
    Statistics,
    Transform,
)

from .namespace import NAMESPACE as xp

__all__ = ["SegmentRun", "refusals", "segmented", "with_runs"]

#: Features of a call whose steps read keys of more than one segment.
_REFUSED = ("head_scaling", "prefix", "user_normalization", "gaussian", "features")


def refusals(request: Request) -> list[str]:
    """Return why a call whose ids are traced cannot run."""
    advice = "pass the ids as a NumPy array, or from outside of the traced function"
    needed = request.features()
    reasons = [
        f"segments: the ids are traced, not with {FEATURES[name]}; {advice}"
        for name in _REFUSED
        if name in needed
    ]
    if request.segments == "traced_pair":
        reasons.append(f"segments: the ids are traced, and a pair; {advice}, or one array for both")
    if request.offset == "end":
        reasons.append(f"segments: the ids are traced, and offset is 'end'; {advice}")
    return reasons


def segmented(plan: Plan) -> Plan:
    """Return the plan of a call whose ids are traced."""
    transforms: Any = plan.transforms
    steps = ["segments: ids are compared inside the blocks of scores"]
    if plan.summary is not None and plan.summary.scope == "sequence":
        first, *rest = transforms
        transforms = (replace(first, choice=_Apart(first)), *rest)
        steps.append("statistics: those of the segment of each row and of each key, by a scan")
    return replace(plan, transforms=transforms, steps=(*plan.steps, *steps))


def with_runs(inputs: Inputs) -> Inputs:
    """Return inputs with the index of each position's run as `segments`, and without padding."""
    ids = inputs.segments
    if ids is None:
        return inputs
    ids = jnp.asarray(ids[0] if isinstance(ids, tuple | list) else ids)
    real, first = ids >= 0, jnp.zeros_like(ids[..., :1], dtype=jnp.int32)
    runs = jnp.cumsum(ids[..., 1:] != ids[..., :-1], axis=-1, dtype=jnp.int32)
    mask = real if inputs.key_mask is None else inputs.key_mask & real
    # A row that sees no key has weights of 0, and its gradients 0 times what padding holds.
    q = jnp.where(real[..., None, :, None], inputs.q, jnp.zeros_like(inputs.q))
    return inputs._replace(q=q, key_mask=mask, segments=jnp.concat([first, runs], axis=-1))


class SegmentRun(GroupRun):
    """The steps of a head group, with statistics of each segment."""

    def summarise(self) -> None:
        """Compute the statistics of the segment of each row, and of each key."""
        summary, call = self.call.plan.summary, self.call
        assert summary is not None
        if summary.scope != "sequence":
            super().summarise()
            return
        keys = call.read_by("statistics", self.k)
        of_keys = _moments(summary.statistics, keys, self._mask(), call.inputs.segments)
        group = self.q.shape[-3]
        of_rows = {name: jnp.concat([x] * group, axis=-2) for name, x in of_keys.items()}
        self.state = {"rows": of_rows, "keys": of_keys}


@dataclass(frozen=True)
class _Apart:
    """A transform by statistics, with one state for each row and one for each key.

    Attributes
    ----------
    step : Transform
        The transform, which reads one state for all rows.
    """

    step: Transform

    def __call__(self, rows: Rows, state: Any, params: Any, *, xp: Any) -> tuple[Rows, Any]:
        """Transform queries and keys; see `Rows`. JAX needs no pullback."""
        q, _ = self.step(rows._replace(k=rows.q), state["rows"], params, xp=xp)
        k, _ = self.step(rows._replace(q=rows.k), state["keys"], params, xp=xp)
        return q._replace(k=k.k, key_bias=k.key_bias), None


def _moments(stats: Statistics, keys: Any, mask: Any, runs: Any) -> dict[str, Any]:
    """Compute the finalised state of the run of each key, (*B, H, M, D) and (*B, 1, M, 1).

    Sums are of the run's own keys, relative to a point of the run; values of other runs are
    selected away before they are added, since NaN times 0 is NaN.
    """
    change = runs[..., 1:] != runs[..., :-1]
    begins = jnp.concat([jnp.ones_like(runs[..., :1], bool), change], axis=-1)
    places = jnp.where(begins, jnp.arange(runs.shape[-1]), 0)
    first = lax.cummax(places, axis=runs.ndim - 1)[..., None, :, None]
    runs = runs[..., None, :, None]
    keys = jnp.where(mask, keys, jnp.zeros_like(keys))
    n = _sums(mask.astype(keys.dtype), runs, first)
    divisor = jnp.maximum(n, 1.0)

    def nearer(point: Any) -> Any:
        deviation = jnp.where(mask, keys - point, jnp.zeros_like(keys))
        return point + _sums(deviation, runs, first) / divisor

    # The first key may be an outlier, or padding: the mean relative to it is the point.
    mean = nearer(lax.stop_gradient(nearer(_at(first, keys))))
    state = {"n": n, "mean": mean}
    if type(stats) is Moments:
        deviation = jnp.where(mask, keys - mean, jnp.zeros_like(keys))
        state["m2"] = _sums(deviation * deviation, runs, first)
    return dict(stats.finalize(state, xp=xp))


def _at(index: Any, x: Any) -> Any:
    """Return the entries at an index of each position, along the axis -2."""
    return jnp.take_along_axis(x, jnp.broadcast_to(index, x.shape), axis=-2)


@jax.custom_jvp  # type: ignore[untyped-decorator]
def _sums(x: Any, runs: Any, first: Any) -> Any:
    """Sum an array over the run of each position, along the axis -2.

    All positions of a run have the sum from its first on, to the last bit. In the derivative they
    have their own: that of a gather would add in no fixed order on a GPU.
    """
    return _at(first, _sums_from(x, runs))


@_sums.defjvp  # type: ignore[untyped-decorator]
def _sums_jvp(primals: tuple[Any, Any, Any], tangents: tuple[Any, Any, Any]) -> Any:
    x, runs, first = primals
    dx = tangents[0]
    after = jnp.where(_later(runs, -1) == runs, _later(_sums_from(dx, runs), 0.0), 0.0)
    return _sums(x, runs, first), _sums_to(dx, runs) + after


def _sums_from(x: Any, runs: Any) -> Any:
    """Sum an array over its run from each position on."""
    return jnp.flip(_sums_to(jnp.flip(x, axis=-2), jnp.flip(runs, axis=-2)), axis=-2)


def _sums_to(x: Any, runs: Any) -> Any:
    """Sum an array over its run up to each position: over 2, 4, 8, ... positions at once."""

    def step(total: Any, shift: Any) -> tuple[Any, None]:
        same = _earlier(runs, shift, -1) == runs
        return total + jnp.where(same, _earlier(total, shift, 0.0), jnp.zeros_like(total)), None

    shifts = 2 ** jnp.arange(max(x.shape[-2] - 1, 0).bit_length())
    summed, _ = lax.scan(step, x, shifts)
    return summed


def _earlier(x: Any, shift: Any, empty: float) -> Any:
    """Return the entries `shift` places before, along the axis -2."""
    size = x.shape[-2]
    padded = jnp.concat([jnp.full_like(x, empty), x], axis=-2)
    return lax.dynamic_slice_in_dim(padded, size - shift, size, axis=x.ndim - 2)


def _later(x: Any, empty: float) -> Any:
    """Return the next entry, along the axis -2."""
    return jnp.concat([x[..., 1:, :], jnp.full_like(x[..., :1, :], empty)], axis=-2)
