"""Test the transformer that classifies series: its arrays, model and training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pdcore.datasets import japanese_vowels
from pdcore_adapters.diagnostics import head_distances
from pdcore_adapters.time_series import model
from pdcore_adapters.time_series.arrays import patched, real_steps, stack, stratified_split
from pdcore_adapters.time_series.training import Training


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vowels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return twelve utterances of four speakers each, which are real steps, and the speakers."""
    data = japanese_vowels()
    chosen = np.concatenate(
        [np.flatnonzero(data.train & (data.speakers == c))[:12] for c in range(1, 5)]
    )
    frames = data.frames[chosen]
    real = real_steps(frames, data.lengths[chosen])
    return torch.from_numpy(frames), torch.from_numpy(real), torch.arange(4).repeat_interleave(12)


def small(**options: Any) -> Any:
    return model.Settings(**{"epochs": 12, "patience": 12, "batch": 12, "width": 16} | options)


# --- arrays -----------------------------------------------------------------------------------


def test_series_are_padded_and_joined_into_patches() -> None:
    series = [np.arange(2.0 * n).reshape(n, 2) for n in (5, 2)]
    frames, lengths = stack(series)
    assert frames.dtype == np.float32
    assert frames.shape == (2, 5, 2)
    assert real_steps(frames, lengths).sum(axis=1).tolist() == [5, 2]
    np.testing.assert_array_equal(frames[1], np.pad(series[1], ((0, 3), (0, 0))))
    tokens, counts = patched(frames, lengths, 3)
    assert counts.tolist() == [2, 1]
    np.testing.assert_array_equal(tokens[0], [range(6), [6, 7, 8, 9, 0, 0]])
    np.testing.assert_array_equal(tokens[1], [[0, 1, 2, 3, 0, 0], [0] * 6])
    for a, b in zip(patched(frames, lengths, 1), (frames, lengths), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_split_is_stratified_and_repeatable() -> None:
    targets = np.repeat([0, 1, 2, 3], [20, 10, 2, 1])
    fit, held = stratified_split(targets, 0.2, 5)
    assert sorted([*fit, *held]) == list(range(33))
    assert np.bincount(targets[held], minlength=4).tolist() == [4, 2, 1, 0]
    for a, b in zip((fit, held), stratified_split(targets, 0.2, 5), strict=True):
        np.testing.assert_array_equal(a, b)
    assert held.tolist() != stratified_split(targets, 0.2, 6)[1].tolist()


# --- the model --------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["softmax", "bn", "sh(1,1,2,2)", "linear+bn"])
def test_padding_changes_nothing(spec: str, vowels: Any) -> None:
    torch.manual_seed(0)
    net = model.Classifier(model.Settings(spec=spec), 12, 4).eval()
    frames, real = (x[:6] for x in vowels[:2])
    net.standardize_by(frames, real)
    together = net(frames, real)
    poisoned = torch.where(real[..., None], frames, torch.nan)
    longer = torch.nn.functional.pad(poisoned, (0, 0, 0, 5), value=torch.nan)
    padded = net(longer, torch.nn.functional.pad(real, (0, 5)))
    torch.testing.assert_close(padded, together)
    lengths = real.sum(1).tolist()
    alone = [
        net(f[None, :n], r[None, :n])[0] for f, r, n in zip(frames, real, lengths, strict=True)
    ]
    torch.testing.assert_close(torch.stack(alone), together)


def test_channels_are_standardized_and_a_constant_one_is_left_out(vowels: Any) -> None:
    net = model.Classifier(model.Settings(), 12, 4).eval()
    frames, real = vowels[0] * 7.0 + 1e3, vowels[1]
    frames[..., 3] = 1e3
    net.standardize_by(frames, real)
    changed = frames.clone()
    changed[..., 3] = 2e3
    torch.testing.assert_close(net(frames, real), net(changed, real), rtol=0.0, atol=0.0)
    net.embed.register_forward_hook(lambda module, options, result: seen.append(options[0]))
    seen: list[Any] = []
    net(frames, real)
    steps = seen[0][real]
    others = [c for c in range(12) if c != 3]
    torch.testing.assert_close(steps.mean(0), torch.zeros(12), rtol=0.0, atol=2e-4)
    torch.testing.assert_close(steps.std(0)[others], torch.ones(11), rtol=1e-2, atol=0.0)


def test_a_crop_keeps_a_run_of_real_steps() -> None:
    torch.manual_seed(0)
    real = torch.arange(20) < torch.tensor([1, 2, 10, 20]).repeat(50)[:, None]
    kept = model._kept(real, 0.5) & real
    lengths, left = real.sum(1), kept.sum(1)
    assert bool((left >= lengths - lengths // 2).all())
    assert bool((left < lengths).any())
    starts = torch.diff(torch.nn.functional.pad(kept.int(), (1, 1)), dim=1).clamp(min=0).sum(1)
    assert bool((starts == 1).all())


def test_arrays_of_a_spec_are_learned(vowels: Any) -> None:
    run = Training(small(spec="bn(beta=param)", epochs=2), *vowels)
    run.advance()
    beta = run.model.layers[0].attention.arrays["beta"]
    assert beta.shape == (4,)
    assert not torch.equal(beta, torch.ones(4))


@pytest.mark.parametrize("spec", ["softmax", "bn(beta=param)", "sh(1,1,2,2)"])
def test_calls_of_layers_are_those_of_the_series_alone(spec: str, vowels: Any) -> None:
    torch.manual_seed(0)
    net = model.Classifier(model.Settings(spec=spec), 12, 4)
    series = vowels[0][0, : int(vowels[1][0].sum())]
    calls = model.layer_calls(net, series)
    assert [call.layer for call in calls] == ["layers.0.attention", "layers.1.attention"]
    for call, layer in zip(calls, net.layers, strict=True):
        q, k, v = call.inputs[:3]
        assert q.shape == (1, 4, len(series), 16)
        mixed = call.out.transpose(1, 2).flatten(2)
        weights = call.weights()
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(1, 4, len(series)))
        if "sh" not in spec:
            torch.testing.assert_close((weights @ v).transpose(1, 2).flatten(2), mixed)
        found = head_distances(q, k, v, spec, params=dict(layer.attention.arrays.items()))
        assert found.mean() == call.distances().mean()


def test_statistics_that_run_from_batch_to_batch_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="would have to keep mean from batch to batch"):
        model.Classifier(model.Settings(spec="bn(statistics=running)"), 12, 4)


# --- training ---------------------------------------------------------------------------------


def test_training_stops_early(vowels: Any) -> None:
    # The rate is so large that the loss soon gets worse.
    run = Training(small(epochs=50, patience=2, rate=0.1), *vowels)
    while run.phase == "choose":
        run.advance()
    assert len(run.history) == run.chosen + 2 < 50


def test_one_series_of_each_class_cannot_choose_an_epoch(vowels: Any) -> None:
    with pytest.raises(ValueError, match="targets: got 4 series of as many classes, expected two"):
        Training(small(), *(x[::12] for x in vowels))
