"""Devices of JAX by their names in pdcore."""

from __future__ import annotations

from typing import Any

import jax

__all__ = ["find"]


def find(name: str) -> Any:
    """Return a device by its name: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.

    Raises
    ------
    RuntimeError
        When JAX has no such device.
    """
    kind, _, index = name.partition(":")
    devices = {d.id: d for d in jax.devices(kind)}
    if not index:
        return next(iter(devices.values()))
    if int(index) not in devices:
        raise RuntimeError(f"JAX has devices {sorted(devices)} of {kind}")
    return devices[int(index)]
