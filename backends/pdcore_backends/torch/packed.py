"""Packed sequences in compiled code: one operator, which reads the ids when it runs.

The number of segments and their lengths are values, on which a traced program cannot branch. The
operator is a single node for any of them; its code is the call that eager code makes, and its
gradient `pdcore.attention_vjp`, which computes the forward call again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import pdcore
from pdcore.extend import Inputs, Plan, Request

__all__ = ["compiled_segments", "segments_attention"]

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor[] params, Tensor? mask, Tensor? key_mask, "
    "Tensor? positions, Tensor q_ids, Tensor k_ids, Tensor? q_labels, Tensor? k_labels, "
    "SymInt offset, str words"
)


def compiled_segments(request: Request) -> list[str]:
    """Return why the operator cannot run a call whose segments are traced by the compiler."""
    asked = {"attention_vjp": request.vjp, "attention_weights": request.weights}
    asked["dropout"] = request.dropout > 0
    return [
        f"{name} of segments inside of compiled code: call it outside, or pass no segments"
        for name, used in asked.items()
        if used
    ]


def segments_attention(plan: Plan, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Run a traced call with segments; return out and the log-sum-exp."""
    offset, ids = inputs.offset, inputs.segments
    pair = ids if isinstance(ids, tuple | list) else (ids, ids)
    labels = inputs.labels if isinstance(inputs.labels, tuple | list) else (inputs.labels,) * 2
    kind = "array"
    if isinstance(offset, str):
        kind = "end"
    elif isinstance(offset, int):
        kind = "int"
    results: tuple[Tensor, Tensor] = torch.ops.pdcore.packed(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.bias,
        list(inputs.params.values()),
        inputs.mask,
        inputs.key_mask,
        offset if kind == "array" else None,
        pair[0],
        pair[1],
        *labels,
        offset if kind == "int" else 0,
        " ".join([kind, ",".join(inputs.params), plan.text]),
    )
    return results


def _call(arguments: Any) -> tuple[Any, ...]:
    """Return q, k, v, the spec and the named arguments of a call from those of the operator."""
    q, k, v, bias, params, mask, key_mask, positions, *rest = arguments
    q_ids, k_ids, q_labels, k_labels, offset, words = rest
    # The text of a plan ends with its spec, behind the four words of its signature.
    kind, names, _, _, _, _, spec = words.split(" ", 6)
    named = {
        "bias": bias,
        "params": dict(zip(names.split(",") if names else (), params, strict=True)),
        "mask": mask,
        "key_mask": key_mask,
        "offset": {"end": "end", "int": offset, "array": positions}[kind],
        "segments": (q_ids, k_ids),
        "labels": None if q_labels is None else (q_labels, k_labels),
        "backend": "torch",
    }
    return q, k, v, spec, named


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "pdcore::packed", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
def _packed(*arguments: Any) -> tuple[Tensor, Tensor]:
    *arrays, named = _call(arguments)
    out, lse = pdcore.attention(*arrays, return_lse=True, **named)
    return out.contiguous(), lse.contiguous()


@_packed.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=wide)


@torch.library.custom_op(  # type: ignore[untyped-decorator]
    "pdcore::packed_backward",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, Tensor d_out, Tensor d_lse) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor[])",
)
def _packed_backward(*arguments: Any) -> Any:
    *inputs, d_out, d_lse = arguments
    *arrays, named = _call(inputs)
    _, _, pull = pdcore.attention_vjp(*arrays, **named)
    d = {name: x.contiguous() for name, x in pull(d_out, d_lse).items()}
    bias = d.get("bias", d_out.new_empty(0))
    return d["q"], d["k"], d["v"], bias, [d[name] for name in named["params"]]


@_packed_backward.register_fake  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, bias: Any, params: Any, *rest: Any) -> Any:
    first = (q, k, v, q.new_empty(0) if bias is None else bias)
    return *(_like(x) for x in first), [_like(x) for x in params]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    *arrays, offset, words = inputs
    params = arrays.pop(4)
    ctx.rest, ctx.count = (offset, words), len(params)
    ctx.save_for_backward(*arrays, *params)


def _backward(ctx: Any, d_out: Any, d_lse: Any) -> Any:
    saved = ctx.saved_tensors
    cut = len(saved) - ctx.count
    arrays, params = saved[:cut], list(saved[cut:])
    *first, of_params = torch.ops.pdcore.packed_backward(
        *arrays[:4], params, *arrays[4:], *ctx.rest, d_out, d_lse
    )
    if arrays[3] is None:
        first[3] = None
    return (*first, of_params, *(None,) * 9)


torch.library.register_autograd("pdcore::packed", _backward, setup_context=_keep_for_backward)
