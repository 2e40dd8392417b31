"""A call finds backend and plan where the call before it has left them, from the second on."""

from __future__ import annotations

from installing import fresh

SCRIPT = """
import json
import numpy as np
import pdcore
from pdcore.dispatch import selection

choose, counts = selection.choose, []

def counted(*arguments, **more):
    counts[-1] += 1
    return choose(*arguments, **more)

selection.choose = counted
q, k, v = np.ones((3, 1, 2, 5, 4))
for _ in range(3):
    counts.append(0)
    pdcore.attention(q, k, v, "bn+sh(1,2)")
print(json.dumps(counts))
"""


def test_the_second_call_is_warm() -> None:
    # Plugins are discovered in the first call, which makes older choices of backends void.
    assert fresh(SCRIPT) == [1, 0, 0]
