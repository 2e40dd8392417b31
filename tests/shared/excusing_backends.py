"""A plugin of backends that would end a case, or the run, without a failure."""

from __future__ import annotations

import ctypes
import os
import sys
import time
import unittest

import pytest
from hypothesis.errors import UnsatisfiedAssumption

from pdcore.extend import FEATURES, ArrayBackend, BackendInfo, hookimpl

_FRAMEWORK = {
    "autodiff",
    "double_backward",
    "vmap",
    "jvp",
    "compile",
    "dropout",
    "axis_name",
    "group",
}
FULL = {f: "unsupported" if f in _FRAMEWORK else "full" for f in FEATURES}


def _unsatisfied():
    raise UnsatisfiedAssumption


def _interrupt():
    raise KeyboardInterrupt


def _skip_test():
    raise unittest.SkipTest("planted")


def _block():
    print("before the block")
    time.sleep(600)


def _abort():
    sys.stderr.write("terminate called, as planted\n")
    sys.stderr.flush()
    os.abort()


#: By the name of the backend: what raises an exception, and what ends or blocks the process.
RAISES = {
    "skips": lambda: pytest.skip("planted"),
    "skips_as_unittest": _skip_test,
    "expects_failure": lambda: pytest.xfail("planted"),
    "ends_pytest": lambda: pytest.exit("planted", returncode=0),
    "exits": lambda: sys.exit(0),
    "assumes": _unsatisfied,
    "interrupts": _interrupt,
}
ENDS = {
    "exits_at_once": lambda: os._exit(0),
    "segfaults": lambda: ctypes.string_at(0),
    "aborts": _abort,
    "blocks": _block,
}


def _backend(name, act):
    class Excusing(ArrayBackend):
        info = BackendInfo(
            name=name,
            load=f"{__name__}:{name}",
            library="numpy",
            requires=("numpy",),
            capabilities=FULL,
        )

        def scores(self, c, o):
            # The calls of most cases do not have 4 rows.
            return super().scores(c, o) if o.q.shape[-2] == 4 else act()

    return Excusing


BACKENDS = {name: _backend(name, act) for name, act in (RAISES | ENDS).items()}
globals().update(BACKENDS)


@hookimpl
def pdcore_backends():
    return [cls.info for cls in BACKENDS.values()]
