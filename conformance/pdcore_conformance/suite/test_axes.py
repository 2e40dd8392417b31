"""Every value of every axis, alone and with every value of every other axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from pdcore.errors import SpecError, UnsupportedError

from ..judge import user_axes
from ..judge.calls import Call
from ..judge.judging import DTYPES, full, judged

#: The axes, with the values that are not the default. Strings are words of the spec; mappings are
#: arguments of the call.
AXES: Mapping[str, tuple[Any, ...]] = {
    "kernel": (
        "softmax(softcap=2)",
        "gaussian(gamma=0.3)",
        "cosine(scale=2)",
        "polynomial",
        "linear",
        "relu",
        "random_features(count=16)",
        "conformance_logistic",
        "conformance_square",
    ),
    "normalization": (
        "bn",
        "bn(beta=0.5)",
        "bn(beta=param)",
        "bn(statistics=batch)",
        "bn(statistics=running)",
        # The variance of one key is 0, and a larger eps keeps the logits within float32.
        "bn(eps=0.1,statistics=prefix)",
        "conformance_centred",
        "iebn",
        # With few keys a component may have one key.
        "mixture(eps=0.1)",
    ),
    "normaliser": ("h(count)", "h(one)"),
    "heads": ("sh(1,2)", "sh(2,3,pool=first)"),
    "support": ("causal", "sparse(3,2)", "causal+sparse(4,inf)"),
    "key_mask": ({"key_mask": "right"}, {"key_mask": "holes"}),
    "mask": ({"mask": "random"},),
    "bias": ({"bias": "full"},),
    "offset": ({"offset": 2}, {"offset": "array"}, {"offset": "sequence"}, {"offset": "end"}),
    "groups": ({"heads": 4},),
}


def build_call(values: tuple[Any, ...], **more: Any) -> Call | None:
    """Return a call with these values, or None where they cannot be combined."""
    words = [value for value in values if isinstance(value, str)]
    changes = {n: x for value in values if not isinstance(value, str) for n, x in value.items()}
    for leak in ("", "allow_leak=true"):
        spec = "+".join(_leaking(word) if leak else word for word in words) or "softmax"
        call = Call(spec=spec, rows=10, keys=11, **changes, **more)
        try:
            parsed = call.parsed
        except UnsupportedError:
            continue
        except SpecError:
            return None
        if parsed.prefix and parsed.normaliser != "sum" and not parsed.support.causal:
            # The prefix statistics of one key put later keys many deviations away: kappa overflows.
            return None
        if call.bias and (not parsed.kernel.has_log or parsed.heads.largest > 1):
            return None
        return call
    return None


def _leaking(word: str) -> str:
    if not word.startswith(("bn", "conformance_centred", "iebn", "mixture")):
        return word
    return f"{word[:-1]},allow_leak=true)" if word.endswith(")") else f"{word}(allow_leak=true)"


def pairs(**more: Any) -> Iterator[Call]:
    """Yield a call for each pair of values of two axes."""
    for one, other in combinations(AXES.values(), 2):
        for a in one:
            for b in other:
                call = build_call((a, b), **more)
                if call is not None:
                    yield call


user_axes.register()
SINGLE = [value for values in AXES.values() for value in values]

test_one = judged(
    "One axis at a time, in every dtype.",
    *(call for dtype in DTYPES for value in SINGLE if (call := build_call((value,), dtype=dtype))),
)
test_pair = judged(
    "Every pair of values of two axes.",
    *pairs(),
    *(full(call) for dtype in DTYPES[1:] for call in pairs(dtype=dtype)),
)
test_gradient_of_one = judged(
    "Gradients, one axis at a time.",
    *(
        call
        for dtype in ("float32", "float64")
        for value in SINGLE
        if (call := build_call((value,), dtype=dtype))
    ),
    through="vjp",
)
test_gradient_of_pair = judged(
    "Gradients of every pair of values of two axes.", *pairs(), through="vjp"
)
test_autodiff_of_pair = judged(
    "Gradients of every pair by the framework's automatic differentiation.",
    *pairs(),
    through="autodiff",
)
