"""Layers that keep running statistics, and the parameters of their specs."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from specs_of_words import SPECS, labels_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import pdcore
from pdcore import AttentionSpec, Moments, UnsupportedError
from pdcore.extend import reference_attention
from pdcore_adapters import bound
from pdcore_adapters.torch_nn import PDMultiheadAttention, convert
from pdcore_adapters.torch_nn import state as kept_state

B, N, E, H = 3, 7, 12, 4
D = E // H
RUNNING = "bn(statistics=running)"
CAUSAL = f"causal+{RUNNING}"
POOLED = [RUNNING, f"{RUNNING}+sh(2,1,3,1)", f"{RUNNING}+sh(half=2,pool=first)"]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def layer_of(spec: str, **options: Any) -> PDMultiheadAttention:
    options = {"batch_first": True, "dtype": torch.float64} | options
    layer = PDMultiheadAttention(E, H, spec=spec, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return layer


def drawn(*shape: int) -> Any:
    return torch.randn(*(shape or (B, N, E)), dtype=torch.float64)


def run(layer: Any, x: Any, **options: Any) -> Any:
    return layer(x, x, x, need_weights=False, **options)[0]


def keys_of(layer: Any, x: Any) -> np.ndarray:
    """Return the projected keys (B, H, M, D) of a layer."""
    return layer._project(x, x, x, True)[1].transpose(1, 2).detach().numpy()


def moments(k: np.ndarray, real: np.ndarray, scales: tuple[int, ...], pool: str) -> Any:
    """Compute mean and biased variance of each head's pooled keys, by loops."""
    means, variances = [], []
    for h, s in enumerate(scales):
        rows = []
        for b in range(k.shape[0]):
            for start in range(0, k.shape[2], s):
                window = [
                    k[b, h, j] for j in range(start, min(start + s, k.shape[2])) if real[b, j]
                ]
                if window:
                    rows.append(window[0] if pool == "first" else np.mean(window, axis=0))
        means.append(np.mean(rows, axis=0))
        variances.append(np.var(rows, axis=0))
    return np.stack(means), np.stack(variances)


def check_one_batch(spec: str) -> None:
    layer, x = layer_of(spec, momentum=1.0), drawn()
    padding = torch.arange(N) >= torch.tensor([[N], [4], [1]])
    x[padding] = torch.nan
    run(layer, x, key_padding_mask=padding)
    heads = layer.spec.for_heads(H).heads
    k = keys_of(layer, torch.nan_to_num(x))
    mean, var = moments(k, ~padding.numpy(), heads.scales or (1,) * H, heads.pool)
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-12, atol=1e-13)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("spec", POOLED)
def test_after_one_batch_of_momentum_1_the_buffers_are_its_statistics(spec: str) -> None:
    check_one_batch(spec)


def unpooled(spec: Any, k: Any, key_mask: Any, *, xp: Any) -> Any:
    return STATE_OF_KEYS(pdcore.parse(RUNNING), k, key_mask, xp=xp)


def with_padding(spec: Any, k: Any, key_mask: Any, *, xp: Any) -> Any:
    return STATE_OF_KEYS(spec, torch.nan_to_num(k), None, xp=xp)


def in_order_of_scales(spec: Any, k: Any, key_mask: Any, *, xp: Any) -> Any:
    order = [h for _, heads in spec.for_heads(H).heads.groups(H) for h in heads]
    return {n: x[order] for n, x in STATE_OF_KEYS(spec, k, key_mask, xp=xp).items()}


def one_sequence(spec: Any, k: Any, key_mask: Any, *, xp: Any) -> Any:
    return STATE_OF_KEYS(spec, k[:1], key_mask[:1], xp=xp)


STATE_OF_KEYS = kept_state.state_of_keys


@pytest.mark.parametrize("wrong", [unpooled, with_padding, in_order_of_scales, one_sequence])
def test_wrong_statistics_are_caught(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_state, "state_of_keys", wrong)
    with pytest.raises(AssertionError):
        check_one_batch(POOLED[1])


def test_an_unbiased_variance_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    true = Moments.finalize

    def unbiased(self: Moments, state: Any, *, xp: Any) -> Any:
        final, n = true(self, state, xp=xp), state["n"]
        return {**final, "var": final["var"] * n / (n - 1)}

    monkeypatch.setattr(Moments, "finalize", unbiased)
    with pytest.raises(AssertionError):
        check_one_batch(RUNNING)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
