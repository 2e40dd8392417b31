"""The names of version 0.1 that have another place now: one table, and an import finder.

Old modules import for one release, with a `DeprecationWarning` that names the new place, and have
the objects of the modules that hold their names now. Rooms that kept the name of an old module,
such as `pdcore.lowering`, ask `attribute` for the names that left them. Objects pickled by 0.1
load: a pickle names a module and a class, and both resolve here.

This module imports nothing of pdcore. A room or module that lost a name ends with

    if not TYPE_CHECKING:

        def __getattr__(name: str) -> Any:
            return _attribute(__name__, name)  # a name of 0.1
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MODULES", "NAMES", "OUTSIDE", "attribute", "install"]

#: Modules of 0.1, and where their names are now.
MODULES = {
    "pdcore.array_backend": "pdcore.backend.array_backend",
    "pdcore.builtin_normalizations": "pdcore.plugins.builtin_normalizations",
    "pdcore.call": "pdcore.backend.call",
    "pdcore.commands": "pdcore.cli.commands",
    "pdcore.commands_bench": "pdcore_conformance.cli.bench",
    "pdcore.commands_conform": "pdcore_conformance.cli.conform",
    "pdcore.commands_derive": "pdcore.cli.derive",
    "pdcore.commands_new": "pdcore_conformance.cli.new",
    "pdcore.commands_report": "pdcore_conformance.cli.report",
    "pdcore.convolution": "pdcore.spec.normalizations.convolution",
    "pdcore.demo": "pdcore_conformance.cli.demo",
    "pdcore.discovery": "pdcore.plugins.discovery",
    "pdcore.explanation": "pdcore.dispatch.explanation",
    "pdcore.expression": "pdcore.spec.expression",
    "pdcore.feature_contraction": "pdcore.backend.feature_contraction",
    "pdcore.files": "pdcore.cli.files",
    "pdcore.grammar": "pdcore.spec.grammar",
    "pdcore.heads": "pdcore.spec.heads",
    "pdcore.hookspecs": "pdcore.plugins.hookspecs",
    "pdcore.instance_enhanced": "pdcore.spec.normalizations.instance_enhanced",
    "pdcore.inventory": "pdcore.plugins.inventory",
    "pdcore.kernels": "pdcore.spec.kernels",
    "pdcore.layers": "pdcore.derivation.layers",
    "pdcore.mixture": "pdcore.spec.normalizations.mixture",
    "pdcore.normalization": "pdcore.spec.normalizations",
    "pdcore.operands": "pdcore.backend.operands",
    "pdcore.pictures": "pdcore_conformance.cli.demo.pictures",
    "pdcore.pieces": "pdcore.cli.pieces",
    "pdcore.plan": "pdcore.lowering.plan",
    "pdcore.reference_inputs": "pdcore.reference.inputs",
    "pdcore.reference_kernels": "pdcore.reference.kernels",
    "pdcore.reference_normalizations": "pdcore.reference.normalizations",
    "pdcore.reporting": "pdcore.cli.reporting",
    "pdcore.score_contraction": "pdcore.backend.score_contraction",
    "pdcore.selection": "pdcore.dispatch.selection",
    "pdcore.silent_backend": "pdcore.backend.silent_backend",
    "pdcore.statistics": "pdcore.spec.statistics",
    "pdcore.support": "pdcore.spec.support",
    "pdcore.tracing": "pdcore.dispatch.tracing",
    "pdcore.transform": "pdcore.lowering.transforms",
    "pdcore.validation": "pdcore.dispatch.validation",
    "pdcore.vocabulary": "pdcore.spec.vocabulary",
    "pdcore_conformance.apart": "pdcore_conformance.bench.apart",
    "pdcore_conformance.budget": "pdcore_conformance.judge.budget",
    "pdcore_conformance.calls": "pdcore_conformance.judge.calls",
    "pdcore_conformance.comparison": "pdcore_conformance.report.comparison",
    "pdcore_conformance.comparison_speed": "pdcore_conformance.report.comparison_speed",
    "pdcore_conformance.environment": "pdcore_conformance.record.environment",
    "pdcore_conformance.gpu_wrappers": "pdcore_conformance.gpu.ptx_wrappers",
    "pdcore_conformance.judging": "pdcore_conformance.judge.judging",
    "pdcore_conformance.memory": "pdcore_conformance.bench.memory",
    "pdcore_conformance.new_backend": "pdcore_conformance.template.new_backend",
    "pdcore_conformance.outcomes": "pdcore_conformance.runner.outcomes",
    "pdcore_conformance.own_words": "pdcore_conformance.judge.user_axes",
    "pdcore_conformance.peers": "pdcore_conformance.bench.peers",
    "pdcore_conformance.plain": "pdcore_conformance.bench.numpy_variants",
    "pdcore_conformance.plugin": "pdcore_conformance.runner.plugin",
    "pdcore_conformance.record_reading": "pdcore_conformance.record.reading",
    "pdcore_conformance.record_types": "pdcore_conformance.record.types",
    "pdcore_conformance.running": "pdcore_conformance.runner.conforming",
    "pdcore_conformance.speed": "pdcore_conformance.bench.speed",
    "pdcore_conformance.speed_figures": "pdcore_conformance.bench.figures",
    "pdcore_conformance.speed_grid": "pdcore_conformance.bench.grid",
    "pdcore_conformance.speed_rates": "pdcore_conformance.bench.rates",
    "pdcore_conformance.speed_table": "pdcore_conformance.bench.table",
    "pdcore_conformance.subject": "pdcore_conformance.judge.subject",
    "pdcore_conformance.timing": "pdcore_conformance.bench.timing",
}

#: Names of 0.1 that are called otherwise now, or left a module which kept its own name.
NAMES = {
    "pdcore.call.Normaliser": "pdcore.backend.normaliser.Normaliser",
    "pdcore.lowering.lower_request": "pdcore.backend.Request.lower",
    "pdcore.transform.Fold": "pdcore.lowering.fold.Fold",
    "pdcore_conformance.plugin.SUITE": "pdcore_conformance.runner.cases.SUITE",
}

#: Modules of 0.1 that are no longer installed, and the folder of the repository that has them.
OUTSIDE = {
    "pdcore.commands_reproduce": "examples/reproduction",
    "pdcore_conformance.reproduce": "examples/reproduction",
    "pdcore_conformance.training": "examples/reproduction/training",
}


class _Loader(Loader):
    """Load an old module as an empty one that looks its names up where they are now."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = MODULES[old]
        # Level 2 is the statement that imports: frames of the import system do not count.
        warnings.warn(_message(old, new), DeprecationWarning, stacklevel=2)
        today = importlib.import_module(new)

        def lookup(name: str) -> Any:
            if f"{old}.{name}" in NAMES or name.startswith("__"):
                return attribute(old, name)
            return getattr(today, name)

        vars(module).update(
            __doc__=today.__doc__,
            __all__=list(getattr(today, "__all__", ())),
            __getattr__=lookup,
            __dir__=lambda: dir(today),
        )


