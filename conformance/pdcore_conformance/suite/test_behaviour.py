"""Relations between calls: equal bits, batches, threads, and no use of another backend."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pdcore import attention, bind

from ..judge.budget import judge
from ..judge.calls import Arrays, Call, drawn
from ..judge.judging import DTYPES, claims, each, judged
from ..judge.subject import Nonconforming, Subject

SMALL = Call()
LARGE = Call(rows=300, keys=700, dim=32, value_dim=32)
PLAN = (
    "softmax",
    "bn",
    "linear",
    "causal",
    "causal+linear",
    "bn+sh(1,2)",
    "gaussian(gamma=0.1)",
    "causal+bn(statistics=prefix)",
)
REPEATED = [
    *(call.but(spec=text) for call in (SMALL, LARGE) for text in PLAN[:-1]),
    SMALL.but(spec=PLAN[-1]),
    *(LARGE.but(spec="bn", dtype=d) for d in DTYPES[1:]),
    LARGE.but(mask="random", key_mask="holes"),
    *(
        LARGE.but(spec=text, lead=(1,), rows=1030, keys=1100)
        for text in ("softmax", "bn", "causal")
    ),
]

#: How many times the threads run each call.
REPEATS = 12

test_inputs_are_left_alone = judged(
    "No call writes into q, k, v, masks, bias or params.",
    SMALL.but(spec="bn(beta=param)", mask="random", key_mask="holes"),
    SMALL.but(spec="bn+sh(1,2)"),
    SMALL.but(bias="full"),
    LARGE.but(spec="causal"),
    LARGE.but(spec="linear+bn"),
    SMALL.but(offset="sequence", spec="causal"),
)

test_results_keep_the_dtype = judged(
    "out has the dtype of q; lse is float32, or float64 for float64; nothing is computed in less.",
    *(SMALL.but(spec=text, dtype=d) for d in DTYPES for text in ("softmax", "bn", "linear")),
)


@claims("deterministic")
@each(REPEATED)
def test_same_call_twice_gives_the_same_bits(call: Call, subject: Subject) -> None:
    """The results have the same bits, however threads and blocks divide the work."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    first, *others = (subject.compute(drawn(call), call.spec) for _ in range(3))
    for other in others:
        require_equal_bits(first, other, "a second call with the same inputs")


