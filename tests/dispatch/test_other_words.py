"""Arguments of other libraries' attentions: answered with pdcore's words, and with ``spec``."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore.dispatch.arguments import WORDS
from pdcore.errors import nearest

X = np.ones((1, 2, 3, 4), np.float32)
ARRAYS = (X, X, X)
MASK = np.ones((3, 3), bool)
CALLS = {
    "attention": pdcore.attention,
    "attention_vjp": pdcore.attention_vjp,
    "attention_weights": pdcore.attention_weights,
    "explain": pdcore.explain,
    "BoundAttention": pdcore.bind(),
}

#: The arguments of attentions that people use, and what the answer has to say.
OTHERS = {
    "torch SDPA": {
        "attn_mask": ("mask=", "True where a query may attend", "bias="),
        "dropout_p": ("dropout=",),
        "is_causal": ('spec="causal"',),
        "scale": ('spec="softmax(scale=...)"',),
        "enable_gqa": ("grouped by the shapes",),
    },
    "nn.MultiheadAttention": {
        "key_padding_mask": ("key_mask=", "inverse", "~key_padding_mask"),
        "need_weights": ("attention_weights",),
        "average_attn_weights": ("attention_weights",),
    },
    "jax.nn": {
        "query_seq_lengths": ("key_mask=",),
        "local_window_size": ("sparse(left,right)",),
        "implementation": ("backend=",),
        "return_residual": ("return_lse=True",),
    },
    "keras": {
        "flash_attention": ("backend=",),
        "attn_logits_soft_cap": ("softmax(softcap=...)",),
        "use_causal_mask": ("causal",),
    },
    "flash-attn": {
        "softmax_scale": ("softmax(scale=...)",),
        "causal": ('spec="causal"',),
        "window_size": ("sparse(left,right)",),
        "softcap": ("softmax(softcap=...)",),
        "alibi_slopes": ('spec="alibi"', "slopes"),
        "deterministic": ("leave it out",),
        "return_attn_probs": ("return_lse=True",),
        "cu_seqlens_q": ("segments=", "segments_from_cu_seqlens"),
    },
    "flax": {
        "dropout_rate": ("dropout=",),
        "dropout_rng": ("leave it out",),
        "broadcast_dropout": ("leave it out",),
        "precision": ("cast",),
    },
    "others": {
        "qkv_format": ("layout=",),
        "score_mod": ("bias=",),
        "mask_mod": ("mask=",),
        "q_offset": ("offset=",),
        "num_heads": ("shapes",),
        "kernel": ("spec",),
    },
}
EACH = [(word, says) for words in OTHERS.values() for word, says in words.items()]


def refused(call: Any, *args: Any, **given: Any) -> str:
    with pytest.raises(TypeError) as caught:
        call(*args, **given)
    return str(caught.value)


@pytest.mark.parametrize(("word", "says"), EACH, ids=[word for word, _ in EACH])
@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_another_library(name: str, word: str, says: tuple[str, ...]) -> None:
    text = refused(CALLS[name], *ARRAYS, **{word: 1})
    assert text.startswith(f"{name}: unknown argument {word}=; {WORDS[word]}")
    for part in (*says, "spec"):
        assert part in text, text


@pytest.mark.parametrize("name", CALLS)
def test_query_key_and_value_are_q_k_and_v(name: str) -> None:
    text = refused(CALLS[name], query=X, key=X, value=X)
    assert "unknown argument query=; use q=" in text
    assert "unknown argument key=; use k=" in text
    assert "unknown argument value=; use v=" in text
    assert "did you mean 'q'?" in refused(CALLS[name], Q=X, k=X, v=X)


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_array(name: str) -> None:
    assert "missing v: q, k and v are required" in refused(CALLS[name], X, X)
    assert "missing q and k" in refused(CALLS[name], v=X)


@pytest.mark.parametrize("name", CALLS)
def test_arguments_by_position(name: str) -> None:
    # scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal)
    text = refused(CALLS[name], *ARRAYS, MASK, 0.0, True)
    assert "got" in text
    assert "arguments by position, takes q, k, v" in text
    assert "mask=" in text
    assert "spec" in text
    text = refused(CALLS[name], *ARRAYS, MASK)
    assert "spec" in text
    assert "mask=" in text


@pytest.mark.parametrize("name", [*CALLS, "bind"])
def test_an_argument_by_position_and_by_name(name: str) -> None:
    if name in ("BoundAttention", "bind"):
        call, given = (pdcore.bind, ("bn",)) if name == "bind" else (CALLS[name], ARRAYS)
        word = "spec" if name == "bind" else "q"
        text = refused(call, *given, **{word: "bn"})
    else:
        # attention(query, key, value, attn_mask), with the spec by name
        text = refused(CALLS[name], *ARRAYS, MASK, spec="bn")
        assert "takes q, k, v, spec by position; pass a mask as mask=" in text
        word = "spec"
        assert "got q twice" in refused(CALLS[name], *ARRAYS, q=X)
    kind = "str" if name == "bind" else "ndarray"
    assert text.startswith(f"{name}: got {word} twice, by position ({kind}) and by name; takes ")


@pytest.mark.parametrize("word", ["layout", "device", "backend", "return_lse", "axis_name"])
@pytest.mark.parametrize("name", CALLS)
def test_an_array_in_the_place_of_an_option(name: str, word: str) -> None:
    call = CALLS[name]
    if word in inspect.signature(call).parameters:
        text = refused(call, *ARRAYS, **{word: X})
        assert text.startswith(word)
        assert "got ndarray, expected " in text
        assert len(text) < 120


def test_what_is_no_spec() -> None:
    assert "an array is passed by name: mask=" in refused(pdcore.attention, *ARRAYS, MASK)
    assert "spec: got ndarray" in refused(pdcore.bind, X)
    assert "spec='causal'" in refused(pdcore.attention, *ARRAYS, True)


def test_bind_answers_too() -> None:
    assert 'spec="causal"' in refused(pdcore.bind, is_causal=True)
    assert "belongs to the call of what bind returns" in refused(pdcore.bind, "bn", mask=MASK)
    assert "got 2 arguments by position, takes spec" in refused(pdcore.bind, "bn", "numpy")


def test_arguments_of_another_public_call() -> None:
    bound = pdcore.bind()
    assert "it is an argument of bind" in refused(bound, *ARRAYS, spec="bn")
    assert "it is an argument of bind" in refused(bound, *ARRAYS, backend="numpy")
    assert "attention_vjp returns lse" in refused(pdcore.attention_vjp, *ARRAYS, return_lse=True)
    assert "explain and a bound spec take it" in refused(
        pdcore.attention_weights, *ARRAYS, dropout=0.1
    )


def test_a_misspelt_argument_and_one_that_is_nothing() -> None:
    assert "unknown argument biass=; did you mean 'bias'?" in refused(
        pdcore.attention, *ARRAYS, biass=X
    )
    assert "did you mean 'key_mask'?" in refused(pdcore.attention, *ARRAYS, Key_Mask=MASK)
    text = refused(pdcore.attention, *ARRAYS, zzz=1)
    assert "did you mean" not in text
    assert "spec" in text


@pytest.mark.parametrize("name", [*CALLS, "bind"])
def test_the_signature_is_what_is_meant(name: str) -> None:
    parameters = inspect.signature({**CALLS, "bind": pdcore.bind}[name]).parameters
    assert not {"extra", "unknown"} & parameters.keys()
    for required in "qkv" if name != "bind" else "":
        assert parameters[required].default is inspect.Parameter.empty


def test_no_answer_is_about_an_argument_that_exists() -> None:
    for name, call in CALLS.items():
        assert not WORDS.keys() & inspect.signature(call).parameters.keys(), name


# --- the nearest word -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("Softmax", "softmax"),
        ("BN", "bn"),
        ("SH", "sh"),
        ("sotfmax", "softmax"),
        ("Causl", "causal"),
    ],
)
def test_a_near_word_is_suggested(word: str, meant: str) -> None:
    with pytest.raises(pdcore.SpecError, match=f"did you mean '{meant}'"):
        pdcore.parse(word)


@pytest.mark.parametrize("word", ["Q", "zzz", "flash"])
def test_nothing_is_suggested_where_nothing_is_near(word: str) -> None:
    with pytest.raises(pdcore.SpecError, match="known: ") as caught:
        pdcore.parse(word)
    assert "did you mean" not in str(caught.value)


def test_case_comes_first() -> None:
    assert nearest("Q", ["k", "q", "qq", "v"]).startswith("did you mean 'q'?")
    assert nearest("x", []) == "known: (none)"


# --- masks of other kinds -------------------------------------------------------------------------


def test_masks_that_are_no_bool() -> None:
    floating = np.zeros((3, 3), np.float32)
    assert "go in bias=" in refused(pdcore.attention, *ARRAYS, mask=floating)
    assert "mask != 0" in refused(pdcore.attention, *ARRAYS, mask=floating.astype(np.int64))
    text = refused(pdcore.attention, *ARRAYS, key_mask=np.ones((1, 3), np.int64))
    assert "True for a real key" in text
    assert "key_mask != 0" in text
