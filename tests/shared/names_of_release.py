"""The names of one release of PyTorch and of Triton, read from their text and not by import.

    python tests/shared/names_of_release.py TORCH_WHEEL TRITON_WHEEL

writes tests/backends/torch/names_of_2_11.json: the names that this project uses, as the release on
a machine with a GPU has them. A wheel without its dependencies is enough::

    pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 \
        --python-version 3.12 torch==2.11.0 triton==3.6.0
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path

from names_in_use import LIBRARIES, uses

__all__ = ["LIST", "Release", "files", "of_folder"]

ROOT = Path(__file__).resolve().parents[2]
LIST = ROOT / "tests" / "backends" / "torch" / "names_of_2_11.json"
OPERATORS = "torchgen/packaged/ATen/native/native_functions.yaml"
BINARY = "torch/lib/libtorch_python.so"
#: From the path of a file in a release to its content; None where there is no such file.
Read = Callable[[str], bytes | None]


def files() -> list[Path]:
    """Return the modules of this project's packages."""
    roots = [ROOT / name for name in ("pdcore", "backends", "adapters", "conformance")]
    return [file for root in roots for file in sorted(root.rglob("*.py"))]


def of_folder(folder: Path) -> Read:
    """Read the files of an installed release."""

    def read(path: str) -> bytes | None:
        file = folder / path
        return file.read_bytes() if file.is_file() else None

    return read


def of_wheels(paths: list[str]) -> Read:
    """Read the files of wheels."""
    wheels = [zipfile.ZipFile(path) for path in paths]
    places = {name: wheel for wheel in wheels for name in wheel.namelist()}
    return lambda path: places[path].read(path) if path in places else None


