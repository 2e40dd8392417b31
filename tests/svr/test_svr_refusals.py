"""What pdcore.svr refuses before a solver is needed, and the error without a solver."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import pdcore
from pdcore import UnsupportedError
from pdcore.svr import certificate, fit, interpret

KEYS, TARGETS = np.ones((4, 3)), np.ones((4, 2))


@dataclass(frozen=True)
class Plain(pdcore.FeatureMap):
    """phi(x) = x."""

    word = "plain"
    signed = True

    def features(self, x: Any, *, xp: Any, params: Any) -> Any:
        return x

    def latex(self) -> str:
        return "x^T y"


def test_a_certificate_of_nothing() -> None:
    with pytest.raises(TypeError, match=r"expansion: got int, expected what pdcore\.svr\.fit"):
        certificate(3)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("softmax(softcap=2.0)", "softcap"),
        (pdcore.AttentionSpec(kernel=Plain(), normaliser="one"), "signed"),
        ("causal", "every query has keys of its own"),
        ("bn(statistics=prefix)", "every query has statistics of its own"),
        ("sparse(2,3)", "not symmetric"),
        ("sparse(2,2)+sh(2)", "pools keys under a window"),
    ],
)
def test_specs_that_are_no_regression(spec: Any, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^spec: .*{reason}"):
        fit(KEYS, TARGETS, spec, C=1.0, epsilon=0.1)
    x = KEYS[None]
    with pytest.raises(UnsupportedError, match=f"^spec: .*{reason}"):
        interpret(x, x, x, spec, epsilon=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keys": KEYS.tolist()}, TypeError, "keys: got builtins.list"),
        ({"keys": KEYS.astype("f4")}, TypeError, "keys: got a numpy array of float32"),
        ({"targets": TARGETS * np.nan}, ValueError, "targets: got NaN or inf"),
        ({"keys": np.ones(4)}, ValueError, "keys: got shape (4,), expected (H, M, D) or (M, D)"),
        ({"keys": np.ones((0, 3)), "targets": np.ones((0, 1))}, ValueError, "none of them 0"),
        ({"targets": np.ones(4)}, ValueError, "targets: got shape (4,), expected (4, Dv)"),
        ({"targets": np.ones(4)}, ValueError, "of one output, targets[..., None]"),
        ({"params": np.ones(3)}, TypeError, "params: got ndarray, expected a mapping"),
        ({"params": 0}, TypeError, "params: got int, expected a mapping"),
        ({"targets": np.ones((4, 0))}, ValueError, "Dv at least 1"),
        ({"targets": np.ones((3, 2))}, ValueError, "targets: got shape (3, 2)"),
        ({"C": 0.0}, ValueError, "C: got 0.0, expected a finite number above 0"),
        ({"C": np.inf}, ValueError, "C: got inf"),
        ({"epsilon": -1}, ValueError, "epsilon: got -1, expected a finite number from 0"),
        ({"epsilon": True}, ValueError, "epsilon: got True"),
        ({"jobs": 0}, ValueError, "jobs: got 0, expected a whole number from 1, or -1"),
        ({"solver": "clarabell"}, ValueError, "did you mean 'clarabel'?"),
        ({"spec": 3}, TypeError, "spec: got int"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"keys": KEYS, "targets": TARGETS, "C": 1.0, "epsilon": 0.1}
    with pytest.raises(error, match=re.escape(message)):
        fit(**call | arguments)


@pytest.mark.parametrize(
    ("solver", "module", "package"),
    [
        ("clarabel", "qpsolvers", "qpsolvers"),
        ("clarabel", "clarabel", "clarabel"),
        ("sklearn", "sklearn", "scikit-learn"),
    ],
)
def test_without_the_extra_it_says_what_installs_it(
    solver: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    # The packages before it in the extra are present, so that this one is reported.
    for earlier in ("scipy.sparse", "qpsolvers"):
        if earlier != module:
            monkeypatch.setitem(sys.modules, earlier, object())
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        fit(KEYS, TARGETS, C=1.0, epsilon=0.1, solver=solver)
    message = f"pdcore.svr: {package} is not installed: pip install 'pdcore[svr]'"
    assert str(caught.value) == message


@pytest.mark.parametrize("sizes", [(5, 0, 3), (5, 4, 0)], ids=["no keys", "no outputs"])
def test_a_layer_without_points_or_outputs(sizes: tuple[int, int, int]) -> None:
    n, m, dv = sizes
    q, k, v = np.ones((2, n, 4)), np.ones((2, m, 4)), np.ones((2, m, dv))
    with pytest.raises(ValueError, match=r"k, v: got shapes .* no axis of length 0"):
        interpret(q, k, v, epsilon=0.1)
