"""The CUDA C++ source of a contraction by scores, with log kappa compiled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib.resources import files

from pdcore.extend import PLACES, Expression, Scores

__all__ = [
    "COLUMNS",
    "HALVES",
    "STORED",
    "Program",
    "columns_for",
    "memory",
    "read",
    "scalar_of",
    "tile",
    "type_of",
]

#: Columns of a result that a block holds in registers; a result with more takes several blocks.
COLUMNS = (32, 64, 128, 256)

_SIGNATURE = "(scalar s, scalar scale, const scalar* values, const Place& at)"
_PLACE = """
// What log kappa reads of a row and a key beside their inner product.
struct Place {
  scalar distance, query_label, key_label;
  const scalar* tables;

  // The entry of a table (n, m) that begins at `first`; indices beyond the ends are those of ends.
  DEVICE_MEMBER scalar entry(int first, int n, int m, scalar i, scalar j) const {
    return tables[first + bounded(i, n) * m + bounded(j, m)];
  }
  DEVICE_MEMBER static int bounded(scalar x, int size) {
    return x < 1 ? 0 : x < size ? int(x) : size - 1;
  }
};"""
_FEATURES = ("scores_vjp.cu", "features.cuh")
_MMA = ("groups.cuh", "mma_tiles.cuh", "scores_mma.cu")
_FILES = {
    "scores_forward": ("groups.cuh", "scores.cu"),
    "scores_rows": ("scores_vjp.cu",),
    "scores_keys": ("scores_vjp.cu",),
    "scores_bias": ("scores_vjp.cu", "scores_bias.cu"),
    "scores_delta": ("scores_delta.cu",),
    "scores_mma": _MMA,
    "scores_mma_rows": (*_MMA, "scores_mma_vjp.cu"),
    "scores_mma_keys": (*_MMA, "scores_mma_vjp.cu"),
    "features_highest": (*_FEATURES, "features_highest.cu"),
    "features_states": (*_FEATURES, "features.cu"),
    "features_scan": (*_FEATURES, "features.cu"),
    "features_forward": (*_FEATURES, "features.cu"),
    "features_rows": (*_FEATURES, "features_vjp.cu"),
    "features_keys": (*_FEATURES, "features_vjp.cu"),
}
#: The arrays whose type may differ from that of sums; it is ``q_type`` of the kernels for q.
STORED = ("q", "k", "v", "bias", "out", "d_out", "d_bias")
#: The CUDA C++ types of 16-bit arrays.
HALVES = {"float16": "ptx::f16", "bfloat16": "ptx::bf16"}


@dataclass(frozen=True)
class Program:
    """The program of a contraction by scores; with the name of a kernel it gives the source.

    Attributes
    ----------
    scalar : {"float", "double"}
        The CUDA C++ type of every sum, and of every array except `stored`.
    weight : {"log", "features"}
        As in `pdcore.extend.Scores`.
    expression : Expression or None
        log w; None for scale * s, whose scale is an argument of the kernel.
    values : tuple of str
        Names of the scalars per head that the expression reads.
    tables : tuple of (str, int, int)
        The tables that it reads, each with its shape, in the order in which they lie in memory.
    stored : tuple of (str, str)
        The 16-bit arrays among `STORED`, each with its dtype.
    dropout : bool
        Whether weights are dropped.
    """

    scalar: str
    weight: str = "log"
    expression: Expression | None = None
    values: tuple[str, ...] = ()
    tables: tuple[tuple[str, int, int], ...] = ()
    stored: tuple[tuple[str, str], ...] = ()
    dropout: bool = False

    @classmethod
    def of(
        cls,
        c: Scores,
        values: tuple[str, ...],
        dtypes: Mapping[str, str],
        tables: tuple[tuple[str, int, int], ...] = (),
        *,
        dropout: bool = False,
    ) -> Program:
        """Return the program of a contraction by scores.

        Parameters
        ----------
        c : Scores
        values : tuple of str
            Names of the scalars of the contraction.
        dtypes : mapping of str to str
            The dtypes of the arrays of `STORED` that the kernels read and write.
        tables : tuple of (str, int, int)
            The tables of the contraction, with their shapes.
        dropout : bool
            Whether weights are dropped.
        """
        scalar = scalar_of("float64" if "float64" in dtypes.values() else "float32")
        stored = tuple((n, dtypes[n]) for n in STORED if dtypes.get(n) in HALVES)
        if c.expression is None:
            return cls(scalar, c.weight, stored=stored, dropout=dropout)
        return cls(scalar, c.weight, c.expression, values, tables, stored, dropout)

    def text(self, kernel: str) -> str:
        """Return the source of a kernel, by a template instantiation as ``"scores_rows<64>"``."""
        sources = ("ptx.cuh", "tiles.cuh", "operands.cuh", *_FILES[kernel.partition("<")[0]])
        ptx, tiles, *rest = (read(name) for name in sources)
        stored = dict(self.stored)
        types = [
            f"typedef {self.scalar} scalar;",
            *(f"typedef {HALVES.get(stored.get(n, ''), 'scalar')} {n}_type;" for n in STORED),
        ]
        return "\n".join([ptx, *types, tiles, self._weight(), *rest])

    def _weight(self) -> str:
        lines = [
            f"#define LOG_WEIGHT {int(self.weight == 'log')}",
            f"#define PLAIN {int(self.expression is None)}",
            f"#define VALUES {len(self.values)}",
            f"#define TABLES {sum(n * m for _, n, m in self.tables)}",
            f"#define PLACES {int(bool(self._places))}",
            f"#define DROPOUT {int(self.dropout)}",
            _PLACE,
        ]
        if self.expression is None:
            value, slope = "scale * s", "scale"
        else:
            value, slope = self._cuda(self.expression), self._slope("s")
        lines += [
            f"DEVICE scalar log_kappa{_SIGNATURE} {{ return {value}; }}",
            f"DEVICE scalar log_kappa_slope{_SIGNATURE} {{ return {slope}; }}",
            f"DEVICE scalar value_slope(int name, {_SIGNATURE[1:]} {{",
            *(
                f"  if (name == {n}) return {self._slope(name)};"
                for n, name in enumerate(self.values)
            ),
            "  return 0;\n}",
        ]
        return "\n".join(lines)

    @property
    def _places(self) -> frozenset[str]:
        reads = frozenset() if self.expression is None else self.expression.inputs
        return reads & frozenset(PLACES)

    def _slope(self, name: str) -> str:
        assert self.expression is not None
        return self._cuda(self.expression.derivative(name))

    def _cuda(self, expression: Expression) -> str:
        """Return the CUDA C++ of an expression; scalars, whose names may be C++ words, by index."""
        return self._indexed(expression).cuda(self.scalar)

    def _indexed(self, e: Expression) -> Expression:
        if e.op == "entry":
            first = 0
            for name, n, m in self.tables:
                if name == e.table:
                    break
                first += n * m
            index = [self._cuda(i) for i in e.args[1:]]
            i, j = index if len(index) == 2 else ("0", *index)
            return Expression("input", (), f"at.entry({first}, {n}, {m}, {i}, {j})")
        if e.op == "input":
            name = str(e.value)
            if name in PLACES:
                return replace(e, value=f"at.{name}")
            known = self.values
            return replace(e, value=f"values[{known.index(name)}]") if name in known else e
        return replace(e, args=tuple(map(self._indexed, e.args)))


@cache
def read(name: str) -> str:
    """Return the text of a file in kernels/."""
    text = (files(__package__) / "kernels" / name).read_text(encoding="utf-8")
    return text.replace("#pragma once\n", "")  # the text is pasted, not included


def scalar_of(dtype: str) -> str:
    """Return the CUDA C++ type of sums over arrays of a dtype."""
    return "double" if dtype == "float64" else "float"


def type_of(dtype: str) -> str:
    """Return the CUDA C++ type of the entries of an array."""
    return HALVES.get(dtype) or scalar_of(dtype)


def tile(scalar: str) -> int:
    """Return the number of rows, and of keys, of a tile: SIZE of kernels/tiles.cuh."""
    return 64 if scalar == "float" else 32


def columns_for(count: int) -> int:
    """Choose the columns of a block, for a result of `count` columns."""
    return next((c for c in COLUMNS if c >= count), COLUMNS[-1])


@lru_cache(maxsize=64)
def memory(scalar: str, columns: int) -> int:
    """Return the bytes of shared memory of a block: BYTES of kernels/tiles.cuh."""
    size, bytes_ = tile(scalar), 4 if scalar == "float" else 8
    wide, depth, strip = 16 // bytes_, 32, 16
    staged = max(2 * size * (depth + wide), strip * columns)
    return (staged + size * (size + wide)) * bytes_
