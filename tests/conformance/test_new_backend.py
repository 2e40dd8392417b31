"""A plug-in from the template, installed in a new environment: it passes, and fails when broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pdcore.cli.commands import app
from pdcore.errors import Exit


def run(*arguments):
    return CliRunner().invoke(app, ["new-backend", *map(str, arguments)])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    result = run("fresh_one", "--output", folder)
    assert result.exit_code == 0, result.output
    return folder / "pdcore-fresh-one"


@pytest.fixture(scope="module")
def python(project):
    """Return a Python with the plug-in installed, in addition to the packages of the tests."""
    environment = project.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    executable = environment / "bin" / "python"
    if not executable.exists():
        executable = environment / "Scripts" / "python.exe"
    outside = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    installed = subprocess.run(
        [executable, "-m", "pip", "install", "--quiet", "--no-deps", str(project)],
        capture_output=True,
        text=True,
        check=False,
        env=outside,
    )
    assert installed.returncode == 0, installed.stderr
    # Add the packages of the tests after those of the environment.
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = subprocess.run([executable, "-c", script], check=True, capture_output=True, text=True)
    paths = "\n".join(str(Path(path).resolve()) for path in sys.path if path)
    Path(purelib.stdout.strip(), "outer.pth").write_text(paths + "\n")
    return executable


def conform(python, *arguments):
    record = Path(python).parent / "record.json"
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PDCORE_")}
    done = subprocess.run(
        [python, "-m", "pdcore", "conform", "fresh_one", "--report", str(record), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=variables,
        cwd=Path(python).parent,
    )
    assert record.exists(), done.stdout + done.stderr
    return done, json.loads(record.read_text())["runs"][0]


def test_a_generated_plugin_passes(python):
    done, result = conform(python, "--level", "core")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["counts"]["passed"] > 200
    assert result["counts"]["failed"] == 0


CASES = [
    "kernels::kernel_is_computed[softmax-float32]",
    "kernels::kernel_is_computed[linear-float32]",
    "support::causal_includes_the_present[causal-float32-rows=11]",
    "gradients::gradient_of_each_kernel[softmax-float32]",
]
ONLY = [argument for case in CASES for argument in ("--case", case)]


def test_declared_optional_features_pass(python):
    done, result = conform(python, *ONLY)
    assert done.returncode == 0, done.stdout
    assert result["counts"]["passed"] == len(CASES)


def test_a_broken_override_fails_the_cases_that_use_it(project, python):
    """An error of 1 % in the scale fails the cases in which the override runs, and no others."""
    source = project / "pdcore_fresh_one" / "backend.py"
    text = source.read_text()
    assert text.count("c.scale * xp.matmul(") == 1
    script = "import pdcore_fresh_one.backend as b; print(b.__file__)"
    where = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True)
    installed = Path(where.stdout.strip())
    assert installed.read_text() == text
    installed.write_text(text.replace("c.scale * xp.matmul(", "1.01 * c.scale * xp.matmul("))
    try:
        done, result = conform(python, *ONLY)
    finally:
        installed.write_text(text)
    assert done.returncode == Exit.NUMERICS
    outcomes = {case["id"]: case for case in result["cases"]}
    assert [outcomes[case]["outcome"] for case in CASES] == ["failed", "passed", "failed", "failed"]
    assert outcomes[CASES[0]]["ratio"] > 100
    assert "of its budget" in outcomes[CASES[0]]["message"]
    assert "--case" in done.stdout


def test_its_own_test_runs_the_suite(project):
    text = (project / "tests" / "test_conformance.py").read_text()
    assert '"conform", "fresh_one"' in text
    compile(text, "test_conformance.py", "exec")


def test_no_template_syntax_is_left(project):
    for path in project.rglob("*"):
        assert "{" not in path.name
        assert path.suffix != ".jinja"
        if path.is_file():
            assert "{{" not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("numpy",), "there is a backend 'numpy' already"),
        (("no-name",), "expected at most 64 of a-z"),
        (("class",), "expected at most 64 of a-z"),
        (("mine", "--library", "no library"), "expected an import name"),
    ],
)
def test_a_wrong_name_is_a_usage_error(arguments, message, tmp_path):
    result = run(*arguments, "--output", tmp_path)
    assert result.exit_code == Exit.USAGE
    assert message in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_project_is_left_alone(tmp_path):
    (tmp_path / "pdcore-mine").mkdir()
    (tmp_path / "pdcore-mine" / "work.py").write_text("precious")
    result = run("mine", "--output", tmp_path)
    assert result.exit_code == Exit.OUTPUT
    assert [p.name for p in (tmp_path / "pdcore-mine").iterdir()] == ["work.py"]


@pytest.mark.parametrize("library", ["torch", "jax", "cupy", "array_api_strict", "other"])
def test_other_libraries(library, tmp_path):
    result = run("mine", "--library", library, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "pdcore-mine" / "pdcore_mine" / "__init__.py").read_text()
    assert f'library="{library}"' in text
    assert ('"autodiff"' in text) == (library in ("cupy", "array_api_strict", "other"))
