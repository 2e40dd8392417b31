"""The registry of backends, and the discovery of the plugins that fill it.

A plugin is a module named by an entry point of the group ``pdcore``; it implements some of the
hooks of `hookspecs`. The built-in backends are plugins too. Discovery happens once, at the first
call that needs it, and imports no framework: a plugin declares its backends as data, and the
module of a backend is imported at its first use. A plugin that fails is removed completely and
recorded in `broken` with its exception, without effect on other plugins.

Two environment variables are read at discovery. ``PDCORE_BLOCK=name,name`` disables the entry
points and backends of these names, built-in ones too, without importing them. With
``PDCORE_PLUGINS=name,name``, the only entry points of third parties that are loaded are those of
these names; if it is set and empty, none are loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..backend import Backend, BackendInfo
from ..errors import NoBackendError, PluginError, nearest
from ..spec import vocabulary
from .entry import BrokenPlugin, Entry, instantiate, is_importable

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


#: Plugins that failed, by the names of their entry points.
broken: dict[str, BrokenPlugin] = {}
#: Names that ``PDCORE_BLOCK`` and ``PDCORE_PLUGINS`` disable, each with the reason.
disabled: dict[str, str] = {}

_entries: dict[str, Entry] = {}
_instances: dict[str, Backend] = {}
_failed: dict[str, BrokenPlugin] = {}
_installed: set[str] = set()
_candidates: dict[str, tuple[str, ...]] = {}
_words: set[str] = set()
#: Guards the tables, and is never held while code of a plugin runs.
_lock = threading.RLock()
_progress = threading.Condition(_lock)
_stage = "to do"
_discoverer: int | None = None
_generation = 0
#: Seconds that a thread waits for the discovery of another one.
PATIENCE = 5.0


def discover() -> None:
    """Find and register all plugins, once per process.

    Exceptions of a plugin are not raised, but recorded in `broken`; only an interrupt by the user
    is raised. A thread that calls this function during the discovery of another thread waits for
    its end, but not for ever, since a plugin may wait for that thread: after a few seconds the
    function returns, and the thread sees the plugins that have been loaded so far.
    """
    global _stage, _discoverer
    if _stage == "done":
        return
    with _progress:
        # The discovering thread itself gets here where a plugin calls this function.
        while _stage == "under way" and _discoverer != threading.get_ident():
            if not _progress.wait(PATIENCE):
                return
        if _stage != "to do":
            return
        _stage, _discoverer = "under way", threading.get_ident()
    try:
        _discover_all()
    except BaseException:
        _reset()
        raise
    with _progress:
        _stage = "done"
        _progress.notify_all()


def generation() -> int:
    """Return the number of changes of the registry, a cache key for selections."""
    return _generation


def registered() -> dict[str, BackendInfo]:
    """Return the declared backends by name: built-in ones first, then by priority and name."""
    discover()
    with _lock:
        entries = sorted(_entries.values(), key=lambda entry: entry.rank)
    return {entry.info.name: entry.info for entry in entries}


def candidates(library: str) -> tuple[str, ...]:
    """Return the backends that run a library's arrays unasked, in the order of `registered`."""
    names = _candidates.get(library)
    if names is None:
        with _lock:
            infos = registered()
            names = tuple(
                name
                for name, info in infos.items()
                if info.library == library and not info.only_if_named
            )
            _candidates[library] = names
    return names


def is_known(name: str) -> bool:
    """Return whether a backend, or a broken or disabled plugin, has this name."""
    discover()
    return name in _entries or name in broken or name in disabled


