"""Search for plugins, and reading of their declarations, for `pdcore.plugins.registry`.

This module has no state. Every check raises a `PluginError` that describes the defect in one
line, so that the author of a plugin need not read a traceback of pdcore.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import (
    Distribution,
    EntryPoint,
    EntryPoints,
    distributions,
    entry_points,
)
from itertools import chain
from typing import Any, NamedTuple

import pluggy

from ..backend import SPEC_VERSION, BackendInfo
from ..errors import PluginError, nearest
from . import hookspecs

__all__ = [
    "Declarations",
    "Owner",
    "check_backend_info",
    "disabled_reason",
    "find_entry_points",
    "names_in",
    "new_manager",
    "read_declarations",
]

GROUP = "pdcore"
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("pdcore_"))

# These plugins are found without an installed distribution too, as in a source tree.
_BUILT_IN = {
    **{name: f"pdcore_backends.{name}" for name in ("numpy", "strict", "torch", "jax", "cupy")},
    "normalizations": "pdcore.plugins.builtin_normalizations",
}


class Owner(NamedTuple):
    """The distribution that ships a plugin."""

    distribution: str
    version: str
    built_in: bool = False

    def __str__(self) -> str:
        return f"distribution {self.distribution} {self.version}"


class Declarations(NamedTuple):
    """The results of the hooks of one plugin."""

    backends: list[BackendInfo]
    kernels: list[type]
    normalizations: list[type]
    known_failures: Callable[[str], Any] | None


def find_entry_points(
    group: str = GROUP,
) -> tuple[list[tuple[EntryPoint, Owner]], dict[str, tuple[Owner, Exception]]]:
    """Return the entry points: first those of the distribution pdcore, then the others by name.

    Parameters
    ----------
    group : str
        The entry-point group; that of plugins by default.

    Returns
    -------
    owned : list of (EntryPoint, Owner)
    unreadable : dict of str to (Owner, Exception)
        Distributions whose entry points cannot be read, by name.
    """
    points: list[EntryPoint] = []
    unreadable = {}
    try:
        points += entry_points(group=group)
    except Exception:  # noqa: BLE001 - one unreadable distribution hides all others
        readable: dict[str, EntryPoints | tuple[()]] = {}
        for distribution in distributions():
            owner = _owner(distribution)
            # Of distributions of one name, the first on the path is the one that is imported.
            if owner.distribution not in readable:
                try:
                    readable[owner.distribution] = distribution.entry_points.select(group=group)
                except Exception as error:  # noqa: BLE001 - the error is reported
                    readable[owner.distribution] = ()
                    unreadable[owner.distribution] = (owner, error)
        points += chain.from_iterable(readable.values())
    owned = [(point, _owner(point.dist)) for point in points]
    installed = {point.name for point, owner in owned if owner.built_in}
    # The package pdcore_backends is empty, so that `find_spec` of its modules imports nothing.
    if group == GROUP and importlib.util.find_spec("pdcore_backends") is not None:
        source_tree = Owner(GROUP, "(source tree)", built_in=True)
        owned += [
            (EntryPoint(name, module, GROUP), source_tree)
            for name, module in _BUILT_IN.items()
            if name not in installed and importlib.util.find_spec(module) is not None
        ]
    owned.sort(key=lambda pair: (not pair[1].built_in, pair[1].distribution.lower(), pair[0].name))
    return owned, unreadable


def names_in(variable: str) -> frozenset[str] | None:
    """Return the names that an environment variable lists, by commas; None where it is not set."""
    text = os.environ.get(variable)
    if text is None:
        return None
    return frozenset(name.strip() for name in text.split(",") if name.strip())


def disabled_reason(name: str, owner: Owner) -> str | None:
    """Return why the environment leaves an entry point out; None where it does not."""
    if name in (names_in("PDCORE_BLOCK") or ()):
        return "disabled: named in PDCORE_BLOCK"
    allowed = names_in("PDCORE_PLUGINS")
    if allowed is not None and not owner.built_in and name not in allowed:
        return "disabled: not named in PDCORE_PLUGINS"
    return None


def _owner(distribution: Distribution | None) -> Owner:
    try:
        name, version = distribution.name, distribution.version  # type: ignore[union-attr]
    except Exception:  # noqa: BLE001 - metadata that cannot be read
        name, version = "", ""
    name = name or "(unknown)"
    return Owner(name, version or "", re.sub(r"[-_.]+", "-", name).lower() == GROUP)


def new_manager() -> pluggy.PluginManager:
    """Create a plugin manager with the hook specifications of pdcore."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    return manager


