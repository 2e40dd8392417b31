"""Measure the claims of the paper: accuracy, head redundancy and cost of Attention-BN and -SH.

    python examples/reproduce.py
    python examples/reproduce.py --data UEA --full

Needs the extras ``cli``, ``conformance``, ``svr`` and ``torch``. The code is in ``reproduction/``.
"""

from __future__ import annotations

from comparison import command_line
from reproduction.command import reproduce

__all__ = ["app"]

app = command_line()
app.command()(reproduce)

if __name__ == "__main__":
    app(prog_name="reproduce.py")
