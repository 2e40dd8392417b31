"""Discovery and the registry: which plugins are found or disabled, and what is imported."""

from __future__ import annotations

import importlib.metadata
import sys
import threading

import pytest
from installing import (
    BROKEN,
    EXAMPLE,
    REPORT,
    add_distribution,
    fresh,
    info,
    module,
    rediscovered,
)

import pdcore
from pdcore.backend import SPEC_VERSION
from pdcore.errors import NoBackendError, PluginError
from pdcore.plugins import discovery
from pdcore.plugins import registry as plugins
from pdcore_backends.numpy.impl import NumpyBackend

FRAMEWORKS = ("torch", "jax", "cupy")


@pytest.fixture
def rediscover(monkeypatch):
    with rediscovered(monkeypatch):
        yield


# What is found, and what that costs


def test_listing_the_backends_imports_no_framework(tmp_path):
    for name in (*FRAMEWORKS, "array_api_strict"):
        (tmp_path / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")
    add_distribution(tmp_path, "pdcore-example-copy", {"example": "pdcore_example"})
    found = fresh(f"import pdcore\n{REPORT}", tmp_path, EXAMPLE)
    assert "numpy" in found["registered"]
    assert "numba" in found["third_party"]
    assert not found["broken"] or set(found["broken"]) == {"example"}  # where it is installed too
    top = {name.partition(".")[0] for name in found["modules"]}
    assert not top & {*FRAMEWORKS, "array_api_strict", "typer", "rich", "scipy", "matplotlib"}
    assert "pdcore_example.backend" not in found["modules"]
    assert "pdcore_backends.numpy.impl" not in found["modules"]


def test_import_does_not_discover(tmp_path):
    script = "import json, pdcore.plugins.registry as r; print(json.dumps(r._stage))"
    assert fresh(script, tmp_path) == "to do"


def test_built_in_backends_are_found_without_metadata(monkeypatch, rediscover):
    monkeypatch.setattr(discovery, "entry_points", lambda group: [])
    assert "numpy" in plugins.registered()
    assert plugins._entries["numpy"].origin == "distribution pdcore (source tree)"


def test_installed_metadata_comes_before_the_source_tree(monkeypatch, rediscover, tmp_path):
    add_distribution(tmp_path, "pdcore", {"numpy": "pdcore_backends.numpy"}, version="99.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins._entries == {}
    plugins.discover()
    assert plugins._entries["numpy"].origin == "distribution pdcore 99.0"
    assert plugins._entries["numpy"].rank[0] is False


def test_of_two_versions_the_first_on_the_path_counts(monkeypatch, tmp_path):
    folders = [tmp_path / version for version in ("2.0", "1.0")]
    for folder in folders:
        add_distribution(folder, "twofold", {"point": f"m{folder.name[0]}"}, version=folder.name)

    def fail(group):
        raise TypeError("one distribution is unreadable")

    monkeypatch.setattr(discovery, "entry_points", fail)
    found = importlib.metadata.distributions(path=list(map(str, folders)))
    monkeypatch.setattr(discovery, "distributions", lambda: found)
    points, unreadable = discovery.find_entry_points()
    assert [point.value for point, owner in points if not owner.built_in] == ["m2"]
    assert unreadable == {}


def test_order_is_built_in_then_priority_then_name(rediscover):
    for name, priority in (("beta", 1), ("alpha", 1), ("low", -5), ("high", 1000)):
        plugins.register_backend(info(name, priority=priority))
    names = [name for name in plugins.registered() if name in ("beta", "alpha", "low", "high")]
    assert names == ["high", "alpha", "beta", "low"]
    foreign = [entry.rank[0] for entry in map(plugins._entries.get, plugins.registered())]
    assert foreign == sorted(foreign)
    assert plugins.candidates("numpy")[:3] == ("numpy", "high", "alpha")
    assert plugins.candidates("nothing") == ()


def test_discovery_happens_once_whatever_the_threads(monkeypatch, rediscover, tmp_path):
    calls = []

    @pdcore.hookimpl
    def pdcore_backends():
        calls.append(threading.get_ident())
        plugins.discover()  # and a plugin may ask for plugins
        return [info("counted")]

    module(monkeypatch, "counting", pdcore_backends=pdcore_backends)
    add_distribution(tmp_path, "counting", {"counting": "counting"})
    monkeypatch.syspath_prepend(tmp_path)
    barrier, seen = threading.Barrier(8), []

    def ask():
        barrier.wait()
        seen.append("counted" in plugins.registered())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8
    assert len(calls) == 1


def test_an_interrupted_discovery_starts_over(monkeypatch, rediscover):
    find = discovery.find_entry_points
    monkeypatch.setattr(
        discovery, "find_entry_points", lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        plugins.discover()
    monkeypatch.setattr(discovery, "find_entry_points", find)
    assert "numpy" in plugins.registered()


# Switches


def test_block_leaves_out_a_built_in_one_unimported(tmp_path):
    found = fresh(REPORT, tmp_path, PDCORE_BLOCK="numpy")
    assert "numpy" not in found["registered"]
    assert found["disabled"]["numpy"] == "disabled: named in PDCORE_BLOCK"
    assert "pdcore_backends.numpy" not in found["modules"]


def test_block_takes_entry_points_and_backends(tmp_path):
    add_distribution(tmp_path, "pair", {"raises": "raises_on_import", "point": "fails_at_use"})
    found = fresh(REPORT, tmp_path, BROKEN, PDCORE_BLOCK="raises, late")
    assert "late" not in found["registered"]
    assert not found["broken"]
    assert {"raises", "late"} <= set(found["disabled"])
    assert "raises_on_import" not in found["modules"]
    assert "fails_at_use" in found["modules"]


def test_no_third_party(tmp_path):
    add_distribution(tmp_path, "pair", {"raises": "raises_on_import", "point": "fails_at_use"})
    found = fresh(REPORT, tmp_path, BROKEN, PDCORE_PLUGINS="")
    assert "numpy" in found["registered"]
    assert found["third_party"] == []
    assert not found["broken"]
    assert found["disabled"]["point"] == "disabled: not named in PDCORE_PLUGINS"
    assert "fails_at_use" not in found["modules"]


def test_only_the_named_third_parties(tmp_path):
    add_distribution(tmp_path, "pair", {"raises": "raises_on_import", "point": "fails_at_use"})
    found = fresh(REPORT, tmp_path, BROKEN, PDCORE_PLUGINS="point, imaginary")
    assert "numpy" in found["registered"]
    assert found["third_party"] == ["late"]
    assert "raises" in found["disabled"]
    assert found["disabled"]["imaginary"] == (
        "not installed: named in PDCORE_PLUGINS, but no distribution has it"
    )


def test_an_unknown_name_in_the_block_list_is_told(tmp_path):
    found = fresh(REPORT, tmp_path, BROKEN, PDCORE_BLOCK="torhc, torch", PDCORE_PLUGINS="")
    assert found["disabled"]["torch"] == "disabled: named in PDCORE_BLOCK"
    assert found["disabled"]["torhc"] == (
        "not installed: named in PDCORE_BLOCK, but no plugin or backend has it"
    )


def test_a_disabled_backend_says_so(monkeypatch, rediscover):
    monkeypatch.setenv("PDCORE_BLOCK", "numpy")
    with pytest.raises(NoBackendError, match="backend numpy: disabled: named in PDCORE_BLOCK"):
        plugins.load_backend("numpy")


# Backends in this process


def test_a_backend_is_loaded_once(rediscover):
    assert plugins.load_backend("numpy") is plugins.load_backend("numpy")


def test_threads_share_the_instance(monkeypatch, rediscover):
    barrier, found = threading.Barrier(6), []

    def load():
        barrier.wait()
        found.append(plugins.load_backend("numpy"))

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


class Other:
    pass


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Other, "expected a subclass of pdcore.backend.Backend"),
        (lambda: None, "expected a subclass of pdcore.backend.Backend"),
        (pdcore.Backend, "Can't instantiate abstract class Backend"),
        (
            NumpyBackend,
            "has another `info` than what is declared for 'odd'",
        ),
    ],
    ids=["no backend", "function", "abstract", "other declaration"],
)
def test_a_class_that_is_no_backend(monkeypatch, rediscover, cls, reason):
    module(monkeypatch, "odd_module", Odd=cls)
    plugins.register_backend(info("odd", "odd_module:Odd"))
    with pytest.raises(NoBackendError) as caught:
        plugins.load_backend("odd")
    assert "backend odd: failed to load: " in str(caught.value)
    assert reason in str(caught.value)
    assert "(this process)" in str(caught.value)


