"""The CUDA paths of the PyTorch backend on CPU tensors: FlexAttention, checkpointing.

FlexAttention runs uncompiled here, which is slow, because the compiled FlexAttention has neither
gradient nor log-sum-exp on the CPU.
"""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as framework
from cuda_cases import draw, error
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import pdcore
from pdcore.dispatch import cache as bound_cache
from pdcore.reference import reference_attention
from pdcore.spec import Support, Visibility, parse
from pdcore_backends.torch import choice, device, flash, flex, namespace
from pdcore_conformance.judge import budget
from pdcore_conformance.runner import conforming as running

CASES = cache(lambda: running.list_cases("torch:cpu"))


def forget() -> None:
    """Clear the caches of bound calls and compiled programs."""
    bound_cache._BOUND.clear()
    flex._program.cache_clear()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Choose as on CUDA, run FlexAttention uncompiled, and yield the dtypes of its calls."""
    forget()
    calls: list[str] = []
    run = flex._run

    def noted(c: Any, o: Any) -> Any:
        calls.append(c.choice.dtype)
        return run(c, o)

    monkeypatch.setattr(device, "kind", lambda name: "cuda")
    monkeypatch.setattr(device, "without_flex", lambda name: "")
    monkeypatch.setattr(device, "without_triton", lambda name: "no Triton in this test")
    monkeypatch.setattr(choice, "FLEX_LEAST", 1)
    monkeypatch.setattr(flex, "compiled", lambda function: function)
    monkeypatch.setattr(flex, "_run", noted)
    monkeypatch.setattr(framework, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(framework, "_validate_device", lambda *tensors: None)
    yield calls
    forget()


SHAPES = {"grouped": (2, 4, 2, 20, 25, 12, 7), "long": (1, 1, 1, 300, 290, 16, 16)}
SPECS = (
    "softmax(softcap=2)",
    "polynomial(2)",
    "polynomial(degree=4,coef0=1)+causal",
    "sparse(20,7)",
    "causal+sparse(130,inf)",
    "gaussian(gamma=0.3)+sparse(20,7)",
    "cosine+sparse(5,200)",
    "bn+sparse(20,7)",
    "bn+softmax(softcap=3)+sh(3,2)",
    "causal+sh(1,2)",
    "causal+sparse(7,inf)+h(count)",
    "causal+alibi",
    "relative(3)",
    "sparse(20,7)+labels(3)",
)
OPTIONS: dict[str, Callable[[tuple[int, ...]], dict[str, Any]]] = {
    "plain": lambda s: {},
    "padding": lambda s: {"key_mask": draw(s[0], s[4], seed=5) > -0.5},
    "mask": lambda s: {
        "mask": draw(s[3], s[4], seed=6) > -0.5,
        "key_mask": draw(s[0], s[4], seed=5) > -0.5,
    },
    "before": lambda s: {"offset": -3},
    "array": lambda s: {
        "offset": torch.arange(s[0]) + 2,
        "key_mask": draw(s[0], s[4], seed=5) > -0.5,
    },
    "bias": lambda s: {"bias": draw(1, s[1], s[3], 1, seed=7)},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("size", SHAPES)
def test_flex_attention_is_the_oracle(cuda: list[str], size: str, spec: str, option: str) -> None:
    shape = SHAPES[size]
    if "sh(" in spec and (option == "bias" or shape[2] == 1):
        pytest.skip("no such call")
    if size == "long" and option not in ("plain", "before"):
        pytest.skip("blocks are looked at without more")
    batch, query_heads, heads, rows, keys, dim, width = shape
    arrays = [
        draw(batch, query_heads, rows, dim),
        draw(batch, heads, keys, dim, seed=1),
        draw(batch, heads, keys, width, seed=2),
    ]
    options = OPTIONS[option](shape)
    if "relative" in spec:
        options["params"] = {"relative": draw(query_heads, 7, seed=9)}
    if "labels" in spec:
        options["params"] = {"influence": draw(query_heads, 3, 3, seed=9)}
        lengths = (rows, keys)
        options["labels"] = tuple(torch.arange(batch * n).reshape(batch, n) % 3 for n in lengths)
    x = [a.clone().requires_grad_() for a in arrays]
    out, lse = pdcore.attention(*x, spec, return_lse=True, **options)
    assert cuda == ["float32"] * len(lowered_groups(spec))
    wide = tree_map(
        lambda o: o.double() if torch.is_tensor(o) and o.is_floating_point() else o, options
    )
    plain = tree_map(lambda o: o.numpy() if torch.is_tensor(o) else o, wide)
    wanted = reference_attention(
        *(a.double().numpy() for a in arrays), spec, return_lse=True, **plain
    )
    assert error(out, wanted[0]) < 1e-5
    assert error(lse, wanted[1]) < 1e-5

    def slopes(inputs: list[Any], out: Any, lse: Any) -> tuple[Any, ...]:
        results = [r for r in (out, lse) if r.requires_grad]
        d = [draw(*r.shape, seed=8).to(r.dtype) for r in results]
        return torch.autograd.grad(results, inputs, d)

    y = [a.double().requires_grad_() for a in arrays]
    exact = slopes(y, *pdcore.attention(*y, spec, return_lse=True, **wide))  # by blocks
    for ours, slope in zip(slopes(x, out, lse), exact, strict=True):
        assert error(ours, slope) < 1e-5


def lowered_groups(spec: str) -> set[int]:
    return set(parse(spec).heads.scales) or {1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "spec",
    [
        "softmax(softcap=2)",
        "gaussian(gamma=0.3)+sparse(9,9)",
        "bn+sparse(9,9)",
        "bn(statistics=prefix)+sparse(9,9)",
    ],
)
def test_flex_attention_reads_16_bit(cuda: list[str], dtype: Any, spec: str) -> None:
    q, k, v = (draw(1, 2, 30, 16, seed=i, dtype=dtype) for i in range(3))
    out, lse = pdcore.attention(q, k, v, spec, return_lse=True)
    assert cuda == ["float32" if "prefix" in spec else str(dtype).removeprefix("torch.")]
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    wanted = reference_attention(*(x.double().numpy() for x in (q, k, v)), spec)
    assert error(out, wanted) < 8 * torch.finfo(dtype).eps


def test_rows_without_keys_are_zero_with_a_gradient_of_zero(cuda: list[str]) -> None:
    q, k, v = (draw(1, 1, 10, 16, seed=i).requires_grad_() for i in range(3))
    out, lse = pdcore.attention(q, k, v, "sparse(1,1)", offset=6, return_lse=True)
    assert cuda
    assert torch.equal(lse[0, 0, 5:], torch.full((5,), -torch.inf))
    assert not out[0, 0, 5:].any()
    grads = torch.autograd.grad((out.sum(), lse[..., :3].sum()), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[0][0, 0, 5:].any()


def test_gradients_of_gradients_are_those_of_our_blocks(cuda: list[str]) -> None:
    runs = []
    for dtype in (torch.float32, torch.float64):
        x = [draw(1, 1, 9, 16, seed=i).to(dtype).requires_grad_() for i in range(3)]
        out = pdcore.attention(*x, "sparse(3,2)")
        first = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        runs.append(torch.autograd.grad(sum(g.square().sum() for g in first), x))
    assert cuda == ["float32"]
    for ours, wanted in zip(*runs, strict=True):
        assert error(ours, wanted) < 1e-5


def test_a_second_backward_computes_the_record_again(cuda: list[str]) -> None:
    x = [draw(1, 1, 9, 16, seed=i).requires_grad_() for i in range(3)]
    out = pdcore.attention(*x, "sparse(3,2)")
    first = torch.autograd.grad(out.sum(), x, retain_graph=True)
    second = torch.autograd.grad(out.sum(), x)
    assert cuda == ["float32", "float32"]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["bias", "traced", "func", "mode"])
def test_what_flex_attention_does_not_differentiate_goes_by_blocks(
    cuda: list[str], kind: str
) -> None:
    q, k, v = (draw(1, 1, 9, 16, seed=i) for i in range(3))
    if kind == "func":
        torch.func.vmap(lambda q: pdcore.attention(q, k, v, "sparse(3,2)"))(q[None])
    elif kind == "mode":
        with FlopCounterMode(display=False):
            pdcore.attention(q, k, v, "sparse(3,2)")
    elif kind == "bias":
        bias = draw(9, 9, seed=3).requires_grad_()
        pdcore.attention(q, k, v, "sparse(3,2)", bias=bias).sum().backward()
        assert bias.grad is not None
    else:
        layer = pdcore.bind("sparse(3,2)")
        assert (
            error(
                torch.compile(layer, fullgraph=True, backend="eager")(q, k, v),
                pdcore.bind("sparse(3,2)", backend="torch")(q.double(), k.double(), v.double()),
            )
            < 1e-5
        )
    assert not cuda


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("offset", [0, -70, 40, 900])
@pytest.mark.parametrize(
    "support",
    [
        Support(causal=True),
        Support(left=20, right=7),
        Support(left=300),
        Support(causal=True, left=130),
        Support(right=200),
    ],
)
def test_a_mask_of_blocks_is_the_visibility(support: Any, offset: int, scale: int) -> None:
    rows, length = 300, 700
    blocks = flex.block_mask(support, rows, length, scale, offset, "cpu")
    seen = Visibility(support, namespace, rows, length, scale, offset, None, None, None, "cpu")
    exact = seen.by_position(0, rows, 0, seen.keys).expand(rows, seen.keys)
    wanted = framework.create_block_mask(
        lambda b, h, i, j: exact[i, j], None, None, rows, seen.keys, device="cpu"
    )
    assert torch.equal(blocks.to_dense(), wanted.to_dense())
    index = [torch.arange(n) for n in (rows, seen.keys)]
    assert torch.equal(blocks.mask_mod(0, 0, index[0][:, None], index[1]), exact)
    full = framework.BlockMask.from_kv_blocks(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    for row, block in full.to_dense()[0, 0].nonzero().tolist():
        part = exact[128 * row : 128 * (row + 1), 128 * block : 128 * (block + 1)]
        assert part.shape == (128, 128)
        assert part.all()


def test_masks_of_blocks_are_kept_within_bounds() -> None:
    flex.block_mask.cache_clear()
    for offset in range(40):
        flex.block_mask(Support(causal=True), 130, 130, 1, offset, "cpu")
    assert flex.block_mask.cache_info().currsize == flex.block_mask.cache_info().maxsize == 16
    with torch.inference_mode():
        blocks = flex.block_mask(Support(causal=True), 131, 131, 1, 0, "cpu")
    assert not blocks.kv_indices.is_inference()


def test_one_score_map_is_one_program(cuda: list[str]) -> None:
    for rows in (9, 10):
        q, k, v = (draw(1, 1, rows, 16, seed=i) for i in range(3))
        pdcore.attention(q, k, v, "sparse(3,2)")
    assert flex._program.cache_info().currsize == 1
    kind = flex._Kind(None, 1.0, (), 1, None, 1, ())
    programs = [flex._program(kind._replace(pooled=n)) for n in (1, 2)]
    # PyTorch limits recompilations for all functions that share a code object.
    assert programs[0].__code__ is not programs[1].__code__


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_score_map_compiles_without_a_break(cuda: list[str], monkeypatch: Any) -> None:
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    monkeypatch.setattr(flex, "compiled", compiled)
    q, k, v = (draw(1, 2, 20, 16, seed=i) for i in range(3))
    key_mask = draw(1, 20, seed=5) > -0.5
    spec = "polynomial(degree=2,coef0=1)+sparse(4,3)"
    out = pdcore.attention(q, k, v, spec, key_mask=key_mask)
    assert cuda
    wanted = reference_attention(
        *(x.double().numpy() for x in (q, k, v)), spec, key_mask=key_mask.numpy()
    )
    assert error(out, wanted) < 1e-5


@pytest.mark.parametrize(
    "module", ["support", "kernels", "heads", "bias", "lse", "statistics", "gradients"]
)
def test_the_suite_holds_for_what_cuda_runs(
    cuda: list[str], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FlexAttention, uncompiled on the CPU, takes lse from scores of 16 bits: lse is up to 1,500
    # budgets of float32 off (gaussian in bfloat16), and within the budget of its inputs' dtype.
    monkeypatch.setattr(budget, "_dtype_of_lse", lambda spec, dtype: dtype)
    cases = [name for name in CASES() if name.startswith(f"{module}::")]
    # Only every n-th case of a long module, but all cases with softcap, which FlexAttention runs.
    share = max(1, len(cases) // 25)
    cases = [name for i, name in enumerate(cases) if i % share == 0 or "softcap" in name]
    run, code = running.conform("torch:cpu", cases=cases)
    assert run is not None
    wrong = [
        f"{c['id']}: {c['message']}" for c in run["cases"] if c["outcome"] in ("failed", "error")
    ]
    assert not wrong, "\n".join(wrong[:20])
    assert code == 0
    assert run["counts"]["passed"] > 20
    assert cuda


KEPT = [
    "softmax",
    "bn",
    "softmax(softcap=2)",
    "sparse(3,2)",
    "causal+linear",
    "causal+bn(statistics=prefix)",
]


@pytest.mark.parametrize("place", ["cpu", "cuda"])
@pytest.mark.parametrize("spec", KEPT)
def test_checkpointing_computes_once_more_and_keeps_nothing(
    spec: str, place: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "cuda":
        request.getfixturevalue("cuda")
        # The autograd function of the CUDA kernels, on the CPU kernels.
        monkeypatch.setattr(flash._OnCpu, "apply", lambda *a: (flash._OnDevice.apply(*a[:6]), None))
    layer = pdcore.bind(spec)
    ran, saved = 0, []

    def part(q: Any, k: Any, v: Any) -> Any:
        nonlocal ran
        ran += 1
        q, k, v = (x * 1.5 for x in (q, k, v))
        saved.extend(weakref.ref(x) for x in (q, k, v))
        return layer(q, k, v)

    x = [draw(1, 2, 11, 16, seed=i).requires_grad_() for i in range(3)]
    wanted = torch.autograd.grad(part(*x).square().sum(), x)
    ran, saved = 0, []
    out = checkpoint(part, *x, use_reentrant=False)
    gc.collect()
    assert ran == 1
    assert [ref() for ref in saved] == [None] * 3
    grads = torch.autograd.grad(out.square().sum(), x)
    assert ran == 2
    for grad, exact in zip(grads, wanted, strict=True):
        assert error(grad, exact) < 1e-6
