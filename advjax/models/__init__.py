"""Classifiers as Flax Linen modules, each of ONE example and with named layer outputs."""

from advjax.models.fully_connected import MLP, Softmax
from advjax.models.parameters import load, save

__all__ = ["MLP", "Softmax", "load", "save"]
