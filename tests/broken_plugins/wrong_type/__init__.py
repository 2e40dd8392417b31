"""Its hook returns one declaration, not a list of them."""

from pdcore.backend import BackendInfo
from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return BackendInfo(name="single", load="wrong_type:Missing", library="numpy")