def load_backend(name: str) -> Backend:
    """Return the single instance of a backend; its module is imported at the first call.

    Raises
    ------
    ValueError
        When no backend has the name.
    NoBackendError
        When the backend is disabled, a package that it requires is not installed, or it failed
        to load. After a failure, later calls do not try again.
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
        # Not under the lock: another thread may hold the import lock of the module and wait for
        # `_lock`. If two threads get here, the module is imported once and one instance dropped.
        try:
            instance = instantiate(entry.info)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - it is stored and reported
            _failed[name] = entry.failure(error)
            cause, reason = error, unavailable_reason(entry.info)
        else:
            with _lock:
                return _instances.setdefault(name, instance)
    raise NoBackendError(f"backend {name}: {reason}", {name: [str(reason)]}) from cause


def unavailable_reason(info: BackendInfo) -> str | None:
    """Return the reason why a declared backend is not available, without importing it.

    Returns
    -------
    str or None
        The packages that are not installed and the command that installs them, or the failure of
        an earlier attempt to load the backend. None if the backend is available.
    """
    failure = _failed.get(info.name)
    if failure is not None:
        return f"failed to load: {failure}"
    if info.name in _installed:
        return None
    # For "a.b", only "a" is searched: finding "a.b" would import "a".
    missing = [name for name in info.requires if not is_importable(name.partition(".")[0])]
    if missing:
        return f"not installed: {info.install or 'needs ' + ', '.join(missing)}"
    # Only success is cached: a missing package may be installed before the next call.
    _installed.add(info.name)
    return None


def register_backend(info: BackendInfo) -> None:
    """Add a backend in this process, without a plugin.

    Raises
    ------
    PluginError
        When the name is taken, or the declaration is for another version of the contract.
    """
    from .discovery import check_backend_info

    discover()
    with _lock:
        check_backend_info(info)
        taken = _entries.get(info.name)
        if taken is not None:
            raise PluginError(
                f"backend {info.name!r} is declared by {taken.origin} already; "
                f"unregister_backend({info.name!r}) takes it out"
            )
        _add(Entry(info, None))


def unregister_backend(name: str) -> None:
    """Remove a backend for the rest of the process.

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
    """Return the conformance cases that a backend is declared to fail, with the reasons.

    Raises
    ------
    ValueError
        When no backend has the name.
    PluginError
        When the hook of the backend's plugin raises, or returns another type.
    """
    discover()
    entry = _entries.get(backend)
    if entry is None:
        raise ValueError(f"unknown backend {backend!r}; {nearest(backend, _entries)}")
    if entry.known_failures is None:
        return {}
    where = f"pdcore_known_failures({backend!r}) of {entry.origin}"
    try:
        failures = entry.known_failures(backend)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(f"{where} raised {type(error).__name__}: {error}") from error
    if not isinstance(failures, Mapping) or not all(
        isinstance(text, str) for pair in failures.items() for text in pair
    ):
        raise PluginError(f"{where} returned {failures!r}, expected case ids mapped to reasons")
    return dict(failures)


def _add(entry: Entry) -> None:
    with _lock:
        _entries[entry.info.name] = entry
        _changed()


def _remove(name: str) -> None:
    with _lock:
        for table in (_entries, _instances, _failed):
            table.pop(name, None)
        _installed.discard(name)
        _changed()


def _changed() -> None:
    global _generation
    _generation += 1
    _candidates.clear()


def _discover_all() -> None:
    from . import discovery  # here, so that `import pdcore` does not import pluggy

    manager = discovery.new_manager()
    block = discovery.names_in("PDCORE_BLOCK") or frozenset()
    allowed = discovery.names_in("PDCORE_PLUGINS") or frozenset()
    points, unreadable = discovery.find_entry_points()
    for name, (owner, error) in unreadable.items():
        broken[name] = BrokenPlugin(owner.distribution, owner.version, error)
    for point, owner in points:
        reason = discovery.disabled_reason(point.name, owner)
        if reason is None:
            _load(manager, point, owner, block)
        else:
            disabled[point.name] = reason
    for name in sorted(allowed - {point.name for point, _ in points}):
        disabled[name] = "not installed: named in PDCORE_PLUGINS, but no distribution has it"
    for name in sorted(block - set(disabled)):
        disabled[name] = "not installed: named in PDCORE_BLOCK, but no plugin or backend has it"


def _load(manager: PluginManager, point: EntryPoint, owner: Owner, block: frozenset[str]) -> None:
    """Load one plugin: everything that it declares, or nothing if there is an exception."""
    from .discovery import read_declarations

    key = f"{owner.distribution}:{point.name}"
    # A plugin may also register words while it is imported, so the state is compared with that
    # before.
    words, backends = _vocabulary(), set(_entries)
    try:
        plugin = point.load()
        manager.register(plugin, name=key)
        declared = read_declarations(manager, plugin)
        for info in declared.backends:
            _declare(Entry(info, owner, declared.known_failures), block)
        for kernel in declared.kernels:
            vocabulary.register_kernel(kernel)
        for normalization in declared.normalizations:
            vocabulary.register_normalization(normalization)
    except BaseException as error:
        if manager.has_plugin(key):
            manager.unregister(name=key)
        for word in _vocabulary() - words:
            vocabulary.unregister(word)
        for name in set(_entries) - backends:
            _remove(name)
        if isinstance(error, KeyboardInterrupt):
            raise
        name = point.name if point.name not in broken else f"{point.name} ({owner.distribution})"
        with _lock:
            broken[name] = BrokenPlugin(owner.distribution, owner.version, error)
    _words.update(_vocabulary() - words)


def _declare(entry: Entry, block: frozenset[str]) -> None:
    from .discovery import check_backend_info

    name = entry.info.name
    check_backend_info(entry.info)
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
    # Both call `discover`, which returns at once while discovery is under way.
    return {*vocabulary.kernel_words(), *vocabulary.normalization_words()}


def _reset() -> None:
    """Reset the registry to the state before discovery, for tests."""
    global _stage, _discoverer
    with _progress:
        for name in list(_entries):
            _remove(name)
        for word in _words:
            vocabulary.unregister(word)
        _words.clear()
        broken.clear()
        disabled.clear()
        _stage, _discoverer = "to do", None
        _progress.notify_all()


vocabulary.sources.append(discover)
