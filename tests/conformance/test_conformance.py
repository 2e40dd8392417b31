"""The suite itself: outcomes, refusals, known failures, exit codes, and running one case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from installing import HERE, fresh

from pdcore.errors import Exit
from pdcore_conformance.judge.calls import Call
from pdcore_conformance.judge.subject import CORE, PROPERTIES

SOFTMAX = "kernels::kernel_is_computed[softmax-float32]"
GAUSSIAN = "refusals::feature[gaussian]"
BIAS = "refusals::feature[bias]"
DEAD = "kernels::no_such_case"
CAUSAL = "declaration::core_feature_is_declared[causal]"

#: A script that runs some cases on some backends and prints the outcomes.
RUN = """
import json, sys
import planted_backends
from pdcore.plugins import registry as plugins
from pdcore_conformance.runner.conforming import conform
planted_backends.register()
for name, failures in {failures!r}.items():
    entry = plugins._entries[name]
    plugins._entries[name] = entry._replace(known_failures=lambda backend, f=failures: f)
results = []
for name, options in {runs!r}:
    run, code = conform(name, **options)
    results.append({{
        "code": code,
        "counts": run["counts"],
        "available": run["available"],
        "reason": run["reason"],
        "cases": {{case["id"]: case for case in run["cases"]}},
    }})
print(json.dumps(results))
"""


def run_all(runs, failures=None):
    return fresh(RUN.format(runs=runs, failures=failures or {}), HERE, PDCORE_PLUGINS="")


@pytest.fixture(scope="module")
def outcomes():
    names = ("good", "no_bias", "secretive", "reluctant", "no_causal", "crashing")
    cases = [
        SOFTMAX,
        GAUSSIAN,
        BIAS,
        CAUSAL,
        "refusals::feature[causal]",
        "errors::wrong_call_names_its_argument[integers]",
    ]
    return dict(zip(names, run_all([(name, {"cases": cases}) for name in names]), strict=True))


def outcome(outcomes, name, case):
    return outcomes[name]["cases"][case]["outcome"]


def test_a_good_backend_passes(outcomes):
    assert outcomes["good"]["counts"]["passed"] == 6
    assert outcomes["good"]["code"] == Exit.DONE
    case = outcomes["good"]["cases"][SOFTMAX]
    assert 0 < case["ratio"] < 1
    assert set(case["verdicts"]) == {"out", "lse"}
    assert case["level"] == "core"
    assert case["group"] == "kernels"


def test_a_refusal_is_called_and_verified(outcomes):
    case = outcomes["no_bias"]["cases"][BIAS]
    assert case["outcome"] == "refusal verified"
    assert "no_bias" in case["message"]
    assert "not implemented" in case["message"]
    assert outcomes["no_bias"]["code"] == Exit.DONE


def test_a_feature_declared_unsupported_must_not_run(outcomes):
    case = outcomes["secretive"]["cases"][BIAS]
    assert case["outcome"] == "failed"
    assert "bias=unsupported" in case["message"]
    assert outcomes["secretive"]["code"] == Exit.NUMERICS


def test_an_undeclared_refusal_fails(outcomes):
    case = outcomes["reluctant"]["cases"][GAUSSIAN]
    assert case["outcome"] == "failed"
    assert "no gaussian kernels today" in case["message"]


def test_a_missing_core_feature_fails_once_and_is_refused(outcomes):
    assert (
        outcome(outcomes, "no_causal", "declaration::core_feature_is_declared[causal]") == "failed"
    )
    assert outcome(outcomes, "no_causal", "refusals::feature[causal]") == "refusal verified"


def test_a_crash_is_a_failure_with_its_error(outcomes):
    case = outcomes["crashing"]["cases"][SOFTMAX]
    assert case["outcome"] == "failed"
    assert "ZeroDivisionError: planted" in case["message"]


@pytest.fixture(scope="module")
def whole():
    """Return a run of the core level on a backend without a defect, one of whose notes is dead."""
    [result] = run_all([("good", {"level": "core"})], {"good": {DEAD: "long gone"}})
    return result


def test_known_failures_are_strict():
    runs = [("crashing", {"cases": [SOFTMAX]}), ("good", {"cases": [SOFTMAX]})]
    listed = {SOFTMAX: "a planted crash", DEAD: "long gone"}
    known, passing = run_all(runs, {"crashing": listed, "good": listed})
    assert known["cases"][SOFTMAX]["outcome"] == "known failure"
    assert known["cases"][SOFTMAX]["message"] == "a planted crash"
    # A run of known failures alone is a failure.
    assert known["code"] == Exit.FAILURE
    assert passing["cases"][SOFTMAX]["outcome"] == "failed"
    assert "it passes" in passing["cases"][SOFTMAX]["message"]


def test_a_known_failure_of_no_case_is_a_failure(whole):
    assert whole["code"] == Exit.NUMERICS
    assert whole["counts"]["failed"] == 1
    assert whole["cases"][DEAD]["outcome"] == "failed"
    assert "no such case" in whole["cases"][DEAD]["message"]


def test_an_unavailable_backend_is_an_error_unless_permitted():
    strict, permitted = run_all([("absent", {}), ("absent", {"allow_missing": True})])
    assert not strict["available"]
    assert "pip install no-such-module" in strict["reason"]
    assert strict["code"] == Exit.NO_BACKEND
    assert permitted["code"] == Exit.DONE
    assert permitted["cases"] == {}


def test_core_level_has_core_features_only(whole):
    assert whole["counts"]["passed"] > 200
    for case in whole["cases"].values():
        assert set(case["features"]) <= CORE


def pytest_alone(*arguments, cwd):
    """Run the suite by pytest, as in docs/conformance.md."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PDCORE_PLUGINS": "",
    }
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "pdcore_conformance.runner.plugin",
            "--pyargs",
            "pdcore_conformance.suite",
            "-p",
            "no:cacheprovider",
            *arguments,
        ],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.nightly
