"""What `pdcore.explain` returns: a call's plan, its backend, and the others' reasons."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..backend import Request
from ..lowering import Plan
from ..plugins import load_backend
from ..spec import AttentionSpec
from .selection import UNREGISTERED, AnyChoice, in_words, reasons, resolve, table

__all__ = ["Explanation", "explain_request"]


#: The first step of a call with segments.
PIECES = "segments: each is a call of its own, with these steps; those of equal lengths are one"


@dataclass(frozen=True)
class Explanation:
    """How a call would run; ``print`` it, or take `to_dict`.

    Attributes
    ----------
    spec : AttentionSpec
    request : Request
        The call, without its values.
    backend : str or None
        The chosen backend, None where none runs.
    source : str
        Where the choice comes from: ``"backend= in the call"``, ``"use_backend"``,
        ``"PDCORE_BACKEND"`` or ``"the arrays' library"``.
    plan : Plan or None
        The plan that the spec is lowered to, which any backend can run.
    steps : tuple of str
        The steps of the backend in order, those that its `fuse` changed included.
    reasons : dict of str to list of str
        For every backend the reasons why it cannot run the call; empty where it can.
    """

    spec: AttentionSpec
    request: Request
    backend: str | None
    source: str
    plan: Plan | None
    steps: tuple[str, ...]
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [str(self.spec), f"  {in_words(self.spec)}", f"  {self.request}"]
        if self.plan is not None:
            lines.append("plan")
            steps = (*self.steps, f"sums, statistics and h in {self.plan.accumulate}")
            lines += [f"  {number}. {step}" for number, step in enumerate(steps, 1)]
        lines.append(f"backend: {self.backend or 'none'}, by {self.source}")
        others = {name: why for name, why in self.reasons.items() if name != self.backend}
        if others:
            lines.append(table(others))
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, ready for JSON."""
        request = self.request._asdict()
        return {
            "spec": str(self.spec),
            "request": _plain(request | {"spec": str(self.spec)}),
            "backend": self.backend,
            "source": self.source,
            "plan": None
            if self.plan is None
            else _plan_to_dict(self.plan) | {"steps": list(self.steps)},
            "reasons": {name: list(why) for name, why in self.reasons.items()},
        }


def explain_request(
    request: Request, choice: AnyChoice = None, plan: Plan | None = None
) -> Explanation:
    """Explain a request by the same predicate that selects its backend.

    Parameters
    ----------
    request : Request
        The call, without its values.
    choice : str, sequence of str, ResolvedChoice or None
        The call's ``backend=``, or the result of resolving it.
    plan : Plan, optional
        The plan that the spec is lowered to.

    Raises
    ------
    ValueError
        When the choice names no backend.
    """
    resolved, by_name = resolve(choice, request.library), reasons(request, choice)
    name: str | None = None
    fused = plan
    for candidate in resolved.candidates:
        if by_name.setdefault(str(candidate), [UNREGISTERED]):
            continue
        try:
            backend = load_backend(candidate.name)
        except ValueError:  # another thread has removed the backend
            by_name[str(candidate)] = [UNREGISTERED]
            continue
        name, fused = candidate.name, None if plan is None else backend.fuse(plan, request)
        break
    steps = () if fused is None else fused.steps
    if request.segments == "values":
        steps = (PIECES, *steps)
    return Explanation(request.spec, request, name, resolved.source, plan, steps, by_name)


def _plan_to_dict(plan: Plan) -> dict[str, Any]:
    # What a backend chose is in the steps; it is an object of the backend's own.
    fields = set(plan.contraction.__dataclass_fields__) - {"choice"}
    contraction = {f: _plain(getattr(plan.contraction, f)) for f in sorted(fields)}
    if contraction.get("expression") is not None:
        contraction["expression"] = str(contraction["expression"])
    if "kernel" in contraction:
        contraction["kernel"] = contraction["kernel"].word
    summary = plan.summary
    return {
        "groups": [asdict(group) | {"heads": list(group.heads)} for group in plan.groups],
        "pool": plan.pool,
        "statistics": None if summary is None else type(summary.statistics).__name__,
        "scope": None if summary is None else summary.scope,
        "transforms": [type(transform).__name__ for transform in plan.transforms],
        "contraction": {"kind": type(plan.contraction).__name__.lower()} | contraction,
        "normaliser": plan.normaliser,
        "sink": plan.sink,
        "accumulate": plan.accumulate,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
