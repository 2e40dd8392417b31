"""Discovery: what is found, what is left out, and what a broken plugin does to the others."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import numpy as np
import pytest

import pdcore
from pdcore import discovery, plugins, vocabulary
from pdcore.backend import FEATURES, SPEC_VERSION, BackendInfo
from pdcore.errors import NoBackendError, PluginError
from pdcore_backends.numpy.impl import NumpyBackend

HERE = Path(__file__).resolve().parent
EXAMPLE = HERE / "example_plugin"
BROKEN = HERE / "broken_plugins"
FRAMEWORKS = ("torch", "jax", "cupy")

REPORT = """
import json, sys
from pdcore import plugins, vocabulary
registered = plugins.registered()
print(json.dumps({
    "registered": list(registered),
    "unavailable": {n: plugins.unavailable_reason(i) for n, i in registered.items()},
    "broken": {n: str(b) for n, b in plugins.broken.items()},
    "errors": {n: type(b.error).__name__ for n, b in plugins.broken.items()},
    "disabled": plugins.disabled,
    "words": sorted({*vocabulary.kernel_words(), *vocabulary.normalization_words()}),
    "modules": sorted(sys.modules),
}))
"""


def add_distribution(folder, name, entry_points, *, version="1.0"):
    """Write the metadata of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{point} = {value}" for point, value in entry_points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[pdcore]", *lines, ""]))


