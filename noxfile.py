"""The project's tasks: `nox -l` lists them, `nox -s NAME -- ARGS` runs one with arguments."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "virtualenv"
nox.options.download_python = "never"
# One of the Pythons is enough, and nox lists those it skipped; its own default with CI set is to
# fail.
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests"]

ROOT = Path(__file__).resolve().parent
PACKAGES = ("pdcore", "pdcore_backends", "pdcore_adapters", "pdcore_conformance")

# What runs nox is tested too, whatever it is: "skipped" is never all that happens.
PYTHONS = ["3.11", "3.12", "3.13"]
RUNNING = f"{sys.version_info.major}.{sys.version_info.minor}"
if sys.version_info < (3, 11):
    sys.exit(f"pdcore needs Python 3.11 or newer, but this nox runs on Python {RUNNING}")
if RUNNING not in PYTHONS:
    PYTHONS.append(RUNNING)

# The PyTorch and JAX releases in constraints/ were chosen for this one.
FRAMEWORKS_PYTHON = "3.11"
# On the second, constraints/jax.txt has a newer JAX.
JAX_PYTHONS = [FRAMEWORKS_PYTHON, "3.12"]
NUMPY_ONLY = (
    "not torch and not triton and not transformers and not jax and not jax_adapters and not svr "
    "and not cuda and not example and not browser"
)

# What the conformance matrix installs for each backend: an extra, and the pins to go with it.
MATRIX = {"numpy": "tests", "strict": "tests", "torch": "torch", "jax": "jax", "cupy": "cupy"}
RECORDS = ROOT / "docs" / "records"

# pyenv's own commands answer only for the versions that are active here; nox may use every
# installed one. At the end of the path they hide nothing.
if pyenv_root := os.environ.get("PYENV_ROOT"):
    installed = sorted(str(folder) for folder in Path(pyenv_root).glob("versions/3.*/bin"))
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], *installed])


def pinned(*names: str) -> list[str]:
    """Return pip's options for these files of constraints/."""
    return [f"--constraint={ROOT / 'constraints' / name}.txt" for name in names]


def install_for_tests(
    session: nox.Session, *project: str, root: Path = ROOT, pins: tuple[str, ...] = ("tests",)
) -> None:
    """Install `project`, the test tools and the third-party distribution of the tests."""
    session.install(*pinned(*pins), *project, "array-api-strict", "pytest-xdist")
    # Without dependencies: its pdcore is the one just installed, not one from an index.
    session.install("--no-deps", str(root / "tests" / "example_plugin"))


def run_tests(
    session: nox.Session, *arguments: str, env: dict[str, str | None] | None = None
) -> None:
    """Run pytest on two cores; a module's tests stay together, with what they share."""
    session.run("pytest", "-n", "2", "--dist", "loadfile", *arguments, *session.posargs, env=env)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main job on real data (`pdcore demo`)."""
    session.install(*pinned("cli"), ".[cli]")
    session.run("pdcore", "demo", *session.posargs)


@nox.session(python=FRAMEWORKS_PYTHON)
def example_training(session: nox.Session) -> None:
    """Train a transformer on recorded vowels; `-- --spec bn` with another attention."""
    # By itself and first: in an environment that has it, nothing later asks for another build.
    session.install(*pinned("torch"), "torch")
    session.install(*pinned("torch"), ".[cli,torch]")
    session.run("python", "examples/classify_time_series.py", *session.posargs)


@nox.session(python=FRAMEWORKS_PYTHON)
def reproduce(session: nox.Session) -> None:
    """Measure the paper's claims; `-- --data DIR` with more data sets."""
    # By itself and first: in an environment that has it, nothing later asks for another build.
    session.install(*pinned("torch"), "torch")
    session.install(*pinned("torch", "svr"), ".[cli,conformance,torch,svr]")
    session.run("python", "examples/reproduce.py", *session.posargs)


@nox.session(python=FRAMEWORKS_PYTHON)
def example_digits(session: nox.Session) -> None:
    """Train a Flax transformer on handwritten digits; `-- --spec bn` with another attention."""
    session.install(*pinned("jax_adapters"), ".[cli,flax,svr]")
    session.run("python", "examples/classify_digits.py", *session.posargs)


@nox.session(python=FRAMEWORKS_PYTHON)
def example_interpretation(session: nox.Session) -> None:
    """Read a trained attention layer as a regression; `-- --spec bn` with another attention."""
    # By itself and first: in an environment that has it, nothing later asks for another build.
    session.install(*pinned("torch"), "torch")
    session.install(*pinned("torch", "svr"), ".[cli,torch,svr]")
    session.run("python", "examples/interpret_attention.py", *session.posargs)


