"""Virtual environments that several nox sessions share."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints"
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
#: Processes of pytest in one session.
WORKERS = int(os.environ.get("PDCORE_WORKERS", "0")) or min(os.cpu_count() or 1, 4)

# pyenv's own commands answer only for the versions that are active here; nox may use every
# installed one. At the end of the path they hide nothing.
if pyenv_root := os.environ.get("PYENV_ROOT"):
    installed = sorted(str(folder) for folder in Path(pyenv_root).glob("versions/3.*/bin"))
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *installed])


class Step(NamedTuple):
    """One installation: the tool (``uv`` or ``pip``), and its arguments."""

    tool: str
    arguments: tuple[str, ...]


def pinned(names: Sequence[str]) -> list[str]:
    """Return the options for these files of constraints/."""
    return [f"--constraint={CONSTRAINTS / name}.txt" for name in names]


def pip(*arguments: str, pins: Sequence[str] = ()) -> Step:
    """Return an installation by pip."""
    return Step("pip", (*pinned(pins), *arguments))


def uv(*arguments: str, pins: Sequence[str] = ()) -> Step:
    """Return an installation by uv, which takes a tenth of the time."""
    return Step("uv", (*pinned(pins), *arguments))


def local(folder: str) -> Step:
    """Return the installation of a folder, without its dependencies."""
    return Step("uv", ("--no-deps", "--reinstall", str(ROOT / folder)))


class Environment:
    """An environment in .nox, and how to run something in it.

    Parameters
    ----------
    session
        The session that needs it; skipped if the Python is not here.
    name
        The name of its folder.
    python
        A version such as "3.12".
    steps
        What to install. Nothing is installed again until these, the project's metadata, the
        constraints, or a folder that is installed change.
    folder
        Where to build the environment, by default .nox.
    """

    def __init__(
        self,
        session: nox.Session,
        name: str,
        python: str,
        steps: Sequence[Step],
        folder: Path | None = None,
    ) -> None:
        self.session = session
        self.place = (folder or ROOT / ".nox") / name
        self.bin = self.place / ("Scripts" if os.name == "nt" else "bin")
        self.path: list[str] = []
        interpreter = self.interpreter(python)
        if interpreter is None:
            session.skip(f"Python {python} is not here")
        stamp = self.place / "installed"
        wanted = digest(steps)
        if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
            session.log(f"environment {name} is as it should be")
            return
        stamp.unlink(missing_ok=True)
        if not (self.bin / "python").exists():
            command = [sys.executable, "-m", "virtualenv", "-q", "-p", interpreter, str(self.place)]
            session.run(*command, external=True)
        self.run("python", "-m", "pip", "install", "-q", "uv")
        for step in steps:
            self.install(step)
        stamp.write_text(wanted, encoding="utf-8")

    @staticmethod
    @cache
    def interpreter(version: str) -> str | None:
        """Return the path of a Python that works and is of this version; None without one."""
        if version == RUNNING:
            return sys.executable
        for folder in os.environ["PATH"].split(os.pathsep):
            found = shutil.which(f"python{version}", path=folder)
            command = [found or "", "-c", "import ensurepip"]
            if found and subprocess.run(command, capture_output=True, check=False).returncode == 0:
                return found
        return None

    def install(self, step: Step, *more: str) -> None:
        """Carry out one installation; by pip if uv, which knows no configuration of pip, cannot."""
        python = str(self.bin / "python")
        by_pip = ("python", "-m", "pip", "install", "-q", *more)
        plain = tuple("--force-reinstall" if a == "--reinstall" else a for a in step.arguments)
        if step.tool == "uv":
            try:
                self.run("uv", "pip", "install", "-q", "--python", python, *more, *step.arguments)
                return
            except CommandFailed:
                self.session.warn("uv could not install this, so pip does")
        self.run(*by_pip, *plain)

    def beside(self, *packages: str, pins: Sequence[str], dependencies: bool = True) -> Environment:
        """Have packages in a folder of their own, which only this session sees."""
        alone = () if dependencies else ("--no-deps",)
        place = self.place.with_name(f"{self.place.name}-{packages[0]}")
        stamp = place / "installed"
        wanted = digest([uv(*packages, pins=pins)])
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(place, ignore_errors=True)
            step = Step("pip", (*pinned(pins), *alone, *packages))
            self.install(step, "--target", str(place))
            stamp.write_text(wanted, encoding="utf-8")
        self.path.append(str(place))
        return self

    def has(self, command: str) -> bool:
        """Return whether the environment has this command."""
        return (self.bin / command).exists()

    def run(self, command: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Run a command of the environment."""
        path = os.pathsep.join([str(self.bin), os.environ["PATH"]])
        more = {"PATH": path, "VIRTUAL_ENV": str(self.place), **(env or {})}
        # Builds of the emulator are kept in the environment, not in the user's cache.
        more.setdefault("CUDA_ON_CPU_CACHE", str(self.place / "cuda-on-cpu"))
        if self.path:
            earlier = [more.get("PYTHONPATH", os.environ.get("PYTHONPATH", ""))]
            more["PYTHONPATH"] = os.pathsep.join(filter(None, [*self.path, *earlier]))
        program = str(self.bin / command)
        self.session.run(program, *arguments, env=more, external=True)

    def pytest(
        self, *arguments: str, workers: int = WORKERS, env: Mapping[str, str] | None = None
    ) -> None:
        """Run tests; a module's tests stay in one process, with what they share."""
        parallel = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
        self.run("pytest", *parallel, "--durations=12", *arguments, env=env)

    def doctests(self, *arguments: str) -> None:
        """Run the examples of docstrings."""
        self.run("pytest", "--import-mode=prepend", "--doctest-modules", *arguments)


def digest(steps: Sequence[Step]) -> str:
    """Return a hash of everything that an environment is built from."""
    files = [ROOT / "pyproject.toml", *sorted(CONSTRAINTS.glob("*.txt"))]
    for step in steps:
        if "--no-deps" in step.arguments:
            files += sorted(x for x in Path(step.arguments[-1]).rglob("*") if x.is_file())
    found = hashlib.sha256(repr([tuple(step) for step in steps]).encode())
    for file in files:
        if "__pycache__" not in file.parts:
            found.update(file.read_bytes())
    return found.hexdigest()
