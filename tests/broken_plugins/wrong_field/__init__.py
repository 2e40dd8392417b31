"""Its declaration has a single string where a sequence belongs: six modules named by a letter."""

from pdcore.backend import BackendInfo
from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return [
        BackendInfo(name="lettered", load="wrong_field:Missing", library="numpy", requires="abacus")
    ]
