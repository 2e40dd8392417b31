"""The laws of decoding on the PyTorch backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoding_laws import (  # noqa: F401 - collected here too
    FEW,
    Case,
    close,
    test_a_batch_may_have_any_leading_axes,
    test_a_prompt_with_padding_on_the_left_is_compacted,
    test_a_state_of_sums_or_a_window_does_not_grow,
    test_any_split_gives_the_rows_of_one_call,
    test_beams_continue_the_sequences_of_an_index,
    test_many_single_tokens_keep_the_digits_of_float32,
    test_means_far_from_zero_cost_no_digits,
    test_no_more_is_taken_back_than_the_state_keeps,
    test_positions_beyond_the_capacity_are_an_error,
    test_room_is_added_to_a_state,
    test_sequences_of_different_lengths_in_one_batch,
    test_truncation_selects_an_earlier_state_bit_for_bit,
    test_what_depends_on_the_future_is_refused_by_name,
    test_wrong_arguments_are_explained,
)


@pytest.fixture
def name() -> str:
    return "torch"


@pytest.mark.parametrize("spec", FEW)
def test_a_compiled_step_serves_all_lengths(spec: str) -> None:
    """It is one graph, compiled anew once at most, and rows beyond the capacity are NaN."""
    case, graphs = Case("torch", spec), []

    def backend(graph: Any, arrays: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = torch.compile(case.decoder.extend, backend=backend, fullgraph=True)
    state = case.init(capacity=8)
    for at in range(8):
        out, state = step(state, *case.rows(at, 1))
        case.check(out, at)
    out, state = step(state, *case.rows(8, 1))
    assert torch.isnan(out).all()
    assert len(graphs) <= 2


@pytest.mark.parametrize("spec", FEW[:3])
def test_compiled_calls_take_back_what_they_add(spec: str) -> None:
    """Any of the new positions are real, and the last one is taken back, in one graph."""
    case, graphs = Case("torch", spec), []

    def backend(graph: Any, arrays: Any) -> Any:
        graphs.append(graph)
        return graph

    def draft(state: Any, q: Any, k: Any, v: Any, real: Any, index: Any) -> Any:
        out, state = case.decoder.extend(state, q, k, v, lengths=real, in_place=True)
        state = case.decoder.truncate(state, state["lengths"] - 1, in_place=True)
        return out, case.decoder.reorder(state, index)

    torch._dynamo.reset()
    step = torch.compile(draft, backend=backend, fullgraph=True)
    state, index, at = case.init(undo=2), torch.arange(2), np.zeros(2, np.int64)
    for counts in ((4, 3), (2, 3), (4, 1), (2, 2)):
        out, state = step(state, *case.rows(at, 4), torch.tensor(counts), index)
        for b, count in enumerate(counts):
            close(case.numpy(out)[b, :, :count], case.out[b, :, at[b] : at[b] + count])
        at += np.array(counts) - 1
    assert state["lengths"].tolist() == at.tolist()
    assert len(graphs) <= 2


def test_gradients_go_through_a_step() -> None:
    case = Case("torch", "causal+linear")
    q, k, v = (x.requires_grad_() for x in case.rows(0, 5))
    out, _ = case.decoder.extend(case.init(), q, k, v)
    whole = torch.autograd.grad(out.sum(), (q, k, v))
    first, state = case.decoder.extend(case.init(), q[:, :, :3], k[:, :, :3], v[:, :, :3])
    last, _ = case.decoder.extend(state, q[:, :, 3:], k[:, :, 3:], v[:, :, 3:])
    parts = torch.autograd.grad(first.sum() + last.sum(), (q, k, v))
    for got, expected in zip(parts, whole, strict=True):
        torch.testing.assert_close(got, expected)
