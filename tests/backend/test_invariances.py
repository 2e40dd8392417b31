"""What must not change a result: of every spec, and of several backends."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from nightly import examples
from reference_cases import INF, Array, Case, Strict, check_forward, cotangents, normal_case, run
from strategies import cases

import pdcore
from pdcore.spec import parse


class OnNumpy:
    """The public calls on NumPy."""

    def forward(self, case: Case) -> tuple[Array, Array]:
        out, lse = pdcore.attention(*case.qkv, case.spec, return_lse=True, **case.call)
        return out, lse

    def backward(self, case: Case, d_out: Array, d_lse: Array) -> dict[str, Array]:
        return pdcore.attention_vjp(*case.qkv, case.spec, **case.call)[2](d_out, d_lse)


class OnStrict:
    """`ArrayBackend` on array-api-strict."""

    def forward(self, case: Case) -> tuple[Array, Array]:
        with np.errstate(all="ignore"):
            out, lse = run(Strict(), case, array_api_strict.asarray)
        return np.asarray(out), np.asarray(lse)

    def backward(self, case: Case, d_out: Array, d_lse: Array) -> dict[str, Array]:
        xp = array_api_strict
        with np.errstate(all="ignore"):
            _, _, vjp = Strict().attention_vjp(case.plan(), case.inputs(xp.asarray))
            found = vjp(xp.asarray(d_out), xp.asarray(d_lse))
        return {name: np.asarray(x) for name, x in found.items()}


@pytest.fixture(params=[OnNumpy, OnStrict], ids=["numpy", "array-api-strict"])
def on(request: pytest.FixtureRequest) -> Any:
    return request.param()


def close(got: Any, want: Any, tolerance: float = 1e-13) -> None:
    """Compare in units of the largest entry; infinities must agree."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    got, want = np.where(np.isfinite(got), got, 0.0), np.where(np.isfinite(want), want, 0.0)
    scale = max(np.max(np.abs(want), initial=0.0), 1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


def pair_close(
    got: tuple[Array, Array], want: tuple[Array, Array], tolerance: float = 1e-13
) -> None:
    for x, y in zip(got, want, strict=True):
        close(x, y, tolerance)


KERNELS = [
    "softmax",
    "softmax(softcap=2)",
    "gaussian(gamma=0.3)",
    "cosine(scale=2)",
    "polynomial(degree=4)",
    "linear",
    "relu",
    "random_features(6,1)",
]
CAUSAL = [
    "softmax",
    "softmax+sh(2,3)+h(count)",
    "softmax(softcap=2)+sh(3,1,pool=first)",
    "gaussian(gamma=0.3)+sh(1,2)",
    "cosine+sparse(3,2)",
    "polynomial+h(one)",
    "linear",
    "linear+sh(2,3)+h(count)",
    "random_features(6,1)+sh(1,2)",
    "relu+sparse(4,0)",
    "bn(statistics=prefix)",
    "bn(statistics=prefix,beta=0.5)+sh(2,3)",
    "bn(statistics=prefix,beta=param)+sh(3,1,pool=first)+h(count)",
    "bn(statistics=prefix)+sparse(4,0)",
    "gaussian(gamma=0.3)+bn(statistics=running)+sh(1,2)",
]


def causal(text: str) -> str:
    return f"causal+{text}"


# --- growth and decoding --------------------------------------------------------------------------


def part(case: Case, rows: slice, keys: slice, **changed: Any) -> Case:
    """Cut queries and keys."""
    return replace(
        case,
        q=case.q[..., rows, :],
        k=case.k[..., keys, :],
        v=case.v[..., keys, :],
        call={**case.call, **changed},
    )


@pytest.mark.parametrize("text", CAUSAL)
@pytest.mark.sampled(2)
def test_growth(text: str, on: Any) -> None:
    case = normal_case(causal(text), n=11, m=11, d=4)
    out, lse = on.forward(case)
    for m in range(12):
        prefix = on.forward(part(case, slice(m), slice(m)))
        pair_close(prefix, (out[..., :m, :], lse[..., :m]))


@pytest.mark.parametrize("text", [t for t in CAUSAL if "sparse" not in t])
def test_growth_over_tile_edges(text: str) -> None:
    case = normal_case(causal(text), n=140, m=140, d=4)
    out, lse = OnNumpy().forward(case)
    for m in (63, 64, 65, 128):
        prefix = OnNumpy().forward(part(case, slice(m), slice(m)))
        pair_close(prefix, (out[..., :m, :], lse[..., :m]), 1e-12)


def test_growth_would_show_a_leak(on: Any) -> None:
    case = normal_case("causal+bn(allow_leak=true)", n=11, m=11, d=4)
    out, _ = on.forward(case)
    short, _ = on.forward(part(case, slice(6), slice(6)))
    assert np.abs(short - out[..., :6, :]).max() > 1e-3


@pytest.mark.parametrize("offset", ["int", "array", "end"])
@pytest.mark.parametrize("text", CAUSAL)
@pytest.mark.sampled(3)
def test_decoding_step_by_step_is_the_whole(text: str, offset: str, on: Any) -> None:
    case = normal_case(causal(text), n=9, m=9, d=4)
    out, lse = on.forward(case)
    for m in range(9):
        at = {"int": m, "array": np.full((2,), m), "end": "end"}[offset]
        step = on.forward(part(case, slice(m, m + 1), slice(m + 1), offset=at))
        pair_close(step, (out[..., m : m + 1, :], lse[..., m : m + 1]))


@pytest.mark.parametrize("text", CAUSAL)
@pytest.mark.sampled(2)
def test_each_sequence_may_stand_at_its_own_position(text: str, on: Any) -> None:
    case = normal_case(causal(text), lead=(3,), n=4, m=9, d=4)
    at = np.asarray([0, 5, -2])
    out, lse = on.forward(replace(case, call={**case.call, "offset": at}))
    for b in range(3):
        alone = replace(
            case, q=case.q[b], k=case.k[b], v=case.v[b], call={**case.call, "offset": int(at[b])}
        )
        pair_close(on.forward(alone), (out[b], lse[b]))


@pytest.mark.parametrize("text", [t for t in CAUSAL if "sh(" not in t and "bn" not in t])
def test_left_padding_moves_positions_alone(text: str, on: Any) -> None:
    case = normal_case(causal(text), n=6, m=6, d=4)
    filler = np.full((2, 2, 3, 4), np.nan)
    padded = replace(
        case,
        k=np.concat([filler, case.k], axis=-2),
        v=np.concat([filler[..., :2], case.v], axis=-2),
        call={**case.call, "offset": 3, "key_mask": np.asarray([[False] * 3 + [True] * 6] * 2)},
    )
    pair_close(on.forward(padded), on.forward(case))


# --- keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", ["sum", "count", "one"])
@pytest.mark.parametrize("bn", ["", "+bn", "+bn(statistics=batch,beta=0.5)"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.sampled(3)
def test_the_order_of_keys_does_not_matter(kernel: str, bn: str, h: str, on: Any) -> None:
    case = normal_case(f"{kernel}{bn}+h({h})", n=5, m=13, d=4)
    real = np.arange(13) % 5 != 1
    case = replace(case, call={"key_mask": np.stack([real, real[::-1]])})
    out, lse = on.forward(case)
    order = np.random.default_rng(7).permutation(13)
    mixed = replace(
        case,
        k=case.k[..., order, :],
        v=case.v[..., order, :],
        call={"key_mask": case.call["key_mask"][:, order]},
    )
    again, level = on.forward(mixed)
    close(again, out, 1e-12)
    close(level, lse, 1e-12)


def test_the_order_of_keys_matters_where_it_should(on: Any) -> None:
    for text in ("causal", "sparse(2,2)", "sh(1,2)"):
        case = normal_case(text)
        order = np.arange(7)[::-1]
        mixed = replace(case, k=case.k[..., order, :], v=case.v[..., order, :])
        assert np.abs(on.forward(mixed)[0] - on.forward(case)[0]).max() > 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "softmax(scale=0.7)+causal",
        "sh(1,3)",
        "bn",
        "bn(beta=0.5)+sh(2,1)",
        "causal+bn(statistics=prefix)",
    ],
)
def test_a_shift_of_all_keys_changes_nothing_under_softmax(text: str, on: Any) -> None:
    case = normal_case(text, d=4)
    shift = np.random.default_rng(3).normal(size=(2, 2, 1, 4))
    moved = replace(case, k=case.k + shift)
    if "bn" in text:  # where the statistics move along, the query has to
        moved = replace(
            moved, q=case.q + case.spec.normalization.beta * np.repeat(shift, 2, axis=1)
        )
    (out, lse), (again, level) = on.forward(case), on.forward(moved)
    close(again, out, 1e-12)
    assert np.isfinite(lse).any()
    if "bn" not in text:
        assert np.nanmax(np.abs(np.where(np.isfinite(lse), level - lse, 0.0))) > 1e-3
    counted = replace(moved, spec=replace(case.spec, normaliser="count"))
    plain = replace(case, spec=replace(case.spec, normaliser="count"))
    if "bn" not in text:  # h(sum) alone hides the shift
        assert np.abs(on.forward(counted)[0] - on.forward(plain)[0]).max() > 1e-3


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "linear+causal",
        "gaussian(gamma=0.3)+h(count)",
        "bn(beta=0.5)",
        "causal+bn(statistics=prefix)",
        "relu+sparse(2,1)",
    ],
)
def test_scales_of_one_are_plain_attention(text: str, on: Any) -> None:
    case = normal_case(text)
    for heads in ("sh(1,1)", "sh(1,1,pool=first)"):
        scaled = replace(case, spec=parse(f"{text}+{heads}"))
        np.testing.assert_array_equal(on.forward(scaled)[0], on.forward(case)[0])
        np.testing.assert_array_equal(on.forward(scaled)[1], on.forward(case)[1])


