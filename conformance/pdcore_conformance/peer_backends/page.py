"""The page of the peers: who gets what right, with the case that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..report.templating import asset, render
from . import PEERS
from .cases import TOPICS
from .settled import settled

__all__ = ["page"]


class _Cell(NamedTuple):
    text: str
    kind: str


class _Disagreement(NamedTuple):
    peers: str
    whose: str
    why: str
    cases: tuple[tuple[str, str], ...]


class _Section(NamedTuple):
    name: str
    rule: str
    right: str
    disagreements: tuple[_Disagreement, ...]


def page(peers: Mapping[str, Any]) -> str:
    """Return the page as HTML that needs nothing else.

    Parameters
    ----------
    peers : mapping
        By name, what ``python -m pdcore_conformance.peer_backends`` writes of a peer.

    Raises
    ------
    ModuleNotFoundError
        Without jinja2.
    """
    judged = {name: peer for name, peer in peers.items() if peer["cases"]}
    rows = [(name, [_cell(peer, topic.name) for topic in TOPICS]) for name, peer in judged.items()]
    return render(
        "peer_backends",
        **asset("style", "style.css"),
        names=list(judged),
        rows=rows,
        topics=[topic.name for topic in TOPICS],
        sections=[_section(judged, topic.name, topic.rule) for topic in TOPICS],
        versions=[
            (name, PEERS[name].library, ", ".join(f"{n} {v}" for n, v in p["versions"].items()))
            + (p["date"],)
            for name, p in judged.items()
        ],
        missing=[(name, peer["unavailable"]) for name, peer in peers.items() if not peer["cases"]],
    )


def _of(peer: Mapping[str, Any], topic: str) -> list[Mapping[str, Any]]:
    return [case for case in peer["cases"] if case["topic"] == topic]


def _cell(peer: Mapping[str, Any], topic: str) -> _Cell:
    """Return how many of a topic's cases are right, of those that the peer takes."""
    outcomes = [case["outcome"] for case in _of(peer, topic)]
    taken = [outcome for outcome in outcomes if outcome != "refused"]
    if not taken:
        return _Cell("refused", "off")
    right = taken.count("right")
    return _Cell(f"{right} of {len(taken)}", "good" if right == len(taken) else "bad")


def _section(peers: Mapping[str, Any], topic: str, rule: str) -> _Section:
    right = [
        name
        for name, peer in peers.items()
        if {case["outcome"] for case in _of(peer, topic)} - {"refused"} == {"right"}
    ]
    grouped: dict[tuple[str, str], dict[str, list[tuple[str, str]]]] = {}
    for name, peer in peers.items():
        for case in _of(peer, topic):
            if case["outcome"] in ("wrong", "error"):
                entry = settled(name, topic, case["case"])
                key = (entry.whose, entry.why) if entry else ("not settled", "")
                shown = (f"{name}: {case['case']}", case["message"])
                grouped.setdefault(key, {}).setdefault(name, []).append(shown)
    disagreements = tuple(
        _Disagreement(", ".join(by_peer), whose, why, tuple(c for x in by_peer.values() for c in x))
        for (whose, why), by_peer in grouped.items()
    )
    return _Section(topic, rule, ", ".join(right), disagreements)
