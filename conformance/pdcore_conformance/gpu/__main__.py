"""Run everything that needs a GPU: ``python conformance/pdcore_conformance/gpu`` in a checkout.

Nothing has to be installed but the frameworks: the packages of the checkout are found from here,
and the wheels that `pdcore_conformance.gpu.prepare` fetched stand in for what the machine lacks.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run by its path, not by -m
    ROOT = Path(__file__).resolve().parents[3]
    # Python has put this folder there, whose modules must not stand for others.
    sys.path[0] = str(ROOT)
    sys.path[1:1] = [str(ROOT / name) for name in ("backends", "adapters", "conformance")]

from pdcore_conformance.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
