"""``pdcore explain``: how a call would run, from its shapes alone."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..backend import FEATURES, Request
from ..dispatch import explain_request
from ..errors import Exit
from ..plugins import registry as plugins
from ..spec import parse
from .options import (
    AsJson,
    BackendName,
    DeviceName,
    SpecText,
    check_known,
    parse_backends,
    parse_whole,
)
from .reporting import Failed, emit, reported, stdout

__all__ = ["explain"]


@reported
def explain(
    spec: SpecText,
    shape: Annotated[str, typer.Option(metavar="B,H,N,D", help="The shape of q.")],
    key_shape: Annotated[
        str | None, typer.Option(metavar="B,H,M,D", help="The shape of k; that of q by default.")
    ] = None,
    value_dim: Annotated[int | None, typer.Option(help="Dv; D by default.", min=0)] = None,
    dtype: Annotated[str, typer.Option(help="Of q, k and v.")] = "float32",
    library: Annotated[str, typer.Option(help="Whose arrays.")] = "numpy",
    backend: BackendName = None,
    device: DeviceName = None,
    optional: Annotated[
        str, typer.Option("--with", metavar="LIST", help="Of mask, key_mask, bias; by commas.")
    ] = "",
    offset: Annotated[str, typer.Option(help="int, array, sequence or end.")] = "int",
    lse: Annotated[bool, typer.Option("--lse", help="With lse.")] = False,
    vjp: Annotated[bool, typer.Option("--vjp", help="With gradients.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the derivation as LaTeX.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how a call would run: derivation, plan, backend, and why not every other one."""
    parsed = parse(spec)
    q, k = _query_and_key(shape, key_shape)
    v = (*k[:-1], k[-1] if value_dim is None else value_dim)
    _check_choices(dtype, library, offset)
    mask, key_mask, bias = _optional_shapes(optional, q, k)
    try:
        parsed = parsed.for_heads(k[-3])
        parsed.check_keys(k[-2])
        request = Request(
            parsed, library, dtype, device or "cpu", q, k, v, mask, key_mask, bias, offset
        )._replace(lse=lse, vjp=vjp)
        plan = request.lower()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    explanation = explain_request(request, parse_backends(backend), plan)
    if as_json:
        emit(explanation.to_dict() | {"latex": parsed.latex()})
    else:
        stdout().print(escape(str(explanation)), soft_wrap=True)
        if latex:
            stdout().print(escape(parsed.latex()), soft_wrap=True)
    if explanation.backend is None:
        raise Failed(Exit.NO_BACKEND, "no backend can run it")


def _query_and_key(shape: str, key_shape: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    q = _parse_shape("--shape", shape)
    k = q if key_shape is None else _parse_shape("--key-shape", key_shape)
    fits = len(q) == len(k) and q[:-3] == k[:-3] and q[-1] == k[-1] and k[-3] > 0
    if not fits or q[-3] % k[-3]:
        raise typer.BadParameter(
            f"{k} does not fit q {q}: expected the same leading axes and D, and a number of heads "
            "that divides q's",
            param_hint="--key-shape",
        )
    return q, k


def _parse_shape(option: str, text: str) -> tuple[int, ...]:
    expected = "at least three whole numbers from 0 such as 2,8,1024,64"
    shape = tuple(parse_whole(option, part, expected) for part in text.split(","))
    if len(shape) < 3 or min(shape) < 0:
        raise typer.BadParameter(f"got {text!r}, expected {expected}", param_hint=option)
    return shape


def _check_choices(dtype: str, library: str, offset: str) -> None:
    check_known("--dtype", dtype, [feature for feature in FEATURES if "float" in feature])
    check_known("--library", library, {info.library for info in plugins.registered().values()})
    check_known("--offset", offset, ["int", "array", "sequence", "end"])


def _optional_shapes(
    names: str, q: tuple[int, ...], k: tuple[int, ...]
) -> list[tuple[int, ...] | None]:
    """Return the shapes of mask, key_mask and bias; None for those that are not named."""
    full = (*q[:-1], k[-2])
    shapes = {"mask": full, "key_mask": (*k[:-3], k[-2]), "bias": full}
    words = {word.strip() for word in names.split(",") if word.strip()}
    for word in words:
        check_known("--with", word, shapes)
    return [shape if name in words else None for name, shape in shapes.items()]
