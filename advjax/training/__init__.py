"""Training of classifiers, with penalties on their parameters and on adversarial examples."""

from advjax.training.adversarial import Layer, Pool, adversarial, adversarial_pools, refresh
from advjax.training.fit import AuxiliaryLoss, FitResult, fit
from advjax.training.lipschitz import LipschitzState, lipschitz_penalty
from advjax.training.penalties import Penalty, sparsity, weight_decay

__all__ = [
    "AuxiliaryLoss",
    "FitResult",
    "Layer",
    "LipschitzState",
    "Penalty",
    "Pool",
    "adversarial",
    "adversarial_pools",
    "fit",
    "lipschitz_penalty",
    "refresh",
    "sparsity",
    "weight_decay",
]
