"""The outcome of a case as the record has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ..judge.nonconforming import Nonconforming
from ..judge.subject import Evidence

if TYPE_CHECKING:
    from ..record.types import Outcome
    from ..record.writing import Case

__all__ = ["new_case", "outcome_of", "plain"]


def outcome_of(report: pytest.TestReport) -> tuple[Outcome, str | None]:
    """Return the outcome of a report, and its message or None."""
    if hasattr(report, "wasxfail"):
        if report.skipped:
            return "known failure", report.wasxfail.removeprefix("reason: ")
        return "failed", "listed as a known failure, but it passes: remove it from the list"
    if report.passed:
        return "passed", None
    if report.skipped:
        where = report.longrepr
        reason = where[2] if isinstance(where, tuple) else str(where)
        return "not claimed", reason.removeprefix("Skipped: ")
    if "[XPASS(strict)]" in report.longreprtext:
        return "failed", "listed as a known failure, but it passes: remove it from the list"
    crash = getattr(report.longrepr, "reprcrash", None)
    message = report.longreprtext if crash is None else str(crash.message)
    message = message.removeprefix(f"{Nonconforming.__module__}.{Nonconforming.__name__}: ")
    return ("failed" if report.when == "call" else "error"), message[:4000]


def new_case(
    id: str, level: str, features: list[str], outcome: Outcome, message: str | None = None
) -> Case:
    """Return the record of a case that has not run."""
    return {
        "id": id,
        "group": id.partition("::")[0],
        "level": "core" if level == "core" else "optional",
        "features": features,
        "outcome": outcome,
        "ratio": None,
        "verdicts": {},
        "message": message,
        "seconds": 0.0,
    }


def plain(evidence: Evidence) -> dict[str, Any]:
    """Return evidence as dicts and numbers, which can be sent between processes."""
    verdicts = {
        name: {"ratio": v.ratio, "error": v.error, "budget": v.budget}
        for name, v in evidence.verdicts.items()
    }
    ratio = max((v["ratio"] for v in verdicts.values()), default=None)
    return {
        "verdicts": verdicts,
        "ratio": ratio,
        "outcome": evidence.outcome,
        "note": evidence.note,
    }
