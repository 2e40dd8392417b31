"""Reading, refusing, merging and comparing records, their compact form, and the command."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from sample_records import full_record, sample_case, sample_record, sample_run, sample_speed
from typer.testing import CliRunner

from pdcore.cli.commands import app
from pdcore.errors import Exit
from pdcore_conformance.record import RecordError, json_schema, load, merge, revision, save
from pdcore_conformance.report.comparison import compare

CASES = ["axes::one[softmax]", "axes::two[bn]", "lse::three[bn]"]


def run_of(name: str = "numpy:cpu", **more: Any) -> Any:
    return sample_run(name, [sample_case(case) for case in CASES], **more)


def written(folder: Path, *runs: Any, name: str = "record.json") -> Path:
    save(folder / name, list(runs))
    return folder / name


def changed(folder: Path, change: Any) -> Path:
    """Write a record, change its content, and write the content as plain JSON."""
    path = written(folder, run_of(speed=sample_speed()))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


# --- reading --------------------------------------------------------------------------------------


def test_a_record_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    record = full_record(every=7)
    save(tmp_path / "record.json", record["runs"])
    assert load(tmp_path / "record.json") == record


def test_infinite_and_undefined_ratios_survive(tmp_path: Path) -> None:
    run = sample_run("numpy:cpu", [sample_case("a::b", outcome="failed", ratio=float("inf"))])
    path = written(tmp_path, run)
    assert '"inf"' in path.read_text()
    [case] = load(path)["runs"][0]["cases"]
    assert case["ratio"] == float("inf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty, expected a record"),
        (b"\xff\xfe\x00", "not UTF-8 text: byte 0xff at 0"),
        (b"{'a': 1}", "not JSON: "),
        (b'{"schema": 1, "kind": "pdcore-conf', "the JSON is truncated: it breaks off at "),
        (b"[1, 2]", "not a conformance record: "),
        (b'{"kind": "else"}', "expected an object of kind 'pdcore-conformance'"),
        (
            b'{"kind": "pdcore-conformance", "schema": 99, "runs": []}',
            "written in schema 99, and this pdcore reads up to 1: upgrade pdcore",
        ),
        (
            b'{"kind": "pdcore-conformance", "schema": 1, "runs": [], "runs": []}',
            "damaged: the key 'runs' is twice in one object",
        ),
        (b'{"kind": "pdcore-conformance", "schema": 1, "runs": [NaN]}', "the bare word NaN"),
        (b"[" * 100_000, "record.json: "),
    ],
)
def test_a_damaged_file_says_what_is_wrong(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(RecordError) as error:
        load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda c: c["runs"][0].pop("cases"), "runs[0]"),
        (lambda c: c["runs"][0]["cases"][1].update(outcome="fine"), "cases[1]"),
        (lambda c: c["runs"][0]["cases"][0].update(seconds="long"), "cases[0]"),
        (lambda c: c["runs"][0]["counts"].update(passed=7), "counts"),
        (lambda c: c["runs"][0]["speed"]["ratios"][0].update(ratio=[1]), "ratios[0]"),
        (lambda c: c["runs"].append(c["runs"][0]), "runs[1]"),
    ],
)
def test_a_violation_of_the_schema_says_where(change: Any, place: str, tmp_path: Path) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(RecordError) as error:
        load(path)
    assert place in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["runs"][0]["cases"][1].update(outcome="fine"),
            "$.runs[0].cases[1].outcome: Invalid enum value 'fine', expected one of 'passed', ",
        ),
        (
            lambda c: c["runs"][0]["counts"].update(fine=1),
            "$.runs[0].counts: Invalid enum value 'fine', expected one of 'passed', 'failed', ",
        ),
        (
            lambda c: c["runs"][0]["cases"][0].update(seconds="long"),
            "$.runs[0].cases[0].seconds: got 'long', expected a number, 'inf', '-inf' or 'nan'",
        ),
        (
            lambda c: c["runs"][0]["cases"][0].update(seconds=10**400),
            "$.runs[0].cases[0].seconds: a number beyond any float",
        ),
        (
            lambda c: c["runs"][0]["environment"].update(cores="2"),
            "$.runs[0].environment.cores: Expected `int`, got `str`",
        ),
        (
            lambda c: c["runs"][0]["environment"].update(cores=0),
            "$.runs[0].environment.cores: Expected `int` >= 1",
        ),
        (
            lambda c: c["runs"][0]["environment"].update(colour="red"),
            "$.runs[0].environment: unknown key 'colour'; schema 1 has cpu, cores, threads, blas, ",
        ),
        (lambda c: c["runs"][0].update(commit="HEAD"), "$.runs[0].commit: Expected `str` matching"),
        (lambda c: c.pop("runs"), "$: Object missing required field `runs`"),
    ],
)
def test_a_violation_names_what_came_and_what_was_expected(
    change: Any, message: str, tmp_path: Path
) -> None:
    path = changed(tmp_path, change)
    with pytest.raises(RecordError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_halves_of_surrogate_pairs_become_escapes(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda c: c["runs"][0]["cases"][0].update(message="a\udc00b"))
    assert load(path)["runs"][0]["cases"][0]["message"] == "a\\udc00b"


def test_the_schema_is_that_of_the_types() -> None:
    result = CliRunner().invoke(app, ["report", "--schema"])
    assert result.exit_code == Exit.DONE, result.output
    schema = json.loads(result.stdout)
    assert schema == json_schema()
    run, case = schema["$defs"]["Run"], schema["$defs"]["Case"]
    assert schema["$defs"]["Record"]["properties"]["schema"]["enum"] == [1]
    assert run["required"] == [
        name for name in run["properties"] if name not in ("coverage", "ended")
    ]
    assert run["properties"]["commit"]["anyOf"][0]["pattern"] == "^[0-9a-f]{7,64}$"
    assert case["properties"]["outcome"]["enum"]
    for definition in schema["$defs"].values():
        assert definition["additionalProperties"] is False
        assert definition["description"]


# --- the compact form -----------------------------------------------------------------------------

#: What the compact form keeps of every case; the error over budget it rounds.
KEPT = ("id", "group", "level", "features", "outcome", "message")


def test_the_compact_form_keeps_cases_and_outcomes(tmp_path: Path) -> None:
    record = full_record(every=3)
    for run in record["runs"]:
        run["cases"].sort(key=lambda case: case["id"])
    save(tmp_path / "record.json", record["runs"], compact=True)
    compact = load(tmp_path / "record.json")
    for before, after in zip(record["runs"], compact["runs"], strict=True):
        assert list(before) == list(after)
        assert before["counts"] == after["counts"]
        assert before["versions"] == after["versions"]
        for old, new in zip(before["cases"], after["cases"], strict=True):
            assert [old[key] for key in KEPT] == [new[key] for key in KEPT]
            if old["outcome"] in ("failed", "error", "known failure"):
                assert old == new
            elif old["ratio"] is None:
                assert new["ratio"] is None
            else:
                assert new["ratio"] == pytest.approx(old["ratio"], rel=0.05)
                assert not new["verdicts"]
    assert not compare(record, compact).changes


def test_a_merge_changes_the_lines_of_what_changed(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    runs = full_record(every=3)["runs"]
    save(path, runs, compact=True)
    before = path.read_text().splitlines()
    run = {**runs[1], "created": "2026-11-25T05:00:00Z", "seconds": 94.2}
    run["cases"] = [dict(case) for case in run["cases"]]
    run["cases"][5].update(ratio=0.77)
    run["cases"][6].update(ratio=run["cases"][6]["ratio"] * (1 + 1e-6), seconds=1.5)
    new = written(tmp_path, run, name="new.json")
    done = command(path, new, "--merge", path, "--compact")
    assert done.exit_code == Exit.DONE, done.output
    after = path.read_text().splitlines()
    assert len(after) == len(before)
    differing = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(differing) == 3, differing
    assert differing[0] == '"created": "2026-11-25T05:00:00Z",'
    assert json.loads(differing[2].rstrip(","))[0] == run["cases"][5]["id"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda c: c["cases"][0][3].pop(), "$.cases[0][3]: got 0 results, expected one for each"),
        (lambda c: c["cases"][0][3].__setitem__(0, "fine"), "$.cases[0][3][0]: Invalid enum value"),
        (lambda c: c["cases"][0].pop(), "$.cases[0]: Expected `array` of length 4"),
        (lambda c: c["cases"].append(c["cases"][0]), "$.runs[0].cases[3].id: "),
        (lambda c: c["cases"].pop(), "$.runs[0].counts: 3 passed, but 2 cases are"),
        (lambda c: c["runs"][0].pop("level"), "$.runs[0]: Object missing required field `level`"),
    ],
)
def test_a_damaged_compact_form_says_where(change: Any, place: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    save(path, [run_of()], compact=True)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: {place}")


def test_the_record_of_the_repository_is_in_the_form_that_a_merge_writes(tmp_path: Path) -> None:
    stored = (Path(__file__).parents[2] / "docs" / "records" / "record.json").read_bytes()
    path = tmp_path / "record.json"
    path.write_bytes(stored)
    save(path, load(path)["runs"], compact=True)
    assert path.read_bytes() == stored
    assert len(stored) < 1 << 20


def test_the_compact_form_is_the_same_after_it_was_read(tmp_path: Path) -> None:
    run, path = run_of(), tmp_path / "record.json"
    # What is known at the end of a run only stands behind its cases and speed.
    run["coverage"] = {"pairs": [1, 2], "triples": [0, 0]}
    save(path, [run], compact=True)
    written = path.read_bytes()
    save(path, load(path)["runs"], compact=True)
    assert path.read_bytes() == written


def test_changes_of_records_are_no_changes_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, stored = tmp_path / "pdcore" / "__init__.py", tmp_path / "docs" / "record.json"
    for path in (module, stored):
        path.parent.mkdir()
        path.write_text("1\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "Begin")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr("pdcore.__file__", str(module))
    assert revision()[1] is False
    stored.write_text("2\n")
    assert revision()[1] is False
    module.write_text("2\n")
    assert revision()[1] is True


def test_a_folder_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is a directory"):
        load(tmp_path)
    with pytest.raises(RecordError, match="No such file"):
        load(tmp_path / "none.json")


# --- merging --------------------------------------------------------------------------------------


def test_the_later_run_counts() -> None:
    early, late = (run_of(created=f"2026-11-{day}T05:00:00Z") for day in (20, 24))
    late["cases"][0]["seconds"] = 9.0
    sentences: list[str] = []
    for order in ([early, late], [late, early]):
        merged = merge([sample_record(run) for run in order], say=sentences.append)
        assert merged["runs"] == [late]
    assert len(sentences) == 2
    assert "replaces" in sentences[0]


def test_a_run_that_was_not_available_replaces_nothing() -> None:
    present = run_of("torch:cuda", created="2026-11-20T05:00:00Z")
    absent = sample_run("torch:cuda", [], available=False, reason="no GPU", capabilities={})
    assert merge([sample_record(present), sample_record(absent)])["runs"] == [present]


def test_runs_of_several_backends_stand_side_by_side() -> None:
    merged = merge([sample_record(run_of("numpy:cpu")), sample_record(run_of("torch:cpu"))])
    assert [run["backend"] for run in merged["runs"]] == ["numpy", "torch"]


# --- comparing ------------------------------------------------------------------------------------


def test_a_record_is_no_worse_than_itself() -> None:
    record = full_record(every=5)
    comparison = compare(record, record)
    assert comparison.exit_code == Exit.DONE
    assert not comparison.changes


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda run: run["cases"][0].update(outcome="failed"), "fails now"),
        (lambda run: run["cases"][0].update(outcome="refusal verified"), "refused now"),
        (lambda run: run["cases"].pop(), "case missing"),
        (lambda run: run["cases"][0].update(ratio=0.9), "error / budget grew"),
        (lambda run: run["capabilities"].update(bias="unsupported"), "capability withdrawn"),
        (lambda run: run.update(available=False, reason="gone"), "not available any more"),
    ],
)
def test_each_way_to_get_worse_is_named(change: Any, kind: str) -> None:
    after = run_of()
    change(after)
    comparison = compare(sample_record(run_of()), sample_record(after))
    assert kind in [c.kind for c in comparison.of("worse")]
    assert comparison.exit_code == Exit.NUMERICS
    back = compare(sample_record(after), sample_record(run_of()))
    assert back.exit_code == Exit.DONE


def test_slower_is_worse_where_the_intervals_lie_apart() -> None:
    fast, slow = (run_of(speed=sample_speed(scale=scale)) for scale in (1.0, 0.5))
    comparison = compare(sample_record(fast), sample_record(slow))
    assert comparison.exit_code == Exit.UNMET
    assert not compare(sample_record(slow), sample_record(fast)).of("worse")


def test_speed_of_another_machine_is_not_compared() -> None:
    fast, slow = (run_of(speed=sample_speed(scale=scale)) for scale in (1.0, 0.5))
    slow["environment"] = {**slow["environment"], "cpu": "another"}
    comparison = compare(sample_record(fast), sample_record(slow))
    assert comparison.exit_code == Exit.DONE
    assert comparison.notes


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(RecordError, match="numpy:cpu, the second torch:cpu"):
        compare(sample_record(run_of()), sample_record(run_of("torch:cpu")))


# --- the command ----------------------------------------------------------------------------------


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_a_summary_and_a_page(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    save(path, full_record(every=9)["runs"])
    result = command(path, "--html", tmp_path / "page.html")
    assert result.exit_code == Exit.DONE, result.output
    assert "torch:cuda" in result.output
    assert "cupy:cuda is not available" in result.output
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_two_records_are_compared(tmp_path: Path) -> None:
    worse = run_of()
    worse["cases"][0].update(outcome="failed", ratio=7.0)
    worse["counts"].update(passed=2, failed=1)
    before = written(tmp_path, run_of(), name="before.json")
    after = written(tmp_path, worse, name="after.json")
    result = command(before, after)
    assert result.exit_code == Exit.NUMERICS
    assert "fails now" in result.output
    result = command(before, after, "--json")
    assert json.loads(result.stdout)["worse"][0]["what"] == CASES[0]
    assert command(after, before).exit_code == Exit.DONE


def test_a_damaged_record_is_an_error_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"schema": 1')
    result = command(tmp_path / "record.json")
    assert result.exit_code not in (Exit.DONE, Exit.NUMERICS)
    assert "the JSON is truncated" in result.output


def test_text_of_a_record_is_escaped_in_the_page(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>\x1b[31m"
    run = sample_run("numpy:cpu", [sample_case("a::b", outcome="failed", message=hostile)])
    path = written(tmp_path, run)
    result = command(path, "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "\x1b" not in result.output
