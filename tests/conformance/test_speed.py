"""The bench: refusals, targets, and measurements."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_rows import SMALL, check_rows
from typer.testing import CliRunner

from pdcore.cli.commands import app
from pdcore.errors import Exit
from pdcore_backends.numpy.impl import NumpyBackend
from pdcore_conformance.bench import figures, measurements, rates, rows, speed
from pdcore_conformance.bench import grid as bench_grid
from pdcore_conformance.bench.measurements import FUSED, Bench
from pdcore_conformance.bench.memory import WAYS, peak_memory
from pdcore_conformance.bench.peers import PEERS, Peer, choose_peers
from pdcore_conformance.bench.timing import (
    interleaved,
    interval,
    judged,
    quartiles,
    threads_limited,
)
from pdcore_conformance.bench.workload import DIRECTIONS, Workload, half_pooled, operations
from pdcore_conformance.frameworks import framework
from pdcore_conformance.record import writing as record

TINY = Workload("softmax", (1, 8, 64, 16))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small shapes, and leave out the figures that start new processes."""
    tiny = (TINY, TINY._replace(direction="forward+backward"), TINY._replace(spec="bn"))
    monkeypatch.setattr(bench_grid, "_CPU", {"quick": tiny, "full": tiny})
    for module in (bench_grid, figures):
        monkeypatch.setattr(module, "long_shape", lambda device, grid: (1, 8, 128, 16))
    in_process = {n: f for n, f in speed.FIGURES.items() if n not in ("memory", "import")}
    monkeypatch.setattr(speed, "FIGURES", in_process)


def test_calls_are_interleaved_and_counted() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = interleaved(calls, 3, warm_up=1, repeat=2)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert len(order) == 2 * 2 * (3 + 1)
    assert order[:8] in (list("aabbbbaa"), list("bbaaaabb"))


def test_times_are_seconds_a_call() -> None:
    times = interleaved({"sleep": lambda: time.sleep(0.01)}, 3, repeat=3)
    assert all(0.009 < t < 5 for t in times["sleep"])


def test_summaries() -> None:
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quartiles([1.0]) == [1.0, 1.0, 1.0]
    span = interval([1.0, 1.1, 0.9, 1.05, 0.95, 1.02])
    assert span is not None
    assert 0.9 <= span[0] < 1.01 < span[1] <= 1.1
    assert interval([1.0, 2.0]) is None


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [
        (1.6, (1.5, None), True),
        (1.4, (1.5, None), False),
        (1.2, (None, 1.1), False),
        (15.0, (13.0, 18.0), True),
        (12.9, (13.0, 18.0), False),
        (float("nan"), (1.5, None), False),
        (1.0, (None, None), None),
    ],
)
def test_targets_are_met_or_not(value: float, target: Any, met: bool | None) -> None:
    assert judged(value, target)["met"] is met


def numpy_bench(peers: list[str] | None = None) -> Bench:
    return Bench("numpy", None, "quick", choose_peers(peers), 2)


@pytest.mark.parametrize("name", [n for n, p in PEERS.items() if p.library == "numpy"])
def test_the_peers_compute_what_they_state(name: str) -> None:
    peer = PEERS[name]
    if peer.missing("cpu") is not None:
        assert "pip install" in str(peer.missing("cpu"))
        return
    bench = numpy_bench([name])
    for spec in peer.computes or ():
        workload = TINY._replace(spec=spec)
        assert bench.checked_peer_call(peer, workload) is not None, bench.speed["missing_peers"]


def test_the_peer_of_cupy_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", np)
    for spec in ("softmax", "causal"):
        peer = replace(PEERS["matmul and softmax, CuPy"], library="numpy")
        bench = numpy_bench()
        workload = TINY._replace(spec=spec)
        assert bench.checked_peer_call(peer, workload) is not None, bench.speed["missing_peers"]


@pytest.mark.parametrize(
    ("spec", "direction", "expected"),
    [
        ("softmax", "forward", 4 * 6 * 100 * 8),
        ("causal", "forward", 2 * 6 * 100 * 8),
        ("softmax", "forward+backward", 14 * 6 * 100 * 8),
        ("sh(1,1,4)", "forward", 4 * 2 * 10 * (10 + 10 + 3) * 8),
    ],
)
def test_operations_are_counted(spec: str, direction: str, expected: float) -> None:
    assert operations(Workload(spec, (2, 3, 10, 8), direction=direction)) == expected


