"""Test what `capture` records of layers of torch.nn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import pdcore
from pdcore_adapters.diagnostics import capture, head_distances
from pdcore_adapters.torch_nn import PDMultiheadAttention, convert
from pdcore_adapters.watching import WATCHERS


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = PDMultiheadAttention(8, 2, batch_first=True, spec="bn").double()
        self.second = nn.MultiheadAttention(8, 2, batch_first=True).double()

    def forward(self, x):
        x = self.first(x, x, x, need_weights=False)[0]
        return self.second(x, x, x, need_weights=False)[0]


def series():
    return torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_weights_are_those_of_the_layer():
    model, x = Model().eval(), series()
    with capture(model) as record:
        out = model(x)
        model(x[:1])
    assert out.requires_grad
    assert record.layers == ("first",)
    assert list(record.left) == ["second"]
    assert "not pdcore's" in record.left["second"]
    first, _ = record.of("first")
    assert first.spec == pdcore.parse("bn")
    want = model.first(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(first.weights(), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(first.weights(slice(2, 4)), want[:, :, 2:4], rtol=1e-12, atol=0)
    assert record.weights("first").shape == (1, 2, 7, 7)
    assert record.weights("first", call=0).shape == (3, 2, 7, 7)
    assert not first.inputs.q.requires_grad
    assert not first.out.requires_grad
    assert not any(x.requires_grad for x in first.inputs.params.values())
    whole = first.out.transpose(1, 2).flatten(-2)
    torch.testing.assert_close(model.first.out_proj(whole), model.first(x, x, x)[0])
    found = first.distances(rows=3)
    again = head_distances(*first.inputs[:3], "bn", params=first.inputs.params)
    np.testing.assert_allclose(found.relative, again.relative, rtol=1e-12)


def test_nothing_is_recorded_after_the_context():
    model, x = Model(), series()
    with pytest.raises(RuntimeError), capture(model):
        model(x.float())
    with capture(model) as record:
        model(x)
    model(x)
    assert len(record.calls) == 1
    assert not WATCHERS


def test_other_models_are_not_recorded():
    one, other = Model(), Model()
    with capture(one) as record:
        other(series())
    assert not record.calls
    assert set(record.left) == {"first", "second"}
    with pytest.raises(KeyError, match="got 'first', of which nothing was recorded"):
        record.weights("first")


def test_training_and_its_gradients_are_the_same():
    gradients = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = Model().train()
        if watched:
            with capture(model) as record:
                model(series()).sum().backward()
            assert len(record.calls) == 1
        else:
            model(series()).sum().backward()
        gradients.append(model.first.in_proj_weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("copy", [False, True])
def test_references_or_copies(copy):
    layer, x = PDMultiheadAttention(8, 2, batch_first=True, spec="bn(beta=param)"), series().float()
    with torch.no_grad(), capture(layer, copy=copy) as record:
        layer(x, x, x, need_weights=False)
        (call,) = record.calls
        before = call.inputs.params["beta"].clone()
        layer.spec_beta.add_(1.0)
    assert call.layer == "PDMultiheadAttention"
    assert torch.equal(call.inputs.params["beta"], before) is copy


def test_masks_and_converted_layers():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double()
    model = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False).eval()
    convert(model, "softmax")
    padding = torch.tensor([[False] * 7, [False] * 5 + [True] * 2, [False] * 7])
    with capture(model) as record:
        model(series(), src_key_padding_mask=padding)
    assert record.layers == ("layers.0.self_attn", "layers.1.self_attn")
    assert not record.left
    weights = record.weights("layers.1.self_attn", slice(1, 3))
    assert weights.shape == (3, 2, 2, 7)
    assert not weights[1, :, :, 5:].any()


def test_compiled_models_are_refused():
    model = Model()
    with (
        pytest.raises(pdcore.UnsupportedError, match=r"model: .* compiled by torch.compile"),
        capture(torch.compile(model, backend="eager")),
    ):
        pass
    model.first.compile(backend="eager")
    with pytest.raises(pdcore.UnsupportedError, match=r"model: first is compiled"), capture(model):
        pass


def test_a_traced_call_is_refused_by_name():
    model = Model().eval()
    compiled = torch.compile(
        lambda x: model.first(x, x, x, need_weights=False)[0], backend="eager", fullgraph=True
    )
    compiled(series())
    with capture(model), pytest.raises(Exception, match=r"traced by torch\.compile"):
        compiled(series())
