"""Test pdcore_adapters.torch_nn against nn.MultiheadAttention and the core, and `convert`."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import pdcore
from pdcore import SpecError, UnsupportedError
from pdcore_adapters.torch_nn import PDMultiheadAttention, convert

# A program is compiled for each combination, which takes seconds.
pytestmark = pytest.mark.sampled(2)

E, H, N, M, B = 16, 4, 6, 9, 3
SPECS = [
    "softmax",
    "bn",
    "linear",
    "bn+sh(1,1,2,2)",
    "bn(beta=0.5,with_std=false)",
    "gaussian(gamma=0.3)+h(count)",
    "causal+bn(statistics=prefix)",
]


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def pair(**options: Any) -> tuple[nn.MultiheadAttention, PDMultiheadAttention]:
    """Return nn's layer and the adapter's, with the same random parameters."""
    plain = nn.MultiheadAttention(E, H, **options)
    for p in plain.parameters():
        nn.init.normal_(p, std=0.3)
    ours = PDMultiheadAttention(E, H, **options)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return plain, ours


def close(a: Any, b: Any, *, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def hide(*shape: int) -> Any:
    """Return a mask as nn reads it, True where hidden, in which every query sees the first key."""
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False
    return mask


def causal(n: int) -> Any:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


@contextmanager
def counted(layer: nn.Module) -> Iterator[list[int]]:
    """Count the calls of a layer without a hook: a hook would turn the fast paths off."""
    calls: list[int] = []
    kind = type(layer)
    forward = kind.forward

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return forward(self, *args, **options)

    kind.forward = counting
    try:
        yield calls
    finally:
        kind.forward = forward


# --- with softmax it is nn.MultiheadAttention -----------------------------------------------------

MASKS = {
    "none": lambda b: {},
    "padding": lambda b: {"key_padding_mask": hide(b, M)},
    "mask 2-D": lambda b: {"attn_mask": hide(N, M)},
    "mask 3-D": lambda b: {"attn_mask": hide(b * H, N, M)},
    "both": lambda b: {"attn_mask": hide(b * H, N, M), "key_padding_mask": hide(b, M)},
    "float padding": lambda b: {"key_padding_mask": torch.randn(b, M)},
    "float mask": lambda b: {"attn_mask": torch.randn(N, M)},
    "float 3-D": lambda b: {
        "attn_mask": torch.randn(b * H, N, M).masked_fill(hide(b * H, N, M), -torch.inf)
    },
    "float both": lambda b: {
        "attn_mask": torch.randn(N, M),
        "key_padding_mask": torch.randn(b, M).masked_fill(hide(b, M), -torch.inf),
    },
}


def inputs(layout: str, sizes: tuple[int, int, int] = (E, E, E)) -> list[Any]:
    lengths = (N, M, M)
    if layout == "unbatched":
        return [torch.randn(n, e) for n, e in zip(lengths, sizes, strict=True)]
    x = [torch.randn(B, n, e) for n, e in zip(lengths, sizes, strict=True)]
    return x if layout == "batch first" else [a.transpose(0, 1) for a in x]


def with_gradients(layer: Any, x: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
    x = [a.detach().clone().requires_grad_() for a in x]
    out, weights = layer(*x, **options)
    results = [out] if weights is None else [out, weights]
    generator = torch.Generator().manual_seed(1)
    total = sum((r * torch.randn(r.shape, generator=generator)).sum() for r in results)
    return results, list(torch.autograd.grad(total, [*x, *layer.parameters()]))


@pytest.mark.parametrize("need", ["none", "mean", "heads"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("layout", ["batch first", "length first", "unbatched"])
def test_softmax_equals_nn_multihead_attention(layout: str, masks: str, need: str) -> None:
    plain, ours = pair(batch_first=layout == "batch first")
    x = inputs(layout)
    options = MASKS[masks](1 if layout == "unbatched" else B)
    if layout == "unbatched" and "key_padding_mask" in options:
        options["key_padding_mask"] = options["key_padding_mask"][0]
    options |= {"need_weights": need != "none", "average_attn_weights": need == "mean"}
    want, want_gradients = with_gradients(plain, x, **options)
    got, gradients = with_gradients(ours, x, **options)
    close(got, want)
    close(gradients, want_gradients, tolerance=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": False},
        {"kdim": 5, "vdim": 7},
        {"kdim": 5, "bias": False},
        {"dtype": torch.float64},
    ],
)
def test_constructors_arguments(options: dict[str, Any]) -> None:
    plain, ours = pair(batch_first=True, **options)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(ours.state_dict(), strict=True)
    x = inputs("batch first", (E, options.get("kdim", E), options.get("vdim", E)))
    x = [a.to(options.get("dtype", torch.float32)) for a in x]
    want, want_gradients = with_gradients(plain, x)
    got, gradients = with_gradients(ours, x)
    tight = 1e-13 if "dtype" in options else 2e-6
    close(got, want, tolerance=tight)
    close(gradients, want_gradients, tolerance=10 * tight)


def test_the_same_tensor_twice() -> None:
    plain, ours = pair(batch_first=True)
    x, y = torch.randn(2, B, N, E)
    for call in ((x, x, x), (x, y, y), (x, x, y), (x, y, x)):
        close(ours.train()(*call), plain.train()(*call))
        with torch.no_grad():  # nn takes its fast path for the first
            close(ours.eval()(*call), plain.eval()(*call))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("need", [False, True])
@pytest.mark.parametrize("floating", [False, True])
def test_the_causal_hint(floating: bool, need: bool, padded: bool) -> None:
    plain, ours = pair(batch_first=True)
    x = torch.randn(B, N, E)
    mask = nn.Transformer.generate_square_subsequent_mask(N) if floating else causal(N)
    padding = torch.zeros(B, N, dtype=mask.dtype)
    padding[1, 4:] = -torch.inf if floating else True
    options = {
        "attn_mask": mask,
        "is_causal": True,
        "need_weights": need,
        "key_padding_mask": padding if padded else None,
    }
    want, want_gradients = with_gradients(plain, [x, x, x], **options)
    got, gradients = with_gradients(ours, [x, x, x], **options)
    close(got, want)
    close(gradients, want_gradients, tolerance=2e-5)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        plain(x, x, x, is_causal=True)
    with pytest.raises(ValueError, match="is_causal: got True without attn_mask"):
        ours(x, x, x, is_causal=True)


def test_the_mask_is_ignored_where_nn_ignores_it() -> None:
    plain, ours = pair(batch_first=True)
    x = torch.randn(B, N, E)
    biased = torch.randn(N, N).masked_fill(causal(N), -torch.inf)  # more than causal
    padding = torch.zeros(B, N)
    padding[:, 4:] = -torch.inf
    for options in (
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": False, "key_padding_mask": padding},
    ):
        options |= {"attn_mask": biased, "is_causal": True}
        close(ours(x, x, x, **options), plain(x, x, x, **options))


def test_a_row_that_sees_nothing() -> None:
    plain, ours = pair(batch_first=True)
    x = torch.randn(B, N, E, requires_grad=True)
    mask = causal(N)
    mask[2] = True
    assert plain(x, x, x, attn_mask=mask)[0][:, 2].isnan().all()
    for need in (False, True):
        out, weights = ours(x, x, x, attn_mask=mask, need_weights=need)
        close(out[:, 2], ours.out_proj.bias.expand(B, E))
        assert weights is None or not weights[:, 2].any()
        (slope,) = torch.autograd.grad(out.square().sum(), x)
        assert slope.isfinite().all()
    close(
        ours(x, x, x, attn_mask=mask, need_weights=False)[0],
        plain(x, x, x, attn_mask=mask, need_weights=False)[0],
    )


def test_padding_may_hold_anything() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(B, N, E)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 4:] = True
    dirty = torch.where(padding[..., None], torch.nan, x)
    want = ours(x, x, x, key_padding_mask=padding)
    for floating in (False, True):
        mask = torch.zeros(B, N).masked_fill(padding, -torch.inf) if floating else padding
        got = ours(x, dirty, dirty, key_padding_mask=mask)
        close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: Any) -> None:
    plain, ours = pair(batch_first=True)
    x = torch.randn(B, N, E)
    with torch.autocast("cpu", dtype):
        for options in ({}, {"attn_mask": torch.randn(N, N)}):
            want, _ = plain(x, x, x, need_weights=False, **options)
            got, _ = ours(x, x, x, need_weights=False, **options)
            assert got.dtype == want.dtype
            close(got, want, tolerance=0.05)


# --- other specs ----------------------------------------------------------------------------------


def by_the_core(layer: Any, x: Any, spec: str, **call: Any) -> tuple[Any, Any]:
    q, k, v = (
        p.unflatten(-1, (H, E // H)).transpose(1, 2)
        for p in nn.functional.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    )
    out = pdcore.attention(q, k, v, spec, **call).transpose(1, 2).flatten(-2)
    weights = pdcore.attention_weights(q, k, v, spec, **call)
    return layer.out_proj(out), weights


@pytest.mark.parametrize("spec", SPECS)
def test_every_spec(spec: str) -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec=spec)
    x = torch.randn(B, N, E)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 4:] = True
    mask = torch.zeros(B * H, N, N, dtype=torch.bool)
    mask[:, 3, 1:3] = mask[H:, 5, :5] = True
    want = by_the_core(layer, x, spec, key_mask=~padding, mask=~mask.reshape(B, H, N, N))
    for floating in (False, True):
        masks = [
            torch.zeros(m.shape).masked_fill(m, -torch.inf) if floating else m
            for m in (mask, padding)
        ]
        got = layer(
            x, x, x, attn_mask=masks[0], key_padding_mask=masks[1], average_attn_weights=False
        )
        close(got, want)
    flipped = layer(x, x, x, key_padding_mask=~padding, average_attn_weights=False)
    assert not torch.allclose(flipped[0], want[0], atol=1e-3)  # inverting matters


@pytest.mark.parametrize("hint", [False, True])
def test_a_causal_spec_with_the_usual_mask(hint: bool) -> None:
    spec = "causal+bn(statistics=prefix)"
    layer = PDMultiheadAttention(E, H, batch_first=True, spec=spec)
    x = torch.randn(B, N, E)
    want, _ = layer(x, x, x)
    for mask in (causal(N), nn.Transformer.generate_square_subsequent_mask(N)):
        for need in (False, True):
            out, _ = layer(x, x, x, attn_mask=mask, is_causal=hint, need_weights=need)
            close(out, want)
    for m in range(1, N):  # no later key reaches a row
        close(layer(x[:, :m], x[:, :m], x[:, :m])[0], want[:, :m])


def test_the_filter_of_a_convolution_is_trained() -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec="conv1d")
    assert layer.spec_weight.shape == (H, 3, E // H)
    assert bool((layer.spec_weight == 1 / 3).all())
    x, before = torch.randn(B, N, E), layer.spec_weight.detach().clone()
    layer(x, x, x)[0].square().sum().backward()
    assert layer.spec_weight.grad.abs().min() > 0
    torch.optim.SGD([layer.spec_weight], lr=1.0).step()
    assert not torch.equal(layer.spec_weight, before)
    with torch.no_grad():  # a filter of the middle tap alone is no convolution
        layer.spec_weight.zero_()
        layer.spec_weight[:, 1] = 1.0
    plain = nn.MultiheadAttention(E, H, batch_first=True)
    plain.load_state_dict({k: p for k, p in layer.state_dict().items() if k != "spec_weight"})
    close(layer(x, x, x)[0], plain(x, x, x)[0])
    with pytest.raises(UnsupportedError, match=r"is_causal: conv1d .*use padding=causal"):
        layer(x, x, x, attn_mask=causal(N), is_causal=True)
    layer = PDMultiheadAttention(E, H, batch_first=True, spec="conv1d(padding=causal)")
    whole = layer(x, x, x, attn_mask=causal(N), is_causal=True)[0]
    for m in range(1, N):
        short = x[:, :m]
        close(layer(short, short, short, attn_mask=causal(m))[0], whole[:, :m])


@pytest.mark.parametrize("spec", ["bn", "bn(statistics=batch)+linear"])
def test_leaking_statistics_are_refused(spec: str) -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec=spec)
    x = torch.randn(B, N, E)
    three = causal(N).expand(B * H, N, N)
    for mask in (causal(N), nn.Transformer.generate_square_subsequent_mask(N), three):
        with pytest.raises(UnsupportedError, match=r"attn_mask: it hides all later keys; .*leak"):
            layer(x, x, x, attn_mask=mask)
        with pytest.raises(UnsupportedError, match=r"is_causal: .*allow_leak=true"):
            layer(x, x, x, attn_mask=mask, is_causal=True)
    layer(x, x, x, attn_mask=causal(N).T)
    layer(x[:, :1], x[:, :1], x[:, :1], attn_mask=causal(1))  # there is no later key
    permitted = spec.replace("bn(", "bn(allow_leak=true,") if "(" in spec else "bn(allow_leak=true)"
    allowed = PDMultiheadAttention(E, H, batch_first=True, spec=permitted)
    allowed.load_state_dict(layer.state_dict())
    want = by_the_core(layer, x, spec, mask=~causal(N))
    for hint in (False, True):
        got = allowed(x, x, x, attn_mask=causal(N), is_causal=hint, average_attn_weights=False)
        close(got, want)


def test_float_masks_without_a_place_for_them() -> None:
    x = torch.randn(B, N, E)
    for spec, reason in (
        ("linear", "softmax\\+|linear has no log kappa"),
        ("sh(1,1,2,2)", "pools keys"),
    ):
        layer = PDMultiheadAttention(E, H, batch_first=True, spec=spec)
        for name, shape in (("attn_mask", (N, N)), ("key_padding_mask", (B, N))):
            with pytest.raises(UnsupportedError, match=f"{name}: got a float mask.*({reason})"):
                layer(x, x, x, **{name: torch.full(shape, 0.5)})
            with pytest.raises(UnsupportedError, match=f"{name}: got a float mask"):
                layer(x, x, x, **{name: torch.full(shape, torch.nan)})


def test_a_learned_beta() -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec="bn(beta=param)")
    plain = PDMultiheadAttention(E, H, batch_first=True, spec="bn")
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["spec_beta"]
    x = torch.randn(B, N, E)
    close(layer(x, x, x), plain(x, x, x))
    with torch.no_grad():
        layer.spec_beta.fill_(0.5)
    plain = PDMultiheadAttention(E, H, batch_first=True, spec="bn(beta=0.5)")
    plain.load_state_dict({k: p for k, p in layer.state_dict().items() if k != "spec_beta"})
    close(layer(x, x, x), plain(x, x, x))
    layer(x, x, x)[0].square().sum().backward()
    assert layer.spec_beta.grad.abs().min() > 0


def test_a_learned_beta_that_cancels_has_gradient_zero() -> None:
    spec = "gaussian(gamma=0.3)+bn(beta=param,with_std=false)"
    layer = PDMultiheadAttention(E, H, batch_first=True, spec=spec)
    x = torch.randn(B, N, E)
    layer(x, x, x, need_weights=False)[0].square().sum().backward()
    assert torch.equal(layer.spec_beta.grad, torch.zeros(H))


def test_alibi_has_its_default_slopes() -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec="alibi")
    plain = PDMultiheadAttention(E, H, batch_first=True)
    missing, _ = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing == ["slopes"]
    x = torch.randn(B, N, E)
    distance = (torch.arange(N) - torch.arange(N)[:, None]).abs()
    slopes = torch.tensor([2.0 ** (-8 * h / H) for h in range(1, H + 1)])
    bias = (-slopes[:, None, None] * distance).repeat(B, 1, 1)
    close(layer(x, x, x), plain(x, x, x, attn_mask=bias))


def test_the_slopes_of_alibi_are_a_buffer_that_a_state_dict_keeps() -> None:
    layer = PDMultiheadAttention(12, 12, spec="alibi", dtype=torch.bfloat16)
    assert layer.slopes.dtype == torch.float32  # as in a call: 2^-0.5 has no 16 bits
    layer = PDMultiheadAttention(E, H, batch_first=True, spec="alibi")
    assert "slopes" not in dict(layer.named_parameters())
    layer.slopes *= 1.5
    other = PDMultiheadAttention(E, H, batch_first=True, spec="alibi")
    x = torch.randn(B, N, E)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, x, x)[0], layer(x, x, x)[0])
    q, k, v = layer._project(x, x, x, batched=True)
    own = pdcore.attention(q, k, v, "alibi", params={"slopes": layer.slopes}, layout="bnhd")
    close(other(x, x, x)[0], layer.out_proj(own.flatten(-2)))
    convert(other, "softmax")
    assert not hasattr(other, "slopes")


def test_a_learned_sink() -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec="bn+h(sum,sink=param)")
    assert layer.state_dict()["spec_sink"].tolist() == [0.0] * H
    plain = PDMultiheadAttention(E, H, batch_first=True, spec="bn+h(sum,sink=0)")
    missing = layer.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["spec_sink"]
    x = torch.randn(B, N, E)
    close(layer(x, x, x), plain(x, x, x))
    assert (layer(x, x, x)[1].sum(-1) < 1).all()
    layer(x, x, x)[0].square().sum().backward()
    assert layer.spec_sink.grad.abs().min() > 0
    again = PDMultiheadAttention(E, H, batch_first=True, spec="bn+h(sum,sink=param)")
    with torch.no_grad():
        layer.spec_sink.copy_(torch.randn(H))
    again.load_state_dict(layer.state_dict())
    close(again(x, x, x), layer(x, x, x), tolerance=0)


# --- dropout --------------------------------------------------------------------------------------


def test_dropout() -> None:
    plain, ours = pair(batch_first=True, dropout=0.4)
    x = torch.randn(1, N, E)
    close(ours.eval()(x, x, x), plain.eval()(x, x, x))
    want, _ = ours(x, x, x, need_weights=False)
    with torch.no_grad():
        many = x.expand(4000, N, E)
        out, _ = ours.train()(many, many, many, need_weights=False)
        like, _ = plain.train()(many, many, many, need_weights=False)
    close(out.mean(0), want[0], tolerance=0.03)  # dropout keeps the mean of a weight
    close(out.std(0), like.std(0), tolerance=0.03)  # and its spread, by 1 / (1 - p)
    assert (out[0] - out[1]).abs().max() > 1e-3
    out, weights = ours(x, x, x)
    close(weights, plain.eval()(x, x, x)[1])  # before dropout


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range(dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout: got"):
        PDMultiheadAttention(E, H, dropout=dropout)


# --- wrong calls ----------------------------------------------------------------------------------


def test_wrong_constructors() -> None:
    with pytest.raises(UnsupportedError, match="add_bias_kv: got True, expected False"):
        PDMultiheadAttention(E, H, add_bias_kv=True)
    with pytest.raises(UnsupportedError, match="add_zero_attn: got True, expected False"):
        PDMultiheadAttention(E, H, add_zero_attn=True)
    with pytest.raises(SpecError, match="unknown word 'sofmax'"):
        PDMultiheadAttention(E, H, spec="sofmax")
    with pytest.raises(ValueError, match=r"spec: got 2 scales in .*, expected one .* the 4 heads"):
        PDMultiheadAttention(E, H, spec="sh(1,2)")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"query": torch.zeros(B, N, 5)}, ValueError, r"query: got shape \(3, 6, 5\), expected"),
        ({"query": torch.zeros(B, N, 1, E)}, ValueError, "query: got shape"),
        ({"key": torch.zeros(N, E)}, ValueError, "key: got shape"),
        ({"key": torch.zeros(B, 3, E)}, ValueError, "value: got shape"),
        ({"query": torch.zeros(1, N, E)}, ValueError, "key: got shape .*, expected the batch"),
        ({"attn_mask": torch.zeros(N, 5, dtype=torch.bool)}, ValueError, "attn_mask: got shape"),
        ({"attn_mask": torch.zeros(H, N, N, dtype=torch.bool)}, ValueError, "attn_mask: got shape"),
        ({"attn_mask": torch.zeros(N, N, dtype=torch.int64)}, TypeError, "attn_mask: got dtype"),
        ({"attn_mask": torch.zeros(N, N, dtype=torch.float64)}, TypeError, "attn_mask: got dtype"),
        (
            {"key_padding_mask": torch.zeros(N, dtype=torch.bool)},
            ValueError,
            "key_padding_mask: got",
        ),
        (
            {"key_padding_mask": torch.zeros(B, N, dtype=torch.uint8)},
            TypeError,
            "key_padding_mask: g",
        ),
    ],
)
def test_wrong_calls(call: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True)
    x = torch.zeros(B, N, E)
    with pytest.raises(error, match=message):
        layer(**{"query": x, "key": x, "value": x} | call)


def nested(*lengths: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the feature a prototype
        return torch.nested.nested_tensor([torch.randn(n, E) for n in lengths])


def test_nested_tensors_are_refused() -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True).eval()
    x = nested(3, 5)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="query: got a nested tensor"):
        layer(x, x, x)


# --- in nn's layers -------------------------------------------------------------------------------


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, **{"batch_first": True} | options)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("by", ["convert", "hand"])
def test_encoder_layer(by: str, norm_first: bool, training: bool, grad: bool) -> None:
    plain = encoder_layer(norm_first=norm_first).train(training)
    ours = copy.deepcopy(plain)
    if by == "convert":
        convert(ours, "softmax")
    else:
        ours.self_attn = PDMultiheadAttention(E, H, batch_first=True)
        ours.load_state_dict(plain.state_dict())
        ours.train(training)
    x = torch.randn(B, N, E)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.set_grad_enabled(grad), counted(ours.self_attn) as calls:
        for options in (
            {},
            {"src_mask": causal(N)},
            {"src_key_padding_mask": padding},
            {"src_mask": causal(N), "is_causal": True},
        ):
            close(ours(x, **options), plain(x, **options))
    assert len(calls) == 4


def test_the_plain_layer_is_passed_by() -> None:
    """Check that the test above would notice a bypass of the layer."""
    layer = encoder_layer().eval()
    with torch.no_grad(), counted(layer.self_attn) as calls:
        layer(torch.randn(B, N, E))
    assert not calls


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("when", ["after", "before", "bare"])
def test_encoder(when: str, training: bool) -> None:
    plain = nn.TransformerEncoder(encoder_layer(), 2).train(training)
    if when == "after":
        ours = copy.deepcopy(plain)
        report = convert(ours, "softmax")
        assert report.nested == ("",)
    elif when == "before":
        layer = encoder_layer()
        convert(layer, "softmax")
        ours = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        ours.load_state_dict(plain.state_dict())
    else:
        layer = encoder_layer()
        convert(layer, "softmax")
        with pytest.warns(UserWarning, match="use_nested_tensor is False because"):
            ours = nn.TransformerEncoder(layer, 2)
        ours.load_state_dict(plain.state_dict())
    ours.train(training)
    x = torch.randn(B, N, E)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad(), counted(ours.layers[0].self_attn) as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the plain encoder makes nested tensors
        for mask in (padding, None):
            got = ours(x, src_key_padding_mask=mask)
            want = plain(x, src_key_padding_mask=mask)
            if mask is not None:  # padded rows of the output have no meaning, 0 or not
                got, want = got[~mask], want[~mask]
            close(got, want)
    assert len(calls) == 4


def test_an_encoder_that_still_makes_nested_tensors() -> None:
    ours = nn.TransformerEncoder(encoder_layer(), 1).eval()
    ours.layers[0].self_attn = PDMultiheadAttention(E, H, batch_first=True).eval()
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 4:] = True
    x = torch.randn(B, N, E)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError, match=r"encoder\.use_nested_tensor = False"):
            ours(x, src_key_padding_mask=padding)
        ours.use_nested_tensor = False
        ours(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_transformer(training: bool, batch_first: bool) -> None:
    plain = (
        nn.Transformer(E, H, 1, 2, 32, dropout=0.0, batch_first=batch_first).train(training)
        if batch_first
        else None
    )
    if plain is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors want batch_first
            plain = nn.Transformer(E, H, 1, 2, 32, dropout=0.0).train(training)
    ours = copy.deepcopy(plain)
    assert len(convert(ours, "softmax").converted) == 5
    src, tgt = torch.randn(2, B, M, E), torch.randn(2, B, N, E)
    src, tgt = (x[0] if batch_first else x[0].transpose(0, 1) for x in (src, tgt))
    padding = torch.zeros(B, M)
    padding[1, 4:] = -torch.inf
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    options = {"tgt_mask": mask, "memory_key_padding_mask": padding}
    close(ours(src, tgt, **options), plain(src, tgt, **options), tolerance=5e-6)


def test_a_leaking_decoder_is_refused() -> None:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 32, batch_first=True), 1)
    convert(decoder, "bn")
    x = torch.randn(B, N, E)
    with pytest.raises(UnsupportedError, match="is_causal: bn is computed from keys"):
        decoder(x, x, tgt_mask=nn.Transformer.generate_square_subsequent_mask(N))


# --- convert --------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(E, H, batch_first=True)
        self.second = nn.MultiheadAttention(E, 2, batch_first=True, bias=False)
        self.again = self.first

    def forward(self, x: Any) -> Any:
        for layer in (self.first, self.second, self.again):
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


def test_convert_keeps_modules_and_parameters() -> None:
    model = Block().double().eval()
    first = model.first
    model.second.train()
    seen: list[str] = []
    handle = model.first.register_forward_hook(lambda *_: seen.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    x = torch.randn(B, N, E, dtype=torch.float64)
    want = model(x)
    report = convert(model, "softmax")
    assert report.converted == ("first", "again", "second")
    assert not report.left
    assert not report.parameters
    assert model.first is first is model.again
    assert isinstance(model.first, PDMultiheadAttention)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert (model.first.training, model.second.training) == (False, True)
    close(model(x), want, tolerance=1e-12)
    assert seen == ["hook"] * 4
    handle.remove()
    model(x).square().sum().backward()
    optimizer.step()
    assert len(seen) == 4
    assert not torch.allclose(model(x), want)
    assert "spec='softmax'" in repr(model)
    # Once more, with another spec.
    assert convert(model, "bn").converted == report.converted
    assert str(model.again.spec) == "softmax+bn"


def test_convert_changes_nothing_on_an_error() -> None:
    model = Block()
    for spec, error, message in (
        ("sh(1,1,2,2)", ValueError, "4 scales .* the 2 heads of second; nothing was converted"),
        ("sofmax", SpecError, "unknown word"),
        ("causal+bn", UnsupportedError, "the future leaks"),
    ):
        with pytest.raises(error, match=message):
            convert(model, spec)
        assert type(model.first) is type(model.second) is nn.MultiheadAttention
    report = convert(model, "sh(1,1,2,2)", select=lambda name, layer: layer.num_heads == 4)
    assert report.converted == ("first", "again")
    assert report.left == {"second": "not selected"}


def test_one_spec_fits_layers_of_any_number_of_heads() -> None:
    model, x = Block().double(), torch.randn(B, N, E, dtype=torch.float64)
    halves, written = copy.deepcopy(model), copy.deepcopy(model)
    assert convert(halves, "bn+sh(half=2)").converted == ("first", "again", "second")
    assert str(halves.second.spec) == str(halves.first.spec) == "softmax+bn+sh(half=2)"
    convert(written, "bn+sh(1,1,2,2)", select=lambda name, layer: layer.num_heads == 4)
    convert(written, "bn+sh(1,2)", select=lambda name, layer: layer.num_heads == 2)
    close(halves(x), written(x), tolerance=1e-12)
    compiled = torch.compile(halves, backend="eager", fullgraph=True)
    close(compiled(x), written(x), tolerance=1e-12)


class Own(nn.MultiheadAttention):
    def forward(self, query: Any, key: Any, value: Any) -> Any:
        return query


def test_what_is_left_as_it_was() -> None:
    model = nn.ModuleDict(
        {
            "bias": nn.MultiheadAttention(E, H, add_bias_kv=True),
            "zero": nn.MultiheadAttention(E, H, add_zero_attn=True),
            "own": Own(E, H),
            "replaced": nn.MultiheadAttention(E, H),
            "good": nn.MultiheadAttention(E, H),
        }
    )
    model["replaced"].forward = lambda *_: None
    report = convert(model, "bn(beta=param)")
    assert report.converted == ("good",)
    assert report.parameters == ("good.spec_beta",)
    assert [type(m).__name__ for m in model.values()] == [
        "MultiheadAttention",
        "MultiheadAttention",
        "Own",
        "MultiheadAttention",
        "PDMultiheadAttention",
    ]
    lines = str(report).splitlines()
    assert lines[:3] == ["converted to softmax+bn(beta=param)", "  good", "left as it was"]
    assert lines[3].startswith("  bias: add_bias_kv: the key that it appends")
    assert lines[4].startswith("  zero: add_zero_attn: ")
    assert "Own, whose meaning is its own" in lines[5]
    assert lines[6] == "  replaced: its forward was replaced"
    assert lines[7:] == ["new parameters, for the optimizer", "  good.spec_beta"]
    assert repr(report) == str(report)
    convert(model, "bn")
    assert "spec_beta" not in dict(model["good"].named_parameters())
    assert str(convert(nn.Linear(2, 2), "bn")) == (
        "nothing converted: the model has no nn.MultiheadAttention"
    )


def test_cross_attention_and_specs_that_go_by_position() -> None:
    layer = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, batch_first=True)
    report = convert(layer, "causal+bn(statistics=prefix)")
    assert report.converted == ("self_attn",)
    assert "cross-attention" in report.left["multihead_attn"]
    report = convert(layer, "bn", select=lambda name, _: name == "multihead_attn")
    assert report.converted == ("multihead_attn",)
    x, memory = torch.randn(B, N, E), torch.randn(B, M, E)
    want = layer(x, memory)
    for m in range(1, N):
        close(layer(x[:, :m], memory), want[:, :m])


def test_one_layer_by_itself() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    x = torch.randn(B, N, E)
    want = layer(x, x, x)
    assert str(convert(layer, "softmax")) == "converted to softmax\n  the model itself"
    close(layer(x, x, x), want)


class Double(nn.Module):
    def forward(self, x: Any) -> Any:
        return 2 * x


def test_parametrized_layers() -> None:
    layer = nn.MultiheadAttention(E, H, batch_first=True)
    parametrize.register_parametrization(layer, "in_proj_weight", Double())
    x = torch.randn(B, N, E)
    want = layer(x, x, x)
    assert convert(layer, "softmax").converted == ("",)
    assert isinstance(layer, PDMultiheadAttention)
    assert parametrize.is_parametrized(layer, "in_proj_weight")
    close(layer(x, x, x), want)
    close(copy.deepcopy(layer)(x, x, x), want)
    convert(layer, "bn")
    parametrize.remove_parametrizations(layer, "in_proj_weight")
    assert type(layer) is PDMultiheadAttention
    assert str(layer.spec) == "softmax+bn"


# --- compiling, copies ----------------------------------------------------------------------------


# array-api-compat caches the namespace of a type; Dynamo warns of every cached function.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize(
    ("spec", "backend"), [("softmax", "eager"), *((spec, "aot_eager") for spec in SPECS)]
)
def test_it_compiles_as_one_graph(spec: str, backend: str) -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec=spec, dtype=torch.float64)
    x = torch.randn(B, N, E, dtype=torch.float64)
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 4:] = True
    floating = x.new_zeros(B, N).masked_fill(padding, -torch.inf)
    calls: list[dict[str, Any]] = [
        {"key_padding_mask": padding, "need_weights": False},
        {"key_padding_mask": floating, "attn_mask": x.new_zeros(N, N)},
    ]
    if not spec.startswith("bn"):
        calls.append({"attn_mask": causal(N), "is_causal": True, "need_weights": False})
    want = [with_gradients(layer, [x, x, x], **options) for options in calls]
    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for options, expected in zip(calls, want, strict=True):
        close(with_gradients(compiled, [x, x, x], **options), expected, tolerance=1e-12)


def test_compiled_refusals() -> None:
    layer = PDMultiheadAttention(E, H, batch_first=True, spec="bn")
    x = torch.randn(B, N, E)
    layer(x, x, x, attn_mask=causal(N).T)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x, x, x, attn_mask=causal(N).T)
    with pytest.raises(RuntimeError, match="attn_mask: it hides all later keys"):
        compiled(x, x, x, attn_mask=causal(N))


def test_a_compiled_encoder() -> None:
    model = nn.TransformerEncoder(encoder_layer(), 2).eval()
    convert(model, "bn")
    x = torch.randn(B, N, E)
    want = model(x)
    torch.compiler.reset()
    close(torch.compile(model, backend="eager", fullgraph=True)(x), want)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(how: str) -> None:
    with pdcore.use_backend("torch"):
        layer = PDMultiheadAttention(E, H, batch_first=True, spec="bn(beta=param)+sh(1,1,2,2)")
    x = torch.randn(B, N, E)
    want = layer(x, x, x)
    with pdcore.use_backend("strict"):  # the copy keeps the backend chosen before
        if how == "deepcopy":
            again = copy.deepcopy(layer)
        else:
            again = pickle.loads(pickle.dumps(layer))  # noqa: S301 - pickled here
        close(again(x, x, x), want, tolerance=0)
    assert again.spec == layer.spec
    assert again.state_dict().keys() == layer.state_dict().keys()
    assert again.spec_beta is not layer.spec_beta


def test_the_backend_is_settled() -> None:
    x = torch.randn(B, N, E)
    layer = PDMultiheadAttention(E, H, batch_first=True, backend="strict")
    with pytest.raises(UnsupportedError, match="backend strict"):
        layer(x, x, x)


def test_repr() -> None:
    layer = PDMultiheadAttention(E, H, dropout=0.5, kdim=5, batch_first=True, spec="bn + softmax")
    assert layer.extra_repr() == ("16, 4, spec='softmax+bn', dropout=0.5, kdim=5, batch_first=True")
    assert "spec='softmax+bn'" in repr(nn.Sequential(layer))


def test_parameters_can_be_drawn_again() -> None:
    plain, ours = nn.MultiheadAttention(E, H), PDMultiheadAttention(E, H)
    for layer in (plain, ours):
        torch.manual_seed(3)
        layer._reset_parameters()
    assert torch.equal(plain.in_proj_weight, ours.in_proj_weight)
    assert not ours.in_proj_bias.any()


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("mask", "attn_mask="),
        ("key_mask", "key_padding_mask="),
        ("bias", "floating-point attn_mask="),
        ("q", "query="),
        ("dropout_p", "argument of PDMultiheadAttention"),
        ("spec", "argument of PDMultiheadAttention"),
        ("causal", 'spec="causal"'),
        ("softmax_scale", "softmax(scale=...)"),
    ],
)
def test_a_call_answers_arguments_of_other_attentions(word: str, says: str) -> None:
    layer, x = PDMultiheadAttention(8, 2), torch.zeros(3, 1, 8)
    with pytest.raises(TypeError, match=f"unknown argument {word}=") as caught:
        layer(x, x, x, **{word: None})
    assert says in str(caught.value)
    assert "spec" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [("is_causal", 'spec="causal"'), ("attn_mask", "the call"), ("scale", "softmax(scale=...)")],
)
def test_a_layer_answers_arguments_of_other_attentions(word: str, says: str) -> None:
    with pytest.raises(TypeError, match=f"unknown argument {word}=") as caught:
        PDMultiheadAttention(8, 2, **{word: None})
    assert says in str(caught.value)


class Wrapped(nn.Module):
    """A model with one layer, for tracers that need a module around it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(1,1,2,2)"])
