"""Run everything that needs a GPU: ``python conformance/pdcore_conformance/gpu`` in a checkout.

Nothing has to be installed but the frameworks: the packages of the checkout are found from here,
and the wheels that `pdcore_conformance.gpu.prepare` fetched stand in for what the machine lacks.
"""

from __future__ import annotations

import sys

CARRIED: list[str] = []
if not __package__:  # run by its path, not by -m
    # Python has put this folder first; nothing of pdcore imports without the wheels.
    import prepared  # type: ignore[import-not-found]

    CARRIED = prepared.carry()
    # The modules of this folder must not stand for others.
    sys.path[:1] = [str(prepared.ROOT / name) for name in prepared.ROOTS]
    if lacking := prepared.missing():
        print(
            f"gpu: not installed: {', '.join(lacking)}; on a machine with a network, `python -m "
            "pdcore_conformance.gpu.prepare` fetches them into the checkout",
            file=sys.stderr,
        )
        sys.exit(9)

from pdcore_conformance.gpu.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(carried=CARRIED))
