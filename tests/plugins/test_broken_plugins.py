"""Broken plugins: each is reported with the reason, and none affects the others."""

from __future__ import annotations

import textwrap

import pytest
from installing import BROKEN, REPORT, add_distribution, fresh

from pdcore.backend import SPEC_VERSION

REASONS = {
    "raises_on_import": "OSError: libexample.so.1: cannot open shared object file",
    "exits_on_import": "SystemExit: this module is a script",
    "unusual_exception": "Skipped: there is nothing here for this machine",
    "not_there_at_all": "ModuleNotFoundError: No module named 'not_there_at_all'",
    "raises_in_hook": "pdcore_backends raised ZeroDivisionError: counted the devices wrongly",
    "misspelt_hook": "unknown hook 'pdcore_backend'; did you mean 'pdcore_backends'? known: ",
    "misspelt_undecorated": "unknown hook 'pdcore_kernel'; did you mean 'pdcore_kernels'? known: ",
    "undecorated_hook": "pdcore_backends is not decorated with pdcore.hookimpl",
    "unknown_argument": "Argument(s) {'dtype'} are declared in the hookimpl but can not be found",
    "wrapper_hook": "pdcore_backends is a hook wrapper, expected a plain function",
    "no_hooks": "it implements no hook; known: pdcore_backends, pdcore_kernels, ",
    "duplicate_name": "backend 'numpy' is declared by distribution pdcore ",
    "wrong_spec_version": (
        f"backend 'futuristic' is written for version {SPEC_VERSION + 1} of the plan contract, "
        f"this pdcore has version {SPEC_VERSION}: upgrade pdcore"
    ),
    "old_spec_version": f"this pdcore has version {SPEC_VERSION}: upgrade the plugin",
    "wrong_field": (
        "backend 'lettered': requires is 'abacus', expected a sequence such as ('abacus',)"
    ),
    "wrong_type": "pdcore_backends returned BackendInfo, expected a list of BackendInfo",
    "wrong_item": "pdcore_backends returned a list with dict, expected a list of BackendInfo",
    "returns_nothing": (
        "pdcore_normalizations returned NoneType, expected a list of Normalization classes"
    ),
    "word_taken": "Softmax: the word 'softmax' is taken by pdcore.spec.kernels.Exponential",
    "half_way": "Taken: the word 'causal' is taken by the grammar",
}


@pytest.fixture(scope="module")
def all_broken(tmp_path_factory):
    """Have every broken plugin beside a good one, in one process."""
    folder = tmp_path_factory.mktemp("everything")
    for name in (*REASONS, "missing_dependency", "fails_at_use"):
        add_distribution(folder, f"dist-{name.replace('_', '-')}", {name: name}, version="2.5")
    # The last by name, so it is loaded after all others.
    add_distribution(folder, "zz-good", {"good": "good_plugin"})
    (folder / "good_plugin.py").write_text(
        textwrap.dedent("""
            from pdcore.backend import BackendInfo
            from pdcore.plugins.hookspecs import hookimpl

            @hookimpl
            def pdcore_backends():
                return [BackendInfo(name="good", load="good_plugin:Missing", library="numpy")]
        """)
    )
    return fresh(REPORT, folder, BROKEN)


def test_every_fixture_is_asserted():
    fixtures = {path.parent.name for path in BROKEN.glob("*/__init__.py")}
    assert fixtures == {*REASONS, "missing_dependency", "fails_at_use"} - {"not_there_at_all"}


@pytest.mark.parametrize("name", REASONS)
def test_a_broken_plugin_says_why(all_broken, name):
    text = all_broken["broken"][name]
    assert REASONS[name] in text
    assert text.endswith(f"(distribution dist-{name.replace('_', '-')} 2.5)")
    assert "\n" not in text


def test_broken_plugins_do_not_affect_others(all_broken):
    assert "numpy" in all_broken["registered"]
    assert {*all_broken["third_party"]} - {"numba"} == {"late", "good", "hopeful"}
    assert {*all_broken["broken"]} == {*REASONS}
    assert all_broken["unavailable"]["good"] is None
    assert {"softmax", "linear", "bn"} <= {*all_broken["words"]}


@pytest.mark.parametrize("name", ["raises_on_import", "exits_on_import", "raises_in_hook"])
def test_a_broken_plugin_alone(tmp_path, name):
    add_distribution(tmp_path, "alone", {name: name})
    found = fresh(REPORT, tmp_path, BROKEN)
    assert REASONS[name] in found["broken"][name]
    assert "numpy" in found["registered"]


def test_a_duplicate_name_names_both_owners(all_broken):
    text = all_broken["broken"]["duplicate_name"]
    assert "is declared by distribution pdcore" in text
    assert "and again by distribution dist-duplicate-name 2.5" in text


def test_a_plugin_that_fails_half_way_leaves_nothing(all_broken):
    assert "halfway" not in all_broken["registered"]
    assert not {"by_hook", "by_hook_too", "at_import"} & {*all_broken["words"]}


def test_a_missing_dependency_stays_listed(all_broken):
    assert "hopeful" in all_broken["registered"]
    reason = "not installed: pip install a-framework-that-nobody-wrote"
    assert all_broken["unavailable"]["hopeful"] == reason
    assert not [name for name in all_broken["modules"] if name.startswith("missing_dependency.")]


def test_a_backend_that_fails_at_its_first_use(tmp_path):
    add_distribution(tmp_path, "late-comer", {"late": "fails_at_use"}, version="0.3")
    script = """
import json
from pdcore import plugins
from pdcore.errors import NoBackendError
answers = [plugins.unavailable_reason(plugins.registered()["late"])]
for _ in range(2):
    try:
        plugins.load_backend("late")
    except NoBackendError as error:
        answers += [str(error), error.reasons, type(error.__cause__).__name__]
answers.append(plugins.unavailable_reason(plugins.registered()["late"]))
print(json.dumps(answers))
"""
    reason = (
        "failed to load: RuntimeError: the driver is older than the framework "
        "(distribution late-comer 0.3)"
    )
    before, text, reasons, cause, again, _, no_cause, after = fresh(script, tmp_path, BROKEN)
    assert before is None
    assert text == again == f"backend late: {reason}"
    assert reasons == {"late": [reason]}
    assert (cause, no_cause) == ("RuntimeError", "NoneType")  # remembered, not tried again
    assert after == reason


def test_one_unreadable_distribution_hides_no_other(tmp_path):
    broken = tmp_path / "unreadable-1.0.dist-info"
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: unreadable\nVersion: 1.0\n")
    (broken / "entry_points.txt").write_text("[some.other.group]\nno equals sign\n")
    add_distribution(tmp_path, "late-comer", {"late": "fails_at_use"})
    found = fresh(REPORT, tmp_path, BROKEN)
    assert {"numpy", "late"} <= {*found["registered"]}
    # Whether this raises depends on the version of Python: some ignore such a line.
    assert set(found["broken"]) <= {"unreadable"}


def test_two_broken_plugins_of_one_name(tmp_path):
    for name in ("first", "second"):
        add_distribution(tmp_path, name, {"same": "raises_on_import"})
    found = fresh(REPORT, tmp_path, BROKEN)
    assert set(found["broken"]) == {"same", "same (second)"}


def test_two_entry_points_for_one_module(tmp_path):
    add_distribution(tmp_path, "twice", {"one": "fails_at_use", "two": "fails_at_use"})
    found = fresh(REPORT, tmp_path, BROKEN)
    assert "late" in found["registered"]
    assert "already registered" in found["broken"]["two"]
