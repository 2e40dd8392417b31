"""Its hook forgets to return."""

from pdcore.plugins import hookimpl


@hookimpl
def pdcore_normalizations():
    declared = []
    declared.append(None)