@pytest.mark.parametrize("h", ["sum", "count", "one"])
def test_unit_statistics_are_softmax(h: str, on: Any) -> None:
    # Two keys at -s and s in each feature: mean 0, and var + eps = s^2 + eps = 1 exactly.
    eps = 0.4375
    rng = np.random.default_rng(2)
    signs = np.where(rng.random((2, 2, 4, 3)) < 0.5, -1.0, 1.0)
    k = 0.75 * np.concat([signs, -signs], axis=-2)
    base = normal_case("softmax", m=8)
    case = replace(base, k=k, spec=parse(f"bn(eps={eps})+h({h})"))
    pair_close(on.forward(case), on.forward(replace(case, spec=parse(f"h({h})"))), 1e-14)
    running = replace(
        case,
        spec=parse(f"bn(eps={eps},statistics=running)+h({h})"),
        call={"params": {"mean": np.zeros((2, 3)), "var": np.full((2, 3), 1 - eps)}},
    )
    pair_close(on.forward(running), on.forward(replace(case, spec=parse(f"h({h})"))), 1e-14)


# --- NaN, inf and empty rows ----------------------------------------------------------------------

EVERY_KIND = [
    *KERNELS,
    *(f"{kernel}+bn+h(count)" for kernel in KERNELS),
    "bn(statistics=batch)+sh(1,2)",
    "causal+bn(statistics=prefix)",
    "bn(statistics=prefix,eps=0.3)+sh(2,3)+h(one)",
    "linear+causal+sh(2,3)",
    "random_features(6,1)+causal",
    "linear+sh(2,3,pool=first)+sparse(3,2)+h(one)",
]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("text", EVERY_KIND)
@pytest.mark.sampled(3)
def test_padding_may_hold_anything(text: str, poison: float, on: Any) -> None:
    rng = np.random.default_rng(8)
    case = normal_case(text, n=7, m=9)
    real = rng.random((2, 9)) < 0.6
    real[0, :3] = False  # also a whole window, and the first key of a sequence
    call: dict[str, Any] = {**case.call, "key_mask": real}
    dirty = dict(call)
    if case.spec.kernel.has_log and case.spec.heads.largest == 1:
        call["bias"] = rng.normal(size=(2, 1, 7, 9))
        dirty["bias"] = np.where(real[:, None, None, :], call["bias"], poison)
    clean = replace(case, call=call)
    padding = ~real[:, None, :, None]
    poisoned = replace(
        case, k=np.where(padding, poison, case.k), v=np.where(padding, poison, case.v), call=dirty
    )
    out, lse = on.forward(clean)
    again, level = on.forward(poisoned)
    np.testing.assert_array_equal(again, out)
    np.testing.assert_array_equal(level, lse)
    assert np.isfinite(out).all()
    weights = cotangents(clean, lse)
    want, got = on.backward(clean, *weights), on.backward(poisoned, *weights)
    for name, x in want.items():
        assert np.isfinite(x).all(), name
        np.testing.assert_array_equal(got[name], x, err_msg=name)
    assert not got["k"][np.broadcast_to(padding, case.k.shape)].any()
    assert not got["v"][np.broadcast_to(padding, case.v.shape)].any()
    if "bias" in got:
        assert not got["bias"][np.broadcast_to(~real[:, None, None, :], (2, 1, 7, 9))].any()


