"""What each disagreement of a peer with the oracle comes from, as settled by hand.

An entry holds for the cases of a topic whose label contains its text. A disagreement that no entry
explains makes ``python -m pdcore_conformance.peer_backends`` fail, and so does an entry that
explains none.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SETTLED", "Settled", "settled"]


class Settled(NamedTuple):
    """Whose error a disagreement is.

    Attributes
    ----------
    peers : tuple of str
    topic : str
    text : str
        A part of the labels of the cases.
    whose : {"theirs", "ours", "two conventions"}
    why : str
    """

    peers: tuple[str, ...]
    topic: str
    text: str
    whose: str
    why: str


_SDPA = ("torch_sdpa", "torch_sdpa_math", "torch_sdpa_flash")
_TORCH = (*_SDPA, "torch_multihead")
_JAX = ("jax_nn", "keras_ops")
_NAN = (
    "A hidden key gets the weight 0, and 0 times NaN is NaN. These functions ask for finite "
    "padding; here padding may hold anything, as uninitialised memory does."
)

SETTLED = (
    Settled(
        (*_TORCH, "torch_flex", *_JAX, "onnxruntime"),
        "NaN in padding",
        "key_mask=",
        "two conventions",
        _NAN,
    ),
    Settled(
        (*_TORCH, *_JAX),
        "gradients beside hidden keys",
        "key_mask=right, gradients",
        "two conventions",
        _NAN,
    ),
    Settled(
        _JAX,
        "rows that see no key",
        "",
        "two conventions",
        "JAX replaces hidden scores by a large finite number, so a row that sees no key is the "
        "mean of all values, hidden ones too; with a bias of -inf it is NaN. Its documentation "
        "states neither.",
    ),
    Settled(
        _JAX,
        "gradients beside hidden keys",
        "mask=empty, gradients",
        "two conventions",
        "The same: values get a gradient from rows that see none of them.",
    ),
    Settled(
        ("jax_nn",),
        "log-sum-exp",
        "mask=empty",
        "theirs",
        "The residual of a row that sees no key is the large negative number that replaces hidden "
        "scores, which is neither -inf nor the log of a sum: merging by it counts the mean.",
    ),
    Settled(
        ("jax_nn",),
        "log-sum-exp",
        "bfloat16",
        "two conventions",
        "The residual has the dtype of the inputs; in bfloat16 it has two or three digits, "
        "too few to merge results by.",
    ),
    Settled(
        ("jax_nn",),
        "float64",
        "",
        "theirs",
        "The softmax is computed in float32 whatever the inputs: the result is float64 with the "
        "digits of float32.",
    ),
    Settled(
        ("keras_ops",),
        "float64",
        "",
        "theirs",
        "float64 arrays come back as float32: Keras converts them to its own default dtype.",
    ),
    Settled(
        ("onnxruntime",),
        "float64",
        "",
        "theirs",
        "The scale is kept in float32, the operator's own 1/sqrt(D) too, so scores have the "
        "digits of float32. With D = 16, whose root float32 holds, the result is right.",
    ),
    Settled(
        ("onnxruntime",),
        "16 bits",
        "float16",
        "two conventions",
        "Scores are stored in float16, as ONNX lets them be, and those above 65,504 overflow to "
        "inf, of which the softmax makes NaN. PyTorch and JAX hold scores in float32.",
    ),
    Settled(
        ("torch_flex",),
        "sizes",
        "keys=0",
        "theirs",
        "Not compiled, FlexAttention takes the maximum of no scores and raises an IndexError; "
        "scaled_dot_product_attention returns zeros.",
    ),
    Settled(
        ("fla_naive",),
        "float64",
        "causal+linear",
        "theirs",
        "The reference casts its inputs to float32 and the result back.",
    ),
)


def settled(peer: str, topic: str, case: str) -> Settled | None:
    """Return the entry that explains a disagreement, None where none does."""
    for entry in SETTLED:
        if peer in entry.peers and topic == entry.topic and entry.text in case:
            return entry
    return None
