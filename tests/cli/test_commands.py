"""Test that commands are declared by entry points and imported when they are called."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, distribution
from pathlib import Path
from typing import Any

import pytest
from installing import fresh
from typer.testing import CliRunner

import pdcore.cli
from pdcore.cli import discovery as command_discovery
from pdcore.cli.commands import app
from pdcore.cli.core_commands import COMMANDS as CORE
from pdcore.errors import Exit
from pdcore_conformance.cli import COMMANDS as CONFORMANCE

GROUP = "pdcore.commands"
ALL = {**CORE, **CONFORMANCE}


def run(*arguments: str) -> Any:
    options = {"COLUMNS": "200"}
    return CliRunner().invoke(app, list(arguments), prog_name="pdcore", env=options)


def install(folder: Path, name: str, module: str, content: str) -> Path:
    """Write a distribution, with metadata, whose only table of commands is `module`."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {module}:COMMANDS\n")
    (folder / f"{module}.py").write_text(content)
    return folder


@pytest.fixture
def third_party(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Install a distribution ``thirdparty``; the parameter is the module of its table."""
    install(tmp_path, "thirdparty", "thirdparty_table", request.param)
    (tmp_path / "thirdparty_greeting.py").write_text(GREETING)
    monkeypatch.syspath_prepend(str(tmp_path))
    for variable in ("PDCORE_PLUGINS", "PDCORE_BLOCK"):
        monkeypatch.delenv(variable, raising=False)
    yield
    for name in ("thirdparty_table", "thirdparty_greeting"):
        sys.modules.pop(name, None)


GREETING = '''
import typer
from pdcore.cli.reporting import emit, reported, stdout

@reported
def greet(name: str = typer.Argument("world"), as_json: bool = typer.Option(False, "--json")):
    """Greet somebody, for a test."""
    emit({"name": name}) if as_json else stdout().print(f"hello {name}")

@reported
def raising():
    """Raise an error that is a defect."""
    raise ZeroDivisionError
'''
WORKING = 'COMMANDS = {"greet": ("thirdparty_greeting:greet", "Greet somebody, for a test.")}'


# --- the declared commands --------------------------------------------------------------------


def test_the_distribution_declares_two_tables() -> None:
    points = [p for p in distribution("pdcore").entry_points if p.group == GROUP]
    assert {p.name: p.load() for p in points} == {"pdcore": CORE, "pdcore_conformance": CONFORMANCE}


def test_a_source_tree_that_is_not_installed_has_the_same_tables() -> None:
    points = command_discovery._source_tree()
    assert all(owner.built_in for _, owner in points)
    installed = {p for p in distribution("pdcore").entry_points if p.group == GROUP}
    assert {(p.name, p.value) for p, _ in points} == {(p.name, p.value) for p in installed}


@pytest.mark.parametrize("name", ALL)
def test_the_line_of_the_help_is_the_first_of_the_docstring(name: str) -> None:
    target, summary = ALL[name]
    function = EntryPoint(name, target, GROUP).load()
    assert inspect.getdoc(function).partition("\n")[0] == summary
    assert summary in run("--help").stdout


def test_help_imports_no_command() -> None:
    modules = sorted({target.partition(":")[0] for target, _ in ALL.values()})
    heavy = ["matplotlib", "pytest", "hypothesis", "scipy", "safetensors", "rich.progress"]
    code = (
        "import json, sys\n"
        "from pdcore.cli import main\n"
        "sys.argv = ['pdcore', '--help']\n"
        "sys.stdout, out = sys.stderr, sys.stdout\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "ours = [m for m in sys.modules if m.startswith('pdcore_conformance')]\n"
        f"print(json.dumps([ours, sorted(set({modules + heavy}) & set(sys.modules))]), file=out)\n"
    )
    ours, imported = fresh(code)
    assert imported == []
    assert set(ours) == {"pdcore_conformance", "pdcore_conformance.cli"}


def test_one_command_imports_no_other() -> None:
    code = (
        "import json, sys\n"
        "from pdcore.cli import main\n"
        "sys.argv = ['pdcore', 'specs']\n"
        "sys.stdout, out = sys.stderr, sys.stdout\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)), file=out)\n"
    )
    modules = set(fresh(code))
    assert "pdcore.cli.specs" in modules
    assert not modules & {"pdcore.cli.attend", "pdcore.cli.derive"}
    assert not any(name.startswith("pdcore_conformance.cli.") for name in modules)


def test_the_core_names_nothing_above_it() -> None:
    """Check that neither an import nor a text of the core names conformance: entry points do."""
    for path in Path(pdcore.cli.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"pdcore_(conformance|backends|adapters)", text), path


def test_importing_the_command_line_imports_no_conformance() -> None:
    code = (
        "import json, sys, pdcore.cli, pdcore.cli.commands\n"
        "print(json.dumps([m for m in sys.modules if m.startswith('pdcore_conformance')]))"
    )
    assert fresh(code) == []


def test_a_command_that_moved_says_where_it_is() -> None:
    result = run("reproduce", "--full")
    assert result.exit_code == Exit.USAGE
    assert "unknown command 'reproduce'; it is `python examples/reproduce.py`" in result.stderr


# --- third parties ----------------------------------------------------------------------------


@pytest.mark.parametrize("third_party", [WORKING], indirect=True)
def test_a_third_party_adds_a_command(third_party: None) -> None:
    text = run("--help").stdout
    assert "Greet somebody, for a test." in text
    assert "thirdparty_greeting" not in sys.modules
    assert run("greet", "you").stdout == "hello you\n"
    assert json.loads(run("greet", "you", "--json").stdout) == {"name": "you"}


@pytest.mark.parametrize("third_party", [WORKING], indirect=True)
@pytest.mark.parametrize("variable", [("PDCORE_PLUGINS", ""), ("PDCORE_BLOCK", "thirdparty")])
def test_the_environment_leaves_a_table_out(
    third_party: None, variable: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(*variable)
    assert run("greet").exit_code == Exit.USAGE
    assert run("specs").exit_code == 0


@pytest.mark.parametrize(
    ("third_party", "reason"),
    [
        ("raise RuntimeError('no [/ink]')", "RuntimeError: no [/ink]"),
        ("", "AttributeError: module 'thirdparty_table' has no attribute 'COMMANDS'"),
        ("COMMANDS = ['greet']", "the table of commands is list, expected a mapping"),
        ("COMMANDS = {'greet': 'm:f'}", "command 'greet' is declared by 'm:f', expected a pair"),
        ("COMMANDS = {'greet': ('m:f', None)}", "expected a pair such as ('module:function', "),
        (
            "COMMANDS = {'demo': ('m:f', 'Another demo.')}",
            "command 'demo' is declared by distribution pdcore",
        ),
    ],
    indirect=["third_party"],
)
def test_a_broken_table_is_listed_and_the_others_work(third_party: None, reason: str) -> None:
    text = " ".join(run("--help").stdout.replace("│", " ").split())
    assert "thirdparty Broken: " in text
    assert reason in text, text
    assert all(name in text for name in ALL)
    assert run("specs").exit_code == 0
    called = run("thirdparty", "--fast", "now")
    assert called.exit_code == Exit.FAILURE
    assert called.stderr.startswith("pdcore: 'thirdparty' is broken: ")
    assert reason in called.stderr
    assert "(distribution thirdparty 1.0)" in called.stderr
    printed = json.loads(run("thirdparty", "--json").stdout)
    assert printed["exit_code"] == Exit.FAILURE
    assert reason in printed["error"]["message"]


@pytest.mark.parametrize(
    ("third_party", "reason"),
    [
        ('COMMANDS = {"greet": ("no_such_module:f", "Greet.")}', "ModuleNotFoundError"),
        ('COMMANDS = {"greet": ("thirdparty_greeting:no", "Greet.")}', "AttributeError"),
        ('COMMANDS = {"greet": ("thirdparty_greeting:GROUP", "Greet.")}', "AttributeError"),
        ('COMMANDS = {"greet": ("typer:__name__", "Greet.")}', "TypeError"),
    ],
    indirect=["third_party"],
)
def test_a_command_that_cannot_be_imported_says_why(third_party: None, reason: str) -> None:
    assert "Greet." in run("--help").stdout
    called = run("greet", "--json")
    assert called.exit_code == Exit.FAILURE
    assert f"'greet' is broken: {reason}" in json.loads(called.stdout)["error"]["message"]
    assert run("specs").exit_code == 0


@pytest.mark.parametrize(
    "third_party",
    ['COMMANDS = {"raising": ("thirdparty_greeting:raising", "Look [/here].")}'],
    indirect=True,
)
def test_a_defect_of_a_command_stays_a_traceback(third_party: None) -> None:
    assert "Look [/here]." in run("--help").stdout
    assert isinstance(run("raising").exception, ZeroDivisionError)


def test_a_broken_table_does_not_hide_a_command(tmp_path: Path) -> None:
    install(tmp_path, "demo", "demo_table", "raise RuntimeError('no ink')")
    paths = [str(tmp_path), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-m", "pdcore", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(paths), "COLUMNS": "200"},
    )
    assert "Run every preset on recorded vowels" in done.stdout
    assert "demo (demo)" in done.stdout
    assert "no ink" in done.stdout


def test_the_package_of_the_runner_is_light() -> None:
    code = (
        "import json, sys, pdcore_conformance.runner\n"
        "print(json.dumps(sorted({'pytest', 'hypothesis', 'autograd'} & set(sys.modules))))"
    )
    assert fresh(code) == []
    runner = importlib.import_module("pdcore_conformance.runner")
    conforming = importlib.import_module("pdcore_conformance.runner.conforming")
    assert runner.conform is conforming.conform
    assert conforming.SuiteResult(None, 5).code == 5
    with pytest.raises(AttributeError, match="no attribute 'conformm'"):
        runner.conformm  # noqa: B018
