"""The commands of ``pdcore``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from pdcore_conformance.cli.bench import bench
from pdcore_conformance.cli.conform import conform
from pdcore_conformance.cli.new import new_backend
from pdcore_conformance.cli.report import report

from .. import __version__
from ..attention import bind
from ..backend import FEATURES, Inputs, Request
from ..dispatch import choose, explain_request
from ..errors import Exit, nearest
from ..plugins import list_backends, list_words
from ..plugins import registry as plugins
from ..spec import AttentionSpec, parse
from .derive import derive
from .files import (
    FileError,
    check_writable,
    file_kind,
    read_arrays,
    replacing,
    write_arrays,
)
from .pieces import attend_in_pieces
from .reporting import Failed, emit, note, progress, reported, stdout

__all__ = ["app"]


class _Commands(typer.core.TyperGroup):
    """Commands by name; an unknown one is answered with the nearest and the known ones."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            ctx.fail(f"unknown command {name!r}; {nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


_CODES = (
    "Exit codes: "
    + "; ".join(f"{int(code)} {code.meaning}" for code in Exit)
    + ("; 128 + n after signal n (130 after Ctrl-C).")
)

app = typer.Typer(
    cls=_Commands,
    help="Attention derived from support vector regression, on any array library.",
    epilog=_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout; everything else goes to stderr.")
]
SpecText = Annotated[
    str, typer.Argument(metavar="SPEC", help="For example 'bn+sh(1,1,2,2)'; see `pdcore specs`.")
]
BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend",
        "-b",
        metavar="NAME",
        help="Run on this backend or fail; several, joined by commas, are tried in order.",
    ),
]
DeviceName = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Move the arrays there, such as 'cuda'.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pdcore {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=_CODES)
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

    IN holds q, k and v, and may hold mask, key_mask, bias, offset and params.NAME; OUT, .npz or
    .safetensors by its extension, will hold out (and lse). OUT appears when it is complete, or
    not at all.
    """
    parsed, names = parse(spec), _backends(backend)
    file_kind(out)
    arrays = read_arrays(source)
    if offset is not None:
        if "offset" in arrays:
            raise FileError(f"{source}: it has an offset already, so --offset cannot set it")
        arrays["offset"] = _offset(offset)
    check_writable(out, str(arrays["q"].dtype))
    bound = bind(parsed, backend=names, device=device)
    try:
        request = bound.request(Inputs(**arrays), lse=lse)
        plan = request.lower()
    except (TypeError, ValueError) as error:
        raise FileError(f"{source}: {error}") from error
    chosen = choose(request, bound.choice).backend.info.name
    began = time.perf_counter()
    with replacing(out, force=force) as stream:
        with progress(f"attention by {chosen}") as done:
            outputs, pieces = attend_in_pieces(
                arrays, plan, lse=lse, backend=names, device=device, done=done
            )
        taken = time.perf_counter() - began
        metadata = {"spec": str(parsed), "pdcore": __version__}
        write_arrays(stream, file_kind(out), outputs, metadata)
    shapes = {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in outputs.items()}
    if as_json:
        emit(
            {
                "spec": str(parsed),
                "in": str(source),
                "out": str(out),
                "backend": chosen,
                "arrays": shapes,
                "pieces": pieces,
                "seconds": taken,
            }
        )
    else:
        listed = ", ".join(f"{n} {tuple(x.shape)} {x.dtype}" for n, x in outputs.items())
        stdout().print(
            escape(f"wrote {out}: {listed}; {parsed} by {chosen} in {taken:.2f} s"), soft_wrap=True
        )


@app.command()
@reported
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where to write the pictures.")
    ] = Path("pdcore-demo"),
    as_json: AsJson = False,
) -> None:
    """Run every preset on recorded vowels, on every backend, and draw the attention weights.

    Measures the error over its budget against the oracle, and the time, then writes a PNG and
    one self-contained HTML page.
    """
    from pdcore_conformance.cli.demo import run_demo, show

    result = run_demo(out, say=note)
    if as_json:
        emit(result)
    else:
        show(result, stdout())
    if not result["within_budget"]:
        raise Failed(Exit.NUMERICS, "a backend's error exceeds its budget; see the table")


@app.command()
@reported
def backends(as_json: AsJson = False) -> None:
    """List the backends: version, devices, what they support, and why one is not available."""
    found = list_backends()
    if as_json:
        emit({"backends": found})
        return
    table = Table("backend", "available", "version", "devices", "does not support, or why not")
    for b in found:
        lacking = [feature for feature, support in b["capabilities"].items() if support != "full"]
        why = ", ".join(lacking) if b["available"] else b["reason"]
        versions = ", ".join(f"{n} {v}" for n, v in b["versions"].items())
        table.add_row(
            escape(b["name"]),
            "yes" if b["available"] else "no",
            escape(versions),
            escape(", ".join(b["devices"])),
            escape(why),
        )
    stdout().print(table)


@app.command()
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
    given: Annotated[
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
    request = _request(
        parsed, shape, key_shape, value_dim, dtype, library, device, given, offset
    )._replace(lse=lse, vjp=vjp)
    try:
        parsed.check_keys(request.k[-2])
        plan = request.lower()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    explanation = explain_request(request, _backends(backend), plan)
    if as_json:
        emit(explanation.to_dict() | {"latex": parsed.latex()})
    else:
        stdout().print(escape(str(explanation)), soft_wrap=True)
        if latex:
            stdout().print(escape(parsed.latex()), soft_wrap=True)
    if explanation.backend is None:
        raise Failed(Exit.NO_BACKEND, "no backend can run it")


@app.command()
@reported
def specs(as_json: AsJson = False) -> None:
    """List the presets, and the words of a spec with their arguments and defaults."""
    found = list_words()
    if as_json:
        emit(found)
        return
    presets = Table("preset", "what it is", title="Presets", title_justify="left")
    for preset in found["presets"]:
        presets.add_row(escape(preset["name"]), escape(preset["meaning"]))
    words = Table("word", "sets", "what it is", title="Words, joined by +", title_justify="left")
    for word in found["words"]:
        arguments = ", ".join(_argument(a) for a in word["arguments"])
        form = f"{word['word']}({arguments})" if arguments else word["word"]
        form = " or ".join([form, *word["aliases"]])
        words.add_row(
            escape(form),
            word["axis"],
            escape(word["meaning"]),
        )
    stdout().print(presets)
    stdout().print(words)
    stdout().print("An argument in \\[brackets] may be left out and has no default value.")


app.command()(derive)
app.command()(bench)
app.command()(conform)
app.command()(report)
app.command()(new_backend)


def _argument(argument: dict[str, Any]) -> str:
    if argument["required"]:
        return str(argument["name"])
    default = argument["default"]
    if default is None:
        return f"[{argument['name']}]"
    return f"{argument['name']}={str(default).lower() if isinstance(default, bool) else default}"


def _backends(text: str | None) -> list[str] | None:
    """Read --backend, and refuse a name that nobody has."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    for name in names:
        kind = name.partition(":")[0]
        if not kind or not plugins.is_known(kind):
            raise typer.BadParameter(
                f"unknown backend {name!r}; {nearest(kind, plugins.registered())}",
                param_hint="--backend",
            )
    return names


