"""Test the bundled recordings, and the demo on them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import pdcore
from pdcore import datasets
from pdcore.cli.commands import app
from pdcore.datasets import japanese_vowels
from pdcore.errors import Exit
from pdcore_conformance.cli.demo import measuring, recordings, running

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "pictures"


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    """Run the demo once, by the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "ROUNDS", 3)
        done = CliRunner().invoke(app, ["demo", "--out", str(folder), "--json"])
    assert done.exit_code in (Exit.DONE, Exit.NUMERICS), done.stderr
    assert "utterances" in done.stderr
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


# --- the recordings ---------------------------------------------------------------------------


def test_the_recordings_are_what_their_authors_describe() -> None:
    vowels = japanese_vowels()
    assert vowels.frames.shape == (640, 29, 12)
    assert vowels.frames.dtype == np.float32
    assert (vowels.lengths.min(), vowels.lengths.max()) == (7, 29)
    assert vowels.train.sum() == 270
    assert np.bincount(vowels.speakers[vowels.train])[1:].tolist() == [30] * 9
    test = np.bincount(vowels.speakers[~vowels.train])[1:]
    assert test.tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert np.all(vowels.frames[~vowels.real] == 0)
    assert np.all(np.any(vowels.frames[vowels.real] != 0, axis=-1))


def test_the_attribution_is_beside_them() -> None:
    text = (Path(datasets.__file__).parent / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    for words in (
        "Kudo",
        "Toyama",
        "Shimbo",
        "UCI Machine Learning Repository",
        "CC BY 4.0",
        "10.24432/C5NS47",
        "Changes:",
    ):
        assert words in text
    for words in ("Kudo", "CC BY 4.0", "UCI"):
        assert words in datasets.ATTRIBUTION


def test_the_script_that_made_them_reads_the_format(tmp_path: Path) -> None:
    path = ROOT / "docs" / "make_japanese_vowels.py"
    spec = importlib.util.spec_from_file_location("make_japanese_vowels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    header = "#comment\n@problemName JapaneseVowels\n@data\n"
    (tmp_path / "a.ts").write_text(header + "1,2,3:4,5,6:2\n", encoding="utf-8")
    (tmp_path / "b.ts").write_text(header + "7,8:9,0.5:1\n", encoding="utf-8")
    module.make(tmp_path / "a.ts", tmp_path / "b.ts", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz", allow_pickle=False) as packed:
        np.testing.assert_array_equal(
            packed["frames"], [[[1, 4], [2, 5], [3, 6]], [[7, 9], [8, 0.5], [0, 0]]]
        )
        assert packed["lengths"].tolist() == [3, 2]
        assert packed["speakers"].tolist() == [2, 1]
        assert packed["train"].tolist() == [True, False]


# --- the demo ---------------------------------------------------------------------------------


def test_the_projections_are_fixed_and_leave_padding_at_zero() -> None:
    first, again = recordings.project(japanese_vowels()), recordings.project(japanese_vowels())
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    padded = ~first.key_mask[:, None, :].repeat(4, axis=1)
    assert np.all(first.q[padded] == 0)
    assert not np.array_equal(first.q, first.k)


def test_the_presets_are_the_documented_ones() -> None:
    kinds = {re.sub(r"\d+,\d+", "_", str(pdcore.parse(spec))) for spec in recordings.PRESETS}
    assert kinds == {re.sub(r"\d+,\d+", "_", str(pdcore.parse(spec))) for spec in pdcore.PRESETS}


def test_every_preset_is_judged_and_timed(result: dict[str, Any]) -> None:
    assert [p["spec"] for p in result["presets"]] == list(recordings.PRESETS)
    for preset in result["presets"]:
        measured = preset["backends"]["numpy"]
        assert 0 <= measured["error_over_budget"] <= 1, preset["spec"]
        low, high = measured["spread"]
        assert 0 < low <= measured["milliseconds"] <= high
        assert measured["versus_softmax"] > 0
        assert preset["redundancy"]["utterance"] > 0
    assert result["presets"][0]["backends"]["numpy"]["versus_softmax"] == 1.0
    assert result["within_budget"] is True


def test_the_picture_is_a_picture(result: dict[str, Any], folder: Path) -> None:
    from matplotlib.image import imread

    assert result["files"] == [str(folder / "attention.png"), str(folder / "attention.html")]
    height, width, _ = imread(folder / "attention.png").shape
    assert width > 1200
    assert height > 600


class Page(HTMLParser):
    """Collect what a browser would fetch, and the images' descriptions."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.alt: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("src", "href", "srcset") if name in attributes]
        if tag == "img":
            self.alt.append(attributes.get("alt", ""))


def test_the_page_needs_nothing_else(result: dict[str, Any], folder: Path) -> None:
    text = (folder / "attention.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert len(page.alt) == 4 * len(recordings.PRESETS) + 1
    assert all(page.alt)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "Kudo" in text
    assert "CC BY 4.0" in text
    assert "Nothing is" in text
    assert len(text) < 500_000


def test_the_weights_of_each_preset_are_drawn(result: dict[str, Any], folder: Path) -> None:
    page = Page()
    page.feed((folder / "attention.html").read_text(encoding="utf-8"))
    digests = {hashlib.sha256(link.encode()).hexdigest() for link in page.links}
    # Heads of scale 1 are the same in sh as in softmax, and in bn+sh as in bn.
    assert len(digests) == len(page.links) - 4


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ROUNDS", 2)
    monkeypatch.setenv("COLUMNS", "140")
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "deep" / "folder")])
    assert done.exit_code == 0, done.stderr
    for spec in recordings.PRESETS:
        assert spec in done.stdout
    assert f"wrote {tmp_path / 'deep' / 'folder' / 'attention.html'}" in done.stdout
    assert "Kudo" in done.stdout


def test_an_error_over_its_budget_ends_with_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pdcore_backends.numpy.impl import NumpyBackend

    honest = NumpyBackend.attention

    def careless(self: Any, plan: Any, inputs: Any, *, lse: bool = False) -> Any:
        out, level = honest(self, plan, inputs, lse=lse)
        return (out * np.float32(1.0001), level) if plan.spec.support.causal else (out, level)

    monkeypatch.setattr(NumpyBackend, "attention", careless)
    monkeypatch.setattr(measuring, "ROUNDS", 2)
    first, *_, last = recordings.PRESETS.items()
    for module in (measuring, running):
        monkeypatch.setattr(module, "PRESETS", dict([first, last]))
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--json"])
    assert done.exit_code == Exit.NUMERICS
    printed = json.loads(done.stdout)
    assert printed["within_budget"] is False
    assert printed["presets"][-1]["backends"]["numpy"]["error_over_budget"] > 1
    assert printed["presets"][0]["backends"]["numpy"]["error_over_budget"] < 1


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setattr(measuring, "ROUNDS", 2)
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "x")])
    assert done.exit_code == Exit.OUTPUT
    assert "cannot write there" in done.stderr
