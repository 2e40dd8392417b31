"""Plugins that exit, wait for threads or print: nobody else notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from installing import (
    VARIABLES,
    add_distribution,
    fresh,
    info,
    rediscovered,
)

import pdcore
from pdcore.errors import NoBackendError
from pdcore.plugins import registry as plugins

GOOD = """
from pdcore.backend import BackendInfo
from pdcore.plugins.hookspecs import hookimpl

@hookimpl
def pdcore_backends():
    return [BackendInfo(name={name!r}, load={load!r}, library="numpy")]
"""


@pytest.fixture
def rediscover(monkeypatch):
    with rediscovered(monkeypatch):
        yield


def add_plugin(folder, name, code, *, load=None):
    add_distribution(folder, f"dist-{name}", {name: name})
    (folder / f"{name}.py").write_text(
        textwrap.dedent(code) + GOOD.format(name=name, load=load or f"{name}:Missing")
    )


RAISE = {
    "SystemExit": "raise SystemExit(3)",
    "GeneratorExit": "raise GeneratorExit('gone')",
    "CancelledError": "import asyncio\nraise asyncio.CancelledError('cancelled')",
    "Stop": "class Stop(BaseException): pass\nraise Stop('stopped')",
}


@pytest.mark.parametrize("name", RAISE)
@pytest.mark.parametrize("place", ["import", "hook", "class", "refusals", "versions"])
def test_an_exception_that_is_no_exception(name, place, tmp_path):
    raising = textwrap.indent(RAISE[name], "        ")
    code = RAISE[name] if place == "import" else ""
    if place == "hook":
        code = f"def fail():\n    if True:\n{raising}\nfail.__name__ = 'pdcore_backends'\n"
    add_plugin(tmp_path, "odd", code, load="odd_impl:Odd")
    if place == "hook":
        text = (
            (tmp_path / "odd.py")
            .read_text()
            .replace("    return [", f"    if True:\n{raising}\n    return [")
        )
        (tmp_path / "odd.py").write_text(text)
    at_class = RAISE[name] if place == "class" else ""
    methods = "\n".join(
        f"    def {method}(self, *a):\n        if {place == method}:\n"
        f"{textwrap.indent(raising, '    ')}\n        return {result}"
        for method, result in (("refusals", "[]"), ("versions", "{}"))
    )
    (tmp_path / "odd_impl.py").write_text(
        f"{at_class}\nfrom pdcore.backend import ArrayBackend, BackendInfo\n"
        "class Odd(ArrayBackend):\n"
        "    info = BackendInfo(name='odd', load='odd_impl:Odd', library='numpy')\n" + methods
    )
    seen = fresh(
        """
import json, numpy as np, pdcore
from pdcore.plugins import list_backends
q = np.ones((1, 1, 2, 2))
why = pdcore.explain(q, q, q).reasons["odd"]
listed = {b["name"]: b["reason"] for b in list_backends()}
print(json.dumps([why, listed["odd"], float(pdcore.attention(q, q, q).sum())]))
""",
        tmp_path,
        PDCORE_PLUGINS="odd",
    )
    why, reason, total = seen
    assert total == 4.0
    if place == "versions":
        assert why == []
        assert f"its versions() raised {name}" in reason
    else:
        assert name in why[0]


@pytest.mark.parametrize("place", ["import", "class"])
def test_an_interrupt_by_the_user_interrupts(place, monkeypatch, rediscover, tmp_path):
    library = f"interrupted_{place}"
    code = f"import {library}\n" if place == "import" else ""
    add_plugin(tmp_path, f"slow_{place}", code, load=f"{library}:Slow")
    (tmp_path / f"{library}.py").write_text("raise KeyboardInterrupt\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        plugins.load_backend(f"slow_{place}")
    # Nothing of the interrupted plugin is remembered as broken.
    assert f"slow_{place}" not in plugins.broken
    assert f"slow_{place}" not in plugins._failed


def test_a_plugin_may_ask_from_a_thread(monkeypatch, rediscover, tmp_path):
    monkeypatch.setattr(plugins, "PATIENCE", 0.2)
    add_plugin(
        tmp_path,
        "asking",
        """
        import threading
        from pdcore import plugins
        answers = []

        def ask():
            answers.append("numpy" in plugins.registered())
            answers.append(plugins.candidates("numpy")[0])
            answers.append(plugins.load_backend("numpy").info.name)

        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    began = time.perf_counter()
    assert "asking" in plugins.registered()
    assert sys.modules["asking"].answers == [True, "numpy", "numpy"]
    assert time.perf_counter() - began < 20
    assert "asking" in plugins.candidates("numpy")  # the partial answer is not kept