def test_rates_are_compared_with_those_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5, 0.25, *[2.0] * 8, 0.125])
    monkeypatch.setattr(rates, "_fastest", lambda call, rounds: [call(), next(seconds)][1])
    monkeypatch.setattr(rates.framework("torch"), "available", lambda device: "not here")
    bench = numpy_bench()
    rates.rates(bench)
    assert not bench.speed["figures"]  # no GPU
    sizes = rates.Sizes((1, 2, 64, 8), "float32", copied=2**20, side=128, rounds=1)
    rates.rates_at(bench, sizes)
    figures = {f["name"]: (f["value"], f["unit"]) for f in bench.speed["figures"]}
    assert figures["copy of 1 MiB, read and written"] == (2 * 2**20 / 0.5 / 1e9, "GB/s")
    product = 2 * 128**3 / 0.25
    assert figures["float32 matrix product of 128, numpy"] == (product / 1e12, "TFLOP/s")
    call = 4 * 2 * 64 * 64 * 8 / 2.0
    name = "softmax (1, 2, 64, 8) float32 forward"
    assert figures[name] == (call / 1e12, "TFLOP/s")
    assert figures[f"{name}, of the matrix product's rate"] == (
        pytest.approx(100 * call / product),
        "%",
    )
    name = "statistics of float32 keys (1, 2, 64, 8)"
    assert figures[name] == (2 * 64 * 8 * 4 / 0.125 / 1e9, "GB/s")
    assert figures[f"{name}, of the copy's rate"][0] == pytest.approx(
        100 * (2 * 64 * 8 * 4 / 0.125) / (2 * 2**20 / 0.5)
    )
    assert len(figures) == 2 + 8 * 2 + 2


def test_a_library_that_does_not_multiply_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates.framework("torch"), "available", lambda device: "not here")

    def fails(*arguments: Any) -> Any:
        raise TypeError("no bfloat16")

    monkeypatch.setattr(rates, "_array", fails)
    bench = numpy_bench()
    assert rates.product_rate(bench, rates.Sizes(side=8)) is None
    assert bench.speed["notes"][-1] == (
        "no bfloat16 matrix product of 8: torch: not here; numpy: TypeError: no bfloat16"
    )


def test_a_peer_that_computes_something_else_is_left_out_and_named() -> None:
    wrong = Peer("wrong", "numpy", ("softmax",), lambda w: lambda x: 1.01 * x["v"])
    bench = numpy_bench()
    assert bench.checked_peer_call(wrong, TINY) is None
    [entry] = [e for e in bench.speed["missing_peers"] if e["peer"] == "wrong"]
    assert "over the budget" in entry["reason"]
    assert not bench.speed["red"]


def test_a_peer_that_fails_is_named() -> None:
    def make(workload: Workload) -> Any:
        raise RuntimeError("no such kernel")

    bench = numpy_bench()
    assert bench.checked_peer_call(Peer("failing", "numpy", ("softmax",), make), TINY) is None
    assert "no such kernel" in bench.speed["missing_peers"][-1]["reason"]


def test_missing_peers_are_named_with_what_installs_them(small: None) -> None:
    absent = Peer("absent", "no_such_library", ("softmax",), lambda w: None, install="pip x")
    assert absent.missing("cpu") == "not installed: no_such_library (pip x)"
    assert PEERS["torch SDPA, flash"].missing("cpu") == "runs on cuda only"
    listed = {entry["peer"] for entry in numpy_bench().speed["missing_peers"]}
    assert "torch SDPA, flash" in listed


def test_an_unknown_peer_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'torch SDPA'"):
        choose_peers(["torch SDP"])
    [other] = choose_peers(["backend numpy"])
    assert other.takes(Workload("polynomial", (1, 1, 2, 2)))


