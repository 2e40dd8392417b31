"""Wrong calls raise an error that names the argument, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pdcore import attention

from ..judge.calls import Arrays, Call
from ..judge.subject import Nonconforming, Subject

Edit = Callable[[Arrays], tuple[Arrays, str]]


def edited(**changes: Any) -> Edit:
    """Return an edit of a call: functions for q, k and v, other options, and the spec."""

    def edit(a: Arrays) -> tuple[Arrays, str]:
        spec = changes.get("spec", "softmax")
        parts = {n: changes.get(n, lambda x: x)(getattr(a, n)) for n in "qkv"}
        options = {n: x for n, x in changes.items() if n not in (*parts, "spec")}
        return Arrays(**parts, options=options), spec

    return edit


WRONG: dict[str, tuple[Edit, str]] = {
    "too_few_axes": (edited(q=lambda x: x[0, 0], k=lambda x: x[0, 0], v=lambda x: x[0, 0]), "q"),
    "features_differ": (edited(k=lambda x: x[..., 1:]), "k"),
    "lengths_differ": (edited(v=lambda x: x[..., 1:, :]), "v"),
    "dtypes_differ": (edited(k=lambda x: x.astype("int32")), "k"),
    "integers": (edited(**{n: lambda x: x.astype("int32") for n in "qkv"}), "q"),
    "heads_do_not_divide": (edited(q=lambda x: np.concatenate([x, x[:, :1]], 1)), "q"),
    "scales_do_not_fit": (edited(spec="sh(1,2,2)"), "scales"),
    "key_mask_of_numbers": (edited(key_mask=np.ones((2, 11), "float32")), "key_mask"),
    "key_mask_too_short": (edited(key_mask=np.ones((2, 10), bool)), "key_mask"),
    "mask_does_not_broadcast": (edited(mask=np.ones((3, 9, 11), bool)), "mask"),
    "offset_of_floats": (edited(offset=np.zeros(2, "float32")), "offset"),
    "parameter_missing": (edited(spec="bn(statistics=running)"), "mean"),
    "parameter_unknown": (edited(params={"bata": np.ones(2, "float32")}), "bata"),
    "bias_with_features": (edited(spec="linear", bias=np.zeros((9, 11), "float32")), "bias"),
    "bias_with_pooled_keys": (edited(spec="sh(1,2)", bias=np.zeros((9, 11), "float32")), "bias"),
}


@pytest.mark.claims("float32", "exponential")
@pytest.mark.parametrize("wrong", sorted(WRONG))
def test_wrong_call_names_its_argument(wrong: str, subject: Subject) -> None:
    """The error names the argument: it is no error of the library, and there is no result."""
    edit, argument = WRONG[wrong]
    try:
        arrays, spec = edit(Call().arrays())
        with subject.watched(arrays) as (q, k, v, options):
            attention(q, k, v, spec, backend=subject.name, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        if argument not in str(error):
            raise Nonconforming(f"the error does not name {argument}: {error}") from error
    else:
        raise Nonconforming(f"{wrong.replace('_', ' ')}: it gives a result")
