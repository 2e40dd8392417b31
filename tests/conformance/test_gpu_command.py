"""The command for a machine with a GPU, tried on the CPU with backends that go wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_command import CASES, COSINE, GAUSSIAN, SCRIPT, SOFTMAX, command, variables
from installing import add_distribution

from pdcore.errors import Exit
from pdcore_conformance.bench.workload import Workload
from pdcore_conformance.gpu import environment
from pdcore_conformance.gpu.calls import KERNELS
from pdcore_conformance.gpu.environment import process_environment
from pdcore_conformance.gpu.log import archive, entries
from pdcore_conformance.gpu.prepared import COMMIT, ROOT
from pdcore_conformance.gpu.records import runs_of
from pdcore_conformance.gpu.stages import STAGES, deadlines, workloads
from pdcore_conformance.gpu.worker import run_step
from pdcore_conformance.record import writing as record

#: A backend that goes wrong in each way that a process on a GPU may: by the kernel of the call.
PLANTED = """
import os, time
import pdcore
from pdcore.backend.array_backend import ArrayBackend
from pdcore.backend import FEATURES, BackendInfo
from pdcore_conformance.frameworks import framework

NONE = {"autodiff", "double_backward", "vmap", "jvp", "compile", "dropout", "axis_name", "group"}


class Planted(ArrayBackend):
    info = BackendInfo(
        name="planted", load="planted:Planted", library="numpy", requires=("numpy",),
        capabilities={f: "unsupported" if f in NONE else "full" for f in FEATURES},
    )

    def scores(self, c, o):
        if o.key_bias is not None:  # gaussian
            print("CUDA error: an illegal instruction", flush=True)
            os.abort()
        if c.expression is not None:  # polynomial
            time.sleep(600.0)
        out, level = super().scores(c, o)
        if o.q.shape[-2] in (9, 70) and o.visibility.support.restricts:  # causal, sparse
            library = framework("numpy")
            library.broken = lambda device: "CUDA error: an illegal memory access"
            raise RuntimeError("CUDA error: an illegal memory access")
        return (1.01 * out if getattr(o, "bias", None) is not None else out), level


@pdcore.hookimpl
def pdcore_backends():
    return [Planted.info]
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED, encoding="utf-8")
    add_distribution(folder, "planted", {"planted": "planted"})
    return folder


def done_of(folder: Path, target: str = "planted:cpu") -> dict[str, dict[str, Any]]:
    """Give the ends of the steps of a target by id."""
    lines = entries(folder / "log.jsonl")
    return {x["done"]["id"]: x["done"] for x in lines if "done" in x and x["target"] == target}


def members(path: Path) -> set[str]:
    with tarfile.open(path) as pack:
        return {Path(name).name for name in pack.getnames()}


# --- a run in which everything goes wrong ---------------------------------------------------------

#: Some of the calls, each of which takes a process: a sticky error, a wrong one, a hang, two good.
NAMES = [list(KERNELS)[i] for i in (0, 1, 3, 5, 9)]
HANGS = "device::kernels[vjp-polynomial-float32-lead=1-heads=4-rows=70-keys=83-dim=40-value_dim=24"
HANGS += "-key_mask=right]"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, planted: Path) -> tuple[Path, int, str]:
    """Run the stages that need no framework, with a limit that the hang exceeds."""
    folder = tmp_path_factory.mktemp("runs") / "records"
    limits = planted / "sitecustomize.py"
    limits.write_text(
        "import sys\n"
        "if any('pdcore_conformance/gpu' in word for word in sys.orig_argv):\n"
        "    from pdcore_conformance.gpu import stages\n"
        "    stages.STAGES = {n: s._replace(limit=6) for n, s in stages.STAGES.items()}\n"
        f"    few = lambda target: {NAMES}\n"
        "    stages.STAGES['kernels'] = stages.STAGES['kernels']._replace(steps=few)\n",
        encoding="utf-8",
    )
    names = "machine,kernels,suite"
    code, text = command(
        folder, "--only=planted", f"--stages={names}", "--minutes=30", *CASES, path=planted
    )
    return folder, code, text


