"""Plans on NumPy arrays: `ArrayBackend` with a threaded, tiled contraction by scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pdcore.extend import (
    FeatureRows,
    Features,
    Fold,
    Mean,
    Moments,
    Operands,
    Plan,
    Recentre,
    Request,
    ScaledRows,
    Scores,
    SilentBackend,
    Summary,
)

from . import INFO, features, prefix, scores, threads
from .by_heads import ByHeads

__all__ = ["NumpyBackend"]


class NumpyBackend(SilentBackend):
    """A backend that runs plans on NumPy arrays, on as many threads as the process has cores.

    The environment variable ``PDCORE_NUM_THREADS`` sets another number of threads.
    """

    info = INFO
    words = "uint32"

    def fuse(self, plan: Plan, request: Request) -> Plan:
        """Choose parts of heads for Attention-BN, and a contraction that applies phi.

        Allocating phi(q) and phi(k) costs more than phi.
        """
        steps = (
            replace(t, choice=ByHeads(t)) if isinstance(t, Fold | Recentre) else t
            for t in plan.transforms
        )
        plan = replace(plan, transforms=tuple(steps))
        c = plan.contraction
        if not isinstance(c, Features) or c.kernel.parameters():
            return plan
        # The scale of features stays apart from L where h needs exp(L), see `Normaliser`.
        own = FeatureRows | ScaledRows if plan.normaliser == "sum" else FeatureRows
        kept = tuple(t for t in plan.transforms if not isinstance(t, own))
        return replace(plan, transforms=kept, contraction=replace(c, raw=True))

    def statistics(self, summary: Summary, keys: Any, mask: Any) -> Mapping[str, Any]:
        """Compute the statistics of keys; moments of prefixes by `.prefix`."""
        stats = summary.statistics
        if summary.scope != "prefix" or type(stats) not in (Mean, Moments) or not keys.size:
            return super().statistics(summary, keys, mask)
        origin = self.first_key(keys, None if mask is None else mask[..., 0])
        return prefix.prefix_moments(stats, keys, mask, origin)

    def scores(self, c: Scores, o: Operands) -> tuple[Any, Any]:
        """Contract by scores in tiles, or by `ArrayBackend` with terms of positions or dropout."""
        generic = c.weight == "log_features" or bool(c.places) or o.by_query_head
        generic = generic or o.dropout is not None
        return super().scores(c, o) if generic else scores.scores(c, o)

    def scores_vjp(
        self, c: Scores, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Pull back in tiles, or by `ArrayBackend` with a bias, dropout or scalars per head."""
        if c.weight == "log_features" or o.bias is not None or o.values or o.dropout is not None:
            return super().scores_vjp(c, o, out, level, d_out, d_level)
        return scores.scores_vjp(c, o, out, level, d_out, d_level)

    def features(self, c: Features, o: Operands) -> tuple[Any, Any]:
        """Contract by features, heads in parallel."""
        return features.features(c, o)

    def features_vjp(
        self, c: Features, o: Operands, out: Any, level: Any, d_out: Any, d_level: Any
    ) -> dict[str, Any]:
        """Pull the contraction by features back, heads in parallel."""
        return features.features_vjp(c, o, out, level, d_out, d_level)

    def versions(self) -> dict[str, str]:
        """Return NumPy's version and the number of threads."""
        return {"numpy": np.__version__, "threads": str(threads.count())}
