"""The position biases of T5, UMT5 and Swin, as the models pass them, and as terms of a spec."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import pdcore
from pdcore_adapters.transformers import register

SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 4}


def outputs(model: Any, *arguments: Any, **named: Any) -> list[Any]:
    """Return the output of a model with eager attention and with pdcore's, and gradients."""
    results = []
    for attention in ("eager", "pdcore"):
        each = copy.deepcopy(model)
        each.set_attn_implementation(attention)
        out = each(*arguments, **named)[0]
        out.square().sum().backward()
        biases = [p.grad for n, p in each.named_parameters() if "relative" in n]
        assert biases
        assert all(g is not None and g.abs().max() > 0 for g in biases)
        results.append([out, *biases])
    return results


def test_swin_equals_eager() -> None:
    register()
    torch.manual_seed(0)
    config = transformers.SwinConfig(**SWIN, depths=(2, 1), num_heads=(2, 2), drop_path_rate=0.0)
    model = transformers.SwinModel(config)
    for name, p in model.named_parameters():
        if "relative" in name:
            torch.nn.init.normal_(p)
    eager, ours = outputs(model, torch.randn(2, 3, 32, 32))
    for actual, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["T5", "UMT5"])
def test_buckets_are_a_table_of_distances(kind: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=31, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    model = getattr(transformers, f"{kind}EncoderModel")(config)
    layer = next(m for m in model.modules() if type(m).__name__ == f"{kind}Attention")
    torch.nn.init.normal_(layer.relative_attention_bias.weight)
    length, reach = 300, 128
    # One row of the model's own bias has the entries of all distances.
    row = layer.compute_bias(2 * reach + 1, 2 * reach + 1)[0, :, reach]
    table = row.detach().clone().requires_grad_()
    q, k, v = torch.randn(3, 2, 2, length, 8)
    got = pdcore.attention(
        q, k, v, f"softmax(scale=1)+relative({reach})", params={"relative": table}
    )
    bias = layer.compute_bias(length, length).expand(2, -1, -1, -1)
    torch.testing.assert_close(got, pdcore.attention(q, k, v, "softmax(scale=1)", bias=bias))
    # The entries of a bucket add up to the gradient of its weight.
    got.square().sum().backward()
    buckets = layer.relative_attention_bias.weight
    row.backward(table.grad)
    of_table, buckets.grad = buckets.grad, None
    dense = pdcore.attention(q, k, v, "softmax(scale=1)", bias=layer.compute_bias(length, length))
    dense.square().sum().backward()
    torch.testing.assert_close(of_table, buckets.grad, rtol=1e-4, atol=1e-4)


def test_windows_of_an_image_are_labelled_by_their_places() -> None:
    torch.manual_seed(0)
    config = transformers.SwinConfig(**SWIN, depths=(1,), num_heads=(2,))
    model = transformers.SwinModel(config)
    [bias] = [m for m in model.modules() if type(m).__name__ == "SwinRelativePositionBias"]
    torch.nn.init.normal_(bias.relative_position_bias_table)
    q, k, v = torch.randn(3, 5, 2, 16, 4)
    influence = bias()[0]  # a table by places: an offset in two dimensions is none in one
    labels = torch.arange(16).expand(5, 16)
    got = pdcore.attention(q, k, v, "labels(16)", labels=labels, params={"influence": influence})
    torch.testing.assert_close(got, pdcore.attention(q, k, v, bias=influence[None]))


@pytest.mark.parametrize("heads", [4, 6, 16])
def test_alibi_is_that_of_published_models(heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, heads, 9, 4)
    got = pdcore.attention(q, k, v, "causal+alibi")
    # BLOOM and MPT add m p_j, which differs by a constant of the row.
    bloom = build_alibi_tensor(torch.ones(2, 9, dtype=torch.int64), heads, torch.float32)
    bias = bloom.reshape(2, heads, 1, 9)
    torch.testing.assert_close(got, pdcore.attention(q, k, v, "causal", bias=bias))
    mpt = build_mpt_alibi_tensor(heads, 9).reshape(1, heads, 1, 9)
    if heads & (heads - 1) == 0:  # MPT orders the slopes of other numbers of heads in its own way
        torch.testing.assert_close(got, pdcore.attention(q, k, v, "causal", bias=mpt))
