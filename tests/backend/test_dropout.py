"""Dropout: its stream of numbers, by the laws and by statistics, on NumPy and array-api-strict."""

from __future__ import annotations

import array_api_strict
import numpy as np
import pytest
from dropout_laws import VECTORS, DropoutLaws

import pdcore
from pdcore.backend.dropout import threshold
from pdcore.reference.dropout import keeps, random_words


class TestOnNumpy(DropoutLaws):
    xp, words = np, "uint32"

    def array(self, x):
        return x


class TestOnStrict(DropoutLaws):
    xp, words = array_api_strict, "int64"

    def array(self, x):
        return array_api_strict.asarray(x)


@pytest.mark.parametrize(("place", "expected"), VECTORS)
def test_the_oracle_has_the_vectors(place, expected):
    assert int(random_words(*place)) == expected


def test_the_probability_is_that_of_the_threshold():
    assert threshold(0.0) == 0
    assert threshold(0.5) == 2**31
    assert threshold(np.nextafter(1.0, 0.0)) == 2**32 - 1
    # p = u / 2^32 keeps the weight of number u, (u + 1) / 2^32 drops it.
    for place, number in VECTORS[1:4]:
        seed, head, i, j = place
        for more, kept in ((0, True), (1, False)):
            p = (number + more) / 2**32
            assert bool(keeps(p, seed, np.array(head), i + 1, np.array([j]))[i, 0]) is kept


def test_kept_weights_have_their_share_in_every_row_and_column():
    kept = keeps(0.3, 11, np.arange(8), 512, np.arange(512))
    # Five standard deviations of a binomial share, of all, and six of 4,096 rows and columns.
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / kept.size) ** 0.5
    for axis in (1, 2):
        assert np.abs(kept.mean(axis) - 0.7).max() < 6 * (0.21 / 512) ** 0.5


def test_numbers_repeat_as_often_as_random_ones():
    # Of n words of 32 bits n^2 / 2^33 pairs are equal: 32,768 of 2^24, Poisson.
    words = random_words(3, np.array(5), np.arange(4096)[:, None], np.arange(4096))
    assert abs(repeats(words) - 2**15) < 6 * 2**7.5


def of_one_lane(seed, head, i, j):
    """A bad mix, which knows a row by 32 bits: rows that share a number share all of them."""
    lane = random_words(seed, head, i, np.uint32(0))
    return random_words(seed, np.array(0), lane, j)


def repeats(x):
    """Return how many numbers are equal to another one before them."""
    x = np.sort(x.ravel())
    return int((x[1:] == x[:-1]).sum())


@pytest.mark.parametrize("heads", [1, 2**6, 2**16])
def test_rows_do_not_share_words(heads):
    # The first two numbers of a row are 64 bits: none of 2^22 rows should share both, though
    # 2,048 pairs share one of them, Poisson.
    head, i = np.arange(heads)[:, None], np.arange(2**22 // heads)
    for mix, alone, both in ((random_words, 2**11, 0), (of_one_lane, 2**12, 2**11)):
        first, second = (mix(3, head, i, np.array(j)).astype(np.uint64) for j in (0, 1))
        assert abs(repeats(first) - alone) < 6 * alone**0.5
        assert abs(repeats(first << np.uint64(32) | second) - both) <= 6 * both**0.5


@pytest.mark.parametrize("other", [(1, 0), (0, 1)])
def test_neighbouring_rows_and_columns_are_not_correlated(other):
    words = random_words(1, np.array(0), np.arange(1025)[:, None], np.arange(1025))
    x = words / 2.0**32 - 0.5
    di, dj = other
    a, b = x[:1024, :1024], x[di : 1024 + di, dj : 1024 + dj]
    assert abs(np.mean(a * b) * 12) < 5 / 1024


def test_packed_sequences_and_features_are_refused():
    x = np.zeros((1, 2, 6, 4), np.float32)
    with pytest.raises(pdcore.UnsupportedError, match=r"dropout 0\.5: linear has no weights"):
        pdcore.attention(x, x, x, "linear", dropout=0.5, seed=1, backend="numpy")
    ids = np.array([[0, 0, 0, 1, 1, 1]])
    with pytest.raises(pdcore.UnsupportedError, match=r"dropout 0\.5: not with segments"):
        pdcore.attention(x, x, x, dropout=0.5, seed=1, segments=ids, backend="numpy")


def test_explain_and_gradients_take_it():
    x = np.random.default_rng(0).standard_normal((1, 2, 5, 4))
    out, _, vjp = pdcore.attention_vjp(x, x, x, dropout=0.5, seed=3)
    np.testing.assert_array_equal(out, pdcore.attention(x, x, x, dropout=0.5, seed=3))
    # Linear in v: the weights that are kept, transposed.
    d = np.random.default_rng(1).standard_normal(out.shape)
    moved = pdcore.attention(x, x, x + vjp(d)["v"], dropout=0.5, seed=3) - out
    assert np.sum(moved * d) == pytest.approx(np.sum(vjp(d)["v"] ** 2))
    assert pdcore.explain(x, x, x, dropout=0.5, seed=3).to_dict()
