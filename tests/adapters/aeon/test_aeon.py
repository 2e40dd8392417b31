"""Test pdcore_adapters.aeon by aeon's checks, and by the training that the study runs."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

# Numba warns of aeon's own code, while it compiles and where a function is already in its cache.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from aeon.testing.estimator_checking import parametrize_with_checks

from reproduction.training.run import Run
from reproduction.training.series import Pair, Series, pair
from sklearn.model_selection import GridSearchCV

import pdcore
from pdcore.datasets import japanese_vowels
from pdcore_adapters.aeon import AttentionClassifier
from pdcore_adapters.diagnostics import capture, head_distances, plot_distances
from pdcore_adapters.time_series.model import Settings


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vowels() -> Pair:
    """Return four speakers, with twelve utterances each to train, and fifteen to test."""
    data = japanese_vowels()

    def part(of: Any, count: int) -> Series:
        chosen = [np.flatnonzero(of & (data.speakers == c))[:count] for c in range(1, 5)]
        places = np.concatenate(chosen)
        labels = tuple(f"speaker {c}" for c in data.speakers[places])
        lengths = data.lengths[places]
        # As long as the longest: the noise of the training has the shape of the padded array.
        return Series(data.frames[places, : lengths.max()], lengths, labels)

    return pair("vowels", part(data.train, 12), part(~data.train, 15), "test")


def of_aeon(part: Series) -> tuple[list[Any], Any]:
    X = [frames[:n].T.astype(float) for frames, n in zip(part.frames, part.lengths, strict=True)]
    return X, np.array(part.labels)


def small(spec: Any = "softmax", **options: Any) -> AttentionClassifier:
    chosen = {"random_state": 0, "epochs": 8, "patience": 8, "batch": 12, "width": 16}
    return AttentionClassifier(spec, **(chosen | options))


@pytest.fixture(scope="module")
def fitted(vowels: Pair) -> AttentionClassifier:
    return small("bn(beta=param)+sh(half=2)").fit(*of_aeon(vowels.train))


@parametrize_with_checks([AttentionClassifier])
def test_checks_of_aeon(check: Any) -> None:
    check()


@pytest.mark.parametrize("spec", ["softmax", "bn(beta=param)+sh(half=2)"])
def test_it_is_the_training_of_the_study(spec: str, vowels: Pair) -> None:
    settings = Settings(
        spec=spec, seed=3, epochs=5, patience=8, batch=12, width=16, rate=2e-3, noise=0.1
    )
    result = Run(settings, vowels).finish()
    model = small(spec, random_state=3, epochs=5).fit(*of_aeon(vowels.train))
    assert model.history_ == result["history"]
    assert model.epoch_ == result["epoch"]
    X, y = of_aeon(vowels.test)
    assert int(np.sum(model.predict(X) == y)) == result["test_correct"] > 15


def test_it_learns(vowels: Pair) -> None:
    model = small("bn", epochs=30, rate=5e-3).fit(*of_aeon(vowels.train))
    assert model.score(*of_aeon(vowels.test)) > 0.85


def test_lengths_of_others_change_nothing(fitted: AttentionClassifier, vowels: Pair) -> None:
    X, _ = of_aeon(vowels.test)
    together = fitted.predict_proba(X[:6])
    alone = np.concatenate([fitted.predict_proba([x]) for x in X[:6]])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(together.sum(axis=1), 1.0, rtol=1e-12)
    labels = fitted.classes_[together.argmax(axis=1)]
    np.testing.assert_array_equal(fitted.predict(X[:6]), labels)


def test_equal_lengths_are_an_array_or_a_list(vowels: Pair) -> None:
    X, y = of_aeon(vowels.train)
    cut = [x[:, :7] for x in X]
    one, other = (small(epochs=2).fit(series, y) for series in (cut, np.stack(cut)))
    np.testing.assert_array_equal(one.predict_proba(cut), other.predict_proba(np.stack(cut)))


def test_long_series_are_cut_into_tokens(vowels: Pair) -> None:
    X, y = of_aeon(vowels.train)
    assert max(x.shape[1] for x in X) == 26
    model = small(epochs=1, tokens=10).fit(X, y)
    assert model.patch_ == 3
    maps = model.attention_maps([x for x in X if x.shape[1] == 26] + [X[0]])
    assert maps[0].shape == (2, 4, 9, 9)
    assert maps[-1].shape[2] == -(-X[0].shape[1] // 3)


def test_random_numbers_are_of_random_state_alone(vowels: Pair) -> None:
    X, y = of_aeon(vowels.train)

    def probabilities(random_state: Any, draws: int = 0) -> Any:
        torch.rand(draws)
        return small(random_state=random_state, epochs=1).fit(X, y).predict_proba(X)

    first = probabilities(5)
    np.testing.assert_array_equal(first, probabilities(5, draws=7))
    assert np.abs(first - probabilities(6)).max() > 1e-3
    a, b = (probabilities(np.random.RandomState(1)) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    before = torch.get_rng_state()
    probabilities(5)
    assert torch.equal(before, torch.get_rng_state())


def test_it_stops_early_and_prints_each_epoch(vowels: Pair, capsys: Any) -> None:
    model = small(epochs=50, patience=2, rate=0.1, verbose=True).fit(*of_aeon(vowels.train))
    assert len(model.history_) == model.epoch_ + 2 < 50
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(model.history_) + model.epoch_
    loss = model.history_[0]["loss"]
    assert lines[0].startswith(f"epoch 1 of at most 50: validation loss {loss:.4f}, accuracy ")
    assert lines[-1] == f"all series: epoch {model.epoch_} of {model.epoch_}"
    small(epochs=1).fit(*of_aeon(vowels.train))
    assert capsys.readouterr().out == ""


def test_maps_and_redundancy_are_those_of_the_layers(
    fitted: AttentionClassifier, vowels: Pair
) -> None:
    X, _ = of_aeon(vowels.test)
    maps, redundancy = fitted.attention_maps(X[:3]), fitted.head_redundancy(X[:3])
    assert list(redundancy) == ["layers.0.attention", "layers.1.attention"]
    spec = fitted.model_.settings.spec
    for i, x in enumerate(X[:3]):
        frames = torch.tensor(x.T[None], dtype=torch.float32)
        real = torch.ones(frames.shape[:2], dtype=torch.bool)
        with torch.no_grad(), capture(fitted.model_) as record:
            fitted.model_(frames, real)
        assert maps[i].shape == (2, 4, x.shape[1], x.shape[1])
        np.testing.assert_allclose(maps[i].sum(axis=-1), 1.0, atol=1e-5)
        for place, (name, call) in enumerate(zip(redundancy, record.calls, strict=True)):
            q, k, v = call.inputs[:3]
            params = call.inputs.params
            weights = pdcore.attention_weights(q, k, v, spec, params=params)[0]
            np.testing.assert_allclose(maps[i][place], weights, atol=1e-5)
            expected = head_distances(q, k, v, spec, params=params)
            for measure in ("maps", "outputs", "relative"):
                found = getattr(redundancy[name], measure)
                assert found.shape == (3,)
                np.testing.assert_allclose(found[i], getattr(expected, measure)[0], rtol=1e-4)
    assert len(plot_distances(redundancy, spec).axes) == 3


def test_calls_leave_the_model_as_it_is(fitted: AttentionClassifier, vowels: Pair) -> None:
    X, _ = of_aeon(vowels.test)
    before = {name: x.clone() for name, x in fitted.model_.state_dict().items()}
    first = fitted.predict_proba(X)
    fitted.attention_maps(X[:1])
    fitted.head_redundancy(X[:1])
    np.testing.assert_array_equal(fitted.predict_proba(X), first)
    for name, x in fitted.model_.state_dict().items():
        assert torch.equal(x, before[name])
    again = pickle.loads(pickle.dumps(fitted))  # noqa: S301 - its own
    np.testing.assert_array_equal(again.predict_proba(X), first)


def test_grid_search_over_specs(vowels: Pair) -> None:
    X, y = of_aeon(vowels.train)
    specs = ["softmax", "bn", pdcore.parse("linear")]
    search = GridSearchCV(small(epochs=3), {"spec": specs}, cv=2).fit(X, y)
    scores = search.cv_results_["mean_test_score"]
    assert np.isfinite(scores).all()
    assert search.best_params_ == {"spec": specs[int(np.argmax(scores))]}
    assert search.predict(X).shape == y.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs: got 0, expected a whole number from 1"),
        ({"tokens": 2.5}, "tokens: got 2.5, expected a whole number from 1"),
        ({"validation": 1.0}, "validation: got 1.0, expected a share above 0, below 1"),
        ({"dropout": "much"}, "dropout: got 'much', expected a share from 0, below 1"),
        ({"rate": float("nan")}, "rate: got nan, expected a number above 0"),
        ({"noise": -1.0}, "noise: got -1.0, expected a number from 0"),
        ({"random_state": -1}, "random_state: got -1, expected one from 0"),
        ({"heads": 3}, "heads: got 3, expected a divisor of width=16"),
        ({"spec": "sofmax"}, "sofmax"),
        ({"spec": "sh(1,1,2)"}, "3"),
    ],
)
def test_arguments_that_make_no_sense_are_named(
    options: dict[str, Any], message: str, vowels: Pair
) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options).fit(*of_aeon(vowels.train))


def test_series_that_make_no_sense_are_refused(fitted: AttentionClassifier, vowels: Pair) -> None:
    X, y = of_aeon(vowels.train)
    with pytest.raises(ValueError, match="X: got values that float32 does not have"):
        fitted.predict([X[0] * 1e40])
    with pytest.raises(ValueError, match="different number of channels"):
        fitted.attention_maps([X[0][:3]])
    with pytest.raises(ValueError, match="targets: got 4 series of as many classes"):
        small().fit(X[::12], y[::12])
    with pytest.raises(ValueError, match="has not been fitted"):
        small().head_redundancy(X)
    with pytest.raises(pdcore.UnsupportedError, match="keep mean from batch to batch"):
        small("bn(statistics=running)").fit(X, y)
    with pytest.raises(ValueError, match="two or more heads"):
        small(heads=1, epochs=1).fit(X, y).head_redundancy(X[:1])
