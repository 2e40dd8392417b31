"""What a backend declares."""

from __future__ import annotations

from typing import Any

import pytest

from pdcore.backend import FEATURES

from ..judge.subject import CORE, Nonconforming, Subject


@pytest.mark.parametrize("feature", sorted(CORE))
def test_core_feature_is_declared(feature: str, subject: Subject) -> None:
    """Every backend has the core features; a kernel or a dtype more is its own choice."""
    if not subject.claims(feature):
        raise Nonconforming(
            f"{feature} ({FEATURES[feature]}) is declared {subject.info.support(feature)!r}, and "
            "every backend needs it: ArrayBackend has it"
        )


def test_versions_are_given(subject: Subject) -> None:
    """A record without the version of what was tested is of no use."""
    found: Any = subject.backend.versions()
    if not found or not all(isinstance(x, str) and x for pair in found.items() for x in pair):
        raise Nonconforming(f"versions() gives {found!r}, expected the version of each library")


def test_refusals_are_sentences(subject: Subject) -> None:
    """The reasons of a refusal are strings; a call that can run has none."""
    from ..judge.calls import Call

    request = Call().request(subject.info.library, subject.device)
    found = subject.backend.refusals(request)
    if found != []:
        raise Nonconforming(f"refusals of a plain softmax call: got {found!r}, expected []")
    strange: Any = subject.backend.refusals(request._replace(device="nowhere:0"))
    if not strange or not all(isinstance(reason, str) and reason for reason in strange):
        raise Nonconforming(f"refusals on device nowhere:0: got {strange!r}, expected reasons")
