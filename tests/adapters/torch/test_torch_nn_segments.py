"""Packed sequences in `PDMultiheadAttention`: the rows of a segment are those of its own call."""

from __future__ import annotations

import pytest
import torch

import pdcore
from pdcore_adapters.torch_nn import PDMultiheadAttention

LENGTHS = (5, 4)
IDS = pdcore.segments_from_lengths(torch.tensor(LENGTHS), total=10)


def layer(spec, **options):
    torch.manual_seed(0)
    return PDMultiheadAttention(16, 4, spec=spec, **options)


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,1,2,2)", "causal+bn(statistics=prefix)"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_rows_are_those_of_the_segments(spec, batch_first):
    attend = layer(spec, batch_first=batch_first)
    x = torch.randn(3, 10, 16)
    x[:, 9] = torch.nan

    def run(part, **options):
        part = part if batch_first else part.transpose(0, 1)
        out, weights = attend(part, part, part, **options)
        return (out if batch_first else out.transpose(0, 1)), weights

    out, weights = run(x, segments=IDS.expand(3, -1))
    for start, stop in ((0, 5), (5, 9)):
        own, of_own = run(x[:, start:stop])
        torch.testing.assert_close(out[:, start:stop], own)
        torch.testing.assert_close(weights[:, start:stop, start:stop], of_own)
    torch.testing.assert_close(out[:, 9], attend.out_proj.bias.expand(3, -1))
    assert not weights[:, :5, 5:].any()


def test_causal_mask_and_padding_of_a_layer():
    attend = layer("softmax", batch_first=True)
    x, hidden = torch.randn(2, 10, 16), torch.ones(10, 10, dtype=torch.bool).triu(1)
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[1, 3] = True
    options = {"attn_mask": hidden, "key_padding_mask": padding, "is_causal": True}
    out, _ = attend(x, x, x, segments=IDS.expand(2, -1), **options)
    options = {"attn_mask": hidden[:4, :4], "key_padding_mask": padding[:, 5:9], "is_causal": True}
    own, _ = attend(*[x[:, 5:9]] * 3, **options)
    torch.testing.assert_close(out[:, 5:9], own)


def test_unbatched_and_a_pair():
    attend = layer("bn")
    x, y = torch.randn(10, 16), torch.randn(7, 16)
    keys = pdcore.segments_from_lengths(torch.tensor([3, 4]))
    out, weights = attend(x, y, y, segments=(IDS, keys))
    own, _ = attend(x[5:9], y[3:], y[3:])
    torch.testing.assert_close(out[5:9], own)
    assert weights.shape == (10, 7)
    loss = attend(x, y, y, segments=(IDS, keys), need_weights=False)[0].sum()
    assert all(g is not None for g in torch.autograd.grad(loss, list(attend.parameters())))
