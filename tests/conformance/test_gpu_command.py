"""The command for a GPU machine, run on the CPU: stages, records, resuming and failures."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from gpu_command import BIAS, CASES, GAUSSIAN, SOFTMAX, command, runs_of
from installing import add_distribution
from sample_records import sample_case, sample_run

from pdcore.errors import Exit
from pdcore_conformance.gpu.processes import process_environment, share_processes
from pdcore_conformance.gpu.records import merge_runs, summary
from pdcore_conformance.record import writing as record

#: Backends that go wrong in the ways that a process may.
PLANTED = """
import os, time
import pdcore
from pdcore.backend.array_backend import ArrayBackend
from pdcore.backend import FEATURES, BackendInfo

NONE = {"autodiff", "double_backward", "vmap", "jvp", "compile", "dropout", "axis_name"}


def info(name, cls):
    return BackendInfo(
        name=name, load=f"planted:{cls}", library="numpy", requires=("numpy",),
        capabilities={f: "unsupported" if f in NONE else "full" for f in FEATURES},
    )


class Wrong(ArrayBackend):
    info = info("wrong", "Wrong")

    def scores(self, c, o):
        out, level = super().scores(c, o)
        return 1.01 * out, level


class Dying(ArrayBackend):
    info = info("dying", "Dying")

    def scores(self, c, o):
        if o.key_bias is not None:  # the gaussian kernel
            print("CUDA error: an illegal memory access", flush=True)
            os._exit(3)
        return super().scores(c, o)


class Slow(ArrayBackend):
    info = info("slow", "Slow")

    def scores(self, c, o):
        time.sleep(60.0)


@pdcore.hookimpl
def pdcore_backends():
    return [Wrong.info, Dying.info, Slow.info]


@pdcore.hookimpl
def pdcore_known_failures(backend):
    return {"kernels::no_such_case": "it is gone"} if backend == "slow" else {}
"""

#: What a GPU machine need not have.
OPTIONAL = (
    "rich",
    "typer",
    "scipy",
    "psutil",
    "matplotlib",
    "jinja2",
    "copier",
    "threadpoolctl",
    "ml_dtypes",
    "safetensors",
)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED, encoding="utf-8")
    add_distribution(folder, "planted", {"planted": "planted"})
    return folder


# --- a whole run ----------------------------------------------------------------------------------


def test_numerics_of_two_backends_and_going_on(tmp_path: Path) -> None:
    out = tmp_path / "records"
    only = ("--only", "numpy,strict", "--no-speed", *CASES)
    code, text = command(out, *only)
    assert code == Exit.DONE, text
    runs = runs_of(out / "record.json")
    assert list(runs) == ["numpy:cpu", "strict:cpu"]
    for name, run in runs.items():
        assert {case["id"] for case in run["cases"]} == {SOFTMAX, GAUSSIAN, BIAS}
        assert run["selection"] is not None  # the suite has more cases
        assert run["counts"]["passed"] == 3
        assert run["versions"]["numpy"]
        assert run["precision"]
        own = runs_of(out / f"{name.replace(':', '-')}.numerics.json")[name]
        assert own["cases"] == run["cases"]
        assert f"{name} on" in text

    # The same commit: nothing is run again, except the case that is added.
    more = "kernels::kernel_is_computed[cosine-float32]"
    code, text = command(out, *only, f"--case={more}", "--resume")
    assert code == Exit.DONE, text
    assert text.count("1 cases in 1 processes, 3 are kept from before") == 2
    again = runs_of(out / "record.json")["numpy:cpu"]
    kept = {case["id"]: case for case in again["cases"]}
    assert set(kept) == {SOFTMAX, GAUSSIAN, BIAS, more}
    assert [kept[case["id"]] for case in runs["numpy:cpu"]["cases"]] == runs["numpy:cpu"]["cases"]

    # A record of another commit is not used: its cases are run again.
    path = out / "numpy-cpu.numerics.json"
    [old] = record.load(path)["runs"]
    record.save(path, [{**old, "commit": "f" * 40}], replace=True)
    code, text = command(out, "--only", "numpy", "--no-speed", "--resume", f"--case={SOFTMAX}")
    assert code == Exit.DONE, text
    assert "is of another commit or grid: its stage is repeated" in text
    assert "numpy:cpu: 1 cases in 1 processes\n" in text


@pytest.mark.nightly
def test_parts_of_a_run_that_was_killed_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "records"
    only = ("--only", "numpy", "--no-speed")
    code, text = command(out, *only, f"--case={SOFTMAX}")
    assert code == Exit.DONE, text
    part = out / "parts" / "numpy-cpu.numerics.0.json"
    (out / "numpy-cpu.numerics.json").rename(part)
    (out / "parts" / "numpy-cpu.numerics.1.json").write_text('{"half', encoding="utf-8")
    code, text = command(out, *only, "--resume", f"--case={SOFTMAX}", f"--case={BIAS}")
    assert code == Exit.DONE, text
    assert "1 cases in 1 processes, 1 are kept from before" in text
    assert "cannot be read, so its stage is repeated" in text
    assert not list((out / "parts").glob("*.numerics.*.json"))
    assert runs_of(out / "record.json")["numpy:cpu"]["counts"]["passed"] == 2


#: Small shapes, and a last step in which the process crashes.
SMALL = """
import os, sys
if os.environ.get("SMALL_BENCH") and "pdcore_conformance.gpu.stage" in " ".join(sys.orig_argv):
    from pdcore_conformance.bench import grid, speed
    from pdcore_conformance.bench.workload import Workload
    grid._CPU = {"quick": (Workload("softmax", (1, 8, 64, 16)),)}
    def dies(bench):
        if os.environ["SMALL_BENCH"] == "dies":
            print("CUDA error: lost", flush=True)
            os._exit(3)
    speed.FIGURES = {"one that dies": dies, "one more": lambda bench: None}
