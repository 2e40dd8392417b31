"""The CUDA C++ source of a contraction by features, with phi compiled in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pdcore.extend import Features, Scores

from .programs import Program

__all__ = ["COLUMNS", "MAPS", "FeatureProgram", "columns_for"]

#: Columns of a result that a block of `features_forward` and of the pullbacks holds in registers.
COLUMNS = (64, 128)

#: phi(x) and its derivative as CUDA C++, by `Features.phi`; both propagate NaN.
MAPS: dict[str, tuple[str, str]] = {
    "elu": ("x < 0 ? exponential(x) : x + 1", "x >= 0 ? scalar(1) : exponential(x)"),
    "relu": ("x <= 0 ? scalar(0) : x", "x <= 0 ? scalar(0) : scalar(1)"),
}


@dataclass(frozen=True)
class FeatureProgram(Program):
    """The program of a contraction by features.

    Attributes
    ----------
    log : bool
        Whether the rows hold log phi.
    phi : str
        A key of `MAPS` where the rows hold x; empty where the rows hold phi(x).
    """

    log: bool = False
    phi: str = ""

    @classmethod
    def of_features(cls, c: Features, dtypes: Mapping[str, str]) -> FeatureProgram:
        """Return the program of a contraction by features, see `Program.of`."""
        base = Program.of(Scores("features"), (), dtypes)
        phi = c.phi if c.raw else ""
        return cls(base.scalar, base.weight, stored=base.stored, log=c.log, phi=phi)

    def _weight(self) -> str:
        value, slope = ("x", "scalar(1)") if not self.phi else MAPS[self.phi]
        return "\n".join(
            [
                super()._weight(),
                f"#define LOG_FEATURES {int(self.log)}",
                f"DEVICE scalar phi(scalar x) {{ return {value}; }}",
                f"DEVICE scalar phi_slope(scalar x) {{ return {slope}; }}",
            ]
        )


def columns_for(count: int) -> int:
    """Choose the columns of a block, for a result of `count` columns."""
    return next((c for c in COLUMNS if c >= count), COLUMNS[-1])
