"""Generate calls that combine the values of all axes: every pair, and triples that share a kernel.

A covering array has every pair of values of two axes in some row, in far fewer rows than there are
pairs. The rows are built greedily, in an order that a seed decides: a row starts as a combination
that no earlier row has, and each further axis takes the value that adds most new combinations.
Libraries that build covering arrays want the forbidden combinations as formulas; here a
combination is allowed where its spec parses and the backend declares what the call needs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations, product
from typing import Any

from pdcore.errors import SpecError, UnsupportedError

from .calls import Call

__all__ = ["AXES", "TRIPLES", "Combinations", "Row", "Target", "build_call", "covering"]

FOUR = {"heads": 4, "key_heads": 4}

#: The axes, with the values that are not the default. Strings are words of the spec, other values
#: change fields of the call, or add a `word` too; `through` is the way of `Subject.judge`.
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
        # With few keys a component may have one key, and its variance no digit.
        {"word": "mixture(eps=0.1)", "keys": 40},
    ),
    "terms": ("alibi", "relative(3)", "labels(3)"),
    "normaliser": ("h(count)", "h(one)", "h(sum,sink=param)"),
    "scales": ("sh(1,2)", "sh(2,3,pool=first)", {"word": "sh(1,1,2,2)", **FOUR}),
    "support": ("causal", "sparse(3,2)", "causal+sparse(4,inf)"),
    "key_mask": tuple({"key_mask": how} for how in ("right", "left", "holes")),
    "mask": tuple(
        {"mask": how}
        for how in ("random", "keys", "heads", "sequences", "rows", "strided", "empty")
    ),
    "bias": tuple(
        {"bias": how}
        for how in ("full", "keys", "rows", "heads", "batch", "sequences", "strided", "inf")
    ),
    "offset": ({"offset": 2}, {"offset": "array"}, {"offset": "sequence"}, {"offset": "end"}),
    "groups": ({"heads": 8}, {"heads": 8, "key_heads": 1}, {"heads": 8, "key_heads": 4}),
    "dtype": ({"dtype": "float64"}, {"dtype": "float16"}, {"dtype": "bfloat16"}),
    "lead": ({"lead": ()}, {"lead": (9,)}, {"lead": (1, 2)}),
    "lengths": (
        {"rows": 1, "keys": 70},
        {"rows": 65, "keys": 33, "dim": 17, "value_dim": 16},
        {"rows": 9, "keys": 129, "dim": 64, "value_dim": 64},
    ),
    "layout": tuple({"layout": how} for how in ("transposed", "sliced", "packed", "readonly")),
    "through": ({"through": "vjp"}, {"through": "autodiff"}, {"through": "weights"}),
}

#: Axes that meet in one kernel, of which every triple of values is tried.
TRIPLES: tuple[tuple[str, str, str], ...] = (
    ("kernel", "normalization", "through"),
    ("kernel", "support", "through"),
    ("dtype", "support", "groups"),
    ("dtype", "support", "scales"),
    ("normalization", "scales", "support"),
    ("mask", "bias", "through"),
    ("support", "lengths", "through"),
    ("groups", "scales", "through"),
)

#: The axes whose values are combined.
GROUPS: tuple[tuple[str, ...], ...] = (*combinations(AXES, 2), *TRIPLES)
_GROUPS_OF = {axis: [group for group in GROUPS if axis in group] for axis in AXES}

#: A combination: for some axes, the index of a value; 0 is the default.
Target = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Row:
    """A call that has one value of every axis.

    Attributes
    ----------
    call : Call
    through : str
        The way of `Subject.judge`.
    values : mapping of str to int
        For each axis the index of its value; 0 is the default.
    """

    call: Call
    through: str
    values: Mapping[str, int]

    def has(self, target: Target) -> bool:
        """Return whether the row has all values of a combination."""
        return all(self.values[axis] == index for axis, index in target)


class Combinations:
    """The rows that cover the pairs and triples of the values that a backend declares.

    Parameters
    ----------
    features : collection of str
        What the calls may need, see `pdcore.backend.FEATURES`.
    seed : int
        Decides the rows, and the order in which they are built.
    """

    def __init__(self, features: frozenset[str], seed: int = 0) -> None:
        self.features, self.seed = features, seed
        self._allowed: dict[Target, bool] = {}

    @cached_property
    def targets(self) -> list[Target]:
        """The pairs and triples that are allowed."""
        indices = {axis: range(len(values) + 1) for axis, values in AXES.items()}
        every = (
            tuple(zip(group, values, strict=True))
            for group in GROUPS
            for values in product(*(indices[axis] for axis in group))
        )
        return [target for target in every if self._allows(target)]

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of the covering array."""
        rng = random.Random(self.seed)
        left = dict.fromkeys(rng.sample(self.targets, len(self.targets)))
        rows = []
        while left:
            row = self._row(next(iter(left)), left, rng)
            rows.append(row)
            for target in _targets_of(row.values):
                left.pop(target, None)
        return rows

    def covered(self, rows: Sequence[Row]) -> tuple[int, int, int, int]:
        """Count what some rows cover.

        Returns
        -------
        pairs, of pairs, triples, of triples : int
        """
        seen = {target for row in rows for target in _targets_of(row.values)}
        pairs = [target in seen for target in self.targets if len(target) == 2]
        triples = [target in seen for target in self.targets if len(target) == 3]
        return sum(pairs), len(pairs), sum(triples), len(triples)

    def _row(self, first: Target, left: Mapping[Target, None], rng: random.Random) -> Row:
        values = dict(first)
        axes = [axis for axis in AXES if axis not in values]
        for axis in rng.sample(axes, len(axes)):
            indices = rng.sample(range(len(AXES[axis]) + 1), len(AXES[axis]) + 1)
            indices.sort(key=lambda i: -_gain(values, (axis, i), left))
            values[axis] = next(i for i in indices if self._allows((*values.items(), (axis, i))))
        built = _build(tuple(values.items()))
        assert built is not None
        return Row(*built, values)

    def _allows(self, target: Target) -> bool:
        key = tuple(sorted((axis, i) for axis, i in target if i))
        if key not in self._allowed:
            self._allowed[key] = self._declared(key)
        return self._allowed[key]

    def _declared(self, target: Target) -> bool:
        built = _build(target)
        if built is None:
            return False
        call, through = built
        return self.features.issuperset(call.needs(through))


