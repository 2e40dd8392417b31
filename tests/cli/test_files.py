"""Test that arrays in files are read back, and that hostile or damaged files are refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from pdcore.cli.files import (
    FileError,
    OutputError,
    check_writable,
    file_kind,
    read_arrays,
    replacing,
    write_arrays,
)

RNG = np.random.default_rng(0)
QKV: dict[str, Any] = {
    name: RNG.standard_normal((2, 3, 5, 4)).astype(np.float32) for name in ("q", "k", "v")
}
EXTRA: dict[str, Any] = {
    "mask": RNG.random((5, 5)) < 0.5,
    "key_mask": RNG.random((2, 5)) < 0.5,
    "bias": RNG.standard_normal((5, 5)).astype(np.float32),
    "offset": np.array([3, 4]),
    "params.beta": np.ones(3, np.float32),
}


TRACE: list[str] = []


class Harmful:
    """An object that leaves a trace when it is unpickled."""

    def __reduce__(self) -> Any:
        return (TRACE.append, ("unpickled",))


def save(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, path)
    return path


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asanyarray(array))
    return stream.getvalue()


def header(text: str, version: tuple[int, int] = (1, 0)) -> bytes:
    raw = (text + "\n").encode("latin1")
    size = struct.pack("<H" if version == (1, 0) else "<I", len(raw))
    return b"\x93NUMPY" + bytes(version) + size + raw


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def members(**changed: Any) -> dict[str, bytes]:
    """Return the members of a good archive, with changes; None leaves a member out."""
    content = {f"{name}.npy": npy(array) for name, array in QKV.items()}
    content.update({name.replace("_npy", ".npy"): value for name, value in changed.items()})
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ".NPZ"])
def test_everything_is_read_back(tmp_path: Path, kind: str) -> None:
    if kind == ".NPZ":
        path = save(tmp_path / "in.npz", QKV | EXTRA).rename(tmp_path / "in.NPZ")
    else:
        path = save(tmp_path / f"in{kind}", QKV | EXTRA)
    result = read_arrays(path)
    params = result.pop("params")
    assert set(result) | {f"params.{n}" for n in params} == set(QKV | EXTRA)
    for name, array in result.items():
        np.testing.assert_array_equal(array, (QKV | EXTRA)[name])
        assert array.dtype == (QKV | EXTRA)[name].dtype
    np.testing.assert_array_equal(params["beta"], 1.0)


def test_compressed_fortran_ordered_and_swapped_arrays(tmp_path: Path) -> None:
    options = dict(QKV)
    options["q"] = np.asfortranarray(QKV["q"])
    options["k"] = QKV["k"].astype(">f4")
    np.savez_compressed(tmp_path / "in.npz", **options)
    result = read_arrays(tmp_path / "in.npz")
    for name in QKV:
        np.testing.assert_array_equal(result[name], QKV[name])
        assert result[name].dtype.isnative


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_survive(tmp_path: Path, dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    path = save(tmp_path / "in.safetensors", {n: a.astype(kind) for n, a in QKV.items()})
    assert str(read_arrays(path)["q"].dtype) == dtype


def test_ids_of_queries_and_keys_are_a_pair(tmp_path: Path) -> None:
    ids = {f"{name}_segments": np.arange(10).reshape(2, 5) // 3 for name in "qk"}
    for suffix in (".npz", ".safetensors"):
        q_ids, k_ids = read_arrays(save(tmp_path / f"in{suffix}", QKV | ids))["segments"]
        np.testing.assert_array_equal(q_ids, k_ids)
    one = {"segments": ids["q_segments"]}
    assert read_arrays(save(tmp_path / "one.npz", QKV | one))["segments"].shape == (2, 5)
    for wrong in ({"q_segments": ids["q_segments"]}, ids | one):
        with pytest.raises(FileError, match="expected both q_segments and k_segments"):
            read_arrays(save(tmp_path / "wrong.npz", QKV | wrong))
    with pytest.raises(FileError, match="segments has dtype float64, expected integers"):
        read_arrays(save(tmp_path / "wrong.npz", QKV | {"segments": np.zeros((2, 5))}))


@pytest.mark.parametrize(("offset", "expected"), [(np.array(7), 7), (np.array("end"), "end")])
def test_a_scalar_offset_is_a_plain_value(tmp_path: Path, offset: Any, expected: Any) -> None:
    path = save(tmp_path / "in.npz", QKV | {"offset": offset})
    actual = read_arrays(path)["offset"]
    assert actual == expected
    assert type(actual) is type(expected)


def test_bytes_that_are_no_bools_do_not_stay_bools(tmp_path: Path) -> None:
    raw = npy(np.zeros((2, 5), bool))
    path = archive(tmp_path / "in.npz", members(key_mask_npy=raw[:-10] + b"\x02" * 10))
    assert read_arrays(path)["key_mask"].view(np.uint8).max() == 1


FLOAT = "{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"

NPZ: dict[str, tuple[Any, str]] = {
    "not a zip": (b"PK no", "not a readable .npz"),
    "empty": (b"", "not a readable .npz"),
    "a pickle": (pickle.dumps(Harmful()), "not a readable .npz"),
    "an array of objects": (
        members(q_npy=npy(np.array([Harmful()], dtype=object))),
        "q is an array of Python objects, which would have to be unpickled",
    ),
    "a path": (members(**{"../q.npy": npy(QKV["q"])}), r"member '\.\./q\.npy' is a path"),
    "an absolute path": (members(**{"/q.npy": npy(QKV["q"])}), "is a path"),
    "a Windows path": (members(**{"a\\q.npy": npy(QKV["q"])}), "is a path"),
    "no array": (members(**{"readme.txt": b"hello"}), "member 'readme.txt' is no array"),
    "an unknown name": (
        members(querry_npy=npy(QKV["q"])),
        r"unknown array 'querry'; known: bias, k, .*, params.NAME, q, q_labels, .*, v",
    ),
    "a bad parameter name": (members(**{"params.a b.npy": npy(np.ones(3))}), "unknown array"),
    "no keys": (members(k_npy=None), "k is missing; it holds q, v"),
    "integers": (members(q_npy=npy(np.ones((1, 2, 3), int))), "q has dtype int64, expected float"),
    "complex": (members(q_npy=npy(np.ones((1, 2, 3), complex))), "q has dtype complex128"),
    "text": (members(q_npy=npy(np.array(["a"]))), "q has dtype str32"),
    "bfloat16": (
        members(q_npy=npy(QKV["q"].astype(ml_dtypes.bfloat16))),
        "a .npz cannot hold bfloat16, use .safetensors",
    ),
    "records": (members(q_npy=npy(np.zeros(2, "f4,f4"))), "q has dtype void64"),
    "a mask of numbers": (members(mask_npy=npy(np.ones((5, 5)))), "mask has dtype float64, expec"),
    "an offset of floats": (members(offset_npy=npy(np.array(1.5))), "offset has dtype float64"),
    "an offset of other text": (members(offset_npy=npy(np.array("abc"))), "offset is text"),
    "an offset of two texts": (members(offset_npy=npy(np.array(["end"]))), "offset is text"),
    "an unreadable header": (members(q_npy=header("{'descr': ")), "q has no readable .npy header"),
    "a header that is code": (
        members(q_npy=header("__import__('os').getcwd()")),
        "q has no readable .npy header",
    ),
    "no magic": (members(q_npy=b"hello"), "q has no readable .npy header"),
    "an empty member": (members(q_npy=b""), "q has no readable .npy header"),
    "a future version": (members(q_npy=header(FLOAT % "(1,)", (9, 0))), r"has \.npy version"),
    "a huge shape": (
        members(q_npy=header(FLOAT % "(1000000, 1000000, 1000000)")),
        r"q claims shape \(1000000, 1000000, 1000000\) float32, 4000000000000000000 bytes, but",
    ),
    "a negative shape": (members(q_npy=header(FLOAT % "(-1, -4)") + bytes(16)), "in its header"),
    "a shape of bools": (members(q_npy=header(FLOAT % "(True, True)") + bytes(4)), "in its header"),
    "too few bytes": (members(q_npy=npy(QKV["q"])[:-4]), "bytes, but has .*damaged"),
    "too many bytes": (members(q_npy=npy(QKV["q"]) + bytes(4)), "bytes, but has .*damaged"),
    "a header without end": (
        members(q_npy=header("{" + " " * 60000 + "}")),
        "q has no readable .npy header",
    ),
}


@pytest.mark.parametrize("case", NPZ)
def test_hostile_and_damaged_npz(tmp_path: Path, case: str) -> None:
    content, message = NPZ[case]
    path = tmp_path / "in.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        archive(path, content)
    with pytest.raises(FileError, match=message) as caught:
        read_arrays(path)
    assert str(path) in str(caught.value)
    assert TRACE == []


def test_a_member_that_is_there_twice(tmp_path: Path) -> None:
    path = tmp_path / "in.npz"
    archive(path, members())
    with zipfile.ZipFile(path, "a") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("q.npy", npy(QKV["q"]))
    with pytest.raises(FileError, match="q is there twice"):
        read_arrays(path)


def test_other_compressions_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "in.npz", members(), zipfile.ZIP_BZIP2)
    with pytest.raises(FileError, match="unknown compression 12"):
        read_arrays(path)


def test_sizes_that_the_bytes_cannot_hold_are_not_allocated(tmp_path: Path) -> None:
    path = archive(tmp_path / "in.npz", members(), zipfile.ZIP_DEFLATED)
    raw = bytearray(path.read_bytes())
    # The directory at the end states the size of each member; claim 2 GiB for the first.
    at = raw.index(b"PK\x01\x02") + 24
    raw[at : at + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(raw)
    with pytest.raises(FileError, match="claims 2147483648 bytes, but"):
        read_arrays(path)


def test_more_than_this_machine_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "in.npz", QKV)
    monkeypatch.setattr(os, "sysconf", lambda name: 10)
    with pytest.raises(FileError, match=r"GiB, and this machine has 0\.0 GiB of memory"):
        read_arrays(path)


def test_a_damaged_byte_of_a_member_fails_its_checksum(tmp_path: Path) -> None:
    path = save(tmp_path / "in.npz", QKV)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\x93NUMPY") + 200] ^= 0x10
    path.write_bytes(raw)
    with pytest.raises(FileError, match="CRC"):
        read_arrays(path)


@pytest.mark.parametrize("kind", [".npz", ".safetensors"])
def test_no_damage_gets_past(tmp_path: Path, kind: str) -> None:
    """Check that damaged bytes raise `FileError` or give arrays, and nothing else."""
    path = save(tmp_path / f"in{kind}", QKV | EXTRA)
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for turn in range(400):
        raw = bytearray(good)
        if turn % 2:
            raw = raw[: rng.integers(len(raw))]
        else:
            # Headers are short: damage one in half of the runs.
            limit = 200 if turn % 4 else len(raw)
            for at in rng.integers(limit, size=rng.integers(1, 4)):
                raw[at] = rng.integers(256)
        path.write_bytes(raw)
        try:
            read_arrays(path)
        except FileError:
            refused += 1
    assert refused > 200


def tensors(path: Path, described: Any, content: bytes = b"", size: int | None = None) -> Path:
    raw = json.dumps(described).encode() if not isinstance(described, bytes) else described
    length = struct.pack("<Q", len(raw) if size is None else size)
    path.write_bytes(length + raw + content)
    return path


def described(dtype: str, shape: list[int], end: int) -> dict[str, Any]:
    return {"q": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


TENSORS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header too long": ({}, b"", 2**60, "not a readable .safetensors"),
    "no JSON": (b"{hello", b"", None, "not a readable .safetensors"),
    "huge shape": (described("F32", [2**40, 2**20], 4), bytes(4), None, "not a readable"),
    "beyond the end": (described("F32", [4], 16), bytes(4), None, "not a readable"),
    "missing": (described("F32", [1], 4), bytes(4), None, "k is missing; it holds q"),
    "integers": (described("I32", [1], 4), bytes(4), None, "q has dtype int32, expected float16"),
    "float8": (described("F8_E4M3", [1], 1), bytes(1), None, "q has dtype F8_E4M3, expected"),
    "a path": (
        {"../q": described("F32", [1], 4)["q"]},
        bytes(4),
        None,
        r"unknown array '\.\./q'",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_hostile_and_damaged_safetensors(tmp_path: Path, case: str) -> None:
    what, content, size, message = TENSORS[case]
    path = tensors(tmp_path / "in.safetensors", what, content, size)
    with pytest.raises(FileError, match=message):
        read_arrays(path)


@pytest.mark.parametrize("name", ["in.npy", "in", "in.npz.gz", "in.pt"])
def test_unknown_extensions(name: str) -> None:
    with pytest.raises(FileError, match=r"expected one of \.npz, \.safetensors"):
        file_kind(Path(name))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        read_arrays(tmp_path / "none.npz")
    folder = tmp_path / "folder.npz"
    folder.mkdir()
    with pytest.raises(FileError, match="not a regular file"):
        read_arrays(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in.npz")
    with pytest.raises(FileError, match="not a regular file"):
        read_arrays(tmp_path / "in.npz")


# --- writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".npz", ".safetensors"])
def test_what_is_written_can_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"out{kind}"
    arrays = {"out": QKV["q"].swapaxes(0, 1), "lse": np.array(1.5, np.float32)}
    with replacing(path) as stream:
        write_arrays(stream, kind, arrays, {"spec": "softmax"})
    if kind == ".npz":
        with np.load(path, allow_pickle=False) as result:
            loaded = dict(result)
    else:
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as result:
            assert result.metadata() == {"spec": "softmax"}
            loaded = {name: result.get_tensor(name) for name in result.keys()}  # noqa: SIM118
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].shape == array.shape


def test_bfloat16_is_refused_before_the_work() -> None:
    with pytest.raises(FileError, match=r"use \.safetensors"):
        check_writable(Path("out.npz"), "bfloat16")
    check_writable(Path("out.safetensors"), "bfloat16")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.npz"
    path.write_bytes(b"before")

    def interrupted() -> None:
        with replacing(path, force=True) as stream:
            stream.write(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["out.npz"]


def test_overwriting_takes_force(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"
    path.write_bytes(b"before")
    with pytest.raises(OutputError, match="exists; --force replaces it"), replacing(path):
        pytest.fail("the work must not begin")
    with replacing(path, force=True) as stream:
        stream.write(b"after")
    assert path.read_bytes() == b"after"


def test_a_file_made_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.npz"

    def overtaken() -> None:
        with replacing(path) as stream:
            stream.write(b"ours")
            path.write_bytes(b"theirs")

    with pytest.raises(OutputError, match="exists"):
        overtaken()
    assert path.read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out.npz"]


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(OutputError, match="not a regular file"):
        replacing(tmp_path / "folder.npz", force=True).__enter__()
    with pytest.raises(OutputError, match="cannot write there: No such file"):
        replacing(tmp_path / "none" / "out.npz").__enter__()


@pytest.mark.skipif(os.name == "nt", reason="POSIX only")
def test_the_mode_follows_the_umask_and_links_are_followed(tmp_path: Path) -> None:
    path, link = tmp_path / "out.npz", tmp_path / "link.npz"
    link.symlink_to(path)
    before = os.umask(0o027)
    try:
        with replacing(link) as stream:
            stream.write(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert link.is_symlink()
