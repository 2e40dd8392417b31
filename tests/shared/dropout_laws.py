"""The laws of dropout that hold in every library; `test_..._of_a_library` gives each its arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.backend import dropout
from pdcore.reference.dropout import keeps

#: (seed, b h, i, j) and u32, from docs/semantics.md.
VECTORS = [
    ((0, 0, 0, 0), 0xAE62DE3F),
    ((1, 0, 0, 0), 0x80E7706F),
    ((0, 1, 0, 0), 0xD5A24604),
    ((0, 0, 1, 0), 0xC44F2CD9),
    ((0, 0, 0, 1), 0xFFCD14B1),
    ((0x123456789ABCDEF0, 7, 1000, 1001), 0x62561F06),
    ((2**64 - 1, 65535, 2**20 - 1, 2**20 - 1), 0x5C867C8D),
    ((42, 3, 2**32 - 1, 2**32 - 1), 0xAD511D75),
]
SEED = 2**63 + 2**31 + 5


class DropoutLaws:
    """Laws for a library: a subclass has `xp`, `words`, and `array`, which converts from NumPy."""

    xp: Any
    words: str

    def array(self, x: Any) -> Any:
        raise NotImplementedError

    def run(self, *arrays: Any, **options: Any) -> Any:
        out = pdcore.attention(*(self.array(x) for x in arrays), **options)
        return np.asarray(out)

    @pytest.mark.parametrize(("place", "expected"), VECTORS)
    def test_numbers_are_those_of_the_vectors(self, place: Any, expected: int) -> None:
        # A weight is kept up to the threshold of its own number, and dropped above it.
        seed, head, i, j = place
        xp, dtype = self.xp, getattr(self.xp, self.words)
        head, i, j = (xp.asarray([n], dtype=dtype) for n in (head, i, j))
        lanes = dropout.row_lanes(dropout.seed_words(seed, i, xp=xp), head, i, xp=xp)
        found = [bool(dropout.kept(lanes, j, expected + more, xp=xp)[0]) for more in (0, 1)]
        assert found == [True, False]

    @pytest.mark.parametrize("spec", ["softmax", "sh(1,2,1,2)+bn", "sparse(300,7)", "causal"])
    def test_masks_are_equal_bit_by_bit(self, spec: str) -> None:
        rows, keys = 270, 530
        q, k = np.zeros((2, 4, rows, 2), np.float32), np.zeros((2, 4, keys, 2), np.float32)
        units = np.tile(np.eye(keys, dtype=np.float32), (2, 4, 1, 1))
        whole = self.run(q, k, units, spec=spec)
        out = self.run(q, k, units, spec=spec, dropout=0.4, seed=SEED)
        scales = [1, 2, 1, 2] if "sh" in spec else [1] * 4
        for h, scale in enumerate(scales):
            first = np.arange(keys) // scale * scale
            kept = keeps(0.4, SEED, np.array([h, 4 + h]), rows, first)
            expected = np.where(kept, whole[:, h] / 0.6, 0.0)
            np.testing.assert_array_equal(out[:, h] != 0, expected != 0)
            np.testing.assert_allclose(out[:, h], expected, rtol=1e-5)

    def test_a_seed_is_a_number_in_any_form(self) -> None:
        x = np.random.default_rng(0).standard_normal((1, 2, 5, 4)).astype(np.float32)
        seed = 2**31 + 3
        expected = self.run(x, x, x, dropout=0.5, seed=seed)
        for given in (np.int64(seed), np.uint32(seed), np.array([seed, 0], np.uint32)):
            np.testing.assert_array_equal(self.run(x, x, x, dropout=0.5, seed=given), expected)
        for given in self.seeds(seed):
            np.testing.assert_array_equal(self.run(x, x, x, dropout=0.5, seed=given), expected)
        other = self.run(x, x, x, dropout=0.5, seed=seed + 2**32)
        assert (other != expected).any()

    def seeds(self, seed: int) -> list[Any]:
        """Return the seed as arrays of the library."""
        return [self.array(np.asarray(seed, np.int64))]

    def test_heads_of_one_call_are_numbered_over_all_sequences(self) -> None:
        # One call of 6 heads drops what two sequences of 3 heads drop.
        x = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
        apart = self.run(x, x, x, dropout=0.5, seed=9)
        flat = x.reshape(1, 6, 5, 4)
        together = self.run(flat, flat, flat, dropout=0.5, seed=9)
        np.testing.assert_allclose(apart.reshape(1, 6, 5, 4), together, rtol=1e-5, atol=1e-6)