class _Finder(MetaPathFinder):
    """Find the modules of 0.1, after every other finder."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MODULES:
            return ModuleSpec(fullname, _Loader())
        if fullname in OUTSIDE:
            raise ModuleNotFoundError(
                f"{fullname} is not installed any more: it is in {OUTSIDE[fullname]} of pdcore's "
                "repository, and `nox -s reproduce` runs it",
                name=fullname,
            )
        return None


def install() -> None:
    """Let old modules be imported; a second call changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def attribute(module: str, name: str) -> Any:
    """Return what a module of 0.1 had under a name, with a `DeprecationWarning`.

    Parameters
    ----------
    module : str
        A room that kept the name of an old module; its ``__getattr__`` calls this function.
    name : str
        The name that the room does not have.

    Raises
    ------
    AttributeError
        For a name that 0.1 had not.
    """
    old = f"{module}.{name}"
    new = NAMES.get(old) or MODULES.get(old)
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    # Level 3 is the statement that reads the name: above it are this function and `__getattr__`.
    warnings.warn(_message(old, new), DeprecationWarning, stacklevel=3)
    return _resolve(new)


def _message(old: str, new: str) -> str:
    return f"{old} is now {new}; the old name works in this release only"


def _resolve(path: str) -> Any:
    """Return the object at a dotted path: modules first, then attributes."""
    name, _, rest = path.partition(".")
    value: Any = importlib.import_module(name)
    for part in rest.split("."):
        name = f"{name}.{part}"
        if not hasattr(value, part):
            importlib.import_module(name)
        value = getattr(value, part)
    return value
