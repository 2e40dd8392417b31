"""Its hook has a name that pdcore never calls."""

from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backend():
    return []