@nox.session(python=FRAMEWORKS_PYTHON)
def example_regressors(session: nox.Session) -> None:
    """Compare support vector regressions whose kernels are attentions, on diabetes data."""
    session.install(*pinned("svr"), ".[cli,svr]")
    session.run("python", "examples/compare_regressors.py", *session.posargs)


# Numbers, which one Python shows as well as another, and processes by the dozen.
OF_ONE_PYTHON = (
    "precision",
    "invariances",
    "gradients",
    "reference",
    "properties",
    "mutants",
    "speed",
    "gpu_command",
)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests, on NumPy and array-api-strict; the grids of numbers on nox's own Python."""
    install_for_tests(session, "-e", ".[cli,conformance]")
    left_out = () if session.python == RUNNING else OF_ONE_PYTHON
    ignored = [f"--ignore=tests/test_{name}.py" for name in left_out]
    run_tests(session, "-m", NUMPY_ONLY, *ignored)


@nox.session(python=FRAMEWORKS_PYTHON)
def tests_torch(session: nox.Session) -> None:
    """Run the tests that need PyTorch (CPU)."""
    # By itself and first: in an environment that has it, nothing later asks for another build.
    session.install(*pinned("torch"), "torch")
    install_for_tests(session, "-e", ".[cli,conformance,torch,svr]", pins=("torch", "svr"))
    session.run("python", "-c", "import torch; print('PyTorch', torch.__version__)")
    run_tests(session, "-m", "torch")


@nox.session(python=FRAMEWORKS_PYTHON)
def tests_triton(session: nox.Session) -> None:
    """Run the tests of the Triton kernels, by Triton's interpreter (CPU)."""
    # By itself and first: in an environment that has it, nothing later asks for another build.
    session.install(*pinned("torch"), "torch")
    install_for_tests(session, "-e", ".[cli,conformance,torch]", "triton", pins=("triton",))
    session.run("python", "-c", "import triton; print('Triton', triton.__version__)")
    # Read at its import, so before that of any test.
    run_tests(session, "-m", "triton", env={"TRITON_INTERPRET": "1"})


@nox.session(python=FRAMEWORKS_PYTHON)
def tests_transformers(session: nox.Session) -> None:
    """Run the tests that need Hugging Face transformers (CPU, nothing downloaded)."""
    # By itself and first: in an environment that has it, nothing later asks for another build.
    session.install(*pinned("torch"), "torch")
    install_for_tests(session, "-e", ".[cli,conformance,transformers]", pins=("transformers",))
    session.run("python", "-c", "import transformers; print(transformers.__version__)")
    run_tests(session, "-m", "transformers")


@nox.session(python=JAX_PYTHONS)
def tests_jax(session: nox.Session) -> None:
    """Run the tests that need JAX (CPU); with a newer JAX, those of the backend's own code."""
    install_for_tests(session, "-e", ".[cli,conformance,jax,svr]", pins=("jax", "svr"))
    session.run("python", "-c", "import jax; print('JAX', jax.__version__)")
    own = [f"tests/test_jax_{name}.py" for name in ("backend", "blocks", "sharding")]
    run_tests(session, "-m", "jax", *([] if session.python == FRAMEWORKS_PYTHON else own))


@nox.session(python=FRAMEWORKS_PYTHON)
def tests_jax_adapters(session: nox.Session) -> None:
    """Run the tests that need Flax and Equinox (CPU)."""
    install_for_tests(session, "-e", ".[cli,conformance,flax,equinox,svr]", pins=("jax_adapters",))
    session.run("python", "-c", "import flax, equinox; print(flax.__version__)")
    run_tests(session, "-m", "jax_adapters")


@nox.session(python=FRAMEWORKS_PYTHON)
def tests_cuda(session: nox.Session) -> None:
    """Run the CUDA kernels on the CPU, by the emulator, and compile them; no GPU is needed."""
    project = ["-e", ".[cli,conformance,cupy,svr]"]
    install_for_tests(session, *project, "nvidia-cuda-nvrtc", pins=("cupy", "svr"))
    session.install("--no-deps", "./tests/cuda_cpu")
    session.run("g++", "--version", external=True)
    # Builds are kept in the environment, not in the user's cache.
    env: dict[str, str | None] = {"CUDA_ON_CPU_CACHE": session.create_tmp()}
    run_tests(session, "-m", "cuda", env=env)
    session.run("python", "tests/emulated_cupy.py", "--level", "core", env=env)
    half = ("--dtype", "float16", "--dtype", "bfloat16")
    session.run("python", "tests/emulated_cupy.py", "--level", "all", *half, env=env)


