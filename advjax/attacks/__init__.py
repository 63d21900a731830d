"""Minimum-distortion attacks: pure functions of one image, flat under `jax.vmap`."""

from advjax.attacks.base import AttackResult, Machine, Status
from advjax.attacks.fgsm import fgsm
from advjax.attacks.lbfgs import lbfgs, lbfgs_machine
from advjax.attacks.minimum_norm import minimum_norm, minimum_norm_machine
from advjax.attacks.start import Start, decoupled
from advjax.attacks.untargeted import untargeted

__all__ = [
    "AttackResult",
    "Machine",
    "Start",
    "Status",
    "decoupled",
    "fgsm",
    "lbfgs",
    "lbfgs_machine",
    "minimum_norm",
    "minimum_norm_machine",
    "untargeted",
]
