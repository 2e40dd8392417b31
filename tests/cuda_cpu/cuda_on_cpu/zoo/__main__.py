"""Write the table of defects and their detectors: ``python -m cuda_on_cpu.zoo README.md``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..settings import SANITIZERS
from .observe import DETECTORS, observe
from .registry import DEFECTS

START, END = "<!-- defects -->", "<!-- end of defects -->"


def table(caught: dict[str, set[str]]) -> str:
    """Return the table in Markdown."""
    lines = [
        f"| defect | what is wrong | {' | '.join(DETECTORS)} |",
        "|---" * (2 + len(DETECTORS)) + "|",
    ]
    for name, defect in DEFECTS.items():
        marks = " | ".join("x" if detector in caught[name] else "" for detector in DETECTORS)
        lines.append(f"| `{name}` | {defect.what} | {marks} |")
    return "\n".join(lines)


def main() -> None:
    """Observe every defect, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, help="the page that has the table")
    page = parser.parse_args().page
    observed = [observe(sanitize) for sanitize in SANITIZERS]
    false = {name for runs in observed for name, caught in runs.items() if caught["correct"]}
    if false:
        raise SystemExit(f"correct, and reported all the same: {', '.join(sorted(false))}")
    caught = {name: {d for runs in observed for d in runs[name]["planted"]} for name in DEFECTS}
    before, _, rest = page.read_text("utf-8").partition(START)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{START}\n\n{table(caught)}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
