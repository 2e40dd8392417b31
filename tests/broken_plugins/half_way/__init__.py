"""Much of it is right, and it fails at the last step: nothing of it may stay."""

from dataclasses import dataclass

import pdcore.spec.vocabulary
from pdcore.backend import BackendInfo
from pdcore.plugins import hookimpl
from pdcore.spec import Exponential, Identity, PointwiseKernel


class Rational(PointwiseKernel):
    def log_kappa(self, s, dim, **params):
        return s

    def latex(self):
        return "s"


@pdcore.spec.vocabulary.register_kernel
@dataclass(frozen=True)
class AtImport(Rational):
    word = "at_import"


@dataclass(frozen=True)
class ByHook(Rational):
    word = "by_hook"
    aliases = ("by_hook_too",)


@dataclass(frozen=True)
class Taken(Identity):
    word = "causal"


@hookimpl
def pdcore_backends():
    return [BackendInfo(name="halfway", load="half_way:Missing", library="numpy")]


@hookimpl
def pdcore_kernels():
    # The second is built in already, and must outlive the removal of the first.
    return [ByHook, Exponential]


@hookimpl
def pdcore_normalizations():
    return [Taken]