EMPTIED = [
    "softmax",
    "bn(eps=0.3)",
    "gaussian(gamma=0.3)",
    "cosine",
    "polynomial",
    "linear",
    "relu",
    "random_features(6,1)",
    "sh(1,2)",
    "bn(eps=0.3,statistics=prefix)",
]
SILENCED = [
    (text, how)
    for text in EMPTIED
    for how in ("mask", "key_mask", "bias", "position")
    if how != "bias" or (parse(text).kernel.has_log and "sh(" not in text)
]


@pytest.mark.parametrize("h", ["sum", "count", "one"])
@pytest.mark.parametrize(("text", "how"), SILENCED)
@pytest.mark.sampled(3)
def test_empty_rows_are_zero_with_zero_gradient(text: str, h: str, how: str, on: Any) -> None:
    case = normal_case(f"{text}+h({h})", n=5, m=7)
    empty = np.zeros((2, 4, 5), dtype=bool)
    call: dict[str, Any] = dict(case.call)
    if how == "mask":
        empty[:, 1, 2] = empty[0, :, 4] = True
        call["mask"] = np.broadcast_to(~empty[..., None], (2, 4, 5, 7))
    elif how == "key_mask":
        empty[1] = True
        call["key_mask"] = np.asarray([[True] * 7, [False] * 7])
    elif how == "bias":
        empty[:, 1, 2] = True
        call["bias"] = np.where(empty[..., None], -INF, np.zeros((2, 4, 5, 7)))
    else:
        empty[..., :2] = True
        text = str(case.spec).replace("bn(eps=0.3)", "bn(eps=0.3,allow_leak=true)")
        case = replace(case, spec=parse(f"{text}+causal"))
        call["offset"] = -2
        if case.spec.heads.largest == 2:
            empty[:, 2:, 2] = True
    case = replace(case, call=call)
    if text == "relu":  # no other row may be all but empty
        case = replace(case, q=np.abs(case.q), k=np.abs(case.k))
    out, lse = on.forward(case)
    check_forward(case, out, lse)
    assert not out[empty].any()
    np.testing.assert_array_equal(lse == -INF, empty)
    rng = np.random.default_rng(1)
    # The cotangents of empty rows are not 0, and huge: what reaches nothing must not be added.
    d_out, d_lse = rng.normal(size=out.shape), rng.normal(size=lse.shape)
    got = on.backward(case, d_out, d_lse)
    loud = on.backward(case, np.where(empty[..., None], 1e30, d_out), np.where(empty, 1e30, d_lse))
    for name, x in got.items():
        assert np.isfinite(x).all(), name
        np.testing.assert_array_equal(loud[name], x, err_msg=name)
    assert not got["q"][empty].any()
    assert got["q"].any()
    if how == "key_mask":
        assert not got["k"][1].any()
        assert not got["v"][1].any()


