"""Terms of positions and labels by the fused CPU kernel, against blocks of our own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pdcore
from pdcore_backends.torch import impl, terms

BATCH, HEADS, KEY_HEADS, ROWS, KEYS = 2, 4, 2, 300, 340
REAL = torch.arange(KEYS) < torch.tensor([[KEYS], [120]])
LABELS = tuple(torch.arange(BATCH * n).reshape(BATCH, n) * 7 % 4 for n in (ROWS, KEYS))
PARAMS = {"relative": (HEADS, 19), "influence": (1, 4, 4), "beta": (KEY_HEADS,)}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def call(spec: str, options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Return out, the finite log-sum-exps, and the gradients of queries, keys and values."""
    shapes = (HEADS, ROWS, 8), (KEY_HEADS, KEYS, 8), (KEY_HEADS, KEYS, 5)
    x = [drawn(BATCH, *shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    names = [p.name for p in pdcore.parse(spec).parameters() if p.name in PARAMS]
    params = {name: drawn(*PARAMS[name], seed=9) for name in names}
    out, lse = pdcore.attention(*x, spec, params=params, return_lse=True, **options)
    lse = torch.where(lse.isinf(), 0.0, lse)
    return (out, lse, *torch.autograd.grad(out.sin().sum() + lse.cos().sum(), x))


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("causal+alibi", {}),
        ("causal+alibi", {"offset": 40}),
        ("causal+alibi+h(sum,sink=0)", {"offset": -20}),
        ("causal+alibi", {"key_mask": REAL}),
        ("relative(9)+sparse(50,20)", {}),
        ("alibi+relative(9)+bn(beta=param)", {}),
        ("causal+relative(9)+bn(statistics=prefix,eps=0.3)", {}),
        ("labels(4)+causal", {"labels": LABELS}),
        ("labels(4)+alibi+h(count)", {"labels": LABELS, "key_mask": REAL}),
        ("alibi", {"bias": drawn(HEADS, 1, KEYS, seed=5)}),
        ("alibi", {"mask": drawn(ROWS, KEYS, seed=6) > -0.5}),
    ],
)
def test_the_kernel_equals_blocks(
    spec: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    run = terms._forward
    monkeypatch.setattr(terms, "_forward", lambda c, o: used.append(c) or run(c, o))
    fast = call(spec, options)
    assert used
    monkeypatch.setattr(impl, "scores_with_terms", lambda c, o: None)
    for x, y in zip(fast, call(spec, options), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-11)


def test_distances_are_one_line_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 4096, 4)
    sizes = []
    added = terms._added

    def noted(*arguments: Any) -> torch.Tensor:
        result = added(*arguments)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(terms, "_added", noted)
    pdcore.attention(q, q, q, "causal+alibi+relative(5)")
    assert max(sizes) < 2 * (4096 + terms.ROWS)


def test_gradients_of_gradients() -> None:
    x = drawn(1, 2, 6, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: pdcore.attention(x, x, x, "causal+alibi"), (x,))


@pytest.mark.parametrize("name", ["relative", "bias"])
def test_what_requires_a_gradient_goes_by_blocks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terms, "_forward", lambda c, o: pytest.fail("the kernel has no gradient"))
    q = drawn(1, 2, 6, 3)
    of = {"relative": drawn(2, 5), "bias": drawn(2, 6, 6)}
    of[name].requires_grad_()
    params = {"relative": of["relative"]}
    out = pdcore.attention(q, q, q, "relative(2)", params=params, bias=of["bias"])
    out.sin().sum().backward()
    assert of[name].grad.abs().max() > 0


def test_explain_names_the_kernel() -> None:
    q = torch.zeros(1, 2, 6, 3)
    text = str(pdcore.explain(q, q, q, "causal+alibi"))
    assert "flash) on blocks of rows, to whose scores terms are added" in text
    assert "to whose scores" not in str(pdcore.explain(q, q, q, "softmax(softcap=2)+alibi"))