"""


@pytest.mark.nightly
def test_speed_before_a_crash_is_kept(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(SMALL, encoding="utf-8")
    out = tmp_path / "records"
    arguments = ("--only", "numpy", f"--case={SOFTMAX}")
    code, text = command(out, *arguments, path=tmp_path, SMALL_BENCH="dies")
    assert code == Exit.FAILURE, text
    speed = runs_of(out / "record.json")["numpy:cpu"]["speed"]
    assert speed["ratios"]
    assert "times as fast as textbook NumPy" in text
    assert "not reached: speed of numpy:cpu: exit code 3: CUDA error: lost" in text
    for title in ("one that dies", "one more"):
        assert f"not reached: speed of numpy:cpu: not measured: {title}" in text
    own = runs_of(out / "numpy-cpu.speed.json")["numpy:cpu"]
    assert own["cases"] == []
    assert own["speed"] == speed

    code, text = command(out, *arguments, "--resume", path=tmp_path, SMALL_BENCH="lives")
    assert code == Exit.DONE, text
    assert "numpy:cpu: speed is kept from before, but for 2 parts" in text
    whole = runs_of(out / "record.json")["numpy:cpu"]["speed"]
    assert whole["ratios"][: len(speed["ratios"])] == speed["ratios"]
    assert not [note for note in whole["notes"] if note.startswith("not measured")]

    code, text = command(out, *arguments, "--resume", path=tmp_path, SMALL_BENCH="dies")
    assert code == Exit.DONE, text
    assert "numpy:cpu: speed is kept from before\n" in text
    assert runs_of(out / "record.json")["numpy:cpu"]["speed"] == whole


@pytest.mark.nightly
def test_nothing_optional_is_needed(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    lines = [f"sys.modules[{name!r}] = None" for name in OPTIONAL]
    (blocked / "sitecustomize.py").write_text("\n".join(["import sys", *lines]), encoding="utf-8")
    half = "--case=kernels::kernel_is_computed[softmax-bfloat16]"
    code, text = command(
        tmp_path / "records", "--only", "numpy", "--no-speed", *CASES, half, path=blocked
    )
    assert code == Exit.DONE, text
    run = runs_of(tmp_path / "records" / "record.json")["numpy:cpu"]
    assert run["counts"]["passed"] == 3
    [left] = [case for case in run["cases"] if case["outcome"] == "not claimed"]
    assert "ml_dtypes, which is not installed" in left["message"]


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.nightly
def test_without_a_gpu(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, text = command(
        tmp_path / "records",
        device="cuda",
        CUDA_VISIBLE_DEVICES="",
        JAX_PLATFORMS="cpu",
        PATH=str(empty),
    )
    assert code == Exit.NO_BACKEND, text
    for name in ("torch", "jax", "cupy"):
        assert f"{name}:cuda is not available: " in text
    assert "no GPU: none of torch:cuda, jax:cuda, cupy:cuda can run here" in text
    assert not (tmp_path / "records" / "record.json").exists()
    code, text = command(
        tmp_path / "records",
        "--only",
        "numpy,cupy",
        "--allow-missing",
        "--no-speed",
        f"--case={SOFTMAX}",
    )
    assert code == Exit.DONE, text
    assert "cupy:cpu is not available: " in text
    runs = runs_of(tmp_path / "records" / "record.json")
    assert runs["numpy:cpu"]["available"]
    assert not runs["cupy:cpu"]["available"]
    assert runs["cupy:cpu"]["reason"]


@pytest.mark.nightly
def test_a_wrong_backend_fails_and_is_not_measured(tmp_path: Path, planted: Path) -> None:
    out = tmp_path / "records"
    code, text = command(out, "--only", "wrong", *CASES, path=planted)
    assert code == Exit.NUMERICS, text
    assert f"failed: {SOFTMAX}: out: error" in text
    assert f"alone: pdcore conform wrong:cpu --case '{SOFTMAX}'" in text
    assert "not reached: speed of wrong:cpu: its numerics are not green" in text
    assert runs_of(out / "record.json")["wrong:cpu"]["counts"]["failed"] >= 2


@pytest.mark.nightly
def test_a_process_that_crashes_leaves_the_others(tmp_path: Path, planted: Path) -> None:
    out = tmp_path / "records"
    code, text = command(out, "--only", "dying,numpy", "--no-speed", *CASES, path=planted)
    assert code == Exit.FAILURE, text
    assert "not reached: dying:cpu, numerics.0: exit code 3: CUDA error: an illegal" in text
    assert "not reached: dying:cpu: " in text
    assert runs_of(out / "record.json")["numpy:cpu"]["counts"]["passed"] == 3


@pytest.mark.nightly
def test_a_case_that_does_not_end_is_stopped(tmp_path: Path, planted: Path) -> None:
    out = tmp_path / "records"
    began = time.monotonic()
    code, text = command(
        out, "--only", "slow", "--no-speed", f"--case={SOFTMAX}", "--budget-s", "20", path=planted
    )
    assert code == Exit.FAILURE, text
    assert time.monotonic() - began < 40
    assert "slow:cpu, numerics.0: it was ended, because no time was left" in text
    assert "slow:cpu: 1 of 1 cases, such as kernels::kernel_is_computed[softmax-float32]" in text
    assert "the known failure kernels::no_such_case is no case of the suite: remove it" in text


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only", "numpyy"], Exit.USAGE, "unknown backend 'numpyy'"),
        (["--grid", "huge"], Exit.USAGE, "invalid choice: 'huge'"),
        (
            ["--only", "numpy", "--case", "kernels::nothing", "--no-speed"],
            Exit.FAILURE,
            "numpy:cpu: there is no case kernels::nothing",
        ),
    ],
)
def test_wrong_use(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    exit_code, text = command(tmp_path / "records", *arguments)
    assert exit_code == code, text
    assert message in text


@pytest.mark.nightly
def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, text = command(tmp_path / "file" / "records", "--only", "numpy")
    assert code == Exit.OUTPUT, text
    assert "--out: " in text


@pytest.mark.nightly
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['hypothesis'] = None\n")
    code, text = command(tmp_path / "records", "--only", "numpy", path=tmp_path)
    assert code == Exit.MISSING
    assert "not installed: hypothesis" in text


# --- functions ------------------------------------------------------------------------------------


def test_processes_are_distributed_by_cost() -> None:
    assert share_processes({"torch:cuda": 2800, "jax:cuda": 2800, "cupy:cuda": 2800}, 16) == {
        "torch:cuda": 2,
        "jax:cuda": 12,
        "cupy:cuda": 2,
    }
    assert share_processes({"torch:cuda": 2800, "jax:cuda": 2800}, 2) == {
        "torch:cuda": 1,
        "jax:cuda": 1,
    }
    assert share_processes({"torch:cuda": 0, "jax:cuda": 25}, 16) == {"jax:cuda": 3}
    assert share_processes({}, 16) == {}


def test_the_environment_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/given")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    variables = process_environment("cuda:0", threads=3)
    assert variables["OMP_NUM_THREADS"] == variables["OPENBLAS_NUM_THREADS"] == "3"
    assert variables["XLA_FLAGS"] == "--xla_gpu_autotune_level=0"
    assert variables["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert variables["JAX_COMPILATION_CACHE_DIR"] == "/mine"
    assert variables["PYTHONPATH"].endswith("/given")
    assert "XLA_FLAGS" not in process_environment("cuda")  # where times are measured
    assert "XLA_FLAGS" not in process_environment("cpu", threads=3)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    assert process_environment("cuda", threads=3)["XLA_FLAGS"] == "--xla_gpu_autotune_level=4"


def test_parts_are_merge_runs() -> None:
    first = sample_run("torch:cuda", [sample_case("a::one"), sample_case("a::two")], seconds=10.0)
    second = sample_run("torch:cuda", [sample_case("a::three", outcome="failed")], seconds=20.0)
    both = merge_runs(None, [first, second], ["a::one", "a::two", "a::three"])
    assert both is not None
    assert both["selection"] is None
    assert [case["id"] for case in both["cases"]] == ["a::one", "a::three", "a::two"]
    assert both["counts"]["passed"] == 2
    assert both["counts"]["failed"] == 1
    assert both["seconds"] == 20.0
    # A case that is run again replaces the earlier one; a case that is not asked for is left out.
    again = sample_run("torch:cuda", [sample_case("a::three")], seconds=1.0)
    mended = merge_runs(both, [again], ["a::two", "a::three", "a::four"])
    assert mended is not None
    assert mended["selection"] == ["a::three", "a::two"]
    assert mended["counts"]["failed"] == 0
    assert mended["seconds"] == 21.0
    assert merge_runs(None, [first], ["a::other"]) is None
    assert merge_runs(None, [], ["a::one"]) is None
    json.dumps(both)


def test_a_summary_shows_the_first_failures() -> None:
    cases = [
        sample_case(f"a::{i}", outcome="failed", message="out: too far\nby much") for i in range(7)
    ]
    text = "\n".join(summary(sample_run("torch:cuda", cases)))
    assert text.count("failed: a::") == 5
    assert "out: too far by much" in text
    assert "and 2 more, in the record" in text
