"""The commands of pdcore itself, as the entry-point group ``pdcore.commands`` declares them."""

from __future__ import annotations

__all__ = ["COMMANDS"]

#: By name: the function, and the line of ``pdcore --help``. See `pdcore.cli.discovery`.
COMMANDS = {
    "attend": ("pdcore.cli.attend:attend", "Compute attention over your own arrays."),
    "backends": (
        "pdcore.cli.backends:backends",
        "List the backends: version, devices, what they support, and why one is not available.",
    ),
    "explain": (
        "pdcore.cli.explain:explain",
        "Say how a call would run: derivation, plan, backend, and why not every other one.",
    ),
    "specs": (
        "pdcore.cli.specs:specs",
        "List the presets, and the words of a spec with their arguments and defaults.",
    ),
    "derive": (
        "pdcore.cli.derive:derive",
        "Derive an attention from a layer of a neural network, step by step.",
    ),
}
