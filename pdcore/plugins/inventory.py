"""Backends, presets and the words of a spec as plain values, for listings."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import Any

from ..backend import FEATURES
from ..errors import NoBackendError
from ..spec import PRESETS, as_spec, kernel_words, normalization_words
from . import registry as plugins

__all__ = ["list_backends", "list_words", "summary"]


def list_backends() -> list[dict[str, Any]]:
    """Return a description of every backend, including those that are not available.

    Backends that run only where the caller names them are left out.

    Returns
    -------
    list of dict
        ``name``, ``available``, ``reason`` (None where available), ``library``, ``versions``,
        ``devices``, ``priority`` and ``capabilities`` by feature. For a broken or disabled
        plugin, only name and reason are known. Available backends are loaded, since `versions`
        is a method of the backend.
    """
    backends = []
    for name, info in plugins.registered().items():
        if info.only_if_named:
            continue
        reason, versions = plugins.unavailable_reason(info), {}
        if reason is None:
            try:
                versions = plugins.load_backend(name).versions()
            except NoBackendError as error:
                reason = "; ".join(error.reasons.get(name, [str(error)]))
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # noqa: BLE001 - one defect must not hide the others
                text = " ".join(str(error).split())
                reason = f"its versions() raised {type(error).__name__}: {text}"
        backends.append(
            _backend(
                name,
                reason,
                library=info.library,
                versions=versions,
                devices=list(info.devices),
                priority=info.priority,
                capabilities={feature: info.support(feature) for feature in FEATURES},
            )
        )
    failures = {n: f"failed to load: {failure}" for n, failure in list(plugins.broken.items())}
    return backends + [_backend(n, why) for n, why in {**failures, **plugins.disabled}.items()]


def _backend(name: str, reason: str | None, **known: Any) -> dict[str, Any]:
    unknown: dict[str, Any] = {
        "library": None,
        "versions": {},
        "devices": [],
        "priority": None,
        "capabilities": {},
    }
    return {"name": name, "available": reason is None, "reason": reason, **unknown, **known}


#: The words of the other axes than kernel and normalization, with their arguments.
_OTHERS: list[tuple[str, list[str], str, str, list[Any]]] = [
    (
        "sh",
        ["scaling"],
        "head scaling",
        "each key head fitted on keys pooled over windows of its own scale",
        [
            ("scales", "one whole number >= 1 per key head, 2*16 for sixteen 2s", True, None),
            ("pool", "mean or first", False, "mean"),
            ("half", "in place of scales, that of the last half of the key heads", False, None),
        ],
    ),
    ("alibi", [], "terms", "a term -m |p_j - p_i| of log kappa, m for each query head", []),
    (
        "relative",
        [],
        "terms",
        "a term of log kappa for each distance, from a table for each query head",
        [("reach", "the largest distance with an entry of its own, a whole number", True, None)],
    ),
    (
        "labels",
        [],
        "terms",
        "a term of log kappa for each pair of labels of query and key, from a table",
        [("count", "the number of labels, a whole number >= 1", True, None)],
    ),
    ("causal", [], "support", "keys at positions up to the query's only", []),
    (
        "sparse",
        ["window"],
        "support",
        "a window of positions around the query's",
        [
            ("left", "a whole number >= 0, or inf", True, None),
            ("right", "a whole number >= 0, or inf", True, None),
        ],
    ),
    (
        "h",
        [],
        "normaliser",
        "what the weighted sum is divided by",
        [
            ("normaliser", "sum, count or one", True, None),
            ("sink", "a finite number or param, with sum", False, None),
        ],
    ),
]


def list_words() -> dict[str, list[dict[str, Any]]]:
    """Return a description of the presets and of the words of the grammar.

    Returns
    -------
    dict
        ``presets``: ``name``, ``spec`` (canonical) and ``meaning``. ``words``: ``word``,
        ``aliases``, ``axis``, ``meaning`` and ``arguments``: ``name``, ``expects``,
        ``required`` and ``default``; None where a spec without the argument has no value for it.
    """
    presets = [
        {"name": name, "spec": str(as_spec(name)), "meaning": meaning}
        for name, meaning in PRESETS.items()
    ]
    words = []
    axes: dict[str, dict[str, Any]] = {
        "kernel": dict(kernel_words()),
        "normalization": dict(normalization_words()),
    }
    for axis, table in axes.items():
        for cls in dict.fromkeys(table.values()):
            words.append(
                _word(cls.word, list(cls.aliases), axis, summary(cls), list(_arguments(cls)))
            )
    words += [_word(*other) for other in _OTHERS]
    return {"presets": presets, "words": words}


def _word(
    word: str, aliases: list[str], axis: str, meaning: str, arguments: list[Any]
) -> dict[str, Any]:
    return {
        "word": word,
        "aliases": aliases,
        "axis": axis,
        "meaning": meaning,
        "arguments": [
            dict(zip(("name", "expects", "required", "default"), argument, strict=True))
            for argument in arguments
        ],
    }


def summary(cls: type[Any]) -> str:
    """Return the first paragraph of a class's docstring, in one line without the full stop."""
    text = inspect.getdoc(cls) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    # A dataclass without a docstring gets its signature as the docstring, which is no summary.
    return "" if paragraph.startswith(f"{cls.__name__}(") else paragraph.rstrip(".")


def _arguments(cls: type[Any]) -> Any:
    for field in fields(cls):
        if field.init:
            kinds = [kind.strip() for kind in str(field.type).split("|")]
            expects = " or ".join(kind for kind in kinds if kind != "None")
            required = field.default is MISSING
            yield field.name, expects, required, None if required else field.default
