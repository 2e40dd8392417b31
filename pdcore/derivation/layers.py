"""Derivation of an attention from a layer of a neural network, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..dispatch import FLOATS
from ..errors import SpecError, nearest
from ..lowering import Plan, Signature, lower
from ..plugins import summary
from ..spec import (
    AttentionSpec,
    Batch,
    Identity,
    Kernel,
    Normalization,
    align_environment,
    instantiate,
    parse,
    positive_semidefinite,
    read_arguments,
    read_words,
    sections,
)
from ..spec.normalizations import BUILT_IN

__all__ = ["LAYERS", "Derivation", "Step", "derive"]

_NORMALIZATIONS: tuple[type[Normalization], ...] = (Identity, Batch, *BUILT_IN)
#: The layers by name, each with the normalization T of its input.
LAYERS: Mapping[str, type[Normalization]] = {cls.layer: cls for cls in _NORMALIZATIONS}


@dataclass(frozen=True)
class Step:
    """One step of a derivation.

    Attributes
    ----------
    title, text : str
        What the step does, and its result, in words and plain formulas.
    latex : str
        The formulas as an ``align*`` environment; empty for a step without formulas.
    """

    title: str
    text: str
    latex: str


@dataclass(frozen=True)
class Derivation:
    """The attention of a layer, and the steps that derive it.

    Attributes
    ----------
    layer : str
        A name of `LAYERS`.
    spec : AttentionSpec
        The attention.
    steps : tuple of Step
        The steps from the layer to the attention and its plan.
    plan : Plan
        The plan that the attention is lowered to.
    """

    layer: str
    spec: AttentionSpec
    steps: tuple[Step, ...]
    plan: Plan

    def __str__(self) -> str:
        return "\n\n".join(
            f"{number}. {step.title}\n{step.text}" for number, step in enumerate(self.steps, 1)
        )

    def latex(self) -> str:
        """Return the formulas of all steps, one ``align*`` environment for each step with any."""
        return "\n".join(step.latex for step in self.steps if step.latex)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values: ``layer``, ``spec``, ``steps`` and ``plan`` (the plan's steps)."""
        return {
            "layer": self.layer,
            "spec": str(self.spec),
            "steps": [vars(step) for step in self.steps],
            "plan": list(self.plan.steps),
        }


def derive(
    layer: str = "linear",
    kernel: str | Kernel = "exponential",
    *,
    dim: int = 64,
    heads: int = 1,
    dtype: str = "float32",
    **arguments: Any,
) -> Derivation:
    """Derive the attention of the layer f(x) = W Phi(T(x)) / h(x) + b, h the sum of kappa.

    Parameters
    ----------
    layer : str
        The layer, which determines T: a name of `LAYERS`, with or without arguments of its
        normalization, as in ``"mixture_norm(components=3)"``.
    kernel : str or Kernel
        The kernel kappa, which determines Phi, or its word, such as ``"gaussian(0.3)"``.
    dim, heads, dtype
        The number of features, number of key heads and dtype of the call that the plan is for.
    **arguments
        Arguments of the layer's normalization by name, such as ``components=3``.

    Returns
    -------
    Derivation

    Raises
    ------
    SpecError
        For an unknown layer, a kernel beside other words, or arguments that do not fit.
    UnsupportedError
        For a kernel that may be negative, so that its sum h is no normaliser.

    Examples
    --------
    >>> print(derive("batch_norm").spec)
    softmax+bn
    >>> print(derive("conv2d(14,14)", "gaussian(0.3)").spec)
    gaussian(gamma=0.3)+conv2d(height=14,width=14)
    """
    for name, value in (("dim", dim), ("heads", heads)):
        if type(value) is not int or value < 1:
            raise SpecError(f"{name}: got {value!r}, expected a whole number >= 1")
    if dtype not in FLOATS:
        raise SpecError(f"dtype: got {dtype!r}, expected one of {', '.join(FLOATS)}")
    name, normalization = _normalization(layer, arguments)
    spec = AttentionSpec(kernel=_kernel(kernel), normalization=normalization)
    plan = lower(spec, Signature(dim, heads, dtype))
    where = f"For D = {dim}, {heads} key head{'s' * (heads > 1)} and {dtype}:"
    return Derivation(name, spec, tuple(_steps(spec, plan, where)), plan)


