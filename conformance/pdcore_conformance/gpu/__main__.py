"""Run the command by ``python -m pdcore_conformance.gpu``."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
