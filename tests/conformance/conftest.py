"""Fixtures of the tests of the conformance suite."""

from __future__ import annotations

import signal

import pytest


@pytest.fixture
def interruptible():
    """Let SIGINT interrupt this process and its children, as a shell in the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