@nox.session(python=FRAMEWORKS_PYTHON)
def tests_svr(session: nox.Session) -> None:
    """Run the tests of the regression, `pdcore.svr`, and of its scikit-learn estimator."""
    install_for_tests(session, "-e", ".[cli,conformance,svr]", pins=("svr",))
    session.run("python", "-c", "import sklearn; print('scikit-learn', sklearn.__version__)")
    run_tests(session, "-m", "svr")
    modules = ["pdcore/svr", "adapters/pdcore_adapters/sklearn.py"]
    session.run("pytest", "--doctest-modules", *modules)


@nox.session(python=FRAMEWORKS_PYTHON)
def conform_emulated(session: nox.Session) -> None:
    """Judge the CuPy backend's kernels on the emulator (`tests_cuda` does so on the core level)."""
    session.install(*pinned("tests"), "-e", ".[cli,conformance]")
    session.install("--no-deps", "./tests/cuda_cpu")
    session.run("g++", "--version", external=True)
    arguments = session.posargs or ["--level", "all"]
    env = {"CUDA_ON_CPU_CACHE": session.create_tmp()}
    session.run("python", "tests/emulated_cupy.py", *arguments, env=env)


@nox.session(python=FRAMEWORKS_PYTHON)
def tests_example(session: nox.Session) -> None:
    """Run the tests of the third-party example, a Numba backend, and its conformance."""
    install_for_tests(session, "-e", ".[cli,conformance]")
    session.install(*pinned("example"), "numba", "./tests/example_plugin")
    run_tests(session, "-m", "example")
    session.run("pdcore", "conform", "numba")


@nox.session
def tests_browser(session: nox.Session) -> None:
    """Look at the page of a record in a headless Chromium."""
    install_for_tests(session, "-e", ".[cli,conformance]")
    session.install(*pinned("browser"), "selenium")
    session.run("pytest", "-m", "browser", *session.posargs)


