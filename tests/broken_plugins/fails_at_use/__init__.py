"""It declares a backend well, whose module then fails."""

from pdcore.backend import BackendInfo
from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return [BackendInfo(name="late", load="fails_at_use.impl:Late", library="numpy", priority=9)]
