"""Hostile arguments, files and variables: a short message, an exit code, and no traceback."""

from __future__ import annotations

import io
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pdcore.cli.commands import app
from pdcore.cli.files import FileError, OutputError, read_arrays, replacing
from pdcore.errors import Exit, SpecError, concise, visible
from pdcore.spec import parse

ESCAPE = "\x1b[31mred\x07\u202e"
LONG = "x" * 1_000_000
DIGITS = "9" * 5_000
QKV = {name: np.ones((1, 1, 3, 2), np.float32) for name in ("q", "k", "v")}


def run(*arguments: Any) -> Any:
    began = time.perf_counter()
    result = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="pdcore")
    assert time.perf_counter() - began < 10  # a fraction of a second, on a machine that is not busy
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert len(result.output) < 12_000
    assert "\x1b" not in result.output
    assert "\x07" not in result.output
    assert "\u202e" not in result.output
    return result


def process(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdcore", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
        **options,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.savez(tmp_path / "in.npz", **QKV)
    return tmp_path / "in.npz"


# --- arguments ------------------------------------------------------------------------------------

HOSTILE = {"an escape": ESCAPE, "a long word": LONG, "many digits": DIGITS, "bytes": "\udcff"}
#: Where the text goes, in place of None, and the exit codes that may come.
PLACES: dict[str, tuple[tuple[Any, ...], set[int]]] = {
    "spec": (("attend", None, "IN", "-o", "OUT"), {2}),
    "an argument of a spec": (("attend", "gaussian(%s)", "IN", "-o", "OUT"), {2}),
    "a name in a spec": (("attend", "softmax(%s=1)", "IN", "-o", "OUT"), {2}),
    "IN": (("attend", "softmax", None, "-o", "OUT"), {3}),
    "IN with an extension": (("attend", "softmax", "%s.npz", "-o", "OUT"), {3}),
    "OUT": (("attend", "softmax", "IN", "-o", None), {3}),
    "OUT in no folder": (("attend", "softmax", "IN", "-o", "%s/out.npz"), {6}),
    "--backend": (("attend", "softmax", "IN", "-o", "OUT", "--backend", None), {2}),
    "--backend with a device": (("attend", "softmax", "IN", "-o", "OUT", "-b", "numpy:%s"), {4}),
    "--device": (("attend", "softmax", "IN", "-o", "OUT", "--device", None), {2, 5}),
    "--offset": (("attend", "softmax", "IN", "-o", "OUT", "--offset", None), {2}),
    "an option": (("attend", "softmax", "IN", "-o", "OUT", "--%s"), {2}),
    "an extra argument": (("attend", "softmax", "IN", None, "-o", "OUT"), {2}),
    "a command": ((None,), {2}),
    "--shape": (("explain", "softmax", "--shape", None), {2}),
    "an axis of --shape": (("explain", "softmax", "--shape", "1,1,%s,4"), {2}),
    "--key-shape": (("explain", "softmax", "--shape", "1,1,1,1", "--key-shape", None), {2}),
    "--value-dim": (("explain", "softmax", "--shape", "1,1,1,1", "--value-dim", None), {2}),
    "--dtype": (("explain", "softmax", "--shape", "1,1,1,1", "--dtype", None), {2}),
    "--library": (("explain", "softmax", "--shape", "1,1,1,1", "--library", None), {2}),
    "--with": (("explain", "softmax", "--shape", "1,1,1,1", "--with", None), {2}),
    "--device of explain": (("explain", "softmax", "--shape", "1,1,1,1", "--device", None), {2, 5}),
    "LAYER": (("derive", None), {2}),
    "an argument of LAYER": (("derive", "mixture_norm(components=%s)"), {2}),
    "--kernel": (("derive", "linear", "--kernel", None), {2}),
    "--dim": (("derive", "linear", "--dim", None), {2}),
    "the backend to judge": (("conform", None), {2, 5}),
    "--level": (("conform", "numpy", "--level", None), {2}),
    "--case": (("conform", "numpy", "--case", None), {2}),
    "--report": (("conform", "numpy", "--report", "%s/record.json"), {6}),
    "the backend to measure": (("bench", None), {2, 5}),
    "--against": (("bench", "numpy", "--against", None), {2}),
    "--threads": (("bench", "numpy", "--threads", None), {2}),
    "RECORD": (("report", None), {3}),
    "a new backend": (("new-backend", None), {2}),
    "--library of it": (("new-backend", "mine", "--library", None), {2}),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", PLACES)
def test_hostile_arguments(
    place: str, kind: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = HOSTILE[kind]
    arguments, codes = PLACES[place]
    filled = [
        text if a is None else str(a).replace("%s", text).replace("IN", "in.npz") for a in arguments
    ]
    result = run(*("out.npz" if a == "OUT" else a for a in filled))
    allowed = codes | ({2} if kind == "many digits" and place.startswith("--") else set())
    assert result.exit_code in allowed, result.output
    assert result.stderr
    assert os.listdir(tmp_path) == ["in.npz"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"sh({'1,' * 1_000_000}1)", "got 2000005 characters, expected at most 10000"),
        (f"sh({DIGITS})", r"got 99.*\.\.\..*99, expected a whole number up to 9223372036854775807"),
        (f"sparse({DIGITS},1)", "expected a whole number up to"),
        (f"gaussian(gamma={'9' * 4000})", "expected a whole number up to"),
        ("gaussian(gamma=1e999)", "1e999 is beyond float64; write inf for infinity"),
        ("sh(9223372036854775808)", "expected a whole number up to"),
    ],
)
def test_numbers_and_lengths_of_a_spec_are_bounded(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        parse(text)
    assert len(str(caught.value)) < 400


def test_a_message_is_cut_and_harmless() -> None:
    assert visible("Vokale äöü, 日本語\n\tend") == "Vokale äöü, 日本語\n\tend"
    assert visible("\x1b[0m\x9b\r\u2028\udcff") == "\\x1b[0m\\x9b\\r\\u2028\\udcff"
    assert concise(f"unknown {LONG}; known: a") == f"unknown {'x' * 148}...{'x' * 147}; known: a"
    assert len(concise("word " * 100_000)) < 8_100


# --- files ----------------------------------------------------------------------------------------


def write_members(
    path: Path, members: dict[str, Any], compression: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in members.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.asarray(array))
            archive.writestr(f"{name}.npy", stream.getvalue())
    return path


def test_an_archive_of_many_members_takes_seconds(tmp_path: Path) -> None:
    names = [f"params.p{i}" for i in range(5_000)]
    path = write_members(tmp_path / "many.npz", QKV | dict.fromkeys(names, np.float32(1)))
    result = run("attend", "softmax", path, "-o", tmp_path / "out.npz")
    assert result.exit_code == Exit.INPUT
    assert "softmax has no parameter" in " ".join(result.stderr.split())
    path = write_members(tmp_path / "lacking.npz", dict.fromkeys(names[:1000], np.float32(1)))
    result = run("attend", "softmax", path, "-o", tmp_path / "out.npz")
    assert result.exit_code == Exit.INPUT
    assert "q is missing; it holds params.p0, params.p1, " in result.stderr
    assert "and 990 more" in result.stderr


@pytest.mark.parametrize(
    ("bomb", "message"),
    [("mask", "mask: got shape"), ("v", "v: got shape"), ("params.x", "has no parameter 'x'")],
)
def test_a_bomb_is_refused_by_its_header(
    tmp_path: Path, bomb: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zeros = np.zeros((1, 1, 1 << 24, 1), bool if bomb == "mask" else np.float32)
    path = write_members(tmp_path / "bomb.npz", QKV | {bomb: zeros}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000

    def inflated(*arguments: Any) -> None:
        raise AssertionError("an array was inflated before its shape was checked")

    monkeypatch.setattr("pdcore.cli.files.npz._read_bytes", inflated)
    result = run("attend", "softmax", path, "-o", tmp_path / "out.npz")
    assert result.exit_code == Exit.INPUT
    assert message in result.stderr


def test_headers_alone_say_what_the_arrays_are(tmp_path: Path) -> None:
    arrays = QKV | {"mask": np.ones((3, 3), bool), "offset": np.array("end")}
    np.savez(tmp_path / "in.npz", **arrays)
    whole, headers = (read_arrays(tmp_path / "in.npz", headers_only=h) for h in (False, True))
    assert headers["offset"] == whole["offset"] == "end"
    for name in ("q", "k", "v", "mask"):
        assert headers[name].shape == whole[name].shape
        assert headers[name].dtype == whole[name].dtype
        assert not headers[name].any()


def test_names_that_are_not_utf_8(source: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for suffix in (b".npz", b".safetensors"):
        given, out = folder + b"/\xff" + suffix, folder + b"/\xfe" + suffix
        if suffix == b".npz":
            os.rename(source, given)
        else:
            given = folder + b"/\xff.npz"
        done = process(
            "attend", "softmax", given, "-o", out, "--device", "cpu", stdout=subprocess.PIPE
        )
        assert done.returncode == 0, done.stderr
        assert "\\udcfe" in done.stdout
        assert os.path.exists(out)
    again = process("attend", "softmax", out, "-o", folder + b"/x.npz", stdout=subprocess.PIPE)
    assert again.returncode == Exit.INPUT  # it holds `out`, not q
    assert "unknown array 'out'" in again.stderr


def test_a_loop_of_links(source: Path, tmp_path: Path) -> None:
    for suffix in (".npz", ".json"):
        (tmp_path / f"a{suffix}").symlink_to(f"b{suffix}")
        (tmp_path / f"b{suffix}").symlink_to(f"a{suffix}")
    loop = tmp_path / "a.npz"
    result = run("attend", "softmax", loop, "-o", tmp_path / "out.npz")
    assert result.exit_code == Exit.INPUT
    assert "symbolic links" in " ".join(result.stderr.split())
    result = run("attend", "softmax", source, "-o", loop, "--force")
    assert result.exit_code == Exit.OUTPUT
    assert "cannot write there" in " ".join(result.stderr.split())
    assert run("report", tmp_path / "a.json").exit_code == Exit.INPUT
    assert run("new-backend", "mine", "-o", loop).exit_code == Exit.OUTPUT


def test_a_full_disk(source: Path, tmp_path: Path) -> None:
    big = {n: np.ones((1, 1, 4096, 64), np.float32) for n in ("q", "k", "v")}
    np.savez(source, **big)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))

    for out in ("out.npz", "out.safetensors"):
        done = process(
            "attend", "linear", source, "-o", tmp_path / out, preexec_fn=limited, stdout=-1
        )
        assert done.returncode == Exit.OUTPUT, done.stderr
        assert f"{out}: cannot write it: File too large" in " ".join(done.stderr.split())
        assert "Traceback" not in done.stderr
    assert os.listdir(tmp_path) == ["in.npz"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
@pytest.mark.parametrize(
    "arguments", [("specs",), ("specs", "--json"), ("--version",), ("--help",)]
)
def test_standard_output_that_is_full(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = process(*arguments, stdout=full)
    assert done.returncode == Exit.OUTPUT, done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_block_that_writes_names_the_path(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"out\.npz: cannot write it: No space left"),
        replacing(tmp_path / "out.npz"),
    ):
        raise OSError(28, "No space left on device")


def test_a_record_with_a_key_twice_among_many(tmp_path: Path) -> None:
    keys = ", ".join(f'"k{i}": 0' for i in range(200_000))
    (tmp_path / "r.json").write_text(f'{{{keys}, "k199999": 1}}')
    result = run("report", tmp_path / "r.json")
    assert result.exit_code == Exit.INPUT
    assert "the key 'k199999' is twice" in " ".join(result.stderr.split())


# --- names of new backends ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["é", "mine_", "_mine", "Mine", "class", "a" * 65, "a" * 300, "a-b", "", "ａ"]
)
def test_a_name_that_cannot_be_installed(name: str, tmp_path: Path) -> None:
    result = run("new-backend", "-o", tmp_path, "--", name)
    assert result.exit_code == Exit.USAGE
    assert "expected at most 64 of a-z, 0-9 and _" in " ".join(
        result.stderr.replace("│", " ").split()
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("library", ["é", "class", "a" * 300])
def test_a_library_that_cannot_be_imported(library: str, tmp_path: Path) -> None:
    assert run("new-backend", "mine", "-o", tmp_path, "--library", library).exit_code == Exit.USAGE


# --- environment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("PDCORE_NUM_THREADS", "abc", "got 'abc', expected a whole number >= 1"),
        ("PDCORE_NUM_THREADS", ESCAPE, "got '\\x1b"),
        ("PDCORE_NUM_THREADS", LONG[:100_000], "expected a whole number >= 1"),
        ("PDCORE_BACKEND", "nunpy", "unknown backend 'nunpy'; did you mean"),
        ("PDCORE_BACKEND", ESCAPE, "unknown backend"),
        ("PDCORE_BACKEND", "numpy:", "expected a backend's name"),
    ],
)
def test_wrong_variables(
    name: str, text: str, message: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    result = run("attend", "softmax", source, "-o", source.with_name("out.npz"))
    assert result.exit_code == Exit.USAGE, result.output
    assert name in result.stderr
    assert message in " ".join(result.stderr.split())
    assert not source.with_name("out.npz").exists()


def test_a_file_error_of_the_library_is_short(tmp_path: Path) -> None:
    path = write_members(tmp_path / "in.npz", QKV | {LONG[:60_000]: np.float32(1)})
    with pytest.raises(FileError):
        read_arrays(path)
    result = run("attend", "softmax", path, "-o", tmp_path / "out.npz")
    assert result.exit_code == Exit.INPUT
