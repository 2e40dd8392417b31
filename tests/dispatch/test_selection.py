"""Selection: which backends are asked, in which order, which one runs, and the errors."""

from __future__ import annotations

import asyncio
import contextvars
import threading

import numpy as np
import pytest
from fake_backends import REQUEST, SHARDS, Taker, fakes, run

from pdcore.backend import FEATURES, BackendInfo
from pdcore.dispatch import reasons, resolve, selection, use_backend
from pdcore.errors import NoBackendError, UnsupportedError
from pdcore.plugins import registry as plugins
from pdcore.spec import parse


@pytest.fixture
def add(monkeypatch):
    with fakes(monkeypatch) as add:
        yield add


# Which backends are asked


def test_the_arrays_library_decides_and_built_in_comes_first(add):
    eager = add("eager", priority=1000)
    assert run() == "numpy"
    assert "asked" not in vars(eager)  # not even loaded
    assert resolve(None, "numpy").names == ("numpy", "eager")
    assert resolve(None, "numpy").source == "the arrays' library"
    assert not resolve(None, "numpy").explicit


def test_third_parties_by_priority_then_name(add):
    add("beta")
    add("alpha")
    high = add("high", priority=5)
    assert resolve(None, "numpy").names == ("numpy", "high", "alpha", "beta")
    assert run(request=SHARDS) == "high"
    high.answer = ("busy",)
    assert run(request=SHARDS) == "alpha"


def test_a_new_backend_is_seen_at_once(add):
    assert resolve(None, "numpy").names == ("numpy",)
    add("later")
    assert resolve(None, "numpy").names == ("numpy", "later")
    plugins.unregister_backend("later")
    assert resolve(None, "numpy").names == ("numpy",)


def test_another_library_only_if_named(add):
    foreign = add("foreign", base=Taker, library="foreignlib")
    assert resolve(None, "numpy").names == ("numpy",)
    assert run("foreign") == "foreign"
    # The backend is asked about the arrays that it would receive.
    [asked] = foreign.asked
    assert asked == REQUEST._replace(library="foreignlib")


def test_another_library_without_exchange(add):
    add("foreign", library="foreignlib")
    with pytest.raises(UnsupportedError, match="takes foreignlib arrays only, got numpy"):
        run("foreign")


def test_the_order_of_choice(add, monkeypatch):
    for name in ("in_call", "in_block", "in_variable"):
        add(name)
    assert run() == "numpy"
    monkeypatch.setenv("PDCORE_BACKEND", "in_variable")
    assert run() == "in_variable"
    assert resolve(None, "numpy").source == "PDCORE_BACKEND"
    with use_backend("in_block"):
        assert run() == "in_block"
        assert resolve(None, "numpy").source == "use_backend"
        assert run("in_call") == "in_call"
        assert resolve("in_call", "numpy").source == "backend= in the call"
        with use_backend(["in_call", "in_block"]):
            assert resolve(None, "numpy").names == ("in_call", "in_block")
            with use_backend(None):
                assert run() == "in_variable"
        assert run() == "in_block"
    assert run() == "in_variable"


def test_an_exception_ends_the_block(add):
    add("in_block")
    with pytest.raises(KeyError), use_backend("in_block"):
        raise KeyError
    assert run() == "numpy"


def test_the_variable_may_be_a_list_or_empty(add, monkeypatch):
    add("first", answer=("no",))
    add("second")
    monkeypatch.setenv("PDCORE_BACKEND", " first , second ")
    assert resolve(None, "numpy").names == ("first", "second")
    assert run() == "second"
    for empty in ("", "  "):
        monkeypatch.setenv("PDCORE_BACKEND", empty)
        assert run() == "numpy"


def test_threads_do_not_inherit_and_tasks_do(add):
    add("in_block")
    found = {}

    def look(place):
        found[place] = run()

    async def task():
        look("task")

    with use_backend("in_block"):
        thread = threading.Thread(target=look, args=("thread",))
        thread.start()
        thread.join()
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(look, "thread with the context"))
        thread.start()
        thread.join()
        asyncio.run(task())
    assert found == {
        "thread": "numpy",
        "thread with the context": "in_block",
        "task": "in_block",
    }


def test_a_resolved_choice_stays(add, monkeypatch):
    add("in_block")
    with use_backend("in_block"):
        kept = selection.ambient()
    assert kept.source == "use_backend"
    assert run(kept) == "in_block"
    assert selection.ambient() is None


# Explicit choice


def test_an_explicit_choice_never_falls_back(add):
    add("stubborn", answer=("needs 16 bits", "needs a GPU"))
    other = add("other")
    with pytest.raises(UnsupportedError) as caught:
        run("stubborn")
    assert str(caught.value) == (
        "backend stubborn does not support exponential kernel, batch normalization, heads "
        "(1, 1, 2, 2): needs 16 bits; needs a GPU\n"
        "  q (2, 8, 1024, 64), k (2, 4, 1024, 64), v (2, 4, 1024, 64), numpy float32 on cpu\n"
        "  no other backend is tried, because 'stubborn' was named by backend= in the call"
    )
    assert "asked" not in vars(other)