def test_a_layer_is_a_leaf_of_fx(spec: str) -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    convert(layer, spec)
    model, x = Wrapped(layer), torch.randn(2, 6, 16)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes].count("call_module") == 1
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(traced(x[:, :5]), model(x[:, :5]))
    with pytest.raises(torch.fx.proxy.TraceError, match="trace the model that contains it"):
        torch.fx.symbolic_trace(layer)


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("spec", ["softmax", "bn", "causal"])
def test_a_converted_encoder_by_torchscript(spec: str) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    convert(layer, spec)
    traced = torch.jit.trace(layer.eval(), (torch.randn(2, 6, 16),))
    for length in (6, 9):
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("need_weights", [True, False])
def test_a_layer_compiles_to_one_graph(need_weights: bool) -> None:
    torch.compiler.reset()
    layer, x = PDMultiheadAttention(16, 4, spec="bn", batch_first=True), torch.randn(2, 6, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for result, wanted in zip(
        compiled(x, x, x, need_weights=need_weights),
        layer(x, x, x, need_weights=need_weights),
        strict=True,
    ):
        torch.testing.assert_close(result, wanted)


FEATURE_MAPS = ["linear", "elu", "relu", "random_features", "linear+bn(beta=0)"]


def test_a_feature_map_has_no_dropout() -> None:
    model = nn.TransformerEncoderLayer(16, 4, batch_first=True)
    with pytest.raises(pdcore.UnsupportedError, match=r"dropout: got 0.1 for self_attn.*linear"):
        convert(model, "linear")
    assert type(model.self_attn) is nn.MultiheadAttention
    convert(model, "linear", dropout=0)
    model(torch.randn(2, 5, 16)).sum().backward()
    for spec in FEATURE_MAPS:
        with pytest.raises(pdcore.UnsupportedError, match=r"dropout: got 0.1 for the layer, and "):
            PDMultiheadAttention(16, 4, dropout=0.1, spec=spec)
        PDMultiheadAttention(16, 4, spec=spec)


def test_outputs_are_dropped_in_place_of_weights() -> None:
    model = nn.TransformerEncoderLayer(16, 4, batch_first=True)
    with pytest.raises(pdcore.UnsupportedError, match=r"convert\(drop='output'\) to drop outputs"):
        convert(model, "linear")
    convert(model, "linear", drop="output")
    layer = model.self_attn
    assert (layer.dropout, layer.drop) == (0.1, "output")
    assert (
        layer.extra_repr() == "16, 4, spec='linear', dropout=0.1, batch_first=True, drop='output'"
    )
    x = torch.randn(8, 50, 16)
    whole = layer.eval()(x, x, x)[0]
    out = layer.train()(x, x, x)[0]
    kept = out != 0
    close(out, torch.where(kept, whole / 0.9, 0.0))
    assert abs(kept.double().mean().item() - 0.9) < 5 * (0.09 / kept.numel()) ** 0.5
    with pytest.raises(pdcore.UnsupportedError, match="self_attn, and relu has no weights to drop"):
        convert(model, "relu", drop="weights")
    convert(model, "relu")  # a converted layer drops what it did
    assert layer.drop == "output"
    convert(model, "softmax", drop="weights")
    torch.manual_seed(0)
    expected = PDMultiheadAttention(16, 4, dropout=0.1, batch_first=True)
    expected.load_state_dict(layer.state_dict())
    outs = []
    for module in (layer.train(), expected):
        torch.manual_seed(0)
        outs.append(module(x, x, x)[0])
    close(*outs, tolerance=0)


def test_what_dropout_drops_is_one_of_two() -> None:
    for make in (
        lambda: PDMultiheadAttention(16, 4, drop="heads"),
        lambda: convert(nn.MultiheadAttention(16, 4), "linear", drop="heads"),
    ):
        with pytest.raises(ValueError, match="drop: got 'heads', expected 'weights' or 'output'"):
            make()