@each(
    [
        SMALL.but(spec=text, lead=(3,), rows=n, keys=m, heads=4, **how)
        for text in (*PLAN[:-1], "sparse(3,2)", "bn(statistics=batch)")
        for n, m, how in (
            (11, 11, {}),
            (65, 130, {}),
            (11, 40, {"key_mask": "right"}),
            (33, 40, {"mask": "random"}),
        )
        if n == 11 or text in ("softmax", "causal", "bn", "linear")
    ]
)
def test_nan_reaches_rows_that_see_it(call: Call, subject: Subject) -> None:
    """A NaN in a real key or value reaches every row that sees it, and no other head or sequence.

    Where a mask or the support hides the key from a row of the same head and sequence, that row is
    NaN or right.
    """
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = call.but(draw="nan").arrays()
    has_nan = _has_new_nan(call.arrays(), arrays, call.heads // call.key_heads)
    expected = subject.expected(call, arrays)
    for lse in (True, False):
        result = subject.compute(arrays, call.spec, lse=lse)
        for name, x in result.items():
            oracle = expected.oracle[name]
            touched = has_nan[..., None, None] if name == "out" else has_nan[..., None]
            hidden = np.isnan(x) & ~np.isnan(oracle) & touched
            result[name] = np.where(hidden, expected.low[name], x)
        subject.evidence.add(judge(result, expected))


def _has_new_nan(before: Arrays, after: Arrays, group: int) -> np.ndarray:
    """Return which query heads (*B, Hq) have a NaN in keys or values that was not there before."""
    news = (
        np.any(np.isnan(y) & ~np.isnan(x), axis=(-1, -2))
        for x, y in ((before.k, after.k), (before.v, after.v))
    )
    return np.repeat(np.logical_or(*news), group, axis=-1)


@each(
    [
        SMALL.but(spec=text, rows=n, keys=m, dtype=d)
        for text in PLAN
        for n, m, d in ((9, 11, "float32"), (65, 130, "float32"), (9, 11, "bfloat16"))
    ]
    + [SMALL.but(mask="random", key_mask="right", bias="full"), SMALL.but(spec="bn(beta=param)")]
)
def test_arrays_may_change_between_calls(call: Call, subject: Subject) -> None:
    """The same call after its arrays were overwritten in place has the results of the new values.

    Where arrays are immutable, the second call has new arrays.
    """
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    before, after = call.arrays(), call.but(seed=1).arrays()
    layer = bind(call.spec, backend=subject.name)
    with subject.framework.precision(call.dtype):
        q, k, v, options = subject.arrays_of(before)
        for arrays in (before, after):
            if arrays is after:
                q, k, v, options = subject.overwritten((q, k, v, options), after)
            out, lse = layer(q, k, v, return_lse=True, **options)
            result = {"out": subject.back(out), "lse": subject.back(lse, "lse")}
            subject.evidence.add(judge(result, subject.expected(call, arrays)))
            alone = {"out": subject.back(layer(q, k, v, **options))}
            subject.evidence.add(judge(alone, subject.expected(call, arrays)), "without lse")


def take_sequences(x: np.ndarray, index: slice, lead: int) -> np.ndarray:
    """Index the first leading axis of an array that has all `lead` leading axes."""
    return x[index] if x.ndim > lead else x


@claims("batch_invariant")
@each(
    [
        *(
            LARGE.but(spec=text, lead=(5,), rows=70, dtype=d)
            for text in ("softmax", "bn", "linear", "causal", "gaussian(gamma=0.1)", "bn+sh(1,2)")
            for d in ("float32", "float16")
        ),
        SMALL.but(lead=(7,), key_mask="holes"),
        SMALL.but(lead=(7,), draw="loud"),
    ]
)
def test_row_does_not_depend_on_its_batch(call: Call, subject: Subject) -> None:
    """The results of a sequence have the same bits alone as in a batch."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call)
        return
    arrays = drawn(call)
    whole = subject.compute(arrays, call.spec)
    for first, last in ((0, 1), (3, 5), (call.lead[0] - 1, call.lead[0])):
        index = slice(first, last)
        options = {n: take_sequences(x, index, 1) for n, x in arrays.options.items()}
        selected = Arrays(arrays.q[index], arrays.k[index], arrays.v[index], options)
        alone = subject.compute(selected, call.spec)
        require_equal_bits(
            {n: x[index] for n, x in whole.items()}, alone, f"sequences {first} to {last} alone"
        )


@claims("thread_safe")
def test_eight_threads_share_a_backend(subject: Subject) -> None:
    """Calls of different kinds at the same time are as accurate as alone."""
    calls = [call for call in REPEATED if not subject.unclaimed(call.features(lse=True))]
    if not calls:
        raise Nonconforming("thread_safe is declared, but none of the calls that would show it")
    # The precision is global, so all threads run under the widest one.
    widest = "float64" if any(call.dtype == "float64" for call in calls) else "float32"
    with subject.framework.precision(widest):
        arrays = {call: subject.arrays_of(call.arrays()) for call in calls}

        def run(call: Call) -> Mapping[str, Any]:
            q, k, v, options = arrays[call]
            out, lse = attention(
                q, k, v, call.spec, return_lse=True, backend=subject.name, **options
            )
            return {"out": subject.back(out), "lse": subject.back(lse, "lse")}

        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(run, REPEATS * calls))
    for index, call in enumerate(calls):
        expected = subject.expected(call, call.arrays())
        for result in results[index :: len(calls)]:
            subject.evidence.add(judge(result, expected))


@each([SMALL.but(spec=text, dtype=d) for d in ("float32", "float16") for text in PLAN])
def test_no_other_backend_is_asked(call: Call, subject: Subject) -> None:
    """A backend runs a call itself or refuses it: it never passes the call to another."""
    subject.judge(call)


def require_equal_bits(
    one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], what: str
) -> None:
    """Raise Nonconforming where two results differ in any bit."""
    for name, x in one.items():
        y = other[name]
        if x.tobytes() != y.tobytes():
            difference = np.abs(x.astype(np.float64) - y.astype(np.float64))
            count = int(np.sum(difference > 0))
            raise Nonconforming(
                f"{name}: {what} differs in {count} of {x.size} numbers, by up to "
                f"{np.nanmax(difference):.3g}"
            )
