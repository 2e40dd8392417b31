"""A sequence that is cut over the ranks of a process group: the same results as one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ranked_torch import NARROW, PLANTED
from ranks import Ranks, run
from shard_cases import CASES, agree, single

import pdcore
from pdcore import UnsupportedError
from pdcore_conformance.judge.budget import expect, judge

#: What the ranks have found, in their order.
Found = list[dict[str, Any]]


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the results of a call on all ranks."""
    return {name: _joined(name, [x[name] for x in found]) for name in found[0]}


def _joined(name: str, parts: list[Any]) -> Any:
    """Join the rows of all ranks; the gradient of a parameter is the sum over the ranks."""
    parts = [x.numpy() for x in parts]
    if name.removeprefix("d_") in ("beta", "sink", "relative"):
        return sum(parts)
    return np.concatenate(parts, axis=-1 if name == "lse" else -2)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.nightly)])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return run("ranked_torch", tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda i: f"{CASES[i].spec}-{i}")
def test_ranks_give_what_one_process_gives(found: Found, index: int) -> None:
    agree(joined([x["cases"][index] for x in found]), single(CASES[index]), 1e-12)


@pytest.mark.parametrize("defect", PLANTED)
def test_a_planted_defect_is_seen(found: Found, defect: str) -> None:
    *_, case = PLANTED[defect]
    with pytest.raises(AssertionError):
        agree(joined([x["planted"][defect] for x in found]), single(case), 1e-6)


def test_statistics_have_the_same_bits_on_all_ranks(found: Found) -> None:
    first, *others = (x["merged"] for x in found)
    for other in others:
        for name, x in first.items():
            assert torch.equal(x, other[name]), name


def test_the_bytes_that_a_rank_sends(found: Found) -> None:
    # The formulas of docs/sharding.md, for the 2 sequences of 2 heads in float64.
    count = len(found)
    keys = 2 * 2 * (24 // count) * (5 + 3) * 8
    states = 2 * 2 * (1 + 5 + 5) * 8
    for rank, x in enumerate(found):
        later, earlier, others = count - 1 - rank, rank, count - 1
        assert x["bytes"]["causal"] == {"sent": (2 * later + earlier) * keys, "given": 0}
        assert x["bytes"]["softmax"] == {"sent": 3 * others * keys, "given": 0}
        given = states + count * states
        assert x["bytes"]["bn"] == {"sent": 3 * others * keys, "given": given}


@pytest.mark.parametrize("index", range(len(NARROW)), ids=lambda i: NARROW[i].spec)
def test_float32_keeps_the_budget(found: Found, index: int) -> None:
    case = NARROW[index]
    d_out, d_lse = case.cotangents()
    d_lse = np.where(np.isinf(single(case)["lse"]), 0, d_lse).astype(d_lse.dtype)
    expected = expect(spec=case.spec, d_out=d_out, d_lse=d_lse, **case.arrays())
    verdicts = judge(joined([x["cases"][len(CASES) + index] for x in found]), expected)
    assert all(verdict.ok for verdict in verdicts.values()), verdicts


class Mesh:
    """What a mesh of two dimensions says of itself."""

    ndim = 2

    def size(self) -> int:
        return 4

    def get_group(self) -> Any:
        raise AssertionError("not asked for")


X = torch.ones(1, 2, 6, 4)


@pytest.mark.parametrize(
    ("spec", "more", "error", "words"),
    [
        ("sh(1,4)", {}, UnsupportedError, "6 keys in a shard are no multiple of the scale 4"),
        ("softmax", {"mask": torch.ones(6, 6) > 0}, UnsupportedError, "mask has entries for pairs"),
        ("softmax", {"bias": torch.ones(6, 6)}, UnsupportedError, "bias has entries for pairs"),
        ("softmax", {"segments": torch.zeros(1, 6).int()}, UnsupportedError, "segments: not with"),
        ("labels(2)", {"labels": torch.zeros(1, 6).int()}, UnsupportedError, "labels: not with"),
        ("causal+linear", {"offset": 3}, UnsupportedError, "offset: got 3, expected 0"),
        ("softmax", {"axis_name": "rows"}, UnsupportedError, "along a mapped axis: unsupported"),
        ("softmax", {"group": 2}, TypeError, "group: got 2, expected a ProcessGroup"),
        ("softmax", {"group": X}, TypeError, "expected a ProcessGroup"),
        ("softmax", {"group": Mesh()}, ValueError, "got a mesh of 2 dimensions, expected one"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    spec: str, more: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments = {"group": Ranks(), "backend": "torch", **more}
    with pytest.raises(error, match=words):
        pdcore.attention(X, X, X, spec, **arguments)


def test_other_libraries_refuse_a_group() -> None:
    x = X.numpy()
    with pytest.raises(UnsupportedError, match="over a group of processes: unsupported"):
        pdcore.attention(x, x, x, group=Ranks(), backend="numpy")


def test_a_compiled_call_refuses_a_group() -> None:
    with pytest.raises(Exception, match="group: got a group in a call that PyTorch compiles"):
        torch.compile(lambda x: pdcore.attention(x, x, x, group=Ranks()), fullgraph=True)(X)


def test_explain_says_what_ranks_exchange() -> None:
    for spec, words in {
        "bn": "never a mean of means",
        "causal": "keys are sent to the ranks whose queries see them",
        "linear": "the sum over shards of",
        "causal+linear": "an exclusive scan",
    }.items():
        text = str(pdcore.explain(X, X, X, spec, group=Ranks()))
        assert words in text
        assert "a group of 2" in text
