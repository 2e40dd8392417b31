"""One hook is right; another is misspelt and not decorated, so that pluggy passes over it."""

from pdcore.plugins import hookimpl


@hookimpl
def pdcore_backends():
    return []


def pdcore_kernel():
    return []
