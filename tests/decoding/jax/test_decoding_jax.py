"""The laws of decoding on the JAX backend."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from decoding_laws import (  # noqa: F401 - collected here too
    SPECS,
    Case,
    close,
    float64,
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
    return "jax"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("spec", SPECS)
def test_one_program_serves_all_lengths(spec: str) -> None:
    """A jitted step is traced once, and rows beyond the capacity are NaN."""
    with float64("jax"):
        case, traces = Case("jax", spec), []

        def step(state: Any, q: Any, k: Any, v: Any) -> Any:
            traces.append(1)
            return case.decoder.extend(state, q, k, v)

        compiled, state = jax.jit(step, donate_argnums=0), case.init(capacity=15)
        for at in range(15):
            out, state = compiled(state, *case.rows(at, 1))
            case.check(out, at)
        for at in (15, 16):
            out, state = compiled(state, *case.rows(at, 1))
            assert np.isnan(case.numpy(out)).all()
        assert len(traces) == 1


@pytest.mark.sampled(4)
@pytest.mark.parametrize("spec", SPECS)
def test_one_program_serves_all_numbers_of_real_rows(spec: str) -> None:
    with float64("jax"):
        case, traces = Case("jax", spec), []

        def step(state: Any, q: Any, k: Any, v: Any, lengths: Any) -> Any:
            traces.append(1)
            return case.decoder.extend(state, q, k, v, lengths=lengths)

        compiled, state, at = jax.jit(step), case.init(), np.zeros(2, np.int64)
        for counts in ((4, 2), (0, 4), (1, 3), (4, 4)):
            out, state = compiled(state, *case.rows(at, 4), case.array(np.array(counts)))
            for b, count in enumerate(counts):
                close(case.numpy(out)[b, :, :count], case.out[b, :, at[b] : at[b] + count])
            at += counts
        assert len(traces) == 1


def test_a_traced_truncation_beyond_what_is_kept_spoils_the_state() -> None:
    with float64("jax"):
        case = Case("jax", "causal+linear")
        _, state = case.decoder.extend(case.init(undo=2), *case.rows(0, 6))
        cut = jax.jit(case.decoder.truncate)
        out, _ = case.decoder.extend(
            cut(state, case.array(np.array([4, 5]))), *case.rows([4, 5], 1)
        )
        case.check(out, [4, 5])
        out, _ = jax.jit(case.decoder.extend)(
            cut(state, case.array(np.array([4, 3]))), *case.rows([4, 3], 1)
        )
        assert np.isnan(case.numpy(out)[1]).all()
        assert not np.isnan(case.numpy(out)[0]).any()
