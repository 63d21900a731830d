"""Minimum-distortion attacks: pure functions of one image, flat under `jax.vmap`."""

from advjax.attacks.attack import Attack, Method
from advjax.attacks.ddn import Start, decoupled
from advjax.attacks.fgsm import fgsm
from advjax.attacks.lbfgs import lbfgs
from advjax.attacks.machine import Formulation, Search, Verdict, View
from advjax.attacks.minimum_norm import minimum_norm
from advjax.attacks.quantized import quantized
from advjax.attacks.result import AttackResult, Status, admission
from advjax.attacks.untargeted import untargeted

__all__ = [
    "Attack",
    "AttackResult",
    "Formulation",
    "Method",
    "Search",
    "Start",
    "Status",
    "Verdict",
    "View",
    "admission",
    "decoupled",
    "fgsm",
    "lbfgs",
    "minimum_norm",
    "quantized",
    "untargeted",
]
