"""One rank of `test_torch_groups.py`: calls on its part of a sequence, see `ranks`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from array_api_compat import torch as xp
from ranks import joined, part
from shard_cases import CASES, Case

import pdcore
from pdcore.extend import Moments, Shards
from pdcore_backends.torch import ring
from pdcore_backends.torch.shards import RankedShards

ROWS, VECTORS = ("q", "k", "v"), ("key_mask",)
#: Cases in the other dtypes.
NARROW = [
    Case(spec, ("key_mask",), dtype="float32")
    for spec in ("causal+bn(statistics=prefix)", "softmax", "bn", "causal+sh(1,2)", "causal+linear")
]


def ranked(case: Case, group: Any, *, again: bool = False) -> dict[str, Any]:
    """Run a call on this rank's part, and pull cotangents back; `again` without lse too."""
    inputs = case.arrays()
    params = {n: torch.from_numpy(x) for n, x in inputs.pop("params", {}).items()}
    moving: dict[str, Any] = {}
    for name in ROWS:
        x = part(torch.from_numpy(inputs.pop(name)), group, -2)
        moving[name] = x.clone().requires_grad_()
    for name in VECTORS:
        if name in inputs:
            inputs[name] = part(torch.from_numpy(inputs[name]), group, -1)
    if not isinstance(inputs["offset"], int | str):
        inputs["offset"] = torch.from_numpy(inputs["offset"])
    for name, x in params.items():
        if name in ("beta", "sink", "relative"):
            moving[name] = x.requires_grad_()
    arrays = [moving[name] for name in ROWS]
    layer = pdcore.bind(case.spec)
    out, lse = layer(*arrays, params=params, group=group, return_lse=True, **inputs)
    if again:
        with torch.no_grad():
            assert torch.equal(layer(*arrays, params=params, group=group, **inputs), out)
    d_out, d_lse = (torch.from_numpy(x) for x in case.cotangents())
    d_out, d_lse = part(d_out, group, -2), part(d_lse, group, -1)
    loss = (out * d_out).sum() + torch.where(torch.isinf(lse), 0.0, lse * d_lse).sum()
    loss.backward()
    found = {"out": out, "lse": lse, **{f"d_{name}": x.grad for name, x in moving.items()}}
    return {name: x.detach().clone() for name, x in found.items()}


def counted(case: Case, group: Any) -> dict[str, int]:
    """Count the bytes that a call and its gradient send to ranks, and give to collectives."""
    sums = {"sent": 0, "given": 0}

    def sends(steps: Any) -> Any:
        for step in steps:
            if step.op is dist.isend:
                sums["sent"] += step.tensor.numel() * step.tensor.element_size()
        return dist.distributed_c10d.batch_isend_irecv(steps)

    def gives(collective: Any) -> Any:
        def give(*arrays: Any, **options: Any) -> Any:
            given = [x for x in arrays if isinstance(x, torch.Tensor)][-1]
            sums["given"] += given.numel() * given.element_size()
            return collective(*arrays, **options)

        return give

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", sends))
        for name in ("all_gather", "all_reduce"):
            stack.enter_context(mock.patch.object(dist, name, gives(getattr(dist, name))))
        ranked(case, group)
    return sums


def mean_of_means(shards: Any, stats: Any, state: Any) -> Any:
    """Merge the states of all shards as if they had as many keys, which is wrong."""
    gathered = shards.gathered(state)
    return {name: x.sum(0) if name == "n" else x.mean(0) for name, x in gathered.items()}


def local_offset(o: Any, shards: Any, source: int, keys: Any) -> Any:
    """Return the operands of a pair at the offset of a rank's own keys, which is wrong."""
    return PAIR(o, shards, shards.rank, keys)


PAIR = ring._pair
#: Defects, each with a case that shows it.
PLANTED: dict[str, tuple[Any, str, Any, Case]] = {
    "a mean of means": (Shards, "merged", mean_of_means, Case("bn", ("key_mask",))),
    "a local offset": (ring, "_pair", local_offset, Case("causal")),
    "no merge of earlier prefixes": (
        Shards,
        "prefix_states",
        lambda shards, stats, states: states,
        Case("causal+bn(statistics=prefix)"),
    ),
}


def results(group: Any) -> dict[str, Any]:
    """Run all cases on this rank."""
    found: dict[str, Any] = {"cases": [ranked(case, group, again=True) for case in CASES + NARROW]}
    found["planted"] = {}
    for name, (owner, attribute, defect, case) in PLANTED.items():
        with mock.patch.object(owner, attribute, defect):
            found["planted"][name] = ranked(case, group)
    found["bytes"] = {spec: counted(Case(spec), group) for spec in ("causal", "softmax", "bn")}
    keys = torch.from_numpy(Case("bn").arrays()["k"]) + 100.0
    state = Moments().of(part(keys, group, -2), None, xp=xp)
    found["merged"] = RankedShards(group).merged(Moments(), state)
    return found


if __name__ == "__main__":
    joined(results)
