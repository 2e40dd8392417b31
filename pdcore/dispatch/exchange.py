"""The exchange of a call's arrays with the library of the backend that the caller named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..arrays import device_name, dtype_name, exchangeable, library_of
from ..backend import Backend, Inputs
from ..errors import UnsupportedError

__all__ = ["exchange"]


def exchange(
    backend: Backend, inputs: Inputs, library: str, device: str | None
) -> tuple[Inputs, Callable[[Any], Any] | None]:
    """Convert the arrays of a call for the backend that the caller named, by DLPack.

    Returns
    -------
    inputs : Inputs
    back : callable or None
        Converts a result back; None where nothing was converted.
    """
    q = inputs.q
    home = device_name(q, library)
    target = device or home
    same_library = backend.info.library == library
    if same_library and target == home:
        return inputs, None
    # A move between devices within one library is differentiated by that library.
    if not same_library and any(
        getattr(x, "requires_grad", False) for x in (*inputs, *inputs.params.values())
    ):
        raise UnsupportedError(
            f"backend {backend.info.name}: taking {library} arrays that require a gradient to "
            f"{backend.info.library} would cut it; detach them, or use a {library} backend"
        )

    def forth(x: Any) -> Any:
        if x is None or isinstance(x, (int, float, str)):
            return x
        if isinstance(x, tuple | list):  # a pair of segments
            return tuple(forth(part) for part in x)
        try:
            x = x if same_library else exchangeable(x, library)
            return backend.exchange(x, target if same_library else device)
        except Exception as error:
            raise UnsupportedError(
                f"backend {backend.info.name} cannot take a {library} array of dtype "
                f"{dtype_name(x)} on {device_name(x, library)}"
                f"{'' if same_library else ' by DLPack'}: {error}"
            ) from error

    from array_api_compat import array_namespace

    namespace = array_namespace(q)

    def back(x: Any) -> Any:
        if device is not None:
            x = backend.exchange(x, home)
        # Moving a result to the CPU makes it an array of NumPy in some backends.
        converted = same_library or library_of(x, "out") == library
        if converted:
            return x
        # A result of JAX comes as a read-only array of NumPy.
        return exchangeable(backend.give(exchangeable(x, backend.info.library), namespace), library)

    params = {n: forth(x) for n, x in inputs.params.items()}
    moved = {name: forth(x) for name, x in inputs._asdict().items() if name != "params"}
    return Inputs(**moved, params=params), back
