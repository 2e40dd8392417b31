"""The specification of an attention, and the grammar that it is written in.

An attention is a choice of kernel, normaliser, normalization, head scaling and support. Each
word of a spec string sets one of these axes; the order of words does not matter.

>>> spec = parse("bn + sh(1,1,2,2)")
>>> print(spec)
softmax+bn+sh(1,1,2,2)
>>> parse(str(spec)) == spec
True
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

from .errors import SpecError, UnsupportedError, nearest
from .heads import HeadScaling
from .kernels import Cosine, Exponential, Gaussian, Kernel, Parameter
from .normalization import Batch, Identity, Normalization
from .support import Support
from .vocabulary import find_kernel, find_normalization, kernel_words, normalization_words

__all__ = ["PRESETS", "AttentionSpec", "as_spec", "parse"]

NORMALISERS = ("sum", "count", "one")

#: Specs worth knowing by name, each with what it is.
PRESETS: Mapping[str, str] = {
    "softmax": "scaled dot-product attention",
    "linear": "linear attention, phi = elu + 1",
    "sparse(64,64)": "softmax over a window of positions",
    "bn": "Attention-BN: queries and keys batch-normalized by the key statistics",
    "sh(1,1,2,2)": "Attention-SH: four heads, two of them fitted on pairs of pooled keys",
    "bn+sh(1,1,2,2)": "Attention-BN+SH",
    "causal+bn(statistics=prefix)": "causal Attention-BN by prefix statistics",
}


@dataclass(frozen=True)
class AttentionSpec:
    """What an attention computes: frozen, hashable, picklable, holding scalars only.

    ``str(spec)`` is the canonical string, and ``parse(str(spec)) == spec``.

    Parameters
    ----------
    kernel : Kernel
        kappa(x, y); `Exponential` (softmax) by default.
    normaliser : {"sum", "count", "one"}
        h: the sum of kappa over the visible keys, their number, or 1.
    normalization : Normalization
        T(x); `Identity` by default.
    heads : HeadScaling
        The scale of each key head.
    support : Support
        Causal and window.

    Raises
    ------
    SpecError
        When an argument does not make sense.
    UnsupportedError
        When the combination is refused: statistics of the future under causal, prefix
        statistics with another kernel than the plain exponential, a signed kernel with
        ``h(sum)``, or windows of pooled keys wider than the support.
    """

    kernel: Kernel = field(default_factory=Exponential)
    normaliser: str = "sum"
    normalization: Normalization = field(default_factory=Identity)
    heads: HeadScaling = field(default_factory=HeadScaling)
    support: Support = field(default_factory=Support)

    def __post_init__(self) -> None:
        for name, base in (("kernel", Kernel), ("normalization", Normalization),
                           ("heads", HeadScaling), ("support", Support)):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, base):
                raise TypeError(
                    f"{name}: got {type(value).__name__}, expected pdcore.{base.__name__}"
                )
            _check_final(name, value)
            _check_scalars(value)
        if self.normaliser not in NORMALISERS:
            raise SpecError(
                f"h: got {self.normaliser!r}; {nearest(str(self.normaliser), NORMALISERS)}"
            )
        names = [p.name for p in self.parameters()]
        if len(set(names)) != len(names):
            raise SpecError(f"{self.kernel.word} and {self.normalization.word} declare a "
                            f"parameter of the same name: {names}")  # fmt: skip
        self._refuse()

    def _refuse(self) -> None:
        normalization, support = self.normalization, self.support
        if self.kernel.signed and self.normaliser == "sum":
            raise UnsupportedError(
                f"{self.kernel.word} may be negative, so its sum is no normaliser: "
                "add h(count) or h(one)"
            )
        if self.prefix and not self.plain_exponential:
            raise UnsupportedError(
                f"{normalization.word}(statistics=prefix) needs the exponential kernel without "
                f"softcap, where it folds into the query; got {_word(self.kernel)}"
            )
        if support.ahead == 0 and normalization.leaks:
            raise UnsupportedError(
                f"{_word(normalization)} takes statistics over keys that "
                f"{'causal' if support.causal else 'a window without keys ahead'} hides, so the "
                "future leaks: use statistics=prefix or statistics=running, or permit it with "
                "allow_leak=true"
            )
        if self.heads.largest > support.left + support.right + 1:
            raise UnsupportedError(
                f"sh: a window of {self.heads.largest} pooled keys never fits in "
                f"{_support_words(support)[-1]}: widen it, or use scales up to "
                f"{int(support.left + support.right + 1)}"
            )

    @property
    def plain_exponential(self) -> bool:
        """Whether the kernel is the exponential without softcap."""
        return isinstance(self.kernel, Exponential) and self.kernel.softcap is None

    @property
    def prefix(self) -> bool:
        """Whether every row has statistics of its own."""
        return isinstance(self.normalization, Batch) and self.normalization.statistics == "prefix"

    def parameters(self) -> tuple[Parameter, ...]:
        """List the arrays that a call must or may give in `params`."""
        return (*self.kernel.parameters(), *self.normalization.parameters())

    def __str__(self) -> str:
        words = [_word(self.kernel)]
        if self.normaliser != "sum":
            words.append(f"h({self.normaliser})")
        if not isinstance(self.normalization, Identity):
            words.append(_word(self.normalization))
        if self.heads.scales or self.heads.pool != "mean":
            inside = [str(s) for s in self.heads.scales]
            if self.heads.pool != "mean":
                inside.append(f"pool={self.heads.pool}")
            words.append(f"sh({','.join(inside)})")
        return "+".join([*words, *_support_words(self.support)])

    def latex(self) -> str:
        """Derive the attention: the primal problem, its dual, and the expansion, as LaTeX.

        Returns
        -------
        str
            An ``align*`` environment.
        """
        from .derivation import derive

        return derive(self)


def as_spec(spec: str | AttentionSpec) -> AttentionSpec:
    """Accept a spec or its string."""
    if isinstance(spec, AttentionSpec):
        return spec
    if isinstance(spec, str):
        return parse(spec)
    raise TypeError(
        f"spec: got {type(spec).__name__}, expected a string such as 'softmax+bn' or an "
        "AttentionSpec"
    )


_TOKEN = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?\s*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?\Z")
_AXES = {"sh": "head scaling", "scaling": "head scaling", "sparse": "window", "window": "window",
         "causal": "causal", "h": "normaliser"}  # fmt: skip


@lru_cache(maxsize=1024)
def parse(text: str) -> AttentionSpec:
    """Parse a spec string.

    Parameters
    ----------
    text : str
        Words joined by ``+``: a kernel, a normalization, ``sh(...)``, ``sparse(left,right)``,
        ``causal``, ``h(...)``.

    Raises
    ------
    SpecError
        On an unknown word (with the nearest known one), two words for one axis (naming both),
        or arguments that do not fit.
    UnsupportedError
        When the words make sense but not together; see `AttentionSpec`.

    Examples
    --------
    >>> parse("gaussian(gamma=0.3)+bn(beta=0.5)+sparse(64,inf)").kernel
    Gaussian(gamma=0.3)
    """
    chosen: dict[str, Any] = {}
    source: dict[str, str] = {}
    for word, arguments in _words(text):
        axis, value = _read(word, arguments)
        if axis in chosen:
            raise SpecError(f"{source[axis]!r} and {word!r} both set the {axis} of {text!r}")
        chosen[axis], source[axis] = value, word
    left, right = chosen.get("window", (math.inf, math.inf))
    return AttentionSpec(
        kernel=chosen.get("kernel", Exponential()),
        normaliser=chosen.get("normaliser", "sum"),
        normalization=chosen.get("normalization", Identity()),
        heads=chosen.get("head scaling", HeadScaling()),
        support=Support("causal" in chosen, left, right),
    )


def _words(text: str) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    at = 0
    while True:
        match = _TOKEN.match(text, at)
        if match is None or (match.end() < len(text) and text[match.end()] != "+"):
            where = match.end() if match else at
            rest = text[where : where + 12]
            raise SpecError(
                f"spec {text!r}: cannot read it at column {where + 1} ({rest!r}); "
                "expected words joined by '+', such as 'softmax+bn(beta=0.5)+causal'"
            )
        found.append((match[1], match[2]))
        if match.end() == len(text):
            return found
        at = match.end() + 1


def _read(word: str, arguments: str | None) -> tuple[str, Any]:
    axis = _AXES.get(word)
    if axis is None:
        kernel, normalization = find_kernel(word), find_normalization(word)
        if kernel is not None:
            return "kernel", _build(word, kernel, arguments)
        if normalization is not None:
            return "normalization", _build(word, normalization, arguments)
        known = {*_AXES, *kernel_words(), *normalization_words()}
        raise SpecError(f"unknown word {word!r}; {nearest(word, known)}")
    positional, named = _arguments(word, arguments)
    if axis == "causal":
        if arguments is not None:
            raise SpecError(f"causal takes no arguments, got ({arguments})")
        return axis, True
    if axis == "normaliser":
        if named or len(positional) != 1 or positional[0] not in NORMALISERS:
            raise SpecError(f"h({arguments or ''}): expected h(sum), h(count) or h(one)")
        return axis, positional[0]
    if axis == "window":
        bound = _bind(word, ("left", "right"), positional, named)
        if len(bound) != 2:
            raise SpecError(f"{word}({arguments or ''}): expected left and right, such as "
                            f"{word}(64,64) or {word}(64,inf)")  # fmt: skip
        return axis, (_bound(word, bound["left"]), _bound(word, bound["right"]))
    scales = named.pop("scales", None)
    if scales is not None:
        positional.insert(0, scales)
    pool = named.pop("pool", "mean")
    if named or not positional:
        raise SpecError(f"{word}({arguments or ''}): expected one scale per key head and at most "
                        f"pool=, such as {word}(1,1,2,2) or {word}(1,2,pool=first)")  # fmt: skip
    return axis, HeadScaling(tuple(positional), pool)


def _bound(word: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise SpecError(f"{word}: {value!r}, expected a whole number >= 0 or inf")
    return value


def _arguments(word: str, text: str | None) -> tuple[list[Any], dict[str, Any]]:
    positional: list[Any] = []
    named: dict[str, Any] = {}
    for part in (text or "").split(",") if text and text.strip() else ():
        name, equals, value = (p.strip() for p in part.partition("="))
        if not equals:
            if named:
                raise SpecError(f"{word}({text}): {part.strip()!r} follows a named argument")
            positional.append(_value(word, name))
        elif name in named:
            raise SpecError(f"{word}({text}): {name} is given twice")
        else:
            named[name] = _value(word, value)
    return positional, named


def _value(word: str, text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text == "inf":
        return math.inf
    if _NUMBER.match(text):
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    if text.isidentifier():
        return text
    raise SpecError(f"{word}: cannot read the argument {text!r}: expected a number, inf, true, "
                    "false or a name")  # fmt: skip


def _bind(word: str, names: tuple[str, ...], positional: list[Any],
          named: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
    if len(positional) > len(names):
        raise SpecError(f"{word}: got {len(positional)} arguments, takes {len(names)}"
                        f"{': ' + ', '.join(names) if names else ''}")  # fmt: skip
    bound = dict(zip(names, positional, strict=False))
    for name, value in named.items():
        if name not in names:
            raise SpecError(f"{word}: unknown argument {name!r}; {nearest(name, names)}")
        if name in bound:
            raise SpecError(f"{word}: {name} is given twice")
        bound[name] = value
    return bound


def _build(word: str, cls: type[Any], arguments: str | None) -> Any:
    positional, named = _arguments(word, arguments)
    declared = {f.name: f for f in fields(cls) if f.init}
    bound = _bind(word, tuple(declared), positional, named)
    for name, value in bound.items():
        bound[name] = _coerce(word, name, declared[name].type, value)
    try:
        return cls(**bound)
    except TypeError as error:
        raise SpecError(f"{word}({arguments or ''}): {error}") from error


_SCALARS = frozenset({"int", "float", "str", "bool", "None"})


def _coerce(word: str, name: str, annotation: Any, value: Any) -> Any:
    """Fit a value to a field's annotation: int, float, str, bool and unions of these.

    The annotation is a string or, in a module without postponed annotations, an object. One
    that says anything else is left to the class itself to check.
    """
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    optional = text.removeprefix("typing.").removeprefix("Optional[")
    kinds = {part.strip() for part in optional.removesuffix("]").split("|")}
    if not kinds <= _SCALARS:
        return value
    if type(value) is int and "int" not in kinds and "float" in kinds:
        return float(value)
    if type(value).__name__ in kinds:
        return value
    raise SpecError(f"{word}: {name} is {value!r}, expected {text}")


#: Lowering knows these by their class, and would not call what a subclass overrides.
_FINAL = (Exponential, Gaussian, Cosine, Batch, Identity)


def _check_final(name: str, part: Any) -> None:
    for cls in _FINAL:
        if isinstance(part, cls) and type(part) is not cls:
            base = "Normalization" if name == "normalization" else "PointwiseKernel or FeatureMap"
            raise TypeError(f"{name}: {type(part).__name__} is a subclass of {cls.__name__}, whose "
                            f"formula is fixed; subclass {base} instead")  # fmt: skip


def _check_scalars(part: Any) -> None:
    """Refuse arrays and other objects in fields, which would break hashing and printing."""
    for f in fields(part):
        value = getattr(part, f.name)
        values = value if isinstance(value, tuple) else (value,)
        for v in values:
            if not (v is None or type(v) in (bool, int, float, str)):
                raise TypeError(
                    f"{type(part).__name__}.{f.name}: got {type(v).__name__}, expected a plain "
                    "number or name (arrays go in params)"
                )


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() and abs(value) < 1e16 else repr(value)
    return str(value)


def _word(part: Any) -> str:
    given = [f"{f.name}={_text(getattr(part, f.name))}" for f in fields(part)
             if getattr(part, f.name) != f.default]  # fmt: skip
    return f"{part.word}({','.join(given)})" if given else part.word


def _support_words(support: Support) -> list[str]:
    words = ["causal"] if support.causal else []
    if support.left != math.inf or support.right != math.inf:
        words.append(f"sparse({_text(support.left)},{_text(support.right)})")
    return words
