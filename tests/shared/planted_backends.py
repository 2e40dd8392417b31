"""Backends with wrong declarations or results, on which the suite must fail, and a right one."""

from __future__ import annotations

from pdcore import register_backend
from pdcore.backend import FEATURES, ArrayBackend, BackendInfo

_FRAMEWORK = {
    "autodiff",
    "double_backward",
    "vmap",
    "jvp",
    "compile",
    "dropout",
    "axis_name",
    "group",
}
FULL = {f: "unsupported" if f in _FRAMEWORK else "full" for f in FEATURES}


def info(name, cls, **capabilities):
    return BackendInfo(
        name=name,
        load=f"{__name__}:{cls}",
        library="numpy",
        requires=("numpy",),
        capabilities={**FULL, **capabilities},
    )


class Good(ArrayBackend):
    info = info("good", "Good")


class NoBias(ArrayBackend):
    """Declares bias not implemented, and refuses it."""

    info = info("no_bias", "NoBias", bias="not_implemented")


class Secretive(ArrayBackend):
    """Declares bias unsupported, and runs it."""

    info = info("secretive", "Secretive", bias="unsupported")

    def refusals(self, request):
        return [r for r in super().refusals(request) if "bias" not in r]


class Reluctant(ArrayBackend):
    """Declares everything, and refuses the gaussian kernel."""

    info = info("reluctant", "Reluctant")

    def refusals(self, request):
        reasons = super().refusals(request)
        if request.spec.kernel.word == "gaussian":
            reasons.append("no gaussian kernels today")
        return reasons


class NoCausal(ArrayBackend):
    """Declares a core feature not implemented."""

    info = info("no_causal", "NoCausal", causal="not_implemented")


class Crashing(ArrayBackend):
    """Raises an error where it should compute."""

    info = info("crashing", "Crashing")

    def scores(self, c, o):
        raise ZeroDivisionError("planted")


def register():
    """Register these backends, and one whose library is not installed."""
    for cls in (Good, NoBias, Secretive, Reluctant, NoCausal, Crashing):
        register_backend(cls.info)
    register_backend(
        BackendInfo(
            name="absent",
            load="nowhere:Missing",
            library="numpy",
            requires=("no_such_module",),
            install="pip install no-such-module",
            capabilities=FULL,
        )
    )
