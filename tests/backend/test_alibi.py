"""The laws of alibi, on NumPy and array-api-strict, against a dense bias of the same numbers."""

from __future__ import annotations

from typing import Any

import array_api_strict
import numpy as np
import pytest
from reference_cases import Strict

import pdcore
from pdcore import SpecError, UnsupportedError
from pdcore.backend import Inputs
from pdcore.lowering import Signature, lower
from pdcore.spec.terms import alibi_slopes

SLOPES = np.array([0.5, 0.25, -0.125, 2.0])
SPECS = [
    "softmax",
    "softmax(softcap=2)",
    "gaussian(0.3)",
    "polynomial",
    "bn(beta=0.5)",
    "causal+bn(statistics=prefix,eps=0.3)",
    "causal+h(sum,sink=0)",
    "sparse(2,1)+h(count)",
]


def drawn(rows: int, keys: int, dtype: str = "float64", dim: int = 5) -> Any:
    rng = np.random.default_rng(0)
    shapes = (2, 4, rows, dim), (2, 2, keys, dim), (2, 2, keys, 3)
    return tuple(rng.normal(size=shape).astype(dtype) for shape in shapes)


def apart(rows: int, keys: int, offset: Any) -> Any:
    return abs(np.arange(keys) - (np.arange(rows)[:, None] + np.reshape(offset, (-1, 1, 1, 1))))


@pytest.mark.parametrize("words", SPECS)
@pytest.mark.parametrize("offset", [0, 7, np.array([3, -2])], ids=["first", "later", "sequences"])
def test_alibi_equals_the_dense_bias(words: str, offset: Any) -> None:
    x, distance = drawn(7, 9), apart(7, 9, offset)
    bias = np.broadcast_to(-SLOPES[:, None, None] * distance, (2, 4, 7, 9))
    out, lse, vjp = pdcore.attention_vjp(*x, words, bias=bias, offset=offset)
    rng = np.random.default_rng(1)
    d_out, d_lse = (
        rng.normal(size=out.shape),
        np.where(np.isinf(lse), 0, rng.normal(size=lse.shape)),
    )
    wanted = {"out": out, "lse": lse, **vjp(d_out, d_lse)}
    wanted["slopes"] = -(wanted.pop("bias") * distance).sum((0, -2, -1))
    given = {"slopes": SLOPES}
    out, lse, vjp = pdcore.attention_vjp(*x, f"{words}+alibi", params=given, offset=offset)
    got = {"out": out, "lse": lse, **vjp(d_out, d_lse)}
    xp = array_api_strict
    plan = lower(pdcore.parse(f"{words}+alibi"), Signature(5, 2, "float64"))
    where = offset if isinstance(offset, int) else xp.asarray(offset)
    inputs = Inputs(*map(xp.asarray, x), offset=where, params={"slopes": xp.asarray(SLOPES)})
    with np.errstate(all="ignore"):
        out, lse, vjp = Strict().attention_vjp(plan, inputs)
        strict = {"out": out, "lse": lse, **vjp(xp.asarray(d_out), xp.asarray(d_lse))}
    assert got.keys() == strict.keys() == wanted.keys()
    for name, expected in wanted.items():
        for result in (got[name], np.asarray(strict[name])):
            np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-11, err_msg=name)


def test_alibi_equals_the_dense_bias_of_many_keys() -> None:
    rows, keys, offset = 70, 4096, 4000
    x, distance = drawn(rows, keys), apart(rows, keys, offset)[0]
    bias = -SLOPES[:, None, None] * distance
    results = []
    for spec, more in (
        ("causal", {"bias": bias}),
        ("causal+alibi", {"params": {"slopes": SLOPES}}),
    ):
        out, lse, vjp = pdcore.attention_vjp(*x, spec, offset=offset, **more)
        results.append({"out": out, "lse": lse, **vjp(np.ones_like(out), np.ones_like(lse))})
    wanted, got = results
    wanted["slopes"] = -(wanted.pop("bias") * distance).sum((-2, -1))
    for name, expected in wanted.items():
        scale = abs(expected).max()
        np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-11 * scale, err_msg=name)


