"""Lipschitz bounds in L2: of one linear layer, and of any JAX function."""

from advjax.lipschitz.bound import Bound, Layer, bound, linear_layers, pairwise
from advjax.lipschitz.certificates import Certificate, Status, certified_radius, certify
from advjax.lipschitz.jaxpr.rules import register_rule
from advjax.lipschitz.jaxpr.values import NotLipschitzError, Operation, Signal
from advjax.lipschitz.linear.lanczos import (
    Estimate,
    LanczosEstimate,
    lanczos,
    power_iteration,
    power_step,
)
from advjax.lipschitz.linear.layers import Conv, Dense, conv_norm, dense_norm
from advjax.lipschitz.linear.lipsdp import ChainBound, eclipse, lipsdp, product
from advjax.lipschitz.linear.norms import NormBound

__all__ = [
    "Bound",
    "Certificate",
    "ChainBound",
    "Conv",
    "Dense",
    "Estimate",
    "LanczosEstimate",
    "Layer",
    "NormBound",
    "NotLipschitzError",
    "Operation",
    "Signal",
    "Status",
    "bound",
    "certified_radius",
    "certify",
    "conv_norm",
    "dense_norm",
    "eclipse",
    "lanczos",
    "linear_layers",
    "lipsdp",
    "pairwise",
    "power_iteration",
    "power_step",
    "product",
    "register_rule",
]