def test_momentum_is_that_of_batch_normalization(momentum: float | None) -> None:
    layer, theirs = layer_of(RUNNING, momentum=momentum), nn.BatchNorm1d(E, momentum=momentum)
    theirs = theirs.double()
    for length in (5, 6, 7):
        x = drawn(B, length, E)
        run(layer, x)
        theirs(torch.from_numpy(keys_of(layer, x)).transpose(1, 2).flatten(0, 1).flatten(1))
    torch.testing.assert_close(layer.running_mean.flatten(), theirs.running_mean)
    assert layer.num_batches_tracked == theirs.num_batches_tracked == 3
    assert not torch.equal(layer.running_var.flatten(), theirs.running_var)  # theirs is unbiased


@pytest.mark.parametrize("spec", [*POOLED, f"gaussian(0.3)+{RUNNING}", f"linear+{RUNNING}"])
def test_training_is_that_of_batch_statistics(spec: str) -> None:
    layer = layer_of(spec)
    other = layer_of(spec.replace("running", "batch"))
    other.load_state_dict(layer.state_dict(), strict=False)
    for _ in range(2):
        x, cotangent = drawn(), drawn()
        for one in (layer, other):
            one.zero_grad()
            (run(one, x) * cotangent).sum().backward()
        torch.testing.assert_close(run(layer, x), run(other, x), rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(layer.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert layer.running_mean.grad_fn is None


@pytest.mark.parametrize("spec", [*POOLED, CAUSAL, f"linear+{RUNNING}"])
def test_evaluation_is_the_call_with_the_buffers(spec: str) -> None:
    layer, x = layer_of(spec), drawn()
    for _ in range(3):
        run(layer, 2.0 * drawn() + 1.0)
    layer.eval()
    before = copy.deepcopy(layer.state_dict())
    q, k, v = (y.transpose(1, 2) for y in layer._project(x, x, x, True))
    params = {"mean": layer.running_mean, "var": layer.running_var}
    out = pdcore.attention(q, k, v, spec, params=params).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(run(layer, x), layer.out_proj(out), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, before[name]) for name, a in layer.state_dict().items())


def check_growth(spec: str, **options: Any) -> None:
    layer, x = layer_of(spec), drawn()
    run(layer, drawn())  # buffers that are not those of a new layer
    for m in range(1, N + 1):
        whole, part = (run(copy.deepcopy(layer), y, **options) for y in (x, x[:, :m]))
        torch.testing.assert_close(whole[:, :m], part, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("spec", [CAUSAL, f"{CAUSAL}+sh(1,1,2,3)", f"{RUNNING}+sparse(3,0)"])
def test_a_causal_layer_does_not_see_the_future_in_training(spec: str) -> None:
    check_growth(spec)


def test_a_leak_of_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def always(spec: AttentionSpec) -> AttentionSpec:
        normalization = pdcore.Batch(statistics="batch", allow_leak=True)
        return AttentionSpec(normalization=normalization, support=spec.support)

    monkeypatch.setattr(bound, "_in_training", always)
    with pytest.raises(AssertionError):
        check_growth(CAUSAL)


def test_a_causal_layer_updates_after_the_step() -> None:
    layer = layer_of(CAUSAL, momentum=1.0)
    x, y = drawn(), drawn()
    run(layer, x)
    before = copy.deepcopy(layer).eval()
    trained = run(layer, y)
    torch.testing.assert_close(trained, run(before, y), rtol=0, atol=0)
    trained.sum().backward()  # the arrays of the forward are as they were
    assert not torch.equal(layer.running_mean, before.running_mean)
    assert layer.num_batches_tracked == 2


def test_masks_that_hide_the_future() -> None:
    layer, x = layer_of(RUNNING), drawn()
    mask = nn.Transformer.generate_square_subsequent_mask(N, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="attn_mask: it hides all later keys; in training"):
        run(layer, x, attn_mask=mask)
    before = copy.deepcopy(layer).eval()
    out = run(layer, x, attn_mask=mask, is_causal=True)  # causal: with the buffers
    torch.testing.assert_close(out, run(before, x, attn_mask=mask))
    assert layer.num_batches_tracked == 1
    leaking = layer_of("bn(statistics=running,allow_leak=true)")
    run(leaking, x, attn_mask=mask)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_updates_once(reentrant: bool, compiled: bool) -> None:
    layer, x = layer_of(CAUSAL), drawn().requires_grad_()
    forward = lambda y: run(layer, y)  # noqa: E731 - the compiler takes a function
    if compiled:
        forward = torch.compile(forward, backend="aot_eager", fullgraph=True)
    for count in (1, 2):
        checkpoint(forward, x, use_reentrant=reentrant).sum().backward()
        assert layer.num_batches_tracked == count


def test_a_compiled_layer_updates_its_buffers() -> None:
    layer, x = layer_of(POOLED[1]), drawn()
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled, x), run(layer, x))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value)