def test_wrong_numerics_have_no_figures(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = NumpyBackend.attention

    def off(self: Any, plan: Any, inputs: Any, *, lse: bool = False) -> Any:
        out, level = attention(self, plan, inputs, lse=lse)
        return out * np.float32(1.01), level

    monkeypatch.setattr(NumpyBackend, "attention", off)
    measured = speed.measure("numpy")
    assert measured["red"]
    assert not measured["ratios"]
    assert not measured["growth"]
    assert not measured["figures"]
    assert any("the numerics are red" in note for note in measured["notes"])


def test_a_wrong_gradient_fails(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    attention_vjp = NumpyBackend.attention_vjp

    def off(self: Any, plan: Any, inputs: Any) -> Any:
        out, level, vjp = attention_vjp(self, plan, inputs)
        return out, level, lambda *d: {n: 1.01 * g for n, g in vjp(*d).items()}

    monkeypatch.setattr(NumpyBackend, "attention_vjp", off)
    assert speed.measure("numpy")["red"]


def test_a_whole_measurement_is_a_record(small: None, tmp_path: Any) -> None:
    seen: list[float] = []
    measured = speed.measure("numpy", say=lambda title, share: seen.append(share))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    against = {(r["spec"], r["peer"], r["direction"]) for r in measured["ratios"]}
    assert ("softmax", "textbook NumPy", "forward") in against
    assert ("bn", "literal Attention-BN, NumPy", "forward") in against
    assert ("bn", "spec softmax", "forward") in against
    assert {g["spec"] for g in measured["growth"]} == {"softmax", "linear"}
    assert all(row["ok"] for row in measured["numerics"])
    backward = [row for row in measured["numerics"] if "d_k" in row["error_over_budget"]]
    assert backward
    run = record.new_run("numpy", "cpu")
    run["speed"] = measured
    record.save(tmp_path / "record.json", [run])
    assert record.load(tmp_path / "record.json")["runs"][0]["speed"] == measured


def test_a_deadline_leaves_the_rest_out_and_says_so(small: None) -> None:
    measured = speed.measure("numpy", deadline=0.0)
    assert not measured["ratios"]
    assert any("no time was left" in note for note in measured["notes"])


def test_measurements_are_kept_before_each_step(small: None) -> None:
    kept: list[Any] = []
    measured = speed.measure("numpy", keep=kept.append)
    ended = [[n for n in speed_["notes"] if "the process was ended" in n] for speed_ in kept]
    assert [len(notes) for notes in ended] == list(range(len(kept), 0, -1))
    assert not kept[0]["numerics"]
    assert 0 < len(kept[1]["ratios"]) < len(measured["ratios"])
    assert not any("the process was ended" in note for note in measured["notes"])


def test_targets_belong_to_a_backend() -> None:
    assert bench_grid.targets("numpy", "cpu") is not None
    assert bench_grid.targets("strict", "cpu") is None
    for backend in ("torch", "jax"):
        targets = bench_grid.targets(backend, "cpu")
        assert targets is not None
        timed = set(bench_grid.workloads(backend, "cpu", "full"))
        for spec, shape, direction, peer in targets.against:
            assert Workload(spec, shape, direction=direction) in timed
            assert PEERS[peer].takes(Workload(spec, shape, direction=direction))
    assert half_pooled(8) == "sh(1,1,1,1,2,2,2,2)"
    assert bench_grid.lengths("linear", 8) == [8, 32]
    assert bench_grid.lengths("softmax", 8) == [2, 8]


@pytest.mark.parametrize("grid", ["quick", "full"])
def test_targets_of_jax_on_cuda_are_timed_against_cudnn(grid: str) -> None:
    targets = bench_grid.targets("jax", "cuda")
    assert targets is not None
    timed = bench_grid.workloads("jax", "cuda", grid)
    with_target = [w for w in timed if w in targets.fastest]
    assert {(w.spec, w.shape[3], w.direction) for w in with_target} == {
        (spec, dim, direction)
        for spec in ("softmax", "bn")
        for dim in (64, 128)
        for direction in DIRECTIONS
    }
    for workload in with_target:
        suffix = "" if workload.spec == "softmax" else " of softmax"
        peer = PEERS[f"jax.nn.dot_product_attention{suffix}, cudnn"]
        assert peer.takes(workload)
        assert peer.name.startswith(FUSED)


@pytest.mark.parametrize("grid", ["quick", "full"])
def test_targets_of_torch_on_cuda_are_timed_against_every_fused_kernel(grid: str) -> None:
    targets = bench_grid.targets("torch", "cuda:0")
    assert targets is not None
    timed = bench_grid.workloads("torch", "cuda:0", grid)
    with_target = {w: targets.fastest[w] for w in timed if w in targets.fastest}
    assert {(w.spec, w.shape[3], w.direction) for w in with_target} == {
        (spec, dim, direction)
        for spec in ("bn", half_pooled(16))
        for dim in (64, 128)
        for direction in DIRECTIONS
    }
    for workload, least in with_target.items():
        assert least == (1 / 1.05 if workload.spec == "bn" else 1 / 0.80)
        for kernel in ("flash", "efficient", "cudnn"):
            peer = PEERS[f"torch SDPA of softmax, {kernel}"]
            assert peer.takes(workload)
            assert peer.computed(workload) in timed
    literal = PEERS["literal Attention-BN, torch SDPA"]
    assert all(literal.takes(w) for w in with_target if w.spec == "bn")


def test_a_target_is_judged_against_the_fastest_kernel() -> None:
    bench = numpy_bench()
    workload = Workload("bn", (2, 16, 4096, 64), "bfloat16")
    bench.targets = bench_grid.targets("torch", "cuda")
    names = [f"torch SDPA of softmax{kernel}" for kernel in ("", ", flash", ", cudnn")]
    slower = {name: [time] * 3 for name, time in zip(names, (1.0, 0.98, 0.9), strict=True)}
    bench._ratios(workload, {bench.backend: [1.0] * 3, **slower})
    ratios = {r["peer"]: r for r in bench.speed["ratios"]}
    assert [ratios[name]["at_least"] for name in names] == [None, None, 1 / 1.05]
    assert ratios[names[2]]["met"] is False


@pytest.mark.parametrize("way", WAYS)
def test_peak_memory_sees_an_array(way: str) -> None:
    peak = peak_memory("numpy", (1, 8, 512, 64), way, 2)
    assert peak is not None
    assert 0 < peak < 64


def test_threads_are_limited_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("PDCORE_NUM_THREADS", "7")
    with threads_limited(1):
        assert os.environ["PDCORE_NUM_THREADS"] == "1"
    assert os.environ["PDCORE_NUM_THREADS"] == "7"


def test_the_command_prints_and_adds_to_a_record(small: None, tmp_path: Any) -> None:
    path = tmp_path / "record.json"
    run = record.new_run("numpy", "cpu")
    run["seconds"] = 12.5
    record.save(path, [run])
    result = CliRunner().invoke(app, ["bench", "numpy", "--report", str(path)])
    assert result.exit_code == 0, result.output
    assert "textbook" in result.output
    assert "not compared with" in result.output
    [saved] = json.loads(path.read_text())["runs"]
    assert saved["seconds"] == 12.5
    assert saved["speed"]["ratios"]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["numpi"], "did you mean 'numpy'", Exit.USAGE),
        (["numpy", "--against", "textbok NumPy"], "textbook NumPy", Exit.USAGE),
        (["numpy", "--grid", "huge"], "quick or full", Exit.USAGE),
        (["numpy", "--report", "no/such/folder/x.json"], "no folder", Exit.OUTPUT),
    ],
)
def test_wrong_options(arguments: list[str], message: str, code: int) -> None:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code
    assert message in " ".join(result.output.replace("│", " ").split())


