"""``pdcore attend``: attention over arrays in files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from .. import __version__
from ..attention import BoundAttention, bind
from ..backend import Inputs
from ..dispatch import choose, ranges
from ..lowering import Plan
from ..spec import parse
from .files import FileError, check_writable, file_kind, read_arrays, replacing, write_arrays
from .options import AsJson, BackendName, DeviceName, SpecText, parse_backends, parse_whole
from .pieces import attend_in_pieces
from .reporting import emit, progress, reported, stdout

__all__ = ["attend"]


@reported
def attend(
    spec: SpecText,
    source: Annotated[Path, typer.Argument(metavar="IN", help="A .npz or .safetensors file.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Where to write.")],
    backend: BackendName = None,
    device: DeviceName = None,
    lse: Annotated[bool, typer.Option("--lse", help="Write lse = log h too.")] = False,
    offset: Annotated[
        str | None,
        typer.Option(metavar="INT|end", help="Position of query 0, where IN does not have it."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Compute attention over your own arrays.

    IN holds q, k and v, and may hold mask, key_mask, bias, offset, segments (or q_segments and
    k_segments), labels (or q_labels and k_labels) and params.NAME; OUT, .npz or .safetensors by
    its extension, will hold out (and lse). OUT appears when it is complete, or not at all.
    """
    parsed, names = parse(spec), parse_backends(backend)
    file_kind(out)
    bound = bind(parsed, backend=names, device=device)
    # From the headers alone first: a small file may inflate to gigabytes.
    headers = _read_call(source, offset, headers_only=True)
    check_writable(out, str(headers["q"].dtype))
    _choose(bound, source, headers, lse=lse)
    arrays = _read_call(source, offset)
    chosen, plan = _choose(bound, source, arrays, lse=lse)
    began = time.perf_counter()
    with replacing(out, force=force) as stream:
        with progress(f"attention by {chosen}") as done:
            outputs, pieces = attend_in_pieces(
                arrays, plan, lse=lse, backend=names, device=device, done=done
            )
        seconds = time.perf_counter() - began
        metadata = {"spec": str(parsed), "pdcore": __version__}
        write_arrays(stream, file_kind(out), outputs, metadata)
    if not as_json:
        written = ", ".join(f"{n} {tuple(x.shape)} {x.dtype}" for n, x in outputs.items())
        message = f"wrote {out}: {written}; {parsed} by {chosen} in {seconds:.2f} s"
        stdout().print(escape(message), soft_wrap=True)
        return
    shapes = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in outputs.items()}
    emit(
        {
            "spec": str(parsed),
            "in": str(source),
            "out": str(out),
            "backend": chosen,
            "arrays": shapes,
            "pieces": pieces,
            "seconds": seconds,
        }
    )


def _read_call(source: Path, offset: str | None, *, headers_only: bool = False) -> dict[str, Any]:
    """Return the arrays of a call, with the offset of the command line."""
    arrays = read_arrays(source, headers_only=headers_only)
    if offset is not None:
        if "offset" in arrays:
            raise FileError(f"{source}: it has an offset already, so --offset cannot set it")
        arrays["offset"] = _parse_offset(offset)
    return arrays


def _parse_offset(text: str) -> int | str:
    return text if text == "end" else parse_whole("--offset", text, "a whole number or 'end'")


def _choose(
    bound: BoundAttention, source: Path, arrays: dict[str, Any], *, lse: bool
) -> tuple[str, Plan]:
    """Return the backend's name and the plan of a call; name the file where arrays do not fit."""
    try:
        request = bound.request(Inputs(**arrays), lse=lse)
        plan = request.lower()
        if "segments" in arrays:
            ranges(arrays["segments"], request.q[:-3])
    except (TypeError, ValueError) as error:
        raise FileError(f"{source}: {error}") from error
    return choose(request, bound.choice).backend.info.name, plan
