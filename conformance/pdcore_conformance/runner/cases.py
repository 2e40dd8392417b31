"""The ids and the features of the cases, as pytest has collected them."""

from __future__ import annotations

from typing import Any

import pytest

from ..judge.calls import Call
from ..judge.subject import CORE

__all__ = ["ID", "NEEDS", "SUITE", "about", "case_id", "is_of_suite", "needs_of"]

#: The package with the cases.
SUITE = "pdcore_conformance.suite"
#: What the plugin keeps with each case: its id, and the features that it needs.
ID = pytest.StashKey[str]()
NEEDS = pytest.StashKey[frozenset[str]]()


def case_id(item: pytest.Item) -> str:
    """Return the id of a case: ``statistics::variance_is_biased[bn-float32]``."""
    function: Any = item
    group = function.module.__name__.rpartition(".")[2].removeprefix("test_")
    name = (getattr(function, "originalname", None) or item.name).removeprefix("test_")
    callspec = getattr(function, "callspec", None)
    return f"{group}::{name}" + (f"[{callspec.id}]" if callspec else "")


def about(item: pytest.Item) -> dict[str, Any]:
    """Return the id, level and features of a case that was collected."""
    needs = item.stash[NEEDS]
    level = "core" if needs <= CORE else "optional"
    return {"id": item.stash[ID], "level": level, "features": sorted(needs)}


def is_of_suite(item: pytest.Item) -> bool:
    """Return whether a test is a case of the suite."""
    module = getattr(item, "module", None)
    return module is not None and module.__name__.startswith(f"{SUITE}.")


def needs_of(item: Any) -> frozenset[str]:
    """Return the features that a case needs."""
    features = {feature for marker in item.iter_markers("claims") for feature in marker.args}
    callspec = getattr(item, "callspec", None)
    # Without a backend there is no combination, and pytest passes a mark in its place.
    if callspec and isinstance(callspec.params.get("call"), Call):
        through = callspec.params.get("through", getattr(item.function, "through", "forward"))
        features |= set(callspec.params["call"].needs(through))
    return frozenset(features)