@pytest.mark.parametrize("text", ["relu", "polynomial(degree=2,coef0=1,scale=1)"])
@pytest.mark.parametrize("h", ["sum", "count", "one"])
def test_rows_of_vanishing_kernel_values_are_zero(text: str, h: str, on: Any) -> None:
    case = normal_case(f"{text}+h({h})", d=1)
    case = replace(case, q=np.ones_like(case.q), k=-np.ones_like(case.k))
    out, lse = on.forward(case)
    assert not out.any()
    np.testing.assert_allclose(lse, {"sum": -INF, "count": np.log(7), "one": 0.0}[h], atol=1e-15)
    got = on.backward(case, np.ones_like(out), np.ones_like(lse))
    for name, x in got.items():
        assert not x.any(), name


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize(
    "text",
    [
        *KERNELS,
        "bn",
        "bn(statistics=prefix)+causal",
        "sh(1,2)",
        "linear+causal",
        "random_features(6,1)+causal",
        "linear+bn",
        "sh(2,2)+sparse(3,3)",
    ],
)
@pytest.mark.sampled(3)
def test_a_nan_never_reaches_another_head_or_sequence(
    text: str, poison: float, which: str, on: Any
) -> None:
    case = normal_case(text, lead=(2, 2), n=5, m=7)
    clean = on.forward(case)
    arrays = {which: getattr(case, which).copy()}
    arrays[which][0, 1, 1, 3, 0] = poison
    dirty = case.replaced(arrays)
    out, lse = on.forward(dirty)
    reached = np.zeros((2, 2, 4), dtype=bool)
    heads = [1] if which == "q" else [2, 3]  # the query heads of key head 1
    reached[0, 1, heads] = True
    close(out[~reached], clean[0][~reached])
    close(lse[~reached], clean[1][~reached])
    weights = (np.ones_like(out), np.ones_like(lse))
    want, got = on.backward(case, *weights), on.backward(dirty, *weights)
    others = {"q": reached, "k": np.zeros((2, 2, 2), dtype=bool)}
    others["k"][0, 1, 0 if which == "q" else 1] = True
    for name in ("q", "k", "v"):
        untouched = ~others["q" if name == "q" else "k"]
        close(got[name][untouched], want[name][untouched])
    if np.isnan(poison):
        assert np.isnan(out[reached]).any()