@pytest.mark.parametrize("source", ["use_backend", "PDCORE_BACKEND"])
def test_the_error_names_who_chose(add, monkeypatch, source):
    add("stubborn", answer=("no",))
    if source == "PDCORE_BACKEND":
        monkeypatch.setenv("PDCORE_BACKEND", "stubborn")
    refused = pytest.raises(UnsupportedError, match=f"'stubborn' was named by {source}")
    with use_backend("stubborn" if source == "use_backend" else None), refused:
        run()


def test_a_list_falls_back_in_its_order(add):
    one = add("one", answer=("no",))
    add("two")
    add("three")
    assert run(["one", "two", "three"]) == "two"
    assert run(("three", "two")) == "three"
    assert len(one.asked) == 1


def test_a_list_of_backends_that_all_refuse(add):
    for name, why in (("one", "too long"), ("three", "too short")):
        add(name, answer=(why,))
    add("idle")
    with pytest.raises(NoBackendError) as caught:
        run(["three", "one"])
    assert caught.value.reasons == {
        "three": ["too short"],
        "one": ["too long"],
        "numpy": ["not named by backend= in the call"],
        "idle": ["not named by backend= in the call"],
    }
    assert list(caught.value.reasons)[:2] == ["three", "one"]


def test_a_named_backend_that_is_not_installed(add):
    add("absent", requires=("no_such_module",), install="pip install 'pdcore[absent]'")
    with pytest.raises(NoBackendError) as caught:
        run("absent")
    assert "backend absent cannot run exponential kernel" in str(caught.value)
    assert "not installed: pip install 'pdcore[absent]'" in str(caught.value)
    assert "'absent' was named by backend= in the call" in str(caught.value)
    assert caught.value.reasons == {"absent": ["not installed: pip install 'pdcore[absent]'"]}
    assert run(["absent", "numpy"]) == "numpy"


def test_a_named_backend_that_does_not_load(add):
    plugins.register_backend(
        BackendInfo(name="late", load="fake_backends:Nothing", library="numpy")
    )
    with pytest.raises(NoBackendError) as caught:
        run("late")
    assert "failed to load: AttributeError" in str(caught.value)
    assert run(["late", "numpy"]) == "numpy"


def test_a_named_plugin_that_is_broken(add):
    add("fine")
    error = RuntimeError("libcudart.so.13: cannot open")
    plugins.broken["shattered"] = plugins.BrokenPlugin("shattered-dist", "0.2", error)
    with pytest.raises(NoBackendError) as caught:
        run("shattered")
    reason = (
        "failed to load: RuntimeError: libcudart.so.13: cannot open "
        "(distribution shattered-dist 0.2)"
    )
    assert caught.value.reasons == {"shattered": [reason]}
    assert reasons(REQUEST, ["shattered", "fine"]) == {
        "shattered": [reason],
        "fine": [],
        "numpy": [],
    }
    with pytest.raises(ValueError, match="failed to load: shattered"):
        run("shaterred")


# Wrong choices


def test_unknown_names(add, monkeypatch):
    add("fine")
    text = "unknown backend 'nunpy'; did you mean 'numpy'? known: "
    for choice in ("nunpy", "nunpy:cuda", ["fine", "nunpy"]):
        with pytest.raises(ValueError) as caught:
            run(choice)
        assert str(caught.value).startswith(f"backend= in the call: {text}")
        assert "fine" in str(caught.value)
    refused = pytest.raises(ValueError, match="use_backend: unknown backend 'nunpy'")
    with refused, use_backend("nunpy"):
        raise AssertionError("the block was entered")
    monkeypatch.setenv("PDCORE_BACKEND", "numpy,nunpy")
    with pytest.raises(ValueError, match="PDCORE_BACKEND: unknown backend 'nunpy'"):
        run()


@pytest.mark.parametrize("choice", ["", ":cuda", "numpy:", [], ["numpy", ""]])
def test_choices_that_name_nothing(add, choice):
    with pytest.raises(ValueError, match="backend= in the call: got "):
        run(choice)


@pytest.mark.parametrize("choice", [3, b"numpy", {"numpy"}, ["numpy", 3], np.array(["numpy"]), np])
def test_choices_of_the_wrong_type(add, choice):
    with pytest.raises(TypeError, match="expected a backend's name such as 'torch'"):
        run(choice)


# Devices


def test_a_device_with_the_name(add):
    add("both", devices=("cpu", "cuda"))
    here = selection.choose(REQUEST, "both:cpu")
    assert (here.backend.info.name, here.device) == ("both", None)
    there = selection.choose(REQUEST, "both:cuda:1")
    assert (there.backend.info.name, there.device) == ("both", "cuda:1")
    assert [asked.device for asked in type(there.backend).asked] == ["cpu", "cuda:1"]


def test_a_device_kind_is_any_of_its_devices(add):
    add("both", devices=("cpu", "cuda"))
    on_second = REQUEST._replace(device="cuda:1")
    assert selection.choose(on_second, "both:cuda").device is None
    assert selection.choose(on_second, "both:cuda:1").device is None
    assert selection.choose(on_second, "both:cuda:0").device == "cuda:0"
    assert selection.choose(on_second, "both:cpu").device == "cpu"


