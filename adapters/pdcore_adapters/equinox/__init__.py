"""pdcore attention in the attention layers of Equinox.

>>> layer = PDMultiheadAttention(4, 16, spec="bn+sh(1,1,2,2)", key=jax.random.key(0))
>>> x = jax.numpy.ones((10, 16))
>>> layer(x, x, x).shape
(10, 16)
"""

from __future__ import annotations

from ..requirements import requires

with requires("equinox"):
    import equinox  # noqa: F401 - the first that is named where both are missing
    import jax  # noqa: F401 - the example above uses it

    from .conversion import convert
    from .layer import PDMultiheadAttention

__all__ = ["PDMultiheadAttention", "convert"]