def test_other_threads_wait_for_a_slow_plugin(monkeypatch, rediscover, tmp_path):
    begun = threading.Event()
    monkeypatch.setitem(sys.modules, "slow_events", begun)
    add_plugin(
        tmp_path,
        "slow",
        "import sys, time\nsys.modules['slow_events'].set()\ntime.sleep(0.3)\n",
    )
    monkeypatch.syspath_prepend(tmp_path)
    first = threading.Thread(target=plugins.discover)
    first.start()
    begun.wait(10)
    assert "slow" in plugins.registered()
    first.join()


def test_explain_while_another_thread_unregisters(monkeypatch, rediscover):
    monkeypatch.setenv("PDCORE_PLUGINS", "")
    q = np.ones((1, 1, 2, 2))
    stop = threading.Event()
    load = "pdcore_backends.numpy.impl:NumpyBackend"

    def change():
        while not stop.is_set():
            for number in range(3):
                plugins.register_backend(info(f"passing{number}", load))
            time.sleep(0.002)
            for number in range(3):
                plugins.unregister_backend(f"passing{number}")

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(30):
            assert pdcore.explain(q, q, q).backend == "numpy"
            pdcore.attention(q, q, q)
    finally:
        stop.set()
        thread.join()


def test_a_backend_that_is_removed_while_it_is_judged(monkeypatch, rediscover):
    monkeypatch.setenv("PDCORE_PLUGINS", "")
    from pdcore.dispatch import explanation, selection

    def gone(name):
        raise ValueError(f"unknown backend {name!r}")

    q = np.ones((1, 1, 2, 2))
    monkeypatch.setattr(explanation, "load_backend", gone)
    seen = pdcore.explain(q, q, q)
    assert seen.backend is None
    assert seen.reasons["numpy"] == [selection.UNREGISTERED]
    monkeypatch.setattr(plugins, "load_backend", gone)
    with pytest.raises(NoBackendError, match=r"numpy: +unregistered in the meantime"):
        pdcore.attention(q, q, q)


@pytest.mark.parametrize("command", [("backends",), ("explain", "softmax", "--shape", "1,1,2,2")])
def test_what_a_plugin_prints_is_not_in_the_json(command, tmp_path):
    add_plugin(tmp_path, "loud", "print('from the import')\n", load="loud_impl:Loud")
    (tmp_path / "loud_impl.py").write_text(
        "import os\n"
        "print('from the class')\n"
        "from pdcore.backend import ArrayBackend, BackendInfo\n"
        "class Loud(ArrayBackend):\n"
        "    info = BackendInfo(name='loud', load='loud_impl:Loud', library='numpy')\n"
        "    def refusals(self, request):\n"
        "        print('from refusals')\n"
        "        os.write(1, b'from a library in C\\n')\n"
        "        return []\n"
    )
    # A table of commands, which every command imports.
    points = tmp_path / "dist_loud-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "[pdcore.commands]\nloud = loud_table:COMMANDS\n")
    (tmp_path / "loud_table.py").write_text("print('from the table')\nCOMMANDS = {}\n")
    variables = {n: t for n, t in os.environ.items() if n not in VARIABLES}
    variables["PDCORE_PLUGINS"] = "loud"
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "pdcore", *command, "--json"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    for place in ("the import", "the class", "the table"):
        assert f"from {place}" in done.stderr
