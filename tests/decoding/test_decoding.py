"""The laws of decoding on the backends that need no framework."""

from __future__ import annotations

import numpy as np
import pytest
from decoding_laws import (  # noqa: F401 - collected here too
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

import pdcore


@pytest.fixture(params=["numpy", "strict"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("spec", ["causal+linear", "sparse(2,0)+bn(statistics=prefix)"])
def test_many_tokens_in_float32(spec: str) -> None:
    """After 2^17 tokens rows in float32 differ from those in float64 by its rounding."""
    rng = np.random.default_rng(0)
    count, size = 2**17, 2048
    q, k, v = rng.standard_normal((3, 1, 1, count, 4)).astype("float32")
    decoder = pdcore.decoder(spec)
    state = decoder.init(1, 1, 4, 4, None, like=k)
    rows = np.zeros(0)
    for at in range(0, count, size):
        rows, state = decoder.extend(state, *(x[:, :, at : at + size] for x in (q, k, v)))
    whole = pdcore.attention(*(x.astype("float64") for x in (q, k, v)), spec)[:, :, -size:]
    error = np.abs(rows - whole).max() / np.abs(whole).max()
    assert error < 5e-6, error
