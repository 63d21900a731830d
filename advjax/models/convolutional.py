"""A small convolutional network for MNIST."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax.models.fully_connected import dense_layers


class ConvNet(nn.Module):
    """A small convolutional network, for the paper's figures of units on MNIST.

    The paper does not say which network it used. This one is standard in certified robustness: two
    strided convolutions and a hidden dense layer, without pooling, which would make Lipschitz
    bounds looser. The input is ONE image; use `jax.vmap` for a batch:

        model = ConvNet()
        params = model.init(key, image)
        logits = model.apply(params, image)
        phi = model.apply(params, image, method="layers")["hidden1"]

    Attributes:
        channels: Output channels of each convolution, 4 x 4 with stride 2, which halves the image.
        features: The width of each dense layer; the last is the number of classes.
        activation: The elementwise function after every layer but the last.

    Reference: Wong and Kolter (2018), arXiv:1711.00851, section 4.
    """

    channels: tuple[int, ...] = (16, 32)
    features: tuple[int, ...] = (100, 10)
    activation: Callable[[Array], Array] = jax.nn.relu

    @nn.compact
    def layers(
        self, x: Float[ArrayLike, "height width channels"]
    ) -> dict[str, Float[Array, "..."]]:
        """Compute the output of each layer by name: "conv1", ..., "hidden1", ..., "logits".

        These are outputs after the activation; "hidden1_preactivation", and so on for each hidden
        dense layer, is the output before it. Parameters are named by layer.
        """
        outputs = {}
        for i, channels in enumerate(self.channels, start=1):
            conv = nn.Conv(channels, (4, 4), strides=2, padding=1, name=f"conv{i}")
            outputs[f"conv{i}"] = x = self.activation(conv(x))
        return outputs | dense_layers(jnp.ravel(x), self.features, self.activation)

    def __call__(self, x: Float[ArrayLike, "height width channels"]) -> Float[Array, " classes"]:
        """Compute the logits of one image."""
        return self.layers(x)["logits"]
