"""Its hook returns a list of something else."""

from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return [{"name": "mapping"}]
