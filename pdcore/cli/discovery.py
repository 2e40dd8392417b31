"""The commands that installed distributions add to ``pdcore``.

An entry point of the group ``pdcore.commands`` names a table: a mapping from the name of a command
to a pair of texts, the command's function as ``"module:function"`` and the line about the command
in ``pdcore --help``. The help imports the module of the table, and no command. The environment
variables ``PDCORE_BLOCK`` and ``PDCORE_PLUGINS`` leave tables out as they leave out plugins.

A table that fails to load, or has the name of a command that another distribution has, is kept as
broken, with the reason; the other tables do not notice.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import PluginError
from ..plugins import BrokenPlugin, discovery

__all__ = ["GROUP", "Command", "find_commands"]

GROUP = "pdcore.commands"


class Command(NamedTuple):
    """A command that a distribution declares.

    Attributes
    ----------
    name : str
        The word after ``pdcore``.
    target : str
        The function, as ``"module:function"``.
    summary : str
        The line about the command in the help.
    owner : Owner
        The distribution.
    """

    name: str
    target: str
    summary: str
    owner: discovery.Owner

    def load(self) -> Any:
        """Import the function."""
        with redirect_stdout(sys.stderr):
            return EntryPoint(self.name, self.target, GROUP).load()

    def failure(self, error: BaseException) -> BrokenPlugin:
        """Return the record of an error in this command's module."""
        return BrokenPlugin(self.owner.distribution, self.owner.version, error)


def find_commands() -> tuple[dict[str, Command], dict[str, BrokenPlugin]]:
    """Find the commands of all distributions, and import none.

    Returns
    -------
    commands : dict of str to Command
        Those of the distribution pdcore first.
    broken : dict of str to BrokenPlugin
        Tables that failed, by the names of their entry points, or of their distributions where an
        entry point cannot be read or its name is taken.
    """
    commands: dict[str, Command] = {}
    broken: dict[str, BrokenPlugin] = {}
    points, unreadable = discovery.find_entry_points(GROUP)
    if not any(owner.built_in for _, owner in points):
        points = _source_tree() + points
    for name, (owner, error) in unreadable.items():
        broken[name] = BrokenPlugin(owner.distribution, owner.version, error)
    for point, owner in points:
        if discovery.disabled_reason(point.name, owner) is not None:
            continue
        try:
            with redirect_stdout(sys.stderr):  # standard output is for results
                table = _read_table(point.load(), owner)
            for name in table:
                if name in commands:
                    raise PluginError(
                        f"command {name!r} is declared by {commands[name].owner} already, and "
                        f"again by {owner}"
                    )
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - a defect of a third party is its own
            name = (
                point.name if point.name not in broken else f"{point.name} ({owner.distribution})"
            )
            broken[name] = BrokenPlugin(owner.distribution, owner.version, error)
        else:
            commands |= table
    return commands, broken


def _read_table(table: Any, owner: discovery.Owner) -> dict[str, Command]:
    """Return the commands of a table, after checks of its types."""
    if not isinstance(table, Mapping):
        raise PluginError(f"the table of commands is {type(table).__name__}, expected a mapping")
    commands = {}
    for name, pair in table.items():
        texts = pair if isinstance(pair, (tuple, list)) else ()
        if len(texts) != 2 or not all(isinstance(text, str) for text in (name, *texts)):
            raise PluginError(
                f"command {name!r} is declared by {pair!r}, expected a pair such as "
                "('module:function', 'What the command does.')"
            )
        commands[name] = Command(name, texts[0], texts[1], owner)
    return commands


def _source_tree() -> list[tuple[EntryPoint, discovery.Owner]]:
    """Return the entry points of a source tree that is not installed, from its pyproject.toml."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    if not path.is_file():
        return []
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    if project.get("name") != "pdcore":
        return []
    owner = discovery.Owner("pdcore", "(source tree)", built_in=True)
    declared = project.get("entry-points", {}).get(GROUP, {})
    return [(EntryPoint(name, value, GROUP), owner) for name, value in declared.items()]
