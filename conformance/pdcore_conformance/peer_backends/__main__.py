"""``python -m pdcore_conformance.peer_backends FOLDER``: judge every peer, and write a page.

Each peer runs in a process of its own, since float64 in JAX and the backend of Keras are settings
of a process. ``FOLDER/peers.json`` keeps the outcomes of a peer that is not available here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pdcore.cli.files import replacing
from pdcore.errors import NoBackendError

from . import PEERS
from .judging import as_number, judged
from .page import page
from .settled import SETTLED, settled

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Judge the peers; return 7 where a disagreement is not settled, or an entry is dead."""
    parser = argparse.ArgumentParser(
        prog="python -m pdcore_conformance.peer_backends", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="where peers.html and peers.json are written")
    parser.add_argument("--only", nargs="+", choices=list(PEERS), help="judge these, keep others")
    parser.add_argument("--one", choices=list(PEERS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(outcome(options.one)))
        return 0
    file = options.folder / "peers.json"
    before = json.loads(file.read_text(encoding="utf-8"))["peers"] if file.exists() else {}
    peers: dict[str, Any] = {}
    for name in PEERS:
        known = before.get(name)
        if options.only and name not in options.only and known:
            peers[name] = known
            continue
        new = _in_process(name)
        print(f"{name}: {new['unavailable'] or counts(new)}", file=sys.stderr)
        peers[name] = known if new["unavailable"] and known else new
    written = {"schema": 1, "kind": "pdcore-peers", "peers": peers}
    with replacing(file, force=True) as stream:
        stream.write((_text(written) + "\n").encode())
    with replacing(options.folder / "peers.html", force=True) as stream:
        stream.write(page(peers).encode())
    problems = unsettled(peers)
    print("\n".join(problems) or "every disagreement is settled", file=sys.stderr)
    return 7 if problems else 0


def outcome(name: str) -> dict[str, Any]:
    """Judge one peer in this process."""
    from ..judge.subject import Subject

    result: dict[str, Any] = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "unavailable": "",
        "versions": {},
        "cases": [],
    }
    try:
        subject = Subject(name)
    except NoBackendError as error:
        return result | {"unavailable": str(error).removeprefix(f"backend {name}: ")}
    reason = subject.framework.available(subject.device)
    if reason:
        return result | {"unavailable": reason}
    cases = [{**case, "ratio": as_number(case["ratio"])} for case in judged(subject)]
    return result | {"versions": subject.backend.versions(), "cases": cases}


def counts(peer: dict[str, Any]) -> str:
    """Return the number of cases by outcome, in words."""
    outcomes = [case["outcome"] for case in peer["cases"]]
    words = ("right", "wrong", "error", "refused")
    return ", ".join(f"{outcomes.count(word)} {word}" for word in words)


def unsettled(peers: dict[str, Any]) -> list[str]:
    """Return the disagreements that no entry of `SETTLED` explains, and entries without any."""
    problems, used = [], set()
    for name, peer in peers.items():
        for case in peer["cases"]:
            if case["outcome"] in ("wrong", "error"):
                entry = settled(name, case["topic"], case["case"])
                used.add((name, entry))
                if entry is None:
                    problems.append(
                        f"not settled: {name}, {case['topic']}, {case['case']}: {case['message']}"
                    )
    for entry in SETTLED:
        for name in entry.peers:
            if peers.get(name, {}).get("cases") and (name, entry) not in used:
                problems.append(f"explains nothing of {name}: {entry.topic}, {entry.text!r}")
    return problems


def _in_process(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __package__ or "", ".", "--one", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _text(written: dict[str, Any]) -> str:
    """Return JSON with one line for each case, so that a change is a change of few lines."""
    peers = []
    for name, peer in written["peers"].items():
        cases = ",\n    ".join(json.dumps(case) for case in peer["cases"])
        head = json.dumps({k: v for k, v in peer.items() if k != "cases"})[:-1]
        peers.append(f'  {json.dumps(name)}: {head}, "cases": [\n    {cases}\n  ]}}')
    head = json.dumps({k: v for k, v in written.items() if k != "peers"})[:-1]
    return head + ', "peers": {\n' + ",\n".join(peers) + "\n}}"


if __name__ == "__main__":
    sys.exit(main())
