"""Minimum-distortion adversarial examples in JAX, as pure functions.

Reference: Szegedy et al. (2013), "Intriguing properties of neural networks", arXiv:1312.6199.
"""

import importlib.metadata

from advjax import (
    attacks,
    data,
    lipschitz,
    losses,
    metrics,
    models,
    plots,
    runner,
    solvers,
    training,
    transfer,
    units,
)
from advjax.types import Box, LogitsFn

try:
    __version__ = importlib.metadata.version("advjax")
except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "Box",
    "LogitsFn",
    "__version__",
    "attacks",
    "data",
    "lipschitz",
    "losses",
    "metrics",
    "models",
    "plots",
    "runner",
    "solvers",
    "training",
    "transfer",
    "units",
]