def test_peers_are_listed() -> None:
    result = CliRunner().invoke(app, ["bench", "numpy", "--list-peers", "--json"])
    listed = json.loads(result.output)["peers"]
    assert [entry["peer"] for entry in listed] == list(PEERS)
    assert framework("numpy").available("cpu") is None


# --- the table of goals ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "jax", "numpy", "strict"])
def test_every_goal_belongs_to_a_row(backend: str) -> None:
    chosen = rows.choose(backend)
    assert len(chosen) == len(set(chosen))
    stated = {
        (row.name, row.by)
        for row, workload in chosen
        if rows.goal(backend, "cpu", row, workload) is not None
    }
    assert stated == set(rows._FORWARD.get(f"{backend}:cpu", {}))
    for row, workload in chosen:
        for name in row.by:
            other = workload._replace(spec=row.over, segments=0, direction="forward")
            assert PEERS[name].takes(other)


def test_goals_are_those_of_the_issue() -> None:
    goals = {
        (row.name, workload.shape, workload.direction): rows.goal("torch", "cpu:0", row, workload)
        for row, workload in rows.choose("torch")
    }
    assert goals["bn", (1, 8, 1024, 64), "forward"] == 1.05
    assert goals["bn", (1, 8, 1024, 64), "forward+backward"] == pytest.approx(1.15 * 1.05)
    assert goals["softmax segments=8", (1, 8, 1024, 64), "forward"] is None
    [(row, workload)] = rows.choose("jax", "softmax", (32, 8, 128, 64), "forward+backward")
    assert rows.goal("jax", "cpu", row, workload) == pytest.approx(1 / 1.1)
    assert rows.goal("jax", "cuda:0", row, workload) is None
    assert rows.goal("jax", "cpu", row, workload._replace(shape=SMALL)) is None