def test_a_state_dict_gives_the_same_bits() -> None:
    layer, x = layer_of(f"{RUNNING}+sh(half=2)"), drawn()
    run(layer, x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = layer_of(f"{RUNNING}+sh(half=2)")
    other.load_state_dict(torch.load(file), strict=True)
    for one in (layer, other):
        run(one, 2.0 * x)
    assert all(torch.equal(a, other.state_dict()[n]) for n, a in layer.state_dict().items())
    assert torch.equal(run(layer.eval(), x), run(other.eval(), x))


def test_a_batch_without_real_keys_changes_no_statistic() -> None:
    layer, x = layer_of(RUNNING), drawn()
    run(layer, x, key_padding_mask=torch.ones(B, N, dtype=torch.bool))
    assert torch.equal(layer.running_mean, torch.zeros(H, D, dtype=torch.float64))
    assert torch.equal(layer.running_var, torch.ones(H, D, dtype=torch.float64))


def test_packed_sequences_count_each_real_key_once() -> None:
    layer, x = layer_of(RUNNING, momentum=1.0), drawn()
    segments = torch.tensor([[0] * 3 + [1] * 4, [0] * 5 + [-1] * 2, [2] * 7])
    other = copy.deepcopy(layer)
    run(layer, x, segments=segments)
    run(other, x, key_padding_mask=segments < 0)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())
    run(layer, x, segments=segments.numpy())
    run(other, x, key_padding_mask=segments < 0)
    torch.testing.assert_close(layer.state_dict(), other.state_dict())
    with pytest.raises(UnsupportedError, match=r"segments: .* pools the keys of each segment"):
        run(layer_of(POOLED[1]), x, segments=segments)


def test_sixteen_bits() -> None:
    layer = PDMultiheadAttention(E, H, spec=RUNNING, batch_first=True).to(torch.bfloat16)
    x = torch.randn(B, N, E, dtype=torch.bfloat16)
    assert run(layer, x).dtype == run(layer.eval(), x).dtype == torch.bfloat16
    assert layer.running_mean.dtype == torch.bfloat16