def test_each_way_to_go_wrong_is_a_case(run: tuple[Path, int, str]) -> None:
    folder, code, text = run
    assert code == Exit.NUMERICS, text
    done = done_of(folder)
    assert len([name for name in done if name.startswith("device::kernels")]) == len(NAMES)
    messages = {name: str(case["message"]) for name, case in done.items()}
    assert messages[HANGS].startswith("the process ended: no end after 6 s")
    assert done[GAUSSIAN]["outcome"] == "error"
    assert messages[GAUSSIAN].startswith("the process ended: signal SIGABRT")
    assert "CUDA error: an illegal instruction" in messages[GAUSSIAN]
    sticky = [name for name, text in messages.items() if "illegal memory access" in text]
    assert len(sticky) == 1
    wrong = [name for name, case in done.items() if case["outcome"] == "failed"]
    assert any("bias=rows" in name for name in wrong)
    # What comes after a crash, in a process of its own, is run.
    assert done[SOFTMAX]["outcome"] == done[COSINE]["outcome"] == "passed"


def test_the_record_and_the_archive(run: tuple[Path, int, str]) -> None:
    folder, _, text = run
    [bad] = record.load(folder / "record.json")["runs"]
    assert bad["counts"] == dict.fromkeys(bad["counts"], 0) | {"passed": 4, "failed": 1, "error": 3}
    assert bad["versions"]["numpy"]
    assert members(folder.with_suffix(".tar.gz")) == {"log.jsonl", "record.json"}
    assert "planted:cpu on" in text
    lines = entries(folder / "log.jsonl")
    began = [x["began"] for x in lines if "began" in x]
    assert sorted(began) == sorted(x["done"]["id"] for x in lines if "done" in x)
    ends = [line[10:] for line in text.splitlines() if ": done after " in line]
    assert [x["said"] for x in lines if "seconds" in x] == ends