class Release:
    """What a release has, by the full name.

    Parameters
    ----------
    read : callable
        See `Read`.
    """

    def __init__(self, read: Read) -> None:
        self.read = cache(read)
        self.module = cache(self._module)

    def signatures(self, name: str) -> list[str] | None:
        """Return the signatures of a name, or the schemas of an operator; None if it is absent.

        Signatures have the names of arguments, with ``=`` where there is a default. The list is
        empty for what is not called, and where the text does not show a signature.
        """
        parts = name.split(".")
        if name.startswith("torch.ops.aten."):
            return self.schemas.get(parts[3])
        if parts[0] == "torch" and len(parts) == 2 and parts[1] in self.private:
            return self.schemas[parts[1]]
        for cut in range(len(parts), 0, -1):
            trees = self.module(".".join(parts[:cut]))
            if trees:
                found = self.member(".".join(parts[:cut]), tuple(parts[cut:]), set())
                if found is not None:
                    return found
        # The stubs leave out some functions of the extension.
        extension = parts[:2] == ["torch", "_C"] and self.read(BINARY)
        return [] if extension and f"\0{parts[-1]}\0".encode() in extension else None

    @cached_property
    def private(self) -> set[str]:
        """The operators that are functions of the module torch, but not public."""
        return {name for name in self.schemas if name.startswith("_")}

    @cached_property
    def schemas(self) -> dict[str, list[str]]:
        """The schemas of every overload of the operators of ATen, by the operator's name."""
        found: dict[str, list[str]] = {}
        for line in (self.read(OPERATORS) or b"").decode().splitlines():
            if line.startswith("- func: "):
                schema = line.removeprefix("- func: ")
                found.setdefault(schema.partition("(")[0].partition(".")[0], []).append(schema)
        return found

    def _module(self, name: str) -> list[ast.Module]:
        """Return the stub and the source of a module, empty if it is none."""
        path = name.replace(".", "/")
        places = (path + end for end in (".pyi", "/__init__.pyi", ".py", "/__init__.py"))
        return [ast.parse(text) for place in places if (text := self.read(place)) is not None]

    def member(self, module: str, parts: tuple[str, ...], seen: set[str]) -> list[str] | None:
        """Look a name up in a module, through its imports."""
        if not parts:
            return []
        key = f"{module}:{'.'.join(parts)}"
        if key in seen:
            return None
        seen.add(key)
        for tree in self.module(module):
            found = self.of_body(module, tree.body, parts, seen)
            if found is None and (stand_in := replaced(tree)):
                found = self.of_body(module, stand_in.body, parts, seen, bound=1)
            if found is not None:
                return found
        return None

    def of_body(
        self,
        module: str,
        body: list[ast.stmt],
        parts: tuple[str, ...],
        seen: set[str],
        bound: int = 0,
    ) -> list[str] | None:
        """Look a name up in the statements of a module or class."""
        first, rest = parts[0], parts[1:]
        functions, present, others = [], False, []
        for node in statements(body):
            match node:
                case ast.FunctionDef(name=name) if name == first:
                    functions.append(node)
                case ast.ClassDef(name=name) if name == first:
                    return self.of_class(module, node, rest, seen)
                case ast.Assign() | ast.AnnAssign() if first in targets(node):
                    present = True
                case ast.ImportFrom():
                    others += [
                        (absolute(module, node, self), rest if x.name != "*" else None, x.name)
                        for x in node.names
                        if (x.asname or x.name) == first or x.name == "*"
                    ]
                case ast.Import():
                    others += [
                        (x.name, rest, "") for x in node.names if x.asname == first and x.asname
                    ]
        if functions:
            overloads = [n for n in functions if "overload" in map(ast.unparse, n.decorator_list)]
            return sorted({signature(node, bound) for node in overloads or functions[-1:]})
        for origin, more, name in others:
            found = self.imported(origin, name, parts if more is None else more, seen)
            if found is not None:
                return found
        return [] if present else None

    def imported(
        self, origin: str, name: str, parts: tuple[str, ...], seen: set[str]
    ) -> list[str] | None:
        """Look up what a module imports: by name, whole (no name), or everything (``*``)."""
        if name == "*":
            return self.member(origin, parts, seen)
        if not name:
            return self.member(origin, parts, seen) if self.module(origin) else None
        found = self.member(origin, (name, *parts), seen)
        if found is None and self.module(f"{origin}.{name}"):
            found = self.member(f"{origin}.{name}", parts, seen)
        if found is None and origin.partition(".")[0] not in LIBRARIES:
            return []  # of the standard library, such as math.inf
        return found

    def of_class(
        self, module: str, node: ast.ClassDef, parts: tuple[str, ...], seen: set[str]
    ) -> list[str] | None:
        """Return the signatures of a class, or look a name up in it and in its bases."""
        if not parts:
            for name in ("__init__", "__new__"):
                found = self.of_body(module, node.body, (name,), set(), bound=1)
                if found:
                    return found
            fields = [
                x.target.id + ("=" if x.value else "")
                for x in node.body
                if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)
            ]
            return [", ".join(fields)] if fields else []
        found = self.of_body(module, node.body, parts, seen, bound=1)
        for base in node.bases:
            if found is None:
                found = self.member(module, (*ast.unparse(base).split("."), *parts), seen)
            if found is None:
                found = self.signatures(".".join((ast.unparse(base), *parts)))
        return found


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield statements, and those under conditions."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.For):
                yield from statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def replaced(tree: ast.Module) -> ast.ClassDef | None:
    """Return the class whose instance a module puts in its own place, as torch.backends does."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "sys.modules[__name__]":
            return classes.get(ast.unparse(node.value).partition("(")[0])
    return None


def targets(node: ast.Assign | ast.AnnAssign) -> set[str]:
    """Return the names that an assignment binds."""
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {x.id for target in found for x in ast.walk(target) if isinstance(x, ast.Name)}


def absolute(module: str, node: ast.ImportFrom, release: Release) -> str:
    """Return the full name of the module that a statement imports from."""
    if not node.level:
        return node.module or ""
    path = module.replace(".", "/")
    package = any(release.read(f"{path}/__init__{end}") is not None for end in (".py", ".pyi"))
    parts = module.split(".")
    up = node.level - package
    base = parts[: len(parts) - up]
    return ".".join([*base, node.module] if node.module else base)


def signature(node: ast.FunctionDef, bound: int) -> str:
    """Return the names of a function's arguments, without `bound` ones, which Python passes."""
    a = node.args
    plain = [x.arg for x in a.posonlyargs + a.args]
    first = len(plain) - len(a.defaults)
    static = "staticmethod" in map(ast.unparse, node.decorator_list)
    named = [x + ("=" if i >= first else "") for i, x in enumerate(plain)][not static and bound :]
    if a.vararg:
        named.append(f"*{a.vararg.arg}")
    elif a.kwonlyargs:
        named.append("*")
    pairs = zip(a.kwonlyargs, a.kw_defaults, strict=True)
    named += [x.arg + ("=" if default is not None else "") for x, default in pairs]
    return ", ".join([*named, f"**{a.kwarg.arg}"] if a.kwarg else named)


def main(wheels: list[str]) -> None:
    """Write the list."""
    release = Release(of_wheels(wheels))
    names = sorted({use.name for use in uses(files())})
    content = {name: release.signatures(name) for name in names}
    LIST.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{len(names)} names; absent: {[n for n in names if content[n] is None]}")


if __name__ == "__main__":
    main(sys.argv[1:])
