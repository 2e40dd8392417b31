"""Memory of O(N + M): no call builds an array of N x M numbers, on the host or on the device."""

from __future__ import annotations

from typing import Any

from pdcore import attention, attention_vjp

from ..judge.calls import Call, drawn
from ..judge.judging import claims, each
from ..judge.memory import peak
from ..judge.subject import Nonconforming, Subject
from ..judge.ways import cotangents

LONG = Call(lead=(1,), heads=1, key_heads=1, rows=8192, keys=8192, dim=8, value_dim=8)

#: A call may take a quarter of the bytes that N x M numbers in float32 take: a mask of N x M bytes
#: is too much, blocks of rows and keys are not.
LIMIT = LONG.rows * LONG.keys

CALLS = [
    LONG.but(spec=text)
    for text in ("softmax", "causal", "bn", "linear", "causal+linear", "sparse(100,3)", "sh(2)")
]


def require_little_memory(subject: Subject, call: Call, run: Any) -> None:
    """Run a call twice, and check the peak memory of the second time."""
    with subject.watched(drawn(call)) as (q, k, v, options):
        # The first call compiles, and starts threads.
        subject.framework.finish(run(q, k, v, options))
        places = peak(lambda: run(q, k, v, options), subject.framework, subject.device)
    if not places:
        subject.evidence.outcome = "not claimed"
        subject.evidence.note = "neither the system nor the library reports memory"
    for place, size in places.items():
        if size > LIMIT:
            raise Nonconforming(
                f"takes {size / 2**20:.0f} MiB on the {place} beyond its inputs, and N x M numbers "
                f"would take {4 * LIMIT / 2**20:.0f} MiB: expected memory of O(N + M)"
            )


@each(CALLS)
@claims("lse")
def test_memory_grows_with_the_length(call: Call, subject: Subject) -> None:
    """A call takes memory of O(N + M), with lse and without."""
    if subject.unclaimed(call.features(lse=True)):
        subject.judge(call.but(rows=9, keys=11))
        return
    for lse in (True, False):

        def run(q: Any, k: Any, v: Any, options: Any, lse: bool = lse) -> Any:
            result = attention(q, k, v, call.spec, return_lse=lse, backend=subject.name, **options)
            return result[0] if lse else result

        require_little_memory(subject, call, run)


@each([call.but(rows=4096) for call in CALLS if call.spec in ("softmax", "causal", "linear")])
@claims("vjp")
def test_memory_of_gradients_grows_with_the_length(call: Call, subject: Subject) -> None:
    """A pullback takes memory of O(N + M)."""
    if subject.unclaimed(call.features(lse=True, vjp=True)):
        subject.judge(call.but(rows=9, keys=11), "vjp")
        return
    d_out, d_lse = cotangents(call)

    def run(q: Any, k: Any, v: Any, options: Any) -> Any:
        _, _, pull = attention_vjp(q, k, v, call.spec, backend=subject.name, **options)
        return pull(subject.there(d_out), subject.there(d_lse))["q"]

    require_little_memory(subject, call, run)