@nox.session(python=FRAMEWORKS_PYTHON)
@nox.parametrize("backend", list(MATRIX), ids=list(MATRIX))
def conform(session: nox.Session, backend: str) -> None:
    """Judge the built-in backends on every device that is here, and merge the records.

    `nox -s conform` runs all of them, `nox -s "conform(torch)"` one. Arguments go to
    `pdcore conform`; `-- bench` measures speed too, where the numerics are green.
    """
    arguments = list(session.posargs)
    measured = "bench" in arguments
    if measured:
        arguments.remove("bench")
    gpu = shutil.which("nvidia-smi") is not None
    extra = "" if backend in ("numpy", "strict") else f",{backend}"
    if backend == "cupy" and not gpu:
        session.log("no NVIDIA GPU: CuPy is not installed, and its record says so")
        extra = ""
    if backend == "torch":
        # By itself and first: in an environment that has it, nothing later asks for another build.
        session.install(*pinned("torch"), "torch")
    session.install(*pinned(MATRIX[backend]), "-e", f".[cli,conformance{extra}]")
    if backend == "strict":
        session.install(*pinned("tests"), "array-api-strict")
    devices = {"torch": ["cpu", "cuda"], "jax": ["cpu", "cuda"], "cupy": ["cuda"]}
    RECORDS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for device in devices.get(backend, ["cpu"]):
            if device == "cuda" and not gpu and backend != "cupy":
                continue
            record = Path(folder, f"{backend}-{device}.json")
            name = f"{backend}:{device}"
            session.run(
                "pdcore", "conform", name, "--report", str(record), "--allow-missing", *arguments
            )
            if measured:
                session.run("pdcore", "bench", name, "--report", str(record))
        found = sorted(map(str, Path(folder).glob("*.json")))
        merged = RECORDS / "record.json"
        before = [str(merged)] if merged.exists() else []
        session.run(
            "pdcore",
            "report",
            *before,
            *found,
            "--merge",
            str(merged),
            "--html",
            str(RECORDS / "record.html"),
        )


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Judge and measure everything that needs a GPU, with the frameworks of this Python."""
    roots = [ROOT, *(ROOT / name for name in ("backends", "adapters", "conformance"))]
    path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
    session.run(
        sys.executable,
        "-m",
        "pdcore_conformance.gpu",
        *session.posargs,
        env={"PYTHONPATH": path},
        external=True,
    )


@nox.session(python=FRAMEWORKS_PYTHON)
def mutants(session: nox.Session) -> None:
    """Plant every defect, run the whole suite on each, and write the table of docs/mutants.md."""
    install_for_tests(session, "-e", ".[cli,conformance]")
    session.run("python", "-m", "tests.mutants", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and likely mistakes (ruff), and who imports whom (import-linter)."""
    session.install(*pinned("numpy", "tools"), "-e", ".", "import-linter", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check the type annotations (mypy, strict)."""
    session.install(*pinned("tests", "tools"), "-e", ".[cli,conformance]", "mypy")
    session.run("mypy", *session.posargs)


IMPORTED_FROM_ENVIRONMENT = f"""
import importlib, sys
for name in {PACKAGES}:
    path = importlib.import_module(name).__file__
    assert path.startswith(sys.prefix), f"{{name}} comes from {{path}}, not from the wheel"
"""


OF_FILES = (
    "packaging",
    "plugins",
    "selection",
    "dispatch",
    "builtin_backends",
    "cli",
    "demo",
    "files",
    "conformance",
    "records",
    "new_backend",
    "array_backend",
    "reference",
)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, check its top-level names, run tests on it installed.

    Those that read files of the packages, entry points and plugins; `tests` runs all on the code.
    """
    session.install(*pinned("tools"), "build")
    # Outside the checkout, with the tests from the source archive: nothing of the checkout can be
    # imported by accident, and a file that the archive lacks is missed.
    with tempfile.TemporaryDirectory() as folder:
        session.run("python", "-m", "build", "--outdir", folder)
        [archive] = Path(folder).glob("pdcore-*.tar.gz")
        [built] = Path(folder).glob("pdcore-*.whl")

        expected = {*PACKAGES, f"{'-'.join(built.name.split('-')[:2])}.dist-info"}
        with zipfile.ZipFile(built) as contents:
            names = set(contents.namelist())
        found = {name.partition("/")[0] for name in names}
        if found != expected:
            session.error(f"top level of {built.name}: {sorted(found)}, not {sorted(expected)}")
        untyped = [package for package in PACKAGES if f"{package}/py.typed" not in names]
        if untyped:
            session.error(f"{built.name} has no py.typed in {untyped}")
        session.log(f"top level of {built.name}: {sorted(found)}")

        shutil.unpack_archive(archive, folder, filter="data")
        source = Path(folder, archive.name.removesuffix(".tar.gz"))
        for root in ("pdcore", "backends", "adapters", "conformance"):
            shutil.rmtree(source / root)

        install_for_tests(session, f"{built}[cli,conformance]", root=source)
        with session.chdir(source):
            session.run("python", "-c", IMPORTED_FROM_ENVIRONMENT)
            run_tests(session, "-m", NUMPY_ONLY, *(f"tests/test_{name}.py" for name in OF_FILES))


@nox.session
def docs_examples(session: nox.Session) -> None:
    """Run the Python examples of the README, docs/ and the docstrings."""
    session.install(*pinned("tests"), "-e", ".[cli,conformance]")
    session.run("pytest", "tests/test_docs_examples.py", "-m", NUMPY_ONLY, *session.posargs)
    # The backends whose library is here; the others' modules cannot be imported.
    backends = [f"backends/pdcore_backends/{name}" for name in ("numpy", "strict")]
    session.run("pytest", "--doctest-modules", "pdcore", "--ignore=pdcore/svr", *backends)


@nox.session(python=FRAMEWORKS_PYTHON)
@nox.parametrize("what", ["numpy", "peers"], ids=["numpy", "peers"])
def bench(session: nox.Session, what: str) -> None:
    """Measure the NumPy backend (`pdcore bench numpy --grid full`), or JAX beside PyTorch.

    `nox -s "bench(peers)"` alternates processes of the JAX backend and of PyTorch's fused kernel.
    """
    if what == "numpy":
        session.install(*pinned("tests"), ".[cli,conformance]")
        session.run("pdcore", "bench", "numpy", "--grid", "full", *session.posargs)
        return
    # By itself and first: in an environment that has it, nothing later asks for another build.
    session.install(*pinned("torch"), "torch")
    session.install(*pinned("jax"), ".[cli,conformance,jax]")
    session.run("python", "-m", "pdcore_conformance.bench.apart", *session.posargs)
