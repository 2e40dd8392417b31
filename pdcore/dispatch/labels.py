"""The labels of queries and keys that a call passes: checked against the tables that they index."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import device_name, host_values
from ..backend import Inputs
from ..errors import UnsupportedError
from ..spec import KEY_LABEL, QUERY_LABEL, AttentionSpec, Expression, PointwiseKernel
from .segments import check_pair, pair_of

__all__ = ["check_label_values", "check_labels"]


def check_labels(spec: AttentionSpec, inputs: Inputs) -> None:
    """Check that a call has labels if its spec reads them, and their shapes and dtypes."""
    labels, q, k = inputs.labels, inputs.q, inputs.k
    if labels is None:
        if spec.by_label:
            raise ValueError(
                f"labels: got none, and {spec} reads them; pass integers, {tuple(q.shape[:-3])} "
                f"and a label for each of the {q.shape[-2]} queries, or a pair of those of queries "
                "and of keys"
            )
        return
    if not spec.by_label:
        raise ValueError(f"labels: {spec} reads none; add labels(count), or leave the argument out")
    check_pair("labels", "labels", labels, q, k)
    if inputs.sharding is not None:
        raise UnsupportedError(
            f"labels: not with {inputs.sharding}: labels are not sent between shards"
        )


def check_label_values(spec: AttentionSpec, inputs: Inputs, library: str) -> None:
    """Raise for labels beyond the ends of a table, where the values are at hand on the CPU.

    Labels of keys that `key_mask` hides are not looked at.
    """
    if inputs.labels is None:
        return
    q_labels, k_labels = (_values(x, library) for x in pair_of(inputs.labels))
    if k_labels is not None and inputs.key_mask is not None:
        real = _values(inputs.key_mask, library)
        k_labels = None if real is None else k_labels[real]
    found = {QUERY_LABEL: q_labels, KEY_LABEL: k_labels}
    for entry in _entries(spec, inputs.q.shape[-1]):
        table = entry.table
        sizes = inputs.params[table].shape[1:]
        for index, size in zip(entry.args[1:], sizes, strict=True):
            [reads] = index.inputs
            labels = found.get(reads)
            if labels is None or not labels.size:
                continue
            at = np.floor(index({reads: labels.astype(np.float64)}, np))
            if at.min() < 0 or at.max() >= size:
                wrong = labels[(at < 0) | (at >= size)][0]
                whose = "queries" if reads == QUERY_LABEL else "keys"
                raise ValueError(
                    f"labels: got {wrong} among those of {whose}, expected labels of the "
                    f"{size} entries of params[{table!r}]"
                )


def _values(x: Any, library: str) -> Any:
    return host_values(x) if device_name(x, library).partition(":")[0] == "cpu" else None


def _entries(spec: AttentionSpec, dim: int) -> list[Expression]:
    """Return the entries of tables that log kappa reads by labels."""
    expressions = [term.expression() for term in spec.terms]
    if isinstance(spec.kernel, PointwiseKernel):
        expressions.append(spec.kernel.expression(dim))
    labels = {QUERY_LABEL, KEY_LABEL}
    return [e for x in expressions for e in x.entries if labels & e.inputs]
