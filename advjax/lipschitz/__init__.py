"""Lipschitz bounds in L2: of one linear layer, and of any JAX function."""

from advjax.lipschitz.bound import Bound, Layer, bound, pairwise
from advjax.lipschitz.certificates import certified_radius
from advjax.lipschitz.chains import ChainBound, eclipse, lipsdp, product
from advjax.lipschitz.estimates import Estimate, LanczosEstimate, lanczos, power_iteration
from advjax.lipschitz.norms import Linear, NormBound, conv, conv_norm, dense_norm
from advjax.lipschitz.rules import NotLipschitzError, register_rule
from advjax.lipschitz.signals import Operation, Signal

__all__ = [
    "Bound",
    "ChainBound",
    "Estimate",
    "LanczosEstimate",
    "Layer",
    "Linear",
    "NormBound",
    "NotLipschitzError",
    "Operation",
    "Signal",
    "bound",
    "certified_radius",
    "conv",
    "conv_norm",
    "dense_norm",
    "eclipse",
    "lanczos",
    "lipsdp",
    "pairwise",
    "power_iteration",
    "product",
    "register_rule",
]