def fresh(script, *paths, **variables):
    """Run a script in a fresh interpreter, away from the checkout, and read the JSON it prints."""
    names = ("PDCORE_BLOCK", "PDCORE_PLUGINS", "PDCORE_BACKEND")
    environment = {name: text for name, text in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": os.pathsep.join([*map(str, paths), *filter(None, sys.path)])}
    completed = subprocess.run(
        [sys.executable, "-c", script],
        env=environment | variables,
        cwd=paths[0] if paths else None,
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout)


@pytest.fixture
def rediscover(monkeypatch):
    """Discover anew in this test, and once more after it, without what it added."""
    for name in ("PDCORE_BLOCK", "PDCORE_PLUGINS", "PDCORE_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    plugins._reset()
    yield
    plugins._reset()


@pytest.fixture
def example(tmp_path, monkeypatch, rediscover):
    """Have the example distribution: the installed one, else its sources with metadata."""
    try:
        importlib.metadata.distribution("pdcore-example")
    except importlib.metadata.PackageNotFoundError:
        add_distribution(tmp_path, "pdcore-example", {"example": "pdcore_example"})
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.syspath_prepend(EXAMPLE)
    assert "example" in plugins.registered(), plugins.broken.get("example")


def module(monkeypatch, name, **contents):
    """Put a module into sys.modules."""
    made = types.ModuleType(name)
    vars(made).update(contents)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def info(name, load="nowhere:Missing", **fields):
    return BackendInfo(name=name, load=load, library="numpy", **fields)


# What is found, and what that costs


def test_listing_the_backends_imports_no_framework(tmp_path):
    for name in (*FRAMEWORKS, "array_api_strict"):
        (tmp_path / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n")
    add_distribution(tmp_path, "pdcore-example-copy", {"example": "pdcore_example"})
    found = fresh(f"import pdcore\n{REPORT}", tmp_path, EXAMPLE)
    assert found["registered"][0] == "numpy"
    assert "example" in found["registered"]
    assert not found["broken"] or set(found["broken"]) == {"example"}  # where it is installed too
    top = {name.partition(".")[0] for name in found["modules"]}
    assert not top & {*FRAMEWORKS, "array_api_strict", "typer", "rich", "scipy", "matplotlib"}
    assert "pdcore_example.backend" not in found["modules"]
    assert "pdcore_backends.numpy.impl" not in found["modules"]


def test_import_does_not_discover(tmp_path):
    script = "import json, pdcore; from pdcore import plugins; print(json.dumps(plugins._stage))"
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


def test_order_is_built_in_then_priority_then_name(rediscover):
    for name, priority in (("beta", 1), ("alpha", 1), ("low", -5), ("high", 1000)):
        plugins.register_backend(info(name, priority=priority))
    names = [name for name in plugins.registered() if name in ("beta", "alpha", "low", "high")]
    assert names == ["high", "alpha", "beta", "low"]
    assert next(iter(plugins.registered())) == "numpy"
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
    find = discovery.find
    monkeypatch.setattr(discovery, "find", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plugins.discover()
    monkeypatch.setattr(discovery, "find", find)
    assert "numpy" in plugins.registered()


# Broken plugins

REASONS = {
    "raises_on_import": "OSError: libexample.so.1: cannot open shared object file",
    "exits_on_import": "SystemExit: this module is a script",
    "not_there_at_all": "ModuleNotFoundError: No module named 'not_there_at_all'",
    "raises_in_hook": "pdcore_backends raised ZeroDivisionError: counted the devices wrongly",
    "misspelt_hook": "unknown hook 'pdcore_backend'; did you mean 'pdcore_backends'? known: ",
    "misspelt_undecorated": "unknown hook 'pdcore_kernel'; did you mean 'pdcore_kernels'? known: ",
    "undecorated_hook": "pdcore_backends is not decorated with pdcore.hookspecs.hookimpl",
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
    "word_taken": "Softmax: the word 'softmax' is taken by pdcore.kernels.Exponential",
    "half_way": "Taken: the word 'causal' is taken by the grammar",
}


@pytest.fixture(scope="module")
def all_broken(tmp_path_factory):
    """Have every broken plugin beside a good one, in one process."""
    folder = tmp_path_factory.mktemp("everything")
    for name in (*REASONS, "missing_dependency", "fails_at_use"):
        add_distribution(folder, f"dist-{name.replace('_', '-')}", {name: name}, version="2.5")
    # By name the last: whatever the others do is done when its turn comes.
    add_distribution(folder, "zz-good", {"good": "good_plugin"})
    (folder / "good_plugin.py").write_text(
        textwrap.dedent("""
            from pdcore.backend import BackendInfo
            from pdcore.hookspecs import hookimpl

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


def test_broken_plugins_take_nobody_down(all_broken):
    assert {*all_broken["registered"]} - {"example"} == {"numpy", "late", "good", "hopeful"}
    assert {*all_broken["broken"]} == {*REASONS}
    assert all_broken["unavailable"]["good"] is None
    assert {"softmax", "linear", "bn"} <= {*all_broken["words"]}


@pytest.mark.parametrize("name", ["raises_on_import", "exits_on_import", "raises_in_hook"])
def test_a_broken_plugin_alone(tmp_path, name):
    add_distribution(tmp_path, "alone", {name: name})
    found = fresh(REPORT, tmp_path, BROKEN)
    assert REASONS[name] in found["broken"][name]
    assert found["registered"][0] == "numpy"


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
    # Only Python can tell whether it minds: some versions pass over such a line.
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
    assert found["registered"] == ["numpy"]
    assert not found["broken"]
    assert found["disabled"]["point"] == "disabled: not named in PDCORE_PLUGINS"
    assert "fails_at_use" not in found["modules"]


def test_only_the_named_third_parties(tmp_path):
    add_distribution(tmp_path, "pair", {"raises": "raises_on_import", "point": "fails_at_use"})
    found = fresh(REPORT, tmp_path, BROKEN, PDCORE_PLUGINS="point, imaginary")
    assert found["registered"] == ["numpy", "late"]
    assert "raises" in found["disabled"]
    assert found["disabled"]["imaginary"] == (
        "not installed: named in PDCORE_PLUGINS, but no distribution has it"
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
    """Have a plugin whose hook answers with what the test puts into a list."""
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


# The example distribution


def test_example_is_declared(example):
    assert plugins.registered()["example"].library == "array_api_strict"
    assert plugins.broken == {}
    assert vocabulary.find_kernel("sigmoid").__module__ == "pdcore_example.kernel"
    assert (
        str(pdcore.parse("key_rms + sigmoid(scale=2)+h(one)")) == "sigmoid(scale=2)+h(one)+key_rms"
    )
    assert set(plugins.registered()["example"].capabilities) == set(FEATURES)


@pytest.fixture
def arrays(example):
    rng = np.random.default_rng(7)
    q, k, v = rng.standard_normal((3, 2, 2, 5, 4))
    params = {"shift": np.array([0.3, -0.7]), "gain": 1 + 0.3 * rng.standard_normal((2, 4))}
    return q, k, v, params


def strict(x):
    import array_api_strict

    return array_api_strict.asarray(x)


def literal(q, k, v, params, *, one):
    """Sigmoid attention over keys divided by their root mean square, written out."""
    square = np.mean(k * k, axis=-2, keepdims=True)

    def t(x):
        return params["gain"][:, None] * x / np.sqrt(square + 1e-6)

    s = t(q) @ np.swapaxes(t(k), -1, -2) / 2 + params["shift"][:, None, None]
    w = 1 / (1 + np.exp(-s))
    return (w if one else w / w.sum(-1, keepdims=True)) @ v


@pytest.mark.parametrize("one", [False, True], ids=["h(sum)", "h(one)"])
@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
def test_example_kernel_and_normalization(arrays, library, one):
    q, k, v, params = arrays
    spec = "sigmoid+key_rms" + ("+h(one)" if one else "")
    expected = literal(q, k, v, params, one=one)
    if library == "array_api_strict":
        q, k, v = strict(q), strict(k), strict(v)
        params = {name: strict(x) for name, x in params.items()}
    out = pdcore.attention(q, k, v, spec, params=params)
    assert type(out) is type(q)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["q", "k", "v", "shift", "gain"])
@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
def test_example_gradients(arrays, library, name):
    q, k, v, params = arrays
    rng = np.random.default_rng(11)
    d_out = rng.standard_normal(q.shape)
    bring = strict if library == "array_api_strict" else (lambda x: x)
    given = {"q": q, "k": k, "v": v, **params}

    def loss(x):
        point = {**given, name: x}
        parts = {n: point.pop(n) for n in ("q", "k", "v")}
        return float(np.sum(d_out * literal(**parts, params=point, one=False)))

    _, _, vjp = pdcore.attention_vjp(
        bring(q), bring(k), bring(v), "sigmoid+key_rms",
        params={n: bring(x) for n, x in params.items()},
    )  # fmt: skip
    direction = rng.standard_normal(given[name].shape)
    step = 1e-5
    slope = (loss(given[name] + step * direction) - loss(given[name] - step * direction)) / (
        2 * step
    )
    found = float(np.sum(np.asarray(vjp(bring(d_out))[name]) * direction))
    assert found == pytest.approx(slope, rel=1e-7, abs=1e-9)


def test_example_statistics_merge(example):
    from pdcore_example.normalization import MeanSquare

    keys = np.random.default_rng(3).standard_normal((2, 3, 9, 4))
    mask = np.arange(9)[:, None] % 4 != 1
    stats, xp = MeanSquare(), np
    parts = [stats.of(keys[..., a:b, :], mask[a:b], xp=xp) for a, b in ((0, 2), (2, 7), (7, 9))]
    state = stats.zero(parts[0], xp=xp)
    for part in parts:
        state = stats.merge(state, part, xp=xp)
    whole = stats.of(keys, mask, xp=xp)
    for key, value in stats.finalize(state, xp=xp).items():
        np.testing.assert_allclose(value, whole[key], rtol=1e-13)


def test_example_backend_runs_what_was_not_written_for_it(arrays):
    q, k, v, _ = arrays
    spec = "causal+sh(1,2)"
    expected = pdcore.attention(q, k, v, spec)
    out = pdcore.attention(strict(q), strict(k), strict(v), spec)
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-12, atol=1e-12)


def test_exchange_at_an_explicitly_named_backend(arrays):
    q, k, v, _ = arrays
    expected = pdcore.attention(q, k, v, "bn")
    out = pdcore.attention(q, k, v, "bn", backend="example")
    assert type(out) is np.ndarray
    np.testing.assert_allclose(out, expected, rtol=1e-12, atol=1e-12)
