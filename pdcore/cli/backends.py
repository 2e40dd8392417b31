"""``pdcore backends``: the backends and what each supports."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ..plugins import list_backends
from .options import AsJson
from .reporting import emit, reported, stdout

__all__ = ["backends"]


@reported
def backends(as_json: AsJson = False) -> None:
    """List the backends: version, devices, what they support, and why one is not available."""
    listed = list_backends()
    if as_json:
        emit({"backends": listed})
        return
    table = Table("backend", "available", "version", "devices", "does not support, or why not")
    for b in listed:
        lacking = [feature for feature, support in b["capabilities"].items() if support != "full"]
        why = ", ".join(lacking) if b["available"] else b["reason"]
        versions = ", ".join(f"{n} {v}" for n, v in b["versions"].items())
        table.add_row(
            escape(b["name"]),
            "yes" if b["available"] else "no",
            escape(versions),
            escape(", ".join(b["devices"])),
            escape(why),
        )
    stdout().print(table)
