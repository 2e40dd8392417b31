"""Calls on a sequence of 24 keys that is cut into shards, and what one process gives for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import pdcore

__all__ = ["CASES", "Case", "agree", "single"]


class Case(NamedTuple):
    """A call with 24 keys; `extras` names its arguments besides q, k and v."""

    spec: str
    extras: tuple[str, ...] = ()
    rows: int = 24
    heads: int = 2
    offset: Any = 0
    dtype: str = "float64"
    dropout: float = 0.0

    def arrays(self) -> dict[str, Any]:
        """Draw the arguments of the call."""
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> Any:
            return rng.standard_normal(shape).astype(self.dtype)

        arguments: dict[str, Any] = {
            "q": draw(2, self.heads, self.rows, 5),
            "k": draw(2, 2, 24, 5),
            "v": draw(2, 2, 24, 3),
        }
        if "key_mask" in self.extras:
            arguments["key_mask"] = rng.random((2, 24)) > 0.3
        if "late" in self.extras:  # the first shard of a sequence is all padding
            arguments["key_mask"] = np.arange(24) >= np.array([[7], [0]])
        if "beta" in self.extras:
            arguments["params"] = {"beta": draw(2, 5)}
        if "relative" in self.extras:
            arguments["params"] = {"relative": draw(self.heads, 11)}
        if "sink" in self.extras:
            arguments["params"] = {"sink": draw(self.heads)}
        if "running" in self.extras:
            arguments["params"] = {"mean": draw(2, 5), "var": abs(draw(2, 5)) + 1}
        if "mean" in self.extras:
            arguments["params"] = {"mean": draw(2, 5)}
        arguments["offset"] = self.offset
        if self.dropout:
            arguments |= {"dropout": self.dropout, "seed": 5}
        return arguments

    def cotangents(self) -> tuple[Any, Any]:
        """Draw cotangents of out and lse."""
        rng = np.random.default_rng(1)
        shape = (2, self.heads, self.rows)
        return (
            rng.standard_normal((*shape, 3)).astype(self.dtype),
            rng.standard_normal(shape).astype(self.dtype),
        )


def single(case: Case, framework: Callable[[Any], Any] = np.asarray) -> dict[str, Any]:
    """Run a call on whole arrays, and pull cotangents back."""
    inputs = {name: _taken(x, framework) for name, x in case.arrays().items()}
    out, lse, pull = pdcore.attention_vjp(spec=case.spec, **inputs)
    d_out, d_lse = case.cotangents()
    d_lse = np.where(np.isinf(np.asarray(lse)), 0, d_lse).astype(d_lse.dtype)
    d = pull(framework(d_out), framework(d_lse))
    return {"out": out, "lse": lse, **{f"d_{name}": x for name, x in d.items()}}


def _taken(x: Any, framework: Callable[[Any], Any]) -> Any:
    if isinstance(x, dict):
        return {name: framework(y) for name, y in x.items()}
    return framework(x) if isinstance(x, np.ndarray) else x


def agree(results: dict[str, Any], wanted: dict[str, Any], relative: float) -> None:
    """Check that all results are equal up to `relative` times their largest entry."""
    for name, x in results.items():
        y = np.asarray(wanted[name])
        seen = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x), seen, err_msg=name)
        scale = np.max(abs(y[seen]), initial=0.0)
        np.testing.assert_allclose(x[seen], y[seen], rtol=0, atol=relative * scale, err_msg=name)


#: The first, the third and so on run by day.
CASES = [
    Case("softmax"),
    Case("causal", rows=8, offset=16),
    Case("causal", ("key_mask",), rows=12, offset="end"),
    Case("causal", ("key_mask",), heads=4),
    Case("causal", offset=np.array([3, -30])),
    Case("sparse(7,1)"),
    Case("causal+sparse(9,0)+h(count)", ("key_mask",)),
    Case("exponential(softcap=3)+causal"),
    Case("gaussian(gamma=0.3)+causal", ("late",)),
    Case("bn(statistics=running)+causal", ("running",)),
    Case("bn(beta=param,statistics=batch)", ("key_mask", "beta")),
    Case("bn", ("late",), heads=4),
    Case("causal+bn(statistics=prefix,eps=0.1)", ("late",)),
    Case("bn(statistics=running,with_std=false)+causal", ("mean",)),
    Case("causal+bn(statistics=prefix,with_std=false)", ("late",)),
    Case("bn(with_std=false)", ("key_mask",)),
    Case("bn(beta=param,statistics=batch,with_std=false)", ("key_mask", "beta")),
    Case("gaussian(gamma=0.3)+bn(with_std=false)", ("key_mask",)),
    Case("causal+linear", ("late",), heads=4),
    Case("linear", ("key_mask",), rows=12),
    Case("random_features(16,0)", ("key_mask",)),
    Case("causal+random_features(8,0)", ("late",)),
    Case("bn+sh(3,2)", ("key_mask",)),
    Case("causal+sh(1,2)"),
    Case("causal+h(sum,sink=param)", ("late", "sink"), heads=4),
    Case("bn+h(sum,sink=0)", ("key_mask",)),
    Case("causal+alibi", ("key_mask",), heads=4),
    Case("alibi+bn", rows=8, offset=np.array([3, -30])),
    Case("causal+sh(1,2)", ("key_mask",), heads=4, dropout=0.3),
    Case("relative(5)", ("key_mask", "relative")),
]