def test_slopes_keep_their_digits_in_float32() -> None:
    # A running sum of float32 over the million pairs of a head would lose digits.
    x = drawn(128, 8192, "float32", dim=4)
    given = {"slopes": np.full(4, 1e-3, "float32")}

    def gradient(dtype: str) -> Any:
        cast = [a.astype(dtype) for a in x]
        slopes = {"slopes": given["slopes"].astype(dtype)}
        out, lse, vjp = pdcore.attention_vjp(*cast, "alibi", params=slopes)
        return vjp(np.zeros_like(out), np.ones_like(lse))["slopes"]

    np.testing.assert_allclose(gradient("float32"), gradient("float64"), rtol=2e-6)


def test_far_keys_do_not_matter_at_any_length() -> None:
    # As a key bias m p_j in float32 this would be off by 5e-4.
    rng = np.random.default_rng(2)
    k, v = rng.normal(size=(2, 1, 1, 131_072, 4)).astype("float32")
    q = rng.normal(size=(1, 1, 1, 4)).astype("float32")
    given = {"slopes": np.array([0.5], "float32")}
    whole = pdcore.attention(q, k, v, "causal+alibi", offset="end", params=given)
    last = pdcore.attention(
        q, k[..., -512:, :], v[..., -512:, :], "causal+alibi", offset="end", params=given
    )
    np.testing.assert_allclose(whole, last, rtol=1e-6)


def test_rows_do_not_depend_on_later_positions() -> None:
    q, k, v = drawn(12, 12)
    whole = pdcore.attention(q, k, v, "causal+alibi")
    for m in (1, 5, 11):
        part = pdcore.attention(q[:, :, :m], k[:, :, :m], v[:, :, :m], "causal+alibi")
        np.testing.assert_allclose(part, whole[:, :, :m], rtol=1e-12)


def test_the_default_slopes() -> None:
    assert alibi_slopes(1) == (2**-8,)
    assert alibi_slopes(8) == tuple(2.0**-h for h in range(1, 9))
    assert alibi_slopes(12)[8:] == tuple(2.0 ** -(0.5 * (2 * t - 1)) for t in range(1, 5))
    q, k, v = drawn(7, 9)
    given = {"slopes": np.asarray(alibi_slopes(4))}
    np.testing.assert_array_equal(
        pdcore.attention(q, k, v, "alibi"), pdcore.attention(q, k, v, "alibi", params=given)
    )


def test_specs_with_alibi() -> None:
    spec = pdcore.parse("causal+alibi+bn(statistics=prefix)")
    assert spec.terms == (pdcore.Alibi(),)
    assert pdcore.parse(str(spec)) == spec
    assert "softmax+alibi" in str(spec)
    assert spec == pdcore.AttentionSpec(
        normalization=spec.normalization, support=spec.support, terms=(pdcore.Alibi(),)
    )
    with pytest.raises(SpecError, match="'alibi' and 'alibi' both set"):
        pdcore.parse("alibi+alibi")
    with pytest.raises(SpecError, match="two of one word in alibi, alibi"):
        pdcore.AttentionSpec(terms=(pdcore.Alibi(), pdcore.Alibi()))
    with pytest.raises(TypeError, match=r"terms: got 'alibi', expected a tuple"):
        pdcore.AttentionSpec(terms="alibi")
    with pytest.raises(UnsupportedError, match="alibi: it is a term of log kappa, and linear"):
        pdcore.parse("linear+alibi")
    with pytest.raises(UnsupportedError, match="alibi: a pooled key has no single position"):
        pdcore.parse("alibi+sh(1,2)")
    text = spec.latex()
    assert r"e^{-m \, |j - p|}" in text
    assert "softmax}_{j" not in text
    q, k, v = drawn(7, 7)
    steps = pdcore.explain(q, k, v, spec).plan.steps
    assert any(step.startswith("alibi: log kappa + ") for step in steps)
