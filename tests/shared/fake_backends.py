"""Backends whose refusals a test sets, for the tests of dispatch."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

from installing import rediscovered

from pdcore.backend import Backend, BackendInfo, Request
from pdcore.dispatch import select
from pdcore.plugins import registry as plugins
from pdcore.spec import parse

REQUEST = Request(
    parse("bn+sh(1,1,2,2)"),
    "numpy",
    "float32",
    "cpu",
    (2, 8, 1024, 64),
    (2, 4, 1024, 64),
    (2, 4, 1024, 64),
)
# The NumPy backend refuses shards, which leaves the choice to the fake backends.
SHARDS = REQUEST._replace(axis_name="rows")


class Recorder(Backend):
    """A backend that returns `answer` as its refusals, and records the requests in `asked`."""

    answer: object = ()
    asked: list[Request]

    def __init__(self):
        type(self).asked = []

    def refusals(self, request):
        self.asked.append(request)
        if isinstance(self.answer, Exception):
            raise self.answer
        return list(self.answer) if isinstance(self.answer, tuple) else self.answer

    def attention(self, plan, inputs, *, lse=False):
        raise AssertionError("selection runs nothing")

    attention_vjp = attention_weights = attention


class Taker(Recorder):
    """A `Recorder` that also takes arrays of other libraries."""

    def exchange(self, array, device=None):
        raise AssertionError("selection moves nothing")


@contextmanager
def fakes(monkeypatch):
    """Yield a function that registers a fake backend until the end of the block.

    Of the installed backends only NumPy stays registered, so that a test knows all of them.
    """
    module = types.ModuleType("fake_backends_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def add(name, *, answer=(), base=Recorder, library="numpy", **fields):
        load = f"{module.__name__}:{name}"
        declared = BackendInfo(name=name, load=load, library=library, **fields)
        cls = type(name, (base,), {"info": declared, "answer": answer})
        setattr(module, name, cls)
        plugins.register_backend(declared)
        return cls

    with rediscovered(monkeypatch):
        for name in plugins.registered():
            if name != "numpy":
                plugins.unregister_backend(name)
        plugins.broken.clear()
        plugins.disabled.clear()
        yield add


def run(choice=None, request=REQUEST):
    """Return the name of the backend that is selected for a request."""
    return select(request, choice).info.name
