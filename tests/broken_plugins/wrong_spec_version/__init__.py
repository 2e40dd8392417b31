"""Its backend is written for a later version of the plan contract."""

from pdcore.backend import SPEC_VERSION, BackendInfo
from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return [
        BackendInfo(
            name="futuristic",
            load="wrong_spec_version:Missing",
            library="numpy",
            spec_version=SPEC_VERSION + 1,
        )
    ]