@cache
def covering(features: frozenset[str], seed: int = 0) -> Combinations:
    """Return `Combinations`, built once for all runs in a process."""
    return Combinations(features, seed)


def _build(target: Target) -> tuple[Call, str] | None:
    """Return the call with these values and the way to run it, None where there is none."""
    chosen = dict(target)
    # In the order of AXES: the groups of heads come after the scales, and change their heads.
    values = [AXES[axis][i - 1] for axis in AXES if (i := chosen.get(axis, 0))]
    through = "forward"
    changes = []
    for value in values:
        if isinstance(value, Mapping) and "through" in value:
            through = value["through"]
        else:
            changes.append(value)
    call = build_call(tuple(changes))
    return None if call is None else (call, through)


def build_call(values: tuple[Any, ...], **more: Any) -> Call | None:
    """Return a call with these values, or None where they cannot be combined."""
    entries = [{"word": value} if isinstance(value, str) else value for value in values]
    words = [entry["word"] for entry in entries if "word" in entry]
    changes = {n: x for entry in entries for n, x in entry.items() if n != "word"}
    for leak in ("", "allow_leak=true"):
        spec = "+".join(_leaking(word) if leak else word for word in words) or "softmax"
        call = Call(**{"rows": 10, "keys": 11} | {"spec": spec} | changes | more)
        try:
            parsed = call.parsed
        except UnsupportedError:
            continue
        except SpecError:
            return None
        return call if _makes_sense(call, parsed) else None
    return None


def _makes_sense(call: Call, parsed: Any) -> bool:
    """Return whether a call is valid, and computable without overflow."""
    if parsed.prefix and parsed.normaliser != "sum" and not parsed.support.causal:
        # The prefix statistics of one key put later keys many deviations away: kappa overflows.
        return False
    if parsed.normalization.word == "mixture" and call.keys // max(1, parsed.heads.largest) < 12:
        return False
    if call.bias and (not parsed.kernel.has_log or parsed.heads.largest > 1):
        return False
    return len(parsed.heads.scales) in (0, call.key_heads)


def _leaking(word: str) -> str:
    if not word.startswith(("bn", "conformance_centred", "iebn", "mixture")):
        return word
    return f"{word[:-1]},allow_leak=true)" if word.endswith(")") else f"{word}(allow_leak=true)"


def _targets_of(values: Mapping[str, int]) -> Iterator[Target]:
    for group in GROUPS:
        yield tuple((axis, values[axis]) for axis in group)


def _gain(values: Mapping[str, int], new: tuple[str, int], left: Mapping[Target, None]) -> int:
    """Count the combinations that a further value adds to those of a row."""
    more = dict(values) | {new[0]: new[1]}
    groups = (group for group in _GROUPS_OF[new[0]] if all(axis in more for axis in group))
    return sum(tuple((axis, more[axis]) for axis in group) in left for group in groups)