#: A process of two, each with one half of the batch.
PROCESS = """
import sys
import torch
from torch import distributed
from pdcore_adapters.torch_nn import PDMultiheadAttention

rank, folder = int(sys.argv[1]), sys.argv[2]
store = f"file://{folder}/store"
distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
group = distributed.group.WORLD
inputs, x, padding = torch.load(f"{folder}/inputs.pt")
results = {}
for spec, weights in inputs.items():
    layer = PDMultiheadAttention(
        12, 4, spec=spec, batch_first=True, dtype=torch.float64, process_group=group
    )
    layer.load_state_dict(weights, strict=True)
    for step in range(2):
        own = slice(4 * rank, 4 * rank + 4)
        y, hidden = (step + 1) * x[own], padding[own]
        layer(y, y, y, key_padding_mask=hidden, need_weights=False)
    results[spec] = layer.state_dict()
torch.save(results, f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_two_processes_are_one_on_the_joined_batch(tmp_path: Path) -> None:
    layers = {spec: layer_of(spec) for spec in (CAUSAL, f"{RUNNING}+sh(2,1,3,1)")}
    x = 5.0 + drawn(8, N, E)
    padding = torch.arange(N) >= torch.tensor([[7], [3], [5], [1], [7], [7], [2], [6]])
    states = {spec: layer.state_dict() for spec, layer in layers.items()}
    torch.save((states, x, padding), tmp_path / "inputs.pt")
    command = [sys.executable, "-W", "ignore", "-c", PROCESS]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for spec, layer in layers.items():
        for step in range(2):
            run(layer, (step + 1) * x, key_padding_mask=padding)
        for name, value in layer.state_dict().items():
            assert torch.equal(first[spec][name], second[spec][name]), name
            torch.testing.assert_close(first[spec][name], value, rtol=1e-12, atol=1e-12)


def test_parameters_start_as_the_spec_says() -> None:
    layer = PDMultiheadAttention(E, H, spec="iebn(beta=param)", batch_first=True)
    shapes = {n: tuple(p.shape) for n, p in layer.named_parameters() if n.startswith("spec_")}
    assert shapes == {"spec_beta": (H,), "spec_slope": (H, D), "spec_shift": (H, D)}
    assert layer.spec_beta.eq(1).all()
    assert layer.spec_slope.eq(0).all()
    assert layer.spec_shift.eq(-1).all()
    x = torch.randn(B, N, E)
    run(layer, x).square().sum().backward()
    for name in shapes:
        assert layer.get_parameter(name).grad.abs().max() > 0


@dataclass(frozen=True)
class Shifted(pdcore.Normalization):
    """A normalization of a third party, with a parameter that has no start."""

    word = "shifted"

    def parameters(self) -> tuple[pdcore.Parameter, ...]:
        return (pdcore.Parameter("by", (("H",),)),)

    def apply(self, x: Any, state: Any, *, xp: Any, params: Any) -> Any:
        return x + params["by"]

    def latex(self) -> str:
        return "x + b"


def test_a_parameter_without_a_start_is_refused() -> None:
    spec = AttentionSpec(normalization=Shifted())
    with pytest.raises(UnsupportedError, match=r"takes 'by' from each call, .* start= or default="):
        PDMultiheadAttention(E, H, spec=spec)


@pytest.mark.parametrize("spec", SPECS)
def test_every_word_runs_in_a_layer(spec: str) -> None:
    layer, x = layer_of(spec), drawn(B, 6, E)
    labels = labels_of(spec, torch.from_numpy, (B, 6))
    run(layer, x, labels=labels).sum().backward()
    layer.eval()
    q, k, v = (y.transpose(1, 2) for y in layer._project(x, x, x, True))
    params = kept_state.arrays_of(layer, layer.spec)
    out = reference_attention(q, k, v, spec, params=params, labels=labels)
    out = out.transpose(1, 2).flatten(-2)
    torch.testing.assert_close(
        run(layer, x, labels=labels), layer.out_proj(out), rtol=1e-9, atol=1e-10
    )


def test_convert_adds_and_removes_what_a_spec_needs() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(E, heads, batch_first=True) for heads in (4, 2)])
    report = convert(model, "bn(beta=param,statistics=running)+sh(half=2)", momentum=None)
    assert report.parameters == ("0.spec_beta", "1.spec_beta")
    assert model[1].running_var.shape == (2, 6)
    assert model[0].momentum is None
    run(model[0], torch.randn(B, N, E))
    mean = model[0].running_mean.clone()
    convert(model, RUNNING)  # the buffers keep their values, beta goes
    assert torch.equal(model[0].running_mean, mean)
    assert set(model[0].state_dict()) - set(nn.MultiheadAttention(E, 4).state_dict()) == {
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    convert(model, "softmax")
    assert set(model[0].state_dict()) == set(nn.MultiheadAttention(E, 4).state_dict())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"momentum": 2}, ValueError, "momentum: got 2, expected a number from 0 to 1"),
        ({"momentum": "fast"}, TypeError, "momentum: got str"),
        ({"spec": "bn", "momentum": 0.5}, ValueError, "softmax.bn has no running statistics"),
        ({"spec": "bn", "process_group": object()}, ValueError, "process_group: got <object"),
    ],
)
def test_wrong_arguments(options: Any, error: Any, message: str) -> None:
    options = {"spec": RUNNING} | options
    with pytest.raises(error, match=message):
        PDMultiheadAttention(E, H, **options)
    model = nn.ModuleList([nn.MultiheadAttention(E, H)])
    with pytest.raises(error, match=message):
        convert(model, **options)
    assert type(model[0]) is nn.MultiheadAttention
