"""The declaration of a backend."""

from __future__ import annotations

from typing import Any

import pytest

from pdcore.backend import FEATURES

from ..judge.subject import CORE, Nonconforming, Subject


@pytest.mark.parametrize("feature", sorted(CORE))
def test_core_feature_is_declared(feature: str, subject: Subject) -> None:
    """Every backend declares the core features; further kernels and dtypes are optional."""
    if not subject.claims(feature):
        raise Nonconforming(
            f"{feature} ({FEATURES[feature]}) is declared {subject.info.support(feature)!r}, and "
            "every backend needs it: ArrayBackend has it"
        )


def test_versions_are_given(subject: Subject) -> None:
    """The record states the versions of the tested libraries."""
    versions: Any = subject.backend.versions()
    if not versions or not all(isinstance(x, str) and x for pair in versions.items() for x in pair):
        raise Nonconforming(f"versions() gives {versions!r}, expected the version of each library")


def test_refusals_are_sentences(subject: Subject) -> None:
    """The reasons of a refusal are strings; a call that can run has none."""
    from ..judge.calls import Call

    request = Call().request(subject.info.library, subject.device)
    reasons = subject.backend.refusals(request)
    if reasons != []:
        raise Nonconforming(f"refusals of a plain softmax call: got {reasons!r}, expected []")
    elsewhere: Any = subject.backend.refusals(request._replace(device="nowhere:0"))
    if not elsewhere or not all(isinstance(reason, str) and reason for reason in elsewhere):
        raise Nonconforming(f"refusals on device nowhere:0: got {elsewhere!r}, expected reasons")