def _normalization(layer: str, arguments: dict[str, Any]) -> tuple[str, Normalization]:
    """Return the name of a layer, and its normalization with arguments."""
    if not isinstance(layer, str):
        raise TypeError(f"layer: got {type(layer).__name__}, expected a name of LAYERS")
    one = "one layer, such as 'batch_norm' or 'mixture_norm(components=3)'"
    words = read_words(layer, "layer", one)
    name, text = words[0]
    if len(words) > 1:
        raise SpecError(f"layer: got {layer!r}, expected {one}")
    if name not in LAYERS:
        layers = [known for known, cls in LAYERS.items() if name in (cls.word, *cls.aliases)]
        hint = f"did you mean {layers[0]!r}?" if layers else nearest(name, LAYERS)
        raise SpecError(f"layer: got {name!r}; {hint}")
    positional, named = read_arguments(name, text)
    if arguments and text:
        raise SpecError(
            f"layer: got {layer!r} and {', '.join(arguments)} beside it; give all "
            "arguments in one place"
        )
    normalization: Normalization = instantiate(
        name, LAYERS[name], positional, {**named, **arguments}
    )
    return name, normalization


def _kernel(kernel: str | Kernel) -> Kernel:
    if isinstance(kernel, Kernel):
        return kernel
    if not isinstance(kernel, str):
        raise TypeError(
            f"kernel: got {type(kernel).__name__}, expected a pdcore.Kernel or its word"
        )
    spec = parse(kernel)
    if spec != AttentionSpec(kernel=spec.kernel):
        raise SpecError(
            f"kernel: got {kernel!r}, expected the word of a kernel alone, such as "
            "'gaussian(gamma=0.3)'"
        )
    return spec.kernel


def _scale(kernel: Kernel) -> str:
    """Return the text that defines tau, empty for a kernel without tau."""
    if not hasattr(kernel, "scale"):
        return ""
    return f", tau = {'1 / sqrt(D)' if kernel.scale is None else f'{kernel.scale:g}'}"


def _steps(spec: AttentionSpec, plan: Plan, where: str) -> list[Step]:
    part = sections(spec)
    space = (
        "Phi is needed in inner products alone"
        if positive_semidefinite(spec)
        else "Where kappa is positive semidefinite there is a Phi, needed in inner products alone"
    )
    return [
        Step(
            "The layer",
            "f(x) = W Phi(T(x)) / h(x) + b. Of the layer's input comes "
            f"{summary(type(spec.normalization))}. {spec.normalization.layer_note()}{space}: "
            f"kappa(x, y) = Phi(x).Phi(y), {summary(type(spec.kernel))}{_scale(spec.kernel)}. "
            "h(x) = sum_j kappa(T(x), T(k_j)).",
            align_environment([*part["points"], *part["choices"]]),
        ),
        Step(
            "The regression",
            f"Fit it{', for every query anew,' * spec.prefix} to keys k_j with targets y_j: keep "
            "|W|^2 / 2 small, and charge C for what an error exceeds epsilon, in every output "
            "feature.",
            align_environment(part["primal"]),
        ),
        Step(
            "Its dual",
            "Multipliers a_jd and a*_jd between 0 and C, whose differences sum to 0 over the keys; "
            "the solution is w_d = sum_j (a_jd - a*_jd) Phi(T(k_j)) / h(k_j).",
            align_environment(part["dual"]),
        ),
        Step(
            "The attention",
            "With w_d put into the layer, f(x) = sum_j v_j kappa(T(x), T(k_j)) / h(x) + b, "
            "v_jd = (a_jd - a*_jd) / h(k_j): x is a query, k_j are the keys, v_j the values. "
            f"A transformer learns v and has b = 0: {spec}.",
            align_environment([*part["attention"], *part["project_choices"]]),
        ),
        Step("The plan", "\n".join((where, *plan.steps)), ""),
    ]
