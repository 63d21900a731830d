"""Classifiers as Flax Linen modules, each of ONE example and with named layer outputs."""

from advjax.models.alexnet import AlexNet, alexnet_from_torch, local_response_norm
from advjax.models.autoencoder import AutoencoderClassifier
from advjax.models.convolutional import ConvNet
from advjax.models.efficientnet import (
    EfficientNetLite0,
    efficientnet_lite0_from_torch,
    efficientnet_lite0_weights,
)
from advjax.models.fully_connected import MLP, Softmax
from advjax.models.parameters import load, save
from advjax.models.torch_weights import load_torch_weights

__all__ = [
    "MLP",
    "AlexNet",
    "AutoencoderClassifier",
    "ConvNet",
    "EfficientNetLite0",
    "Softmax",
    "alexnet_from_torch",
    "efficientnet_lite0_from_torch",
    "efficientnet_lite0_weights",
    "load",
    "load_torch_weights",
    "local_response_norm",
    "save",
]
