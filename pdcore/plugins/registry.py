"""The registry of backends, and the discovery of the plugins that fill it.

A plugin is what an entry point of the group ``pdcore`` names; it implements some of the hooks of
`hookspecs`. The built-in backends come in by the same door. Discovery happens once, at the first
need, and imports no framework: a plugin declares its backends as data, and a backend's
module is imported at its first use. A plugin that fails is taken out whole and kept in `broken`
with its exception; the others do not notice.

Two environment variables are read at discovery. ``PDCORE_BLOCK=name,name`` leaves out the entry
points and backends of these names, built-in ones too, without importing them.
``PDCORE_PLUGINS=name,name`` lets in, of third parties, only the entry points of these names; set
and empty, none.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backend import Backend, BackendInfo
from ..errors import NoBackendError, PluginError, nearest
from ..spec import vocabulary

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from pluggy import PluginManager

    from .discovery import Owner

__all__ = [
    "BrokenPlugin",
    "broken",
    "candidates",
    "disabled",
    "discover",
    "generation",
    "is_known",
    "known_failures",
    "load_backend",
    "register_backend",
    "registered",
    "unavailable_reason",
    "unregister_backend",
]


class BrokenPlugin(NamedTuple):
    """A plugin, or the class of a backend, that failed to load.

    Attributes
    ----------
    distribution, version : str
        Who ships it.
    error : BaseException
        What it raised, or a `PluginError` that says what is wrong with it.
    """

    distribution: str
    version: str
    error: BaseException

    def __str__(self) -> str:
        name = "" if isinstance(self.error, PluginError) else f"{type(self.error).__name__}: "
        text = " ".join(str(self.error).split())
        return f"{name}{text} (distribution {self.distribution} {self.version})"


class _Entry(NamedTuple):
    info: BackendInfo
    owner: Owner | None  # None: registered in this process
    known_failures: Callable[[str], Any] | None = None

    @property
    def origin(self) -> str:
        return "register_backend in this process" if self.owner is None else str(self.owner)

    @property
    def rank(self) -> tuple[bool, int, str]:
        built_in = self.owner is not None and self.owner.built_in
        return (not built_in, -self.info.priority, self.info.name)

    def failure(self, error: BaseException) -> BrokenPlugin:
        distribution, version = self.owner[:2] if self.owner else ("(this process)", "")
        return BrokenPlugin(distribution, version, error)


#: Plugins that failed, by the names of their entry points.
broken: dict[str, BrokenPlugin] = {}
#: What ``PDCORE_BLOCK`` and ``PDCORE_PLUGINS`` leave out, by name, each with the reason.
disabled: dict[str, str] = {}

_entries: dict[str, _Entry] = {}
_instances: dict[str, Backend] = {}
_failed: dict[str, BrokenPlugin] = {}
_installed: set[str] = set()
_candidates: dict[str, tuple[str, ...]] = {}
_words: set[str] = set()
_lock = threading.RLock()
_stage = "to do"
_generation = 0


def discover() -> None:
    """Find and register all plugins, once in a process.

    Never raises for what a plugin does; see `broken`.
    """
    global _stage
    if _stage == "done":
        return
    with _lock:
        # Anything but "to do" here is a plugin that asks for plugins while it is imported.
        if _stage != "to do":
            return
        _stage = "under way"
        try:
            _discover_all()
        except BaseException:
            _reset()
            raise
        _stage = "done"


def generation() -> int:
    """Count the changes of the registry, so that a cache of selections knows when it is old."""
    return _generation


def registered() -> dict[str, BackendInfo]:
    """Give the declared backends by name: built-in ones first, then by priority and name."""
    discover()
    with _lock:
        entries = sorted(_entries.values(), key=lambda entry: entry.rank)
    return {entry.info.name: entry.info for entry in entries}


def candidates(library: str) -> tuple[str, ...]:
    """Name the backends that take the arrays of a library, in the order of `registered`."""
    names = _candidates.get(library)
    if names is None:
        with _lock:
            infos = registered()
            names = tuple(name for name, info in infos.items() if info.library == library)
            _candidates[library] = names
    return names


def is_known(name: str) -> bool:
    """Say whether a backend, or a broken or disabled plugin, has this name."""
    discover()
    return name in _entries or name in broken or name in disabled


def load_backend(name: str) -> Backend:
    """Give a backend's one instance; its module is imported at the first call.

    Raises
    ------
    ValueError
        When no backend has the name.
    NoBackendError
        When it is disabled, what it requires is not installed, or it failed to load. A failure
        is remembered, not tried again.
    """
    instance = _instances.get(name)
    if instance is not None:
        return instance
    discover()
    entry = _entries.get(name)
    if entry is not None:
        reason = unavailable_reason(entry.info)
    elif name in broken:
        reason = f"failed to load: {broken[name]}"
    elif name in disabled:
        reason = disabled[name]
    else:
        raise ValueError(f"unknown backend {name!r}; {nearest(name, _entries)}")
    cause: BaseException | None = None
    if entry is not None and reason is None:
        # Not under the lock: another thread may hold the import lock of the same module and
        # wait for ours. Importing twice is one import, and one of two instances is dropped.
        try:
            instance = _instantiate(entry.info)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is stored and reported
            _failed[name] = entry.failure(error)
            cause, reason = error, unavailable_reason(entry.info)
        else:
            with _lock:
                return _instances.setdefault(name, instance)
    raise NoBackendError(f"backend {name}: {reason}", {name: [str(reason)]}) from cause


def unavailable_reason(info: BackendInfo) -> str | None:
    """Say why a declared backend cannot be used at all here, without importing it.

    Returns
    -------
    str or None
        That what it requires is not installed, with the command that installs it, or that an
        earlier attempt to load it failed, with the exception and the distribution.
    """
    failure = _failed.get(info.name)
    if failure is not None:
        return f"failed to load: {failure}"
    if info.name in _installed:
        return None
    # Of "a.b" only "a" is looked for: finding "a.b" would import "a".
    missing = [name for name in info.requires if not _importable(name.partition(".")[0])]
    if missing:
        return f"not installed: {info.install or 'needs ' + ', '.join(missing)}"
    # Not so the other way round: what is missing may be installed before the next call.
    _installed.add(info.name)
    return None


def register_backend(info: BackendInfo) -> None:
    """Add a backend in this process, without a plugin.

    Raises
    ------
    PluginError
        When the name is taken, or the declaration is for another version of the contract.
    """
    from .discovery import check

    discover()
    with _lock:
        check(info)
        taken = _entries.get(info.name)
        if taken is not None:
            raise PluginError(
                f"backend {info.name!r} is declared by {taken.origin} already; "
                f"unregister_backend({info.name!r}) takes it out"
            )
        _add(_Entry(info, None))


def unregister_backend(name: str) -> None:
    """Take a backend out for the rest of the process.

    Raises
    ------
    ValueError
        When no backend has the name.
    """
    discover()
    with _lock:
        if name not in _entries:
            raise ValueError(f"unknown backend {name!r}; {nearest(name, _entries)}")
        _remove(name)


def known_failures(backend: str) -> dict[str, str]:
    """Give the conformance cases that a backend's own plugin says it fails, with the reasons.

    Raises
    ------
    ValueError
        When no backend has the name.
    PluginError
        When the plugin's hook raises or returns something else.
    """
    discover()
    entry = _entries.get(backend)
    if entry is None:
        raise ValueError(f"unknown backend {backend!r}; {nearest(backend, _entries)}")
    if entry.known_failures is None:
        return {}
    where = f"pdcore_known_failures({backend!r}) of {entry.origin}"
    try:
        found = entry.known_failures(backend)
    except Exception as error:
        raise PluginError(f"{where} raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not all(
        isinstance(text, str) for pair in found.items() for text in pair
    ):
        raise PluginError(f"{where} returned {found!r}, expected case ids mapped to reasons")
    return dict(found)


def _importable(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):  # a finder that fails, a module without a spec
        return False


def _instantiate(info: BackendInfo) -> Backend:
    path, _, attribute = info.load.partition(":")
    cls: Any = importlib.import_module(path)
    for part in attribute.split("."):
        cls = getattr(cls, part)
    if not (isinstance(cls, type) and issubclass(cls, Backend)):
        raise PluginError(f"{info.load} is {cls!r}, expected a subclass of pdcore.backend.Backend")
    backend = cls()
    # Selection reads the declaration, and `refusals` the class's own: they must not disagree.
    if getattr(backend, "info", None) != info:
        raise PluginError(
            f"{info.load} has another `info` than what is declared for {info.name!r}: give both "
            "the same BackendInfo"
        )
    return backend


def _add(entry: _Entry) -> None:
    _entries[entry.info.name] = entry
    _changed()


def _remove(name: str) -> None:
    for table in (_entries, _instances, _failed):
        table.pop(name, None)
    _installed.discard(name)
    _changed()


def _changed() -> None:
    global _generation
    _generation += 1
    _candidates.clear()


def _discover_all() -> None:
    from . import discovery  # it costs pluggy and importlib.metadata, so not with `import pdcore`

    manager = discovery.new_manager()
    block = discovery.names_in("PDCORE_BLOCK") or frozenset()
    allowed = discovery.names_in("PDCORE_PLUGINS") or frozenset()
    found, unreadable = discovery.find()
    for name, (owner, error) in unreadable.items():
        broken[name] = BrokenPlugin(owner.distribution, owner.version, error)
    for point, owner in found:
        reason = discovery.disabled_reason(point.name, owner)
        if reason is None:
            _load(manager, point, owner, block)
        else:
            disabled[point.name] = reason
    for name in sorted(allowed - {point.name for point, _ in found}):
        disabled[name] = "not installed: named in PDCORE_PLUGINS, but no distribution has it"


def _load(manager: PluginManager, point: EntryPoint, owner: Owner, block: frozenset[str]) -> None:
    """Load one plugin: all that it declares, or, after an exception, nothing of it."""
    from .discovery import read

    key = f"{owner.distribution}:{point.name}"
    # An import may register too, by decorators; so compare, rather than undo our own steps.
    words, backends = _vocabulary(), set(_entries)
    try:
        plugin = point.load()
        manager.register(plugin, name=key)
        declared = read(manager, plugin)
        for info in declared.backends:
            _declare(_Entry(info, owner, declared.known_failures), block)
        for kernel in declared.kernels:
            vocabulary.register_kernel(kernel)
        for normalization in declared.normalizations:
            vocabulary.register_normalization(normalization)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is stored and reported
        if manager.has_plugin(key):
            manager.unregister(name=key)
        for word in _vocabulary() - words:
            vocabulary.unregister(word)
        for name in set(_entries) - backends:
            _remove(name)
        name = point.name if point.name not in broken else f"{point.name} ({owner.distribution})"
        broken[name] = BrokenPlugin(owner.distribution, owner.version, error)
    _words.update(_vocabulary() - words)


def _declare(entry: _Entry, block: frozenset[str]) -> None:
    from .discovery import check

    name = entry.info.name
    check(entry.info)
    if name in block:
        disabled[name] = "disabled: named in PDCORE_BLOCK"
    elif name in _entries:
        raise PluginError(
            f"backend {name!r} is declared by {_entries[name].origin} already, and again by "
            f"{entry.origin}"
        )
    else:
        _add(entry)


def _vocabulary() -> set[str]:
    # Both ask for discovery, which is under way here and so returns at once.
    return {*vocabulary.kernel_words(), *vocabulary.normalization_words()}


def _reset() -> None:
    """Forget everything that was discovered or registered, for tests."""
    global _stage
    with _lock:
        for name in list(_entries):
            _remove(name)
        for word in _words:
            vocabulary.unregister(word)
        _words.clear()
        broken.clear()
        disabled.clear()
        _stage = "to do"


vocabulary.sources.append(discover)