def _offset(text: str) -> int | str:
    if text == "end":
        return text
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(
            f"got {text!r}, expected a whole number or 'end'", param_hint="--offset"
        ) from None


def _shape(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) < 3 or not all(part.isdecimal() for part in parts):
        raise typer.BadParameter(
            f"got {text!r}, expected at least three whole numbers such as 2,8,1024,64",
            param_hint=option,
        )
    return tuple(map(int, parts))


def _among(option: str, word: str, known: Any) -> str:
    if word not in known:
        raise typer.BadParameter(f"unknown {word!r}; {nearest(word, known)}", param_hint=option)
    return word


def _request(
    spec: AttentionSpec,
    shape: str,
    key_shape: str | None,
    value_dim: int | None,
    dtype: str,
    library: str,
    device: str | None,
    given: str,
    offset: str,
) -> Request:
    q = _shape("--shape", shape)
    k = q if key_shape is None else _shape("--key-shape", key_shape)
    fits = len(q) == len(k) and q[:-3] == k[:-3] and q[-1] == k[-1] and k[-3] > 0
    if not fits or q[-3] % k[-3]:
        raise typer.BadParameter(
            f"{k} does not fit q {q}: expected the same leading axes and D, and a number of heads "
            "that divides q's",
            param_hint="--key-shape",
        )
    _among("--dtype", dtype, [f for f in FEATURES if "float" in f])
    _among("--library", library, {info.library for info in plugins.registered().values()})
    _among("--offset", offset, ["int", "array", "sequence", "end"])
    full = (*q[:-1], k[-2])
    shapes = {"mask": full, "key_mask": (*k[:-3], k[-2]), "bias": full}
    words = [word.strip() for word in given.split(",") if word.strip()]
    v = (*k[:-1], k[-1] if value_dim is None else value_dim)
    present = {_among("--with", word, shapes) for word in words}
    mask, key_mask, bias = (shapes[name] if name in present else None for name in shapes)
    return Request(spec, library, dtype, device or "cpu", q, k, v, mask, key_mask, bias, offset)