def test_a_nan_reaches_a_row_that_sees_it(on: Any) -> None:
    for text in ("softmax", "bn", "linear", "sh(2,2)", "bn(statistics=batch)"):
        case = normal_case(text)
        case.k[1, 0, 6, 0] = np.nan
        out, _ = on.forward(case)
        assert np.isnan(out[1, :2]).all(), text
        assert np.isnan(out[0]).any() == ("batch)" in text), text


# --- merging blocks of keys -----------------------------------------------------------------------


@pytest.mark.parametrize("h", ["sum", "count", "one"])
@pytest.mark.parametrize("support", ["", "+causal", "+sparse(3,2)"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.sampled(3)
def test_blocks_of_keys_merge(kernel: str, support: str, h: str, on: Any) -> None:
    case = normal_case(f"{kernel}{support}+h({h})", n=8, m=11)
    rng = np.random.default_rng(6)
    mask, real = rng.random((2, 4, 8, 11)) < 0.7, rng.random((2, 11)) < 0.8
    case = replace(case, call={"mask": mask, "key_mask": real})
    out, lse = on.forward(case)
    parts = []
    for keys in (slice(0, 4), slice(4, 5), slice(5, 11)):
        # A block that begins at key a has its queries a positions earlier.
        block = part(
            case,
            slice(None),
            keys,
            offset=-keys.start,
            mask=mask[..., keys],
            key_mask=real[:, keys],
        )
        parts.append(on.forward(block))
    if h == "one":
        close(sum(p[0] for p in parts), out)
        np.testing.assert_array_equal(np.max([p[1] for p in parts], axis=0), lse)
        return
    with np.errstate(invalid="ignore"):
        merged = np.logaddexp.reduce([p[1] for p in parts], axis=0)
        shares = [np.where(p[1] > -INF, np.exp(p[1] - merged), 0.0) for p in parts]
    close(merged, lse)
    close(sum(s[..., None] * p[0] for s, p in zip(shares, parts, strict=True)), out, 1e-12)


# --- batch and heads ------------------------------------------------------------------------------


@examples(60)
@given(cases(smallest=1, largest=7), st.integers(0, 3))
def test_sequences_are_independent(case: Case, seed: int) -> None:
    assume(case.q.shape[:-3] and "statistics=batch" not in str(case.spec))
    on = OnNumpy()
    out, lse = on.forward(case)
    lead = case.q.shape[:-3]
    for at in itertools.islice(np.ndindex(lead), seed % 2, None):
        call = dict(case.call)
        rank = len(lead) + 3
        for name in ("mask", "bias"):
            x = call.get(name)
            if x is not None:
                x = np.reshape(x, (1,) * (rank - x.ndim) + x.shape)
                call[name] = x[tuple(0 if x.shape[i] == 1 else at[i] for i in range(len(lead)))]
        for name in ("key_mask", "offset"):
            x = call.get(name)
            if isinstance(x, np.ndarray) and x.ndim:
                call[name] = x[at]
        alone = Case(case.spec, case.q[at], case.k[at], case.v[at], call)
        pair_close(on.forward(alone), (out[at], lse[at]), 1e-12)


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "bn(beta=param)",
        "sh(1,2,3)",
        "linear+causal",
        "bn(statistics=prefix)+sh(3,1,3)+causal",
    ],
)
def test_heads_are_independent(text: str, on: Any) -> None:
    case = normal_case(text, heads=3, group=2, m=8)
    out, lse = on.forward(case)
    scales = case.spec.heads.scales
    for h in range(3):
        spec = case.spec
        if scales:
            spec = replace(spec, heads=replace(spec.heads, scales=(scales[h],)))
        call = dict(case.call)
        if "params" in call:
            call["params"] = {n: x[h : h + 1] for n, x in call["params"].items()}
        alone = Case(
            spec, case.q[:, 2 * h : 2 * h + 2], case.k[:, h : h + 1], case.v[:, h : h + 1], call
        )
        pair_close(on.forward(alone), (out[:, 2 * h : 2 * h + 2], lse[:, 2 * h : 2 * h + 2]))


