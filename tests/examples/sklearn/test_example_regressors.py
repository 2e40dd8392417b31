"""Test the example that compares regressors whose kernels are attentions."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from example_modules import example
from typer.testing import CliRunner

from pdcore.errors import Exit

example("comparison")
command = example("compare_regressors")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "WIDTHS", (0.3, 1.0))
    monkeypatch.setattr(command, "BOXES", (1.0, 10.0))


def ran(*arguments: str) -> Any:
    return CliRunner().invoke(command.app, list(arguments))


def test_the_table_holds_what_is_known_of_it(small: None) -> None:
    run = ran("--kernel", "gaussian", "--kernel", "linear", "--folds", "2", "--json")
    assert run.exit_code == 0, run.output
    result = json.loads(run.stdout)
    scores = {title: np.array(cells) for title, cells in result["scores"].items()}
    assert {x.shape for title, x in scores.items() if "SVR" not in title} == {(3, 2)}
    peer, same = scores[command.PEER], scores["gaussian+h(one)"]
    # exp(-gamma |x - y|^2) with h = 1 is the kernel of the peer.
    np.testing.assert_allclose(same[[0, 2]], peer, atol=1e-2)
    for title in ("gaussian+h(sum)", "linear+h(one)"):
        # bn standardizes by the same mean and deviation, except for eps.
        np.testing.assert_allclose(scores[title][1], scores[title][2], atol=1e-2)
        assert np.all(scores[title] < 0.7)
    assert np.all(scores["gaussian+h(one)"] > 0.2)
    gains = result["differences"]["gaussian"]["bn - as they are, h(one)"]
    assert gains[0] == pytest.approx(np.mean(same[1] - same[0]))


def test_the_table_is_printed(small: None) -> None:
    run = ran("--kernel", "cosine", "--folds", "2")
    assert run.exit_code == 0, run.output
    for word in ("cosine+h(one)", "cosine+h(sum)", "standardized", "Paired differences"):
        assert word in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kernel", "gausian"], "did you mean 'gaussian'"),
        (["--kernel", "relu", "--kernel", "relu"], "is there twice"),
        (["--folds", "1"], "--folds"),
    ],
)
def test_wrong_options(arguments: list[str], message: str) -> None:
    run = ran(*arguments)
    assert run.exit_code == int(Exit.USAGE)
    assert message in " ".join(run.stderr.replace("│", " ").split())
