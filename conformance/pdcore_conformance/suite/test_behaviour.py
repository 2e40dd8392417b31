"""Relations between calls: equal bits, batches, threads, and no use of another backend."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from pdcore import attention

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
        arrays = {call: _device_arrays(subject, call.arrays()) for call in calls}

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


def _device_arrays(subject: Subject, arrays: Arrays) -> tuple[Any, Any, Any, dict[str, Any]]:
    q, k, v = (subject.there(x) for x in (arrays.q, arrays.k, arrays.v))
    return q, k, v, {n: subject.there(x) for n, x in arrays.options.items()}


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
