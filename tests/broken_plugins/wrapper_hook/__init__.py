"""Its hook wraps those of other plugins."""

from pdcore.plugins import hookimpl


@hookimpl(wrapper=True)
def pdcore_backends():
    return (yield)