def test_a_device_that_a_backend_does_not_have(add):
    with pytest.raises(UnsupportedError, match="'numpy:cuda' was named") as caught:
        run("numpy:cuda")
    assert "device cuda: runs on cpu" in str(caught.value)
    assert run(["numpy:cuda", "numpy"]) == "numpy"
    eager = add("eager")  # its own refusals() would let it pass
    with pytest.raises(UnsupportedError, match="device cuda: runs on cpu"):
        run("eager:cuda")
    assert eager.asked == []


# Backends that misbehave


def test_refusals_that_raise_are_that_backends_own_reason(add):
    add("nervous", answer=IndexError("list index\nout of range"))
    add("calm")
    assert run(request=SHARDS) == "calm"
    with pytest.raises(NoBackendError) as caught:
        run("nervous")
    why = ["its refusals() raised IndexError: list index out of range"]
    assert caught.value.reasons == {"nervous": why}
    assert reasons(REQUEST)["nervous"] == why


@pytest.mark.parametrize("answer", [None, "no", {"no"}], ids=["None", "str", "set"])
def test_refusals_of_the_wrong_type(add, answer):
    add("vague", answer=answer)
    [why] = reasons(REQUEST)["vague"]
    assert why == f"its refusals() returned {type(answer).__name__}, expected a list of str"


# Reasons


def test_reasons_list_every_backend(add):
    add("fine")
    add("unwilling", answer=("no", "never"), priority=3)
    add("absent", requires=("no_such_module",), install="pip install absent", priority=2)
    loaded = add("foreign", library="foreignlib", priority=1)
    plugins.broken["shattered"] = plugins.BrokenPlugin("d", "1", ValueError("v"))
    plugins.broken["fine"] = plugins.BrokenPlugin("other-dist", "1", ValueError("v"))
    plugins.disabled["switched_off"] = "disabled: named in PDCORE_BLOCK"
    found = reasons(REQUEST)
    assert found == {
        "numpy": [],
        "unwilling": ["no", "never"],
        "absent": ["not installed: pip install absent"],
        "foreign": ["takes foreignlib arrays, others only if named (backend='foreign')"],
        "fine": [],
        "shattered": ["failed to load: ValueError: v (distribution d 1)"],
        "fine (other-dist)": ["failed to load: ValueError: v (distribution other-dist 1)"],
        "switched_off": ["disabled: named in PDCORE_BLOCK"],
    }
    assert list(found)[:5] == ["numpy", "unwilling", "absent", "foreign", "fine"]
    assert "asked" not in vars(loaded)


def test_reasons_use_the_predicate_of_select(add):
    answers = {"one": ("a",), "two": (), "three": ("b",)}
    for name, answer in answers.items():
        add(name, answer=answer)
    found = reasons(SHARDS)
    for name, why in found.items():
        if why:
            with pytest.raises(UnsupportedError):
                run(name, SHARDS)
        else:
            assert run(name, SHARDS) == name
    assert run(request=SHARDS) == next(name for name, why in found.items() if not why)


def test_no_backend_can_run_a_request(add):
    add(
        "jax_like",
        library="numpy",
        requires=("no_such_module",),
        install="pip install 'pdcore[jax]'",
        priority=2,
    )
    add("x", answer=("needs a newer driver (found 2)",))
    plugins.broken["cupy_like"] = plugins.BrokenPlugin(
        "pdcore", "0.1", RuntimeError("libcudart.so.13: cannot open")
    )
    with pytest.raises(NoBackendError) as caught:
        run(request=SHARDS)
    assert str(caught.value).splitlines() == [
        "no backend can run exponential kernel, batch normalization, heads (1, 1, 2, 2)",
        "  q (2, 8, 1024, 64), k (2, 4, 1024, 64), v (2, 4, 1024, 64), numpy float32 on cpu",
        f"  numpy:     {FEATURES['axis_name']}: unsupported",
        "  jax_like:  not installed: pip install 'pdcore[jax]'",
        "  x:         needs a newer driver (found 2)",
        f"  cupy_like: failed to load: {plugins.broken['cupy_like']}",
    ]
    assert set(caught.value.reasons) == {"numpy", "jax_like", "x", "cupy_like"}


def test_a_library_that_nobody_knows(add):
    with pytest.raises(NoBackendError) as caught:
        run(request=REQUEST._replace(library="tinygrad"))
    assert "tinygrad float32 on cpu" in str(caught.value)
    assert "takes numpy arrays, others only if named (backend='numpy')" in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("softmax", "exponential kernel"),
        ("softmax(softcap=30)+h(count)", "exponential kernel (softcap 30.0), h(count)"),
        ("linear+causal", "linear kernel, causal"),
        (
            "gaussian(0.3)+bn(statistics=running)+sparse(64,inf)",
            "gaussian kernel (gamma 0.3), batch (running) normalization, window (64, inf)",
        ),
        ("sh(1,2,pool=first)", "exponential kernel, heads (1, 2), the first key of a window"),
    ],
)
def test_specs_in_words(spec, words):
    assert selection.in_words(parse(spec)) == words