def test_a_row_is_chosen_by_any_form_of_its_spec() -> None:
    names = {row.name for row, _ in rows.choose("torch", "softmax+bn(statistics=prefix)+causal")}
    assert names == {"causal+bn(statistics=prefix)"}
    with pytest.raises(ValueError, match=r"no row 'gausian.*did you mean 'gaussian"):
        rows.choose("torch", "gausian(0.1)")
    with pytest.raises(ValueError, match=r"no row 'polynomial'"):
        rows.choose("torch", "polynomial")
    assert [row.by for row, _ in rows.choose("numpy", "softmax", SMALL, "forward")] == [
        ("onnxruntime Attention",),
        ("textbook NumPy", "in place NumPy", "head by head NumPy"),
    ]


def test_every_row_is_measured_once_its_numbers_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rows("numpy", "forward", ("",), monkeypatch)


def test_segments_are_compared_with_a_batch_of_them() -> None:
    whole = Workload("softmax", (2, 3, 16, 4), segments=4)
    assert whole.apart() == Workload("softmax", (8, 3, 4, 4))
    assert whole.segment_ids()[1].tolist() == [i // 4 for i in range(16)]
    assert operations(whole) == operations(whole.apart())


def table(*arguments: str) -> Any:
    return CliRunner().invoke(
        app, ["bench", "numpy", "--shape", "1,4,32,8", *arguments], catch_exceptions=False
    )


def test_the_command_prints_a_row_and_keeps_it(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "SECONDS", 0.0)
    path = tmp_path / "record.json"
    result = table("--spec", "bn", "--direction", "both", "--report", str(path))
    assert result.exit_code == 0, result.output
    assert "bn" in result.stdout
    assert "spec softmax" in result.stdout
    assert "bench of numpy:cpu: 0%, bn (1, 4, 32, 8) float32 forward+backward" in result.stderr
    [saved] = json.loads(path.read_text())["runs"]
    assert [entry["peer"] for entry in saved["speed"]["ratios"]] == ["spec softmax"]
    result = table("--spec", "bn", "--direction", "forward", "--json")
    assert json.loads(result.stdout)["speed"]["ratios"][0]["spec"] == "bn"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spec", "gausian(0.1)"], "did you mean 'gaussian(0.1)'"),
        (["--direction", "back"], "expected forward or both"),
        (["--shape", "1,8,64"], "expected B,H,N,D"),
        (["--table", "--grid", "full"], "no --against, no --grid"),
    ],
)
def test_wrong_rows(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "numpy", *arguments])
    assert result.exit_code == Exit.USAGE
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.skipif(os.name == "nt", reason="POSIX only")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_the_rows_that_are_finished(
    number: int, code: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    monkeypatch.setattr(measurements, "SECONDS", 0.0)
    measure = rows._measure

    def ended(bench: Bench, row: Any, workload: Workload) -> None:
        if bench.speed["ratios"]:
            signal.raise_signal(number)
        measure(bench, row, workload)

    monkeypatch.setattr(rows, "_measure", ended)
    path = tmp_path / "record.json"
    result = table("--table", "--report", str(path))
    assert result.exit_code == code, result.output
    assert "times, less is faster" in result.stdout
    [saved] = json.loads(path.read_text())["runs"]
    assert len(saved["speed"]["ratios"]) == 1
    assert any("the process was ended" in note for note in saved["speed"]["notes"])