def test_a_class_that_is_not_there(monkeypatch, rediscover):
    module(monkeypatch, "odd_module")
    plugins.register_backend(info("odd", "odd_module:Gone"))
    with pytest.raises(NoBackendError, match="AttributeError: module 'odd_module' has no attribu"):
        plugins.load_backend("odd")


def test_unknown_names(rediscover):
    for call in (plugins.load_backend, plugins.unregister_backend, plugins.known_failures):
        with pytest.raises(ValueError, match=r"unknown backend 'nunpy'; did you mean 'numpy'\?"):
            call("nunpy")


def test_register_and_unregister(rediscover):
    before = plugins.generation()
    plugins.register_backend(info("mine"))
    assert "mine" in plugins.registered()
    assert plugins.generation() > before
    with pytest.raises(PluginError, match="'mine' is declared by register_backend in this process"):
        plugins.register_backend(info("mine"))
    with pytest.raises(PluginError, match="'numpy' is declared by distribution pdcore"):
        plugins.register_backend(info("numpy"))
    with pytest.raises(PluginError, match="written for version"):
        plugins.register_backend(info("newer", spec_version=SPEC_VERSION + 1))
    plugins.unregister_backend("mine")
    assert "mine" not in plugins.registered()
    assert "mine" not in plugins.candidates("numpy")


