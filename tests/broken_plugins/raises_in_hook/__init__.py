"""Its hook fails."""

from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    raise ZeroDivisionError("counted the devices wrongly")
