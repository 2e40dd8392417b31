"""The names of PyTorch and Triton that source files use, read from their syntax."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["LIBRARIES", "Use", "uses"]

LIBRARIES = ("torch", "triton")
#: Attributes that hold a module, where the syntax does not show it.
HELD = {"self.module": "torch", "self._forward_mode": "torch"}


class Use(NamedTuple):
    """One place where a name is used.

    Attributes
    ----------
    name : str
        ``torch.nn.attention.sdpa_kernel``; of a method of values, ``torch.Tensor.sum``.
    place : str
        The file and its line.
    optional : bool
        Whether the name is read by `getattr` with a default, so that it may be absent.
    positional : int or None
        The positional arguments of a call; None where the name is not called, or some are starred.
    keywords : frozenset of str
        The keyword arguments of a call.
    called : bool
        Whether the name is called.
    """

    name: str
    place: str
    optional: bool = False
    positional: int | None = None
    keywords: frozenset[str] = frozenset()
    called: bool = False


def uses(files: Iterable[Path]) -> list[Use]:
    """Return every use of a name in those of the files that use PyTorch or Triton."""
    found = []
    for file in files:
        text = file.read_text(encoding="utf-8")
        if not any(library in text for library in LIBRARIES):
            continue
        reader = _Reader(file)
        reader.visit(ast.parse(text))
        if reader.imports:
            found += reader.found
    return found


class _Reader(ast.NodeVisitor):
    """A walk through one module, in the order of its text, with one scope for all of it."""

    def __init__(self, file: Path) -> None:
        self.place = "/".join(file.parts[-2:])
        # In this project a variable of that name is always the module.
        self.bound = {name: name for name in LIBRARIES}
        if file.name == "on_torch.py":
            self.bound |= HELD
        # Values that are no tensors: modules of other libraries, array namespaces, decoders.
        self.others = {"self", "self.decoder", "xp"}
        self.imports = bool(self.bound.keys() & HELD.keys())
        self.found: list[Use] = []

    def resolved(self, node: ast.AST) -> str | None:
        """Return the full name that an expression stands for; None if it is no such name."""
        match node:
            case ast.Name(id=name):
                self.imports |= name in LIBRARIES
                return self.bound.get(name)
            case ast.Attribute(value=value, attr=attr):
                own = self.bound.get(ast.unparse(node))
                base = own or self.resolved(value)
                return own or (base and f"{base}.{attr}")
            case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=attr), *_]):
                base = self.resolved(value)
                return base and f"{base}.{attr}"
            case ast.Call(func=function, args=[ast.Constant(value=str(module))]):
                named = module.partition(".")[0] in LIBRARIES
                return module if named and "import_module" in ast.unparse(function) else None
        return None

    def add(self, name: str, node: ast.AST, **more: object) -> None:
        """Note a use, except of a library itself and of this project's own operators."""
        if name not in LIBRARIES and not name.startswith("torch.ops.pdcore"):
            line = getattr(node, "lineno", 0)
            self.found.append(Use(name, f"{self.place}:{line}", **more))  # type: ignore[arg-type]

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] in LIBRARIES:
                self.imports = True
                self.add(alias.name, node)
                if alias.asname:
                    self.bound[alias.asname] = alias.name
            else:
                self.others.add(alias.asname or alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if not node.level and (node.module or "").partition(".")[0] in LIBRARIES:
            self.imports = True
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                self.add(name, node)
                self.bound[alias.asname or alias.name] = name

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for to, value in pairs:
                if name := self.resolved(value):
                    self.bound[ast.unparse(to)] = name
                elif "import_module(" in ast.unparse(value):
                    self.others.add(ast.unparse(to))
        self.visit(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        name = self.resolved(node)
        if name is not None:
            if ast.unparse(node.func) == "getattr":
                self.add(name, node, optional=len(node.args) > 2)
            else:
                self.imports = True
                self.add(name, node)
            return
        name = self.resolved(node.func) or self.of_value(node.func)
        if name is None:
            self.visit(node.func)
        else:
            starred = any(isinstance(x, ast.Starred) for x in node.args)
            keywords = frozenset(x.arg for x in node.keywords if x.arg)
            positional = None if starred else len(node.args)
            self.add(name, node, positional=positional, keywords=keywords, called=True)
            if not self.resolved(node.func):
                self.visit(node.func.value)  # type: ignore[attr-defined]
        for child in (*node.args, *node.keywords):
            self.visit(child)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        name = self.resolved(node) or self.of_value(node)
        if name is not None:
            self.add(name, node)
        if not self.resolved(node):
            self.visit(node.value)

    def of_value(self, node: ast.AST) -> str | None:
        """Return the method of a tensor that an attribute of a value may be."""
        if not isinstance(node, ast.Attribute) or ast.unparse(node.value) in self.others:
            return None
        other = node.attr.startswith("__") or node.attr == "name"  # that of named tensors
        of_tensors = hasattr(torch.Tensor, node.attr) and not other
        return f"torch.Tensor.{node.attr}" if of_tensors else None