def test_what_is_missing_may_be_installed_meanwhile(tmp_path, monkeypatch, rediscover):
    declared = info("waiting", requires=("installed_meanwhile.sub",))
    plugins.register_backend(declared)
    assert plugins.unavailable_reason(declared) == "not installed: needs installed_meanwhile.sub"
    (tmp_path / "installed_meanwhile.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.unavailable_reason(declared) is None


def test_a_blocked_module_counts_as_missing(monkeypatch, rediscover):
    monkeypatch.setitem(sys.modules, "blocked_module", None)
    assert "not installed" in plugins.unavailable_reason(info("x", requires=("blocked_module",)))


# Known failures


@pytest.fixture
def with_failures(monkeypatch, rediscover, tmp_path):
    """Install a plugin whose hook returns the list that the test fills."""
    answers = []

    @pdcore.hookimpl
    def pdcore_backends():
        return [info("candid"), info("candid_too")]

    @pdcore.hookimpl
    def pdcore_known_failures(backend):
        answer = answers.pop(0)
        return answer(backend) if callable(answer) else answer

    module(
        monkeypatch,
        "candid_module",
        pdcore_backends=pdcore_backends,
        pdcore_known_failures=pdcore_known_failures,
    )
    add_distribution(tmp_path, "candid", {"candid": "candid_module"})
    monkeypatch.syspath_prepend(tmp_path)
    return answers


def test_known_failures_are_those_of_the_backends_own_plugin(with_failures):
    with_failures.append(lambda backend: {f"case[{backend}]": "rounding"})
    assert plugins.known_failures("candid_too") == {"case[candid_too]": "rounding"}
    assert plugins.known_failures("numpy") == {}


def test_known_failures_that_fail(with_failures):
    with_failures += [lambda backend: 1 / 0, ["case"], {"case": None}]
    with pytest.raises(PluginError, match=r"of distribution candid 1\.0 raised ZeroDivisionError"):
        plugins.known_failures("candid")
    for _ in range(2):
        with pytest.raises(PluginError, match="expected case ids mapped to reasons"):
            plugins.known_failures("candid")


def test_known_failures_without_arguments(monkeypatch, rediscover, tmp_path):
    @pdcore.hookimpl
    def pdcore_backends():
        return [info("brief")]

    @pdcore.hookimpl
    def pdcore_known_failures():
        return {"case": "reason"}

    module(
        monkeypatch,
        "brief_module",
        pdcore_backends=pdcore_backends,
        pdcore_known_failures=pdcore_known_failures,
    )
    add_distribution(tmp_path, "brief", {"brief": "brief_module"})
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.known_failures("brief") == {"case": "reason"}
