"""The words of a spec: kernels and normalizations by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

from ..errors import PluginError
from . import kernels as _kernels
from .kernels import Kernel
from .normalizations.base import Identity, Normalization
from .normalizations.batch import Batch

__all__ = ["find_kernel", "find_normalization", "register_kernel", "register_normalization"]

# Words of the other axes, which a kernel or normalization cannot have.
RESERVED = frozenset(
    {"sh", "scaling", "sparse", "window", "causal", "h", "alibi", "relative", "labels"}
)

_KERNELS: dict[str, type[Kernel]] = {}
_NORMALIZATIONS: dict[str, type[Normalization]] = {}
_changes = 0

#: Functions that register further words; called before a word is declared unknown.
sources: list[Callable[[], None]] = []

_T = TypeVar("_T", type[Kernel], type[Normalization])


def register_kernel(kernel: type[Kernel]) -> type[Kernel]:
    """Add a kernel class to the grammar; usable as a decorator.

    Raises
    ------
    PluginError
        When its word is missing or taken.
    """
    return _register(kernel, Kernel, _KERNELS)


def register_normalization(normalization: type[Normalization]) -> type[Normalization]:
    """Add a normalization class to the grammar; usable as a decorator.

    Raises
    ------
    PluginError
        When its word is missing or taken.
    """
    return _register(normalization, Normalization, _NORMALIZATIONS)


def unregister(word: str) -> None:
    """Remove a class that `register_kernel` or `register_normalization` added, by its word."""
    for table in (_KERNELS, _NORMALIZATIONS):
        cls = table.get(word)
        for name in (cls.word, *cls.aliases) if cls else ():
            table.pop(name, None)
    _clear_parse_cache()


def find_kernel(word: str) -> type[Kernel] | None:
    """Return a kernel class by word or alias, None if unknown; plugins are discovered if needed."""
    return _KERNELS.get(word) or _find_after_discovery(_KERNELS, word)


def find_normalization(word: str) -> type[Normalization] | None:
    """Return a normalization class by word or alias, None if unknown; as `find_kernel` does."""
    return _NORMALIZATIONS.get(word) or _find_after_discovery(_NORMALIZATIONS, word)


def kernel_words() -> dict[str, type[Kernel]]:
    """Return every kernel class by each of its words, including those of plugins."""
    _find_after_discovery(_KERNELS, "")
    return dict(_KERNELS)


def normalization_words() -> dict[str, type[Normalization]]:
    """Return every normalization class by each of its words, including those of plugins."""
    _find_after_discovery(_NORMALIZATIONS, "")
    return dict(_NORMALIZATIONS)


def _find_after_discovery(table: dict[str, _T], word: str) -> _T | None:
    for discover in sources:
        discover()
    return table.get(word)


def _register(cls: _T, base: type, table: dict[str, _T]) -> _T:
    candidate: object = cls  # a plugin may pass an object of any type
    name = getattr(cls, "__qualname__", repr(cls))
    if not (isinstance(candidate, type) and issubclass(candidate, base)):
        raise PluginError(f"{name}: expected a subclass of pdcore.{base.__name__}")
    words = (getattr(cls, "word", ""), *cls.aliases)
    for word in words:
        if not isinstance(word, str) or not word.isidentifier():
            raise PluginError(f"{name}: its word is {word!r}, expected an identifier")
        taken = _KERNELS.get(word) or _NORMALIZATIONS.get(word)
        if taken is not None and _again(taken, cls):
            unregister(word)
            taken = None
        if word in RESERVED or (taken is not None and taken is not cls):
            owner = f"{taken.__module__}.{taken.__qualname__}" if taken else "the grammar"
            raise PluginError(f"{name}: the word {word!r} is taken by {owner}")
    if not getattr(getattr(cls, "__dataclass_params__", None), "frozen", False):
        raise PluginError(f"{name}: expected a frozen dataclass, so that specs can be hashed")
    for word in words:
        table[word] = cls
    _clear_parse_cache()
    return cls


def _again(old: type, new: type) -> bool:
    """Return whether a class is made by `score_kernel` of a function that is defined anew."""
    function = getattr(new, "of_function", False) and getattr(old, "of_function", False)
    return bool(function) and (old.__module__, old.__qualname__) == (
        new.__module__,
        new.__qualname__,
    )


def changes() -> int:
    """Return how often words were added or removed: a key of caches that hold parsed specs."""
    return _changes


def _clear_parse_cache() -> None:
    global _changes
    _changes += 1
    # A cached spec may hold the class that a word named before.
    spec = sys.modules.get("pdcore.spec.attention_spec")
    if spec is not None and hasattr(spec, "parse"):
        spec.parse.cache_clear()


for _name in ("Cosine", "Elu", "Exponential", "Gaussian", "Polynomial", "RandomFeatures", "Relu"):
    register_kernel(getattr(_kernels, _name))
for _class in (Batch, Identity):
    register_normalization(_class)
