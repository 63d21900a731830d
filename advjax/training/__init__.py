"""Training of classifiers, with penalties on their parameters."""

from advjax.training.fit import FitResult, fit
from advjax.training.lipschitz import LipschitzState, lipschitz_penalty
from advjax.training.penalties import Penalty, sparsity, weight_decay

__all__ = [
    "FitResult",
    "LipschitzState",
    "Penalty",
    "fit",
    "lipschitz_penalty",
    "sparsity",
    "weight_decay",
]