def test_a_run_in_which_all_is_right(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    code, text = command(folder, "--only=numpy", "--stages=machine,suite", "--minutes=30", CASES[0])
    assert code == Exit.DONE, text
    [run] = record.load(folder / "record.json")["runs"]
    assert [case["id"] for case in run["cases"]] == [SOFTMAX]
    assert run["counts"] == dict.fromkeys(run["counts"], 0) | {"passed": 1}


def test_speed_is_measured_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from pdcore_conformance.gpu import steps

    monkeypatch.setattr("pdcore_conformance.bench.measurements.Bench._rounds", lambda *_: 3)
    tiny = [Workload(spec, (1, 2, 64, 8)) for spec in ("softmax", "bn")]
    monkeypatch.setattr(steps, "workloads", lambda device: tiny)
    step = steps.step_of("speed", "numpy:cpu", 60.0)
    lines = []
    for workload in tiny:
        case, found = run_step("speed", str(workload), step)
        assert (case["outcome"], case["message"]) == ("passed", None)
        lines.append({"stage": "speed", "target": "numpy:cpu", "done": case, "found": found})
    [run] = runs_of(lines, {"created": "2026-11-30T00:00:00Z"})
    assert {r["spec"] for r in run["speed"]["ratios"]} == {"softmax", "bn"}
    assert not run["speed"]["red"]
    assert not run["cases"]
    missing = [peer["peer"] for peer in run["speed"]["missing_peers"]]
    assert len(missing) == len(set(missing))


def test_a_run_that_goes_on_skips_what_ended_and_what_crashed(
    run: tuple[Path, int, str], planted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    lines = entries(run[0] / "log.jsonl")
    commit = next(x["commit"] for x in lines if "commit" in x)
    # As if the machine had gone in a step, and its last line had been cut.
    cut = next(i for i, x in enumerate(lines) if x.get("began") == HANGS)
    text = "\n".join(json.dumps(line) for line in lines[: cut + 1]) + '\n{"at": 1'
    (folder / "log.jsonl").write_text(text, encoding="utf-8")
    arguments = ("--only=planted", "--stages=kernels", "--minutes=1", "--resume")
    code, text = command(folder, *arguments, path=planted, **{COMMIT: str(commit)})
    again = [x["began"] for x in entries(folder / "log.jsonl")[cut + 1 :] if "began" in x]
    before = [x["began"] for x in lines[: cut + 1] if "began" in x and x["target"] == "planted:cpu"]
    assert not set(again) & set(before)
    assert code == Exit.NUMERICS, text
    [kept] = [r for r in record.load(folder / "record.json")["runs"] if r["backend"] == "planted"]
    case = next(case for case in kept["cases"] if case["id"] == HANGS)
    assert (case["outcome"], case["message"]) == ("error", "the run ended in this step")


def test_another_commit_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    for commit in ("f" * 40, None):
        line = {"at": 0.0, "created": "2026-11-30T00:00:00Z", "commit": commit}
        (folder / "log.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
        arguments = ("--only=numpy", "--stages=machine", "--minutes=1", "--resume")
        code, text = command(folder, *arguments)
        assert code == Exit.DONE, text
        assert "of another or an unknown commit: all is run again" in text


def test_a_signal_leaves_an_archive_and_no_process(tmp_path: Path, planted: Path) -> None:
    folder = tmp_path / "records"
    arguments = ["--only=planted", "--stages=kernels", "--minutes=9", "--device=cpu"]
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--folder", str(folder), *arguments],
        env=variables(planted),
        stdout=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + 120
        while not any(x.get("began") == HANGS for x in entries(folder / "log.jsonl")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert members(folder.with_suffix(".tar.gz")) == {"log.jsonl", "record.json"}
    left = subprocess.run(["pgrep", "-f", f"worker.*{folder}"], capture_output=True, check=False)
    assert not left.stdout
    record.load(folder / "record.json")


# --- a checkout without git, on a machine without packages ----------------------------------------


def test_a_bare_copy_with_carried_wheels(tmp_path: Path) -> None:
    copy = tmp_path / "checkout"
    for name in ("pdcore", "backends", "adapters", "conformance"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    wheels = copy / "gpu-prepared" / "wheels"
    wheels.mkdir(parents=True)
    import array_api_compat

    package = Path(array_api_compat.__file__).parent
    hidden = tmp_path / "hidden"
    shutil.copytree(package, hidden / "array_api_compat")
    shutil.make_archive(str(wheels / "array_api_compat-1.16-py3-none-any"), "zip", hidden)
    packed = wheels / "array_api_compat-1.16-py3-none-any.zip"
    packed.rename(packed.with_suffix(".whl"))
    bare = tmp_path / "bare"
    bare.mkdir()
    # Neither pdcore nor array-api-compat is installed for this Python.
    (bare / "sitecustomize.py").write_text(
        "import importlib.metadata as m, sys\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'array_api_compat' and not any('wheels' in x for x in sys.path):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "version = m.version\n"
        "def hidden(name):\n"
        "    if name.replace('-', '_') in ('array_api_compat', 'pdcore'):\n"
        "        raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = hidden\n",
        encoding="utf-8",
    )
    script = copy / "conformance" / "pdcore_conformance" / "gpu"
    words = ["--only=numpy", "--stages=machine", "--minutes=1", "--device=cpu"]

    def run_copy(**more: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, str(script), f"--folder={tmp_path / 'out'}", *words],
            env=variables(bare, **more),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    code, text = run_copy()
    assert code == Exit.DONE, text
    assert "the commit is unknown: there is neither .git nor gpu-prepared/commit.json" in text
    first = entries(tmp_path / "out" / "log.jsonl")[0]
    assert first["commit"] is None
    assert first["carried"] == ["array_api_compat-1.16"]

    from pdcore_conformance.gpu.prepared import tree

    about = {"commit": "a" * 40, "tree": tree(copy)}
    (copy / "gpu-prepared" / "commit.json").write_text(json.dumps(about), encoding="utf-8")
    run_copy()
    assert entries(tmp_path / "out" / "log.jsonl")[0]["commit"] == "a" * 40
    (copy / "pdcore" / "compiled.pyc").write_text("", encoding="utf-8")
    run_copy()
    assert entries(tmp_path / "out" / "log.jsonl")[0]["commit"] == "a" * 40
    (copy / "pdcore" / "added.py").write_text("", encoding="utf-8")
    _, text = run_copy()
    assert "the commit is unknown: the code has changed since gpu-prepared/commit.json" in text
    run_copy(**{COMMIT: "b" * 40})
    assert entries(tmp_path / "out" / "log.jsonl")[0]["commit"] == "b" * 40


# --- parts ----------------------------------------------------------------------------------------


def test_stages_end_at_their_share_of_the_time() -> None:
    whole = deadlines(list(STAGES), 12)
    assert {name: end / 60 for name, end in whole.items()} == pytest.approx(
        {name: stage.until for name, stage in STAGES.items()}
    )
    two = deadlines(["machine", "speed"], 1)
    assert two["speed"] == pytest.approx(60)
    assert two["machine"] == pytest.approx(60 * 0.2 / 3.7)


def test_every_workload_on_a_gpu_is_timed_in_both_directions() -> None:
    timed = workloads("cuda")
    assert len(timed) == len(set(map(str, timed))) == 6 * 4 * 2
    assert {w.shape[2] for w in timed[: len(timed) // 2]} == {4096}


def test_the_largest_files_are_left_out_of_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "records"
    folder.mkdir()
    for name, size in (("log.jsonl", 3000), ("record.json", 2000), ("a.txt", 100), ("b.txt", 900)):
        (folder / name).write_bytes(os.urandom(size))
    monkeypatch.setattr("pdcore_conformance.gpu.log.LIMIT", 5900)
    assert archive(folder, tmp_path / "records.tar.gz") == ["b.txt"]
    assert members(tmp_path / "records.tar.gz") == {"log.jsonl", "record.json", "a.txt"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--only=nope"], Exit.USAGE, "gpu: --only: unknown 'nope'; expected some of"),
        (["--stages=nope"], Exit.USAGE, "gpu: --stages: unknown 'nope'; expected some of machine"),
        (["--minutes=many"], Exit.USAGE, "invalid float value: 'many'"),
    ],
)
def test_wrong_use(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    status, text = command(tmp_path / "records", *arguments)
    assert status == code
    assert message in text


def test_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    code, text = command(tmp_path / "file" / "records", "--only=numpy")
    assert code == Exit.OUTPUT
    assert text.startswith("gpu: ")


def test_without_a_gpu(tmp_path: Path) -> None:
    code, text = command(tmp_path / "records", "--only=cupy", "--minutes=1", device="cuda")
    assert code == Exit.NO_BACKEND, text
    [run] = record.load(tmp_path / "records" / "record.json")["runs"]
    assert not run["available"]
    assert run["reason"]
    assert not run["cases"]


def test_the_environment_of_a_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "FOLDER", tmp_path)
    assert "PDCORE_CUPY_CUBINS" not in process_environment("cuda")
    (tmp_path / "cubins").mkdir()
    assert process_environment("cuda")["PDCORE_CUPY_CUBINS"] == str(tmp_path / "cubins")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    many = process_environment("cuda", threads=2)
    assert many["OMP_NUM_THREADS"] == "2"
    assert many["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert many["XLA_FLAGS"] == "--xla_dump_to=x --xla_gpu_autotune_level=0"
    one = process_environment("cuda")
    assert one["XLA_FLAGS"] == "--xla_dump_to=x"
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in process_environment("cpu")
