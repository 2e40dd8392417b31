"""Its backend is written for an earlier version of the plan contract."""

from pdcore.backend import SPEC_VERSION, BackendInfo
from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return [
        BackendInfo(
            name="antique",
            load="old_spec_version:Missing",
            library="numpy",
            spec_version=SPEC_VERSION - 1,
        )
    ]