def read_declarations(manager: pluggy.PluginManager, plugin: Any) -> Declarations:
    """Check the hooks of one registered plugin, call them, and check their results.

    The hooks are not called by ``manager.hook``, which calls all plugins at once, stops at the
    first exception, and drops results that are None.

    Raises
    ------
    PluginError
        When a hook or its result is wrong; the message describes the defect.
    """
    results: dict[str, Any] = {}
    for caller in manager.get_hookcallers(plugin) or ():
        for hook in caller.get_hookimpls():
            if hook.plugin is not plugin:
                continue
            if caller.name not in HOOKS:
                if not hook.optionalhook:
                    raise _unknown_hook(caller.name)
            elif hook.wrapper or hook.hookwrapper:
                raise PluginError(f"{caller.name} is a hook wrapper, expected a plain function")
            elif caller.name == "pdcore_known_failures":
                results[caller.name] = _by_position(hook)
            else:
                results[caller.name] = _call(caller.name, hook.function)
    for name in _unmarked(manager, plugin):
        if name in HOOKS:
            raise PluginError(f"{name} is not decorated with pdcore.hookimpl")
        raise _unknown_hook(name)
    if not results:
        raise PluginError(f"it implements no hook; known: {', '.join(HOOKS)}")
    return Declarations(
        _listed(results, "pdcore_backends", BackendInfo, "BackendInfo"),
        _listed(results, "pdcore_kernels", type, "Kernel classes"),
        _listed(results, "pdcore_normalizations", type, "Normalization classes"),
        results.get("pdcore_known_failures"),
    )


def check_backend_info(info: BackendInfo) -> None:
    """Check fields of a `BackendInfo` that its constructor does not check.

    Raises
    ------
    PluginError
        When it is for another version of the plan contract, or a string is in place of a
        sequence of strings.
    """
    if info.spec_version != SPEC_VERSION:
        older = info.spec_version < SPEC_VERSION
        raise PluginError(
            f"backend {info.name!r} is written for version {info.spec_version} of the plan "
            f"contract, this pdcore has version {SPEC_VERSION}: upgrade "
            f"{'the plugin' if older else 'pdcore'}"
        )
    for name in ("requires", "devices"):
        value = getattr(info, name)
        if isinstance(value, str):
            raise PluginError(
                f"backend {info.name!r}: {name} is {value!r}, expected a sequence such as "
                f"({value!r},)"
            )


def _unknown_hook(name: str) -> PluginError:
    return PluginError(f"unknown hook {name!r}; {nearest(name, HOOKS)}")


def _call(name: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise PluginError(f"{name} raised {type(error).__name__}: {error}") from error


def _by_position(hook: pluggy.HookImpl) -> Callable[[str], Any]:
    # As in pluggy, an implementation may omit arguments that it does not need.
    function, count = hook.function, len(hook.argnames)
    return lambda backend: function(*(backend,)[:count])


def _unmarked(manager: pluggy.PluginManager, plugin: Any) -> Iterator[str]:
    """Yield functions that are named like hooks but not decorated, which pluggy ignores."""
    for name in dir(plugin):
        if name.startswith("pdcore_") and manager.parse_hookimpl_opts(plugin, name) is None:
            value = getattr(plugin, name)
            if callable(value) and not isinstance(value, type):
                yield name


def _listed(results: Mapping[str, Any], hook: str, kind: type, what: str) -> list[Any]:
    value = results.get(hook, ())
    if not isinstance(value, (list, tuple)):
        raise PluginError(f"{hook} returned {type(value).__name__}, expected a list of {what}")
    for item in value:
        if not isinstance(item, kind):
            raise PluginError(
                f"{hook} returned a list with {type(item).__name__}, expected a list of {what}"
            )
    return list(value)
