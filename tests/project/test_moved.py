"""Names of version 0.1 import where 0.1 had them, and its pickles load.

``names_0_1.txt`` has the ``__all__`` of the modules of 0.1, without internal names that no page of
its documentation shows and that were renamed since; ``specs_0_1.pickle`` is a dict of spec string
to `AttentionSpec`, pickled by 0.1 with protocol 4.
"""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pdcore
from pdcore import moved

HERE = Path(__file__).parent
EXPORTED = {
    module: names.split()
    for module, _, names in (
        line.partition(": ") for line in (HERE / "names_0_1.txt").read_text("utf-8").splitlines()
    )
}
# The names of 0.1 whose place is another object of the same name now, and what 0.1 meant.
REPLACED = {"pdcore.derivation.derive": "pdcore.spec.latex.derivation_latex"}


def imported(module: str):
    """Import a module of 0.1 or of today; skip the test where its framework is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "pdcore").startswith("pdcore"):
            raise
        pytest.skip(f"{error.name} is not installed")


def resolved(path: str):
    """Return the object at a dotted path of today."""
    module, rest = path, []
    while True:
        try:
            value = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for name in rest:
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("old", sorted(moved.MODULES))
def test_moved_module_holds_every_name_and_warns(old, monkeypatch):
    new = moved.MODULES[old]
    today = imported(new)
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"^{old} is now {new};"):
        module = importlib.import_module(old)
    for name in EXPORTED.get(old, ()):
        path = moved.NAMES.get(f"{old}.{name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if path else "error", DeprecationWarning)
            value = getattr(module, name)
        assert value is (resolved(path) if path else getattr(today, name)), name
    assert not hasattr(module, "__path__")


@pytest.mark.parametrize("module", sorted(set(EXPORTED) - set(moved.MODULES)))
def test_room_keeps_every_name(module):
    room = imported(module)
    for name in EXPORTED[module]:
        path = f"{module}.{name}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = getattr(room, name)
        if path in moved.NAMES:
            new = moved.NAMES[path]
            assert value is resolved(new), path
            assert [str(w.message).partition(";")[0] for w in caught] == [f"{path} is now {new}"]
        else:
            assert not caught, path


@pytest.mark.parametrize("path", sorted(moved.NAMES))
def test_table_names_what_0_1_exported(path):
    module, _, name = path.rpartition(".")
    assert name in EXPORTED[module]


@pytest.mark.parametrize(("old", "new"), REPLACED.items())
def test_replaced_name_is_reachable_elsewhere(old, new):
    assert resolved(old) is not resolved(new)
    assert callable(resolved(new))


def test_every_module_is_a_room_or_in_the_table():
    for module in EXPORTED:
        assert module in moved.MODULES or importlib.util.find_spec(module), module


def test_renamed_name_of_a_moved_module(monkeypatch):
    monkeypatch.setitem(moved.NAMES, "pdcore.kernels.Elup", "pdcore.spec.kernels.Elu")
    monkeypatch.delitem(sys.modules, "pdcore.kernels", raising=False)
    with pytest.warns(DeprecationWarning, match=r"pdcore.kernels is now"):
        module = importlib.import_module("pdcore.kernels")
    with pytest.warns(DeprecationWarning, match=r"kernels.Elup is now pdcore.spec.kernels.Elu;"):
        assert module.Elup is pdcore.Elu


def test_star_import_of_a_moved_module(monkeypatch):
    monkeypatch.delitem(sys.modules, "pdcore.kernels", raising=False)
    namespace: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=r"pdcore.kernels is now"):
        exec("from pdcore.kernels import *", namespace)
    assert set(EXPORTED["pdcore.kernels"]) <= set(namespace)


@pytest.mark.parametrize(
    "statement", ["import pdcore.kernels", "from pdcore.normalization import Batch, Identity"]
)
def test_warning_points_to_the_statement(statement):
    program = f"import pdcore\n\n{statement}\n"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr.startswith("<string>:3: DeprecationWarning: pdcore.")


def test_conformance_alone_finds_its_old_modules():
    program = "from pdcore_conformance.budget import judge"
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True
    )
    assert "pdcore_conformance.budget is now pdcore_conformance.judge.budget" in done.stderr


def test_attribute_of_the_package():
    with pytest.warns(DeprecationWarning, match=r"pdcore.support is now pdcore.spec.support"):
        assert moved.attribute("pdcore", "support") is pdcore.spec.support
    with pytest.raises(AttributeError, match="module 'pdcore' has no attribute 'suport'"):
        _ = pdcore.suport


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("pdcore.commands_reproduce", "examples/reproduction"),
        ("pdcore_conformance.reproduce.cost", "examples/reproduction"),
        ("pdcore_conformance.training", "examples/reproduction/training"),
        ("pdcore_conformance.training.model", "examples/reproduction/training"),
    ],
)
def test_module_outside_the_wheel_says_where_it_is(module, place):
    with pytest.raises(ModuleNotFoundError, match=f"is in {place} of pdcore's repository"):
        importlib.import_module(module)


def test_unknown_module_is_reported_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'pdcore.kernel'$"):
        importlib.import_module("pdcore.kernel")


def test_second_install_changes_nothing():
    before = list(sys.meta_path)
    moved.install()
    assert sys.meta_path == before


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_specs_pickled_by_0_1_load():
    data = (HERE / "specs_0_1.pickle").read_bytes()
    specs = pickle.loads(data)  # noqa: S301 - the file beside this one
    assert len(specs) == 14
    for text, spec in specs.items():
        today = pdcore.parse(text)
        assert spec == today
        assert hash(spec) == hash(today)
        assert str(spec) == str(today)
        # And by its new places from now on.
        assert pickle.loads(pickle.dumps(spec)) == today  # noqa: S301 - written in this line