def test_pytest_runs_the_suite_on_two_processes(tmp_path):
    report = tmp_path / "record.json"
    done = pytest_alone(
        "--backend",
        "numpy",
        "-n",
        "2",
        "-k",
        "test_heads and float32",
        "--report",
        str(report),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = json.loads(report.read_text())["runs"]
    assert run["counts"]["passed"] == len(run["cases"]) > 50
    assert all(case["verdicts"] for case in run["cases"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--backend NAME[:DEVICE] is missing"),
        (("--backend", "numpi"), "did you mean 'numpy'?"),
        (("--backend", "numpy:cuda"), "numpy runs on cpu"),
        (("--backend", "numpy", "--case", "kernels::kernel_is_compute"), "kernel_is_computed"),
        (("--backend", "numpy", "--level", "some"), "core"),
    ],
)
def test_a_wrong_option_is_a_usage_error(arguments, message, tmp_path):
    done = pytest_alone(*arguments, cwd=tmp_path)
    assert done.returncode == 4
    assert message in done.stderr


def test_nothing_run_is_a_failure(tmp_path):
    done = pytest_alone("--backend", "numpy", "-k", "no_such_test", cwd=tmp_path)
    assert done.returncode == Exit.FAILURE


def test_listed_cases_run_alone(tmp_path):
    script = """
import json
from pdcore_conformance.runner.conforming import conform, list_cases
ids = list_cases("numpy")
some = ids[:: len(ids) // 7]
run, code = conform("numpy", cases=some)
print(json.dumps({"ids": ids, "some": some, "ran": [c["id"] for c in run["cases"]], "code": code}))
"""
    result = fresh(script, tmp_path, PDCORE_PLUGINS="")
    assert len(set(result["ids"])) == len(result["ids"]) > 2000
    assert sorted(result["ran"]) == sorted(result["some"])
    assert not any(c.isspace() for name in result["ids"] for c in name)
    assert result["code"] == 0


def test_calls_draw_the_same_values_in_every_dtype_and_layout():
    call = Call(spec="bn", key_mask="holes")
    narrow = call.but(dtype="float64", layout="sliced").arrays()
    plain = call.arrays()
    np.testing.assert_array_equal(plain.k, narrow.k.astype("float32"))
    assert np.isnan(plain.k[~plain.options["key_mask"][:, None].repeat(2, 1)]).all()
    assert not narrow.k.flags.c_contiguous


def test_properties_are_not_core():
    assert not CORE & PROPERTIES


def test_the_suite_is_part_of_the_package():
    suite = Path(sys.modules["pdcore_conformance"].__file__).parent / "suite"
    assert (suite / "pytest.ini").is_file()
    assert (suite.parent / "py.typed").is_file()


def test_a_conftest_where_the_command_runs_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "conftest.py").write_text("raise RuntimeError('loaded')\n")
    case = "kernels::kernel_is_computed[softmax-float32]"
    done = subprocess.run(
        [sys.executable, "-m", "pdcore", "conform", "numpy", "--case", case],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == Exit.DONE, done.stdout + done.stderr
