"""Mixture normalization and instance-enhancement batch normalization in place of `nn.BatchNorm`."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import pdcore
from pdcore import UnsupportedError
from pdcore_adapters.torch_nn.norms import (
    InstanceEnhancedBatchNorm1d,
    InstanceEnhancedBatchNorm2d,
    MixtureNorm1d,
    MixtureNorm2d,
)

C = 5
#: Each class, the batch normalization that it replaces, and an input.
CLASSES = [
    (MixtureNorm1d, nn.BatchNorm1d, (7, C)),
    (MixtureNorm1d, nn.BatchNorm1d, (3, C, 4)),
    (MixtureNorm2d, nn.BatchNorm2d, (3, C, 4, 2)),
    (InstanceEnhancedBatchNorm1d, nn.BatchNorm1d, (7, C)),
    (InstanceEnhancedBatchNorm1d, nn.BatchNorm1d, (3, C, 4)),
    (InstanceEnhancedBatchNorm2d, nn.BatchNorm2d, (3, C, 4, 2)),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.7, "eps": 1e-2},
    {"affine": False},
    {"track_running_stats": False},
]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def drawn(*shape: int) -> Any:
    return 3.0 * torch.randn(*shape, dtype=torch.float64) + 2.0


def reduced(cls: Any, **options: Any) -> Any:
    """Return a layer with one component or an open gate."""
    options = {"dtype": torch.float64} | options
    if "Mixture" in cls.__name__:
        return cls(C, components=1, **options)
    layer = cls(C, **options)
    nn.init.constant_(layer.shift, 80.0)
    return layer


def clusters(size: int) -> tuple[Any, Any]:
    """Draw rows (size, C) around two far centres of deviations 1 and 2, with their labels."""
    labels = torch.rand(size) < 0.25
    near, far = torch.randn(2, size, C, dtype=torch.float64)
    return torch.where(labels[:, None], 2.0 * far + 40.0, near - 10.0), labels


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("cls", "usual", "shape"), CLASSES)
def test_one_component_or_an_open_gate_is_batch_normalization(
    cls: Any, usual: Any, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    pair = reduced(cls, **options), usual(C, dtype=torch.float64, **options)
    assert isinstance(pair[0], usual)
    if pair[0].affine:
        for name in ("weight", "bias"):
            value = drawn(C)
            for layer in pair:
                getattr(layer, name).data.copy_(value)
    for training in (True, True, False, True):
        x, cotangent = drawn(*shape), drawn(*shape)
        results = []
        for layer in pair:
            layer.train(training)
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            out = layer(leaf)
            out.backward(cotangent)
            affine = [layer.weight.grad, layer.bias.grad] if layer.affine else []
            buffers = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
            kept = [x.squeeze(0) for x in buffers if x is not None]
            results.append([out.detach(), leaf.grad, *affine, *kept])
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_a_mixture_has_the_numbers_and_gradients_of_the_core() -> None:
    x, cotangent = drawn(2, 6, C, 4)
    layer = MixtureNorm1d(
        C, components=3, steps=2, seed=4, track_running_stats=False, dtype=torch.float64
    )
    leaf = x.clone().requires_grad_()
    out = layer(leaf)
    out.backward(cotangent)
    normalization = pdcore.Mixture(components=3, steps=2, seed=4)
    rows, dout = (y.movedim(1, -1).reshape(1, -1, C).numpy() for y in (x, cotangent))
    statistics, state = normalization.statistics_state(), None
    for _ in range(statistics.rounds):
        state = statistics.finalize(statistics.of(rows, None, xp=np, previous=state), xp=np)
    dx, dstate, _ = normalization.apply_vjp(rows, state, dout, xp=np, params={})
    dx = dx + statistics.vjp(rows, None, state, dstate, xp=np)
    expected = normalization.apply(rows, state, xp=np, params={})
    for got, want in ((out.detach(), expected), (leaf.grad, dx)):
        got = got.movedim(1, -1).reshape(1, -1, C).numpy()
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_each_mode_is_normalized_by_itself_and_keeps_its_place() -> None:
    layer = MixtureNorm1d(C, dtype=torch.float64)
    first = None
    for _ in range(40):
        x, labels = clusters(2000)
        out = layer(x).detach()
        for mode in (out[labels], out[~labels]):
            assert mode.mean(0).abs().max() < 1e-6
            assert (mode.var(0, unbiased=False) - 1).abs().max() < 1e-4
        order = layer.running_mean[:, 0].argsort()
        first = order if first is None else first
        assert torch.equal(order, first)
    centres, variances = layer.running_mean[first], layer.running_var[first]
    assert (centres - torch.tensor([[-10.0], [40.0]])).abs().max() < 0.1
    assert (variances / torch.tensor([[1.0], [4.0]]) - 1.0).abs().max() < 0.1
    assert (layer.running_share[first, 0] - torch.tensor([0.75, 0.25])).abs().max() < 0.02
    x, labels = clusters(2000)
    trained, evaluated = layer(x), layer.eval()(x)
    assert (trained - evaluated).abs().max() < 0.5


def test_a_mode_without_rows_keeps_its_statistics() -> None:
    layer = MixtureNorm1d(C, dtype=torch.float64)
    layer(clusters(2000)[0])
    far = layer.running_mean[:, 0].argmax()
    before = layer.running_mean[far].clone(), layer.running_share[far].clone()
    x, labels = clusters(2000)
    layer(x[~labels])
    torch.testing.assert_close(layer.running_mean[far], before[0])
    torch.testing.assert_close(layer.running_share[far], 0.9 * before[1])


@pytest.mark.parametrize(("cls", "shape"), [(c, s) for c, _, s in CLASSES[3:]])
def test_the_gate_multiplies_the_weight(cls: Any, shape: tuple[int, ...]) -> None:
    layer = cls(C, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = drawn(*shape)
    rest = (C,) + (1,) * (x.ndim - 2)
    mean = x.flatten(2).mean(2) if x.ndim > 2 else x
    gate = torch.sigmoid(layer.slope * mean + layer.shift).reshape(len(x), *rest)
    plain = nn.functional.batch_norm(x, None, None, training=True)
    expected = gate * layer.weight.reshape(rest) * plain + layer.bias.reshape(rest)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_the_gate_begins_as_in_the_authors_code() -> None:
    layer = InstanceEnhancedBatchNorm2d(C)
    assert torch.equal(layer.slope, torch.zeros(C))
    assert torch.equal(layer.shift, -torch.ones(C))


@pytest.mark.parametrize(("cls", "usual", "shape"), CLASSES)
def test_state_dicts_and_copies_carry_all(cls: Any, usual: Any, shape: tuple[int, ...]) -> None:
    layer = cls(C, dtype=torch.float64)
    layer(drawn(*shape))
    other = cls(C, dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    x = drawn(*shape)
    for twin in (other, copy.deepcopy(layer)):
        for training in (True, False):
            results = [copy.deepcopy(m).train(training)(x) for m in (twin, layer)]
            assert torch.equal(*results)
    layer.reset_running_stats()
    fresh = cls(C, dtype=torch.float64).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())


def test_a_checkpoint_of_batch_normalization_lacks_the_gate_alone() -> None:
    state = nn.BatchNorm2d(C).state_dict()
    answer = InstanceEnhancedBatchNorm2d(C).load_state_dict(state, strict=False)
    assert answer.missing_keys == ["slope", "shift"]
    assert not answer.unexpected_keys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("cls", "shape"), [(c, s) for c, _, s in CLASSES])
def test_16_bit_inputs_are_computed_in_float32(
    cls: Any, shape: tuple[int, ...], dtype: Any
) -> None:
    x = drawn(*shape).to(dtype)
    layer = cls(C)
    out = layer(x)
    assert out.dtype == dtype
    expected = cls(C)(x.float())
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)


def test_a_mixture_is_fitted_in_float32_under_autocast() -> None:
    x, layer = drawn(7, C, 4).float(), MixtureNorm1d(C)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features is 0, expected a whole number >= 1"),
        ({"eps": -1.0}, "eps is -1.0, expected a finite number > 0"),
        ({"momentum": 2}, "momentum is 2, expected a number from 0 to 1, or None"),
        ({"affine": 1}, "affine is 1, expected True or False"),
        ({"track_running_stats": None}, "track_running_stats is None, expected True or False"),
        ({"components": 0}, "components is 0, expected a whole number >= 1"),
        ({"steps": 1.5}, "steps is 1.5, expected a whole number >= 1"),
    ],
)
def test_wrong_arguments_name_themselves(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        MixtureNorm2d(**{"num_features": C, **options})


@pytest.mark.parametrize(("cls", "usual", "shape"), CLASSES)
def test_wrong_inputs_change_nothing(cls: Any, usual: Any, shape: tuple[int, ...]) -> None:
    layer = cls(C)
    before = copy.deepcopy(layer.state_dict())
    one = (1, C, *(1 for _ in shape[2:]))
    cases = [
        (torch.zeros(2, C, 3, 3, 3), rf"input: got shape .*, expected \(N, {C}"),
        (torch.zeros(shape[0], C + 1, *shape[2:]), rf"input: got shape .*, expected \(N, {C}"),
        (torch.zeros(shape, dtype=torch.int64), "input: got dtype torch.int64, expected a float"),
        (torch.zeros(one), "1 value for each channel, expected at least 2"),
    ]
    for x, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            layer(x)
    assert all(torch.equal(x, before[name]) for name, x in layer.state_dict().items())


def test_a_mixture_within_a_checkpoint_is_refused() -> None:
    layer = MixtureNorm1d(C, dtype=torch.float64)
    out = checkpoint(layer, drawn(7, C).requires_grad_(), use_reentrant=False)
    with pytest.raises(UnsupportedError, match="leave the layer out of the checkpointed part"):
        out.sum().backward()
