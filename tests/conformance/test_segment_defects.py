"""Defects of cutting, planted in the code that all backends share: the suite catches each."""

from __future__ import annotations

import pytest
from segment_laws import DEFECTS, plant

from pdcore_conformance.runner.conforming import conform

KERNEL = "segments::segments_do_not_see_each_other[softmax-float32-rows=14-keys=14-segments=ragged]"
POSITIONS = "segments::positions_start_anew[causal+linear-float32-rows=14-keys=14-segments=ragged]"
MOMENTS = "segments::statistics_start_anew[bn-float32-rows=14-keys=14-segments=ragged]"


@pytest.mark.parametrize("defect", [None, *DEFECTS])
def test_the_suite_catches_a_defect(monkeypatch, defect):
    if defect:
        plant(monkeypatch, defect)
    run, _ = conform("numpy", cases=[KERNEL, POSITIONS, MOMENTS])
    failed = [c["id"] for c in run["cases"] if c["outcome"] in ("failed", "error")]
    # A key after the segment is hidden by causal support.
    assert {KERNEL, MOMENTS} <= set(failed) if defect else not failed
