"""Answer wrong arguments of the public calls, with the words of other libraries translated."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..backend import Inputs
from ..errors import nearest

__all__ = ["check_given", "explains_arguments", "wrong_arguments"]

Function = TypeVar("Function", bound=Callable[..., Any])

_EITHER = inspect.Parameter.POSITIONAL_OR_KEYWORD

_CAUSAL = 'causality is a word of spec: spec="causal", or joined to others, spec="causal+linear"'
_SCALE = 'the scale is an argument of the kernel in spec: spec="softmax(scale=...)"'
_CAP = 'it is an argument of the kernel in spec: spec="softmax(softcap=...)"'
_WINDOW = (
    'windows are a word of spec: spec="sparse(left,right)", with "causal+" before it if needed'
)
_MASK = (
    "use mask=, bool, True where a query may attend to a key (invert a mask that is True where it "
    "hides); scores to be added go in bias=, causality in spec"
)
_BIAS = "use bias=, floating-point, which is added to the scores of a spec with log kappa"
_ALIBI = 'alibi is a word of spec: spec="alibi"; other slopes go in params={"slopes": ...}, (Hq,)'
_PADDING = (
    "use key_mask=, bool (*B, M), which is the inverse: True for a real key, such as "
    "key_mask=~key_padding_mask; spec stays as it is"
)
_LENGTHS = "use key_mask=, bool (*B, M), True for a real key, whatever the spec"
_PACKED = (
    "use segments=, integer ids (*B, N), such as segments_from_cu_seqlens(cu_seqlens), or a pair "
    "of those of queries and keys; spec is unchanged"
)
_DROPOUT = "use dropout=, the probability of dropping a weight; it is no part of spec"
_RANDOM = "leave it out: nothing is random without dropout=, whatever the spec; its seed is seed="
_HEADS = (
    "leave it out: heads are grouped by the shapes, if q has a multiple of the heads of k; spec "
    "says nothing of it"
)
_BACKEND = "use backend=, a name or several; spec says what is computed, not by what"
_WEIGHTS = "the weights are the result of attention_weights, of the same arguments and spec"
_LEVEL = "use return_lse=True, which gives the log-sum-exp, for any spec"
_LAYOUT = 'use layout=, "bhnd" or "bnhd"; spec does not depend on it'
_OFFSET = 'use offset=, the position of query 0, or offset="end"; causal and windows are in spec'
_DTYPE = "leave it out and cast q, k and v: sums are in float32 or float64 for any spec"
_BY_NAME = "pass a mask as mask=, others by their names, and causality and scale in spec"
_SPEC = "the kernel, the normalization and the normaliser are words of spec"


def _operand(name: str) -> str:
    return f"use {name}= (and spec= for what to compute)"


#: The arguments of other libraries' attentions, each with what to do here.
WORDS: Mapping[str, str] = {
    word: answer
    for words, answer in (
        ("query queries", _operand("q")),
        ("key keys key_", _operand("k")),
        ("value values", _operand("v")),
        ("is_causal causal use_causal_mask use_causal", _CAUSAL),
        ("scale softmax_scale scaling sm_scale", _SCALE),
        ("softcap logits_soft_cap attn_logits_soft_cap logit_softcap", _CAP),
        ("window_size window local_window_size sliding_window", _WINDOW),
        ("left_window_size right_window_size", _WINDOW),
        ("attn_mask attention_mask mask_mod block_mask masks", _MASK),
        ("attn_bias attention_bias position_bias score_mod", _BIAS),
        ("alibi_slopes", _ALIBI),
        ("key_padding_mask padding_mask", _PADDING),
        ("query_seq_lengths key_value_seq_lengths seqused_k seq_lens lengths", _LENGTHS),
        ("cu_seqlens cu_seqlens_q cu_seqlens_k cu_seq_q cu_seq_k cu_seq_lens_q", _PACKED),
        ("cu_seq_lens_k max_seqlen_q max_seqlen_k max_q max_k block_table", _PACKED),
        ("segment_ids q_segment_ids kv_segment_ids document_ids sequence_ids", _PACKED),
        ("dropout_p dropout_rate attn_drop attn_dropout", _DROPOUT),
        ("deterministic dropout_rng broadcast_dropout training", _RANDOM),
        ("enable_gqa num_heads num_key_value_heads num_kv_heads", _HEADS),
        ("implementation attn_implementation flash_attention kernel_options op", _BACKEND),
        ("need_weights average_attn_weights return_attention_scores", _WEIGHTS),
        ("output_attentions return_weights", _WEIGHTS),
        ("return_residual return_aux return_attn_probs return_softmax_lse", _LEVEL),
        ("qkv_format tensor_layout input_layout is_bsnh", _LAYOUT),
        ("q_offset query_offset cache_position causal_offset", _OFFSET),
        ("dtype precision softmax_precision promote_dtype force_fp32_for_softmax", _DTYPE),
        ("kernel normalization normaliser normalize heads support", _SPEC),
    )
    for word in words.split()
}


#: Arguments of some public calls only, with where they belong.
_ELSEWHERE = {
    **dict.fromkeys(("spec", "backend", "device"), "it is an argument of bind"),
    **dict.fromkeys(
        ("q", "k", "v", "mask", "key_mask", "bias", "offset", "segments", "labels", "params")
        + ("layout",),
        "bind takes no arrays; it belongs to the call of what bind returns",
    ),
    "return_lse": "attention and a bound spec take it; attention_vjp returns lse in any case",
    **dict.fromkeys(
        ("dropout", "seed"), "attention, attention_vjp, explain and a bound spec take it"
    ),
    **dict.fromkeys(("axis_name", "group"), "only attention, explain and a bound spec take it"),
}

_NO_WORDS: Mapping[str, str] = {}


class _Absent:
    """The value of a required argument that the caller leaves out."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT: Any = _Absent()


