"""The conformance suite: whether a backend computes what the specification says, and how fast."""

import pdcore  # noqa: F401  # modules of 0.1 import by the finder of pdcore.moved