def test_shared_key_heads_are_repeated_key_heads(on: Any) -> None:
    case = normal_case(
        "bn(beta=0.5)+causal+h(count)".replace("bn(", "bn(allow_leak=true,"), heads=2, group=3
    )
    repeated = replace(case, k=np.repeat(case.k, 3, axis=1), v=np.repeat(case.v, 3, axis=1))
    pair_close(on.forward(case), on.forward(repeated))
    weights = cotangents(case, on.forward(case)[1])
    got, wide = on.backward(case, *weights), on.backward(repeated, *weights)
    close(got["q"], wide["q"])
    for name in ("k", "v"):
        close(got[name], wide[name].reshape(2, 2, 3, *wide[name].shape[2:]).sum(axis=2))


@pytest.mark.parametrize("text", ["softmax", "bn", "linear+causal", "sh(1,2)+h(count)"])
def test_values_enter_linearly(text: str, on: Any) -> None:
    case = normal_case(text)
    other = np.random.default_rng(5).normal(size=case.v.shape)
    out, lse = on.forward(case)
    second, _ = on.forward(replace(case, v=other))
    both, level = on.forward(replace(case, v=2.0 * case.v - other))
    close(both, 2.0 * out - second)
    np.testing.assert_array_equal(level, lse)
    wide, _ = on.forward(replace(case, v=np.concat([case.v, other], axis=-1)))
    close(wide, np.concat([out, second], axis=-1))


@pytest.mark.parametrize("text", ["softmax", "bn+sh(1,2)", "linear+causal", "relu+h(one)"])
def test_weights_times_values_is_the_output(text: str) -> None:
    case = normal_case(text, m=8)
    weights = pdcore.attention_weights(*case.qkv, case.spec)
    values = np.repeat(case.v, 2, axis=1)
    close(weights @ values, OnNumpy().forward(case)[0])
    if "h(" not in text:
        rows = OnNumpy().forward(case)[1] > -INF
        np.testing.assert_allclose(weights.sum(axis=-1)[rows], 1.0, rtol=1e-13)


def test_inputs_are_not_written_to(on: Any) -> None:
    for text in ("softmax", "bn+sh(1,2)", "linear+causal", "gaussian(gamma=0.3)"):
        case = normal_case(text, m=8)
        for x in case.qkv:
            x.setflags(write=False)
        out, lse = on.forward(case)
        on.backward(case, np.ones_like(out), np.ones_like(lse))


@pytest.mark.parametrize("text", ["softmax", "bn", "sh(1,2)", "linear+causal"])
def test_strides_do_not_matter(text: str) -> None:
    case = normal_case(text, n=6, m=8)
    want = OnNumpy().forward(case)
    swapped = [np.swapaxes(np.ascontiguousarray(np.swapaxes(x, 1, 2)), 1, 2) for x in case.qkv]
    reversed_ = [np.ascontiguousarray(x[..., ::-1, ::-1])[..., ::-1, ::-1] for x in case.qkv]
    wide = [np.repeat(x, 2, axis=-1)[..., ::2] for x in case.qkv]
    for arrays in (swapped, reversed_, wide):
        assert not all(x.flags.c_contiguous for x in arrays)
        again = replace(case, q=arrays[0], k=arrays[1], v=arrays[2])
        pair_close(OnNumpy().forward(again), want)
    broadcast = replace(case, k=np.broadcast_to(case.k[:1], case.k.shape))
    alone = replace(case, k=np.ascontiguousarray(np.broadcast_to(case.k[:1], case.k.shape)))
    pair_close(OnNumpy().forward(broadcast), OnNumpy().forward(alone))
