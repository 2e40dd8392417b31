"""The commands of conformance, as the entry-point group ``pdcore.commands`` declares them."""

from __future__ import annotations

__all__ = ["COMMANDS"]

#: By name: the function, and the line of ``pdcore --help``. See `pdcore.cli.discovery`.
COMMANDS = {
    "conform": (
        "pdcore_conformance.cli.conform:conform",
        (
            "Judge a backend by the float64 oracle: every axis, every pair, refusals, gradients, "
            "threads."
        ),
    ),
    "bench": (
        "pdcore_conformance.cli.bench:bench",
        "Measure speed, growth and memory, interleaved with the peers that compute the same.",
    ),
    "report": (
        "pdcore_conformance.cli.report:report",
        "Sum up a record, or compare two, or lay records out as a page.",
    ),
    "new-backend": (
        "pdcore_conformance.cli.new:new_backend",
        "Write an installable backend that conforms at once, with one step to make fast.",
    ),
    "demo": (
        "pdcore_conformance.cli.demo.command:demo",
        "Run every preset on recorded vowels, on every backend, and draw the attention weights.",
    ),
}
