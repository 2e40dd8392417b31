"""Its backend has the name of another one."""

from pdcore.backend import BackendInfo
from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return [BackendInfo(name="numpy", load="duplicate_name:Missing", library="numpy")]
