"""What a backend does against the specification, exceptions that would hide it included."""

from __future__ import annotations

import signal
import unittest
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis.errors import UnsatisfiedAssumption

__all__ = ["Nonconforming", "no_excuses"]

#: What ends a test, or an example of hypothesis, without a failure. `KeyboardInterrupt` is another:
#: see `no_excuses`.
_EXCUSES = (
    pytest.skip.Exception,
    pytest.xfail.Exception,
    pytest.exit.Exception,
    unittest.SkipTest,
    UnsatisfiedAssumption,
    SystemExit,
)


class Nonconforming(AssertionError):  # noqa: N818 - pytest reports it as a failed assertion
    """A backend does not do what the specification says."""


@contextmanager
def no_excuses() -> Iterator[None]:
    """Raise `Nonconforming` where the block raises what would end its case without a failure.

    A `KeyboardInterrupt` passes, because it is the user's; but where the process ignores SIGINT,
    as the child of `pdcore_conformance.runner.watching` does, it can only be the backend's.
    """
    try:
        yield
    except _EXCUSES as error:
        raise Nonconforming(_sentence(error)) from error
    except KeyboardInterrupt as error:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            raise
        raise Nonconforming(_sentence(error)) from error


def _sentence(error: BaseException) -> str:
    name = type(error).__name__
    return f"raises {name}({error}) where it should compute: a backend runs a call or refuses it"
