"""`PDMultiheadAttention`, an `nn.MultiheadAttention` with the attention of a spec, and `convert`.

>>> import torch
>>> layer = PDMultiheadAttention(16, 4, spec="bn+sh(1,1,2,2)", batch_first=True)
>>> x = torch.randn(2, 10, 16)
>>> out, weights = layer(x, x, x)
>>> out.shape, weights.shape
(torch.Size([2, 10, 16]), torch.Size([2, 10, 10]))
"""

from __future__ import annotations

from ..requirements import requires

with requires("torch"):
    from .conversion import Conversion, convert
    from .layer import PDMultiheadAttention

__all__ = ["Conversion", "PDMultiheadAttention", "convert"]
