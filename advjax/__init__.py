"""Minimum-distortion adversarial examples in JAX, as pure functions.

An implementation of "Intriguing properties of neural networks" (Szegedy et al., 2013,
arXiv:1312.6199).
"""

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

__all__ = [
    "Box",
    "LogitsFn",
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
