"""Training of classifiers, with penalties on their parameters."""

from advjax.training.fit import FitResult, fit
from advjax.training.penalties import Penalty, sparsity, weight_decay

__all__ = ["FitResult", "Penalty", "fit", "sparsity", "weight_decay"]
