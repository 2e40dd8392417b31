"""Nothing is wrong with it, but what its backend runs on is not installed."""

from pdcore.backend import BackendInfo
from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return [
        BackendInfo(
            name="hopeful",
            load="missing_dependency.impl:Hopeful",
            library="numpy",
            requires=("numpy", "a_framework_that_nobody_wrote.linalg"),
            install="pip install a-framework-that-nobody-wrote",
        )
    ]
