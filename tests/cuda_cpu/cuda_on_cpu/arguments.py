"""Convert the arguments of a launch by CuPy's rules, and check them against the signature.

CUDA copies as many bytes as a parameter of the kernel has from the argument: an argument of
another width or kind is not converted, but read wrong.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Parameter", "Pointer", "Region", "Structure", "Values", "take"]

_KINDS = {"i": "int", "u": "unsigned int", "f": "float", "b": "bool", "c": "class"}


class Parameter(ctypes.Structure):
    """A parameter of a kernel, as in native/runtime.h."""

    _fields_ = [
        ("bytes", ctypes.c_int),
        ("kind", ctypes.c_char),
        ("pointee_bytes", ctypes.c_int),
        ("pointee_kind", ctypes.c_char),
        ("pointee_const", ctypes.c_int),
    ]

    def __str__(self) -> str:
        if self.kind == b"p":
            return "a pointer"
        return f"{_KINDS[self.kind.decode()]} of {self.bytes} bytes"


class Region(ctypes.Structure):
    """Memory of the caller, as in native/runtime.h."""

    _fields_ = [
        ("host", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("argument", ctypes.c_int),
        ("written", ctypes.c_int),
    ]


class Pointer(ctypes.Structure):
    """A pointer into a region, as an argument or inside of one, as in native/runtime.h."""

    _fields_ = [
        ("argument", ctypes.c_int),
        ("region", ctypes.c_int),
        ("offset", ctypes.c_size_t),
    ]


@dataclass(frozen=True)
class Structure:
    """A structure with pointers among its members; CuPy takes the addresses in the structure.

    Writeable arrays count as written, because the types of the members are unknown.

    Parameters
    ----------
    value : numpy.void
        The structure, with any values in place of the pointers.
    arrays : mapping of int to ndarray
        The arrays to which the pointers point, by the offset of the member in bytes.
    """

    value: np.void
    arrays: Mapping[int, np.ndarray]


class _ArrayArgument(NamedTuple):
    """An array, whose pointer is `at` bytes into an argument."""

    argument: int
    at: int
    array: np.ndarray
    written: bool


@dataclass
class Values:
    """Arguments as a launch takes them; `places` are (argument, byte) of pointers in structures."""

    slots: list[Any] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    pointers: list[Pointer] = field(default_factory=list)


def _number(value: Any, what: str, parameter: Parameter) -> np.generic:
    """Return the NumPy number to which CuPy converts `value`."""
    if isinstance(value, np.generic):
        return value
    if type(value) not in (int, float):
        raise TypeError(f"{what}: got {type(value).__name__}, expected an array or a NumPy number")
    number = np.int64(value) if isinstance(value, int) else np.float64(value)
    if parameter.kind not in (b"i", b"u", b"f") or parameter.bytes != 8:
        raise TypeError(
            f"{what}: a Python {type(value).__name__} is passed as 8 bytes, the kernel's parameter "
            f"is {parameter}; pass a NumPy number of its type"
        )
    return number


def _scalar(value: Any, what: str, parameter: Parameter) -> Any:
    number = _number(value, what, parameter)
    # A pointer may be passed as an address: 0 is the null pointer.
    wanted = "u" if parameter.kind == b"p" else parameter.kind.decode()
    kind = {"V": "c"}.get(number.dtype.kind, number.dtype.kind)
    if number.nbytes != parameter.bytes or (kind != wanted and wanted != "c"):
        raise TypeError(
            f"{what}: got {number.dtype} of {number.nbytes} bytes, the kernel's parameter is "
            f"{parameter}"
        )
    if parameter.kind == b"p" and int(number):
        raise TypeError(
            f"{what}: got an address; pass the array itself, or numpy.uint64(0) for null"
        )
    return (ctypes.c_char * number.nbytes).from_buffer_copy(number.tobytes())


def _check_array(array: np.ndarray, what: str, parameter: Parameter) -> None:
    if parameter.kind != b"p":
        raise TypeError(f"{what}: got an array, the kernel's parameter is {parameter}")
    if array.dtype.hasobject:
        raise TypeError(f"{what}: got an array of Python objects")
    if not (array.flags.writeable or parameter.pointee_const):
        raise ValueError(f"{what}: the array is read-only, the kernel's pointer is not const")
    kind, size = parameter.pointee_kind.decode(), parameter.pointee_bytes
    if kind in " cp" or size == 1:
        return  # void, a vector or a class, or bytes: they read any array
    # Kinds of 16-bit floats are "e" and, by ml_dtypes, "V"; CUDA's headers have them as classes.
    same_kind = kind != "f" or array.dtype.kind == "f"
    if array.itemsize != size or not same_kind:
        raise TypeError(
            f"{what}: got an array of {array.dtype}, the kernel points to {_KINDS[kind]} of {size} "
            "bytes"
        )


def _owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def _regions(arrays: Sequence[_ArrayArgument]) -> list[Region]:
    """Return the memory of the arrays; overlapping memory is one region."""
    regions: list[Region] = []
    bounds = [np.lib.array_utils.byte_bounds(_owner(one.array)) for one in arrays]
    for (low, high), i in sorted((ends, i) for i, ends in enumerate(bounds)):
        argument, written = arrays[i].argument, arrays[i].written
        if regions and low < (regions[-1].host or 0) + regions[-1].bytes:
            last = regions[-1]
            last.bytes = max(high, last.host + last.bytes) - last.host
            last.argument = min(argument, last.argument)
            last.written |= written
        else:
            regions.append(Region(low, high - low, argument, written))
    return regions


def _members(
    structure: Structure, number: int, what: str, parameter: Parameter
) -> list[_ArrayArgument]:
    if parameter.kind != b"c":
        raise TypeError(f"{what}: got a structure, the kernel's parameter is {parameter}")
    for at, array in structure.arrays.items():
        if at < 0 or at % 8 or at + 8 > structure.value.nbytes:
            raise ValueError(
                f"{what}: got a pointer at byte {at}, expected a multiple of 8 in "
                f"a structure of {structure.value.nbytes}"
            )
        if array.dtype.hasobject:
            raise TypeError(f"{what}: got an array of Python objects")
    return [
        _ArrayArgument(number, at, array, array.flags.writeable)
        for at, array in structure.arrays.items()
    ]


def take(name: str, values: Sequence[Any], parameters: Sequence[Parameter]) -> Values:
    """Check the arguments of kernel `name`, and return them as a launch takes them."""
    if len(values) != len(parameters):
        raise TypeError(f"{name}: got {len(values)} arguments, the kernel has {len(parameters)}")
    laid_out = Values()
    arrays: list[_ArrayArgument] = []
    for i, (value, parameter) in enumerate(zip(values, parameters, strict=True)):
        what = f"{name}: argument {i}"
        if isinstance(value, np.ndarray):
            _check_array(value, what, parameter)
            arrays.append(_ArrayArgument(i, 0, value, not parameter.pointee_const))
            laid_out.slots.append(ctypes.c_void_p(None))
        elif isinstance(value, Structure):
            arrays += _members(value, i, what, parameter)
            laid_out.slots.append(_scalar(value.value, what, parameter))
        else:
            laid_out.slots.append(_scalar(value, what, parameter))
    laid_out.regions = _regions(arrays)
    for one in arrays:
        address = one.array.ctypes.data
        for number, region in enumerate(laid_out.regions):
            # An array without elements may have an address at the end of a region.
            if region.host <= address <= region.host + region.bytes and (
                one.array.size == 0 or address < region.host + region.bytes
            ):
                place = one.argument
                if isinstance(values[place], Structure):
                    place = len(values) + len(laid_out.places)
                    laid_out.places.append((one.argument, one.at))
                laid_out.pointers.append(Pointer(place, number, address - region.host))
                break
    return laid_out
