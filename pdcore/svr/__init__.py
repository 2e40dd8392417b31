"""The regression behind attention, solved: fit it, certify the solution, run it as attention.

One head is one support vector regression on its keys. `fit` solves its dual for given targets, the
solution is a `SupportVectorExpansion`, and the expansion is an attention with values that were
solved for. `certificate` says how far a solution is from optimal; `interpret` reads the learned
values of a layer as multipliers. Needs the extra ``svr``; all in float64 on NumPy.

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> keys, targets = rng.standard_normal((40, 3)), rng.standard_normal((40, 2))
>>> expansion = fit(keys, targets, "gaussian(gamma=0.3)", C=300.0, epsilon=0.1)
>>> queries = rng.standard_normal((5, 3))
>>> bool(np.allclose(expansion.attention(queries), expansion.predict(queries), rtol=1e-10))
True
>>> expansion.certificate().ok
True
"""

from __future__ import annotations

from .certificate import Certificate, certificate
from .checks import check_jobs
from .expansion import HeadFit, SupportVectorExpansion
from .fitting import fit
from .head_kernel import HeadKernel, check_regression, head_kernels
from .interpretation import Interpretation, interpret

__all__ = [
    "fit",
    "SupportVectorExpansion",
    "HeadFit",
    "certificate",
    "Certificate",
    "interpret",
    "Interpretation",
    # for estimators of other libraries
    "HeadKernel",
    "head_kernels",
    "check_jobs",
    "check_regression",
]
