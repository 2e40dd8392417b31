"""Its hook has a name that pdcore never calls."""

from pdcore.hookspecs import hookimpl


@hookimpl
def pdcore_backend():
    return []