def explains_arguments(function: Function) -> Function:
    """Let a function with ``*extra: Never`` and ``**unknown: Never`` answer wrong arguments.

    Python checks the arguments before the body runs, so a call with ``query=`` in place of ``q``
    would end with a missing ``q``. The arguments without a default get one here, `ABSENT`, which
    `check_given` refuses. An argument by position and by name, such as a mask in the place of
    ``spec`` beside ``spec=``, is answered before the function is called. Type checkers and
    `inspect.signature` see the arguments as they are meant: the required ones required, and neither
    ``*extra`` nor ``**unknown``.
    """
    signature = inspect.signature(function)
    kinds = inspect.Parameter
    meant, required = [], 0
    by_position = [n for n, p in signature.parameters.items() if p.kind is _EITHER]
    for p in signature.parameters.values():
        if p.kind is kinds.VAR_POSITIONAL or p.kind is kinds.VAR_KEYWORD:
            continue
        meant.append(p)
        required += p.kind is kinds.POSITIONAL_OR_KEYWORD and p.default is kinds.empty
    target: Any = function
    target.__defaults__ = (ABSENT,) * required + (target.__defaults__ or ())

    @functools.wraps(target)
    def call(*arguments: Any, **named: Any) -> Any:
        if named:
            for name, value in zip(by_position, arguments, strict=False):
                if name in named:
                    raise _twice(call, name, value)
        return target(*arguments, **named)

    answering: Any = call
    answering.__signature__ = signature.replace(parameters=meant)
    return answering  # type: ignore[no-any-return]


def _twice(function: Callable[..., Any], name: str, value: Any) -> TypeError:
    """Build the error for an argument that is passed by position and by name."""
    places = [n for n, p in inspect.signature(function).parameters.items() if p.kind is _EITHER]
    places = [n for n in places if n != "self"]
    return TypeError(
        f"{_name(function)}: got {name} twice, by position ({type(value).__name__}) and by name; "
        f"takes {', '.join(places)} by position; {_BY_NAME}"
    )


def _name(function: Callable[..., Any]) -> str:
    name = function.__qualname__
    for suffix in (".__call__", ".__init__"):
        name = name.removesuffix(suffix)
    return name


def check_given(inputs: Inputs) -> None:
    """Raise a TypeError for a call that leaves out q, k or v."""
    absent = [name for name, x in zip("qkv", inputs, strict=False) if x is ABSENT]
    if absent:
        raise TypeError(f"missing {' and '.join(absent)}: q, k and v are required, for any spec")


def wrong_arguments(
    function: Callable[..., Any],
    extra: tuple[Any, ...],
    unknown: Mapping[str, Any],
    words: Mapping[str, str] = _NO_WORDS,
    *,
    spec_of: str = "bind",
) -> TypeError:
    """Build the error for arguments that a function does not take.

    Parameters
    ----------
    function : callable
        The function, which has ``**unknown: Never``.
    extra : tuple
        The arguments by position beyond those that it takes.
    unknown : mapping
        The arguments by name that it does not take.
    words : mapping of str to str, optional
        What to do in place of an argument, where the answer in `WORDS` does not fit.
    spec_of : str
        What takes the spec, if the function does not.

    Returns
    -------
    TypeError
    """
    parameters = inspect.signature(function).parameters
    named = (_EITHER, inspect.Parameter.KEYWORD_ONLY)
    known = [n for n, p in parameters.items() if p.kind in named and n != "self"]
    lines = []
    if extra:
        places = [n for n in known if parameters[n].kind is _EITHER]
        lines.append(
            f"got {len(places) + len(extra)} arguments by position, takes {', '.join(places)}; "
            f"{_BY_NAME}"
        )
    for word in unknown:
        lines.append(
            f"unknown argument {word}=; {_answer(word, known, {**_ELSEWHERE, **WORDS, **words})}"
        )
    lines.append(f"known: {', '.join(known)}")
    if "spec" not in known:
        lines[-1] += f"; spec is an argument of {spec_of}"
    return TypeError(f"{_name(function)}: " + "\n  ".join(lines))


def _answer(word: str, known: list[str], words: Mapping[str, str]) -> str:
    lower = {name.lower(): name for name in (*known, *words)}
    same = lower.get(word.lower())
    if same in known:
        return f"did you mean {same!r}?"
    if same is not None:
        return words[same]
    return nearest(word, known).partition("known: ")[0].strip() or (
        "pdcore has no such argument; spec says what is computed"
    )
