"""AlexNet, in torchvision's layout or the paper's."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from advjax.models.fully_connected import dense_layers
from advjax.models.torch_weights import checked_entries

_KERNELS = (11, 5, 3, 3, 3)
_POOLED = (1, 2, 5)  # the convolutions that are followed by max-pooling
_CODE = 6  # height and width of the input of the dense layers

_TORCH_NAMES = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "hidden1": "classifier.1",
    "hidden2": "classifier.4",
    "logits": "classifier.6",
}


def local_response_norm(
    x: Float[ArrayLike, "*shape channels"],
    *,
    size: int = 5,
    k: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> Float[Array, "*shape channels"]:
    """Normalise each feature by its neighbouring channels: `x / (k + alpha * sum(x**2))**beta`.

    Args:
        x: Features, `(*shape, channels)`.
        size: Number of channels in the sum, centred on the feature's own.
        k: Constant in the denominator.
        alpha: Factor of the sum; not divided by `size`, unlike in PyTorch and Caffe.
        beta: Exponent of the denominator.

    Returns:
        An array like `x`.

    Reference: Krizhevsky et al. (2012), section 3.3.
    """
    x = jnp.asarray(x)
    ones = (1,) * (x.ndim - 1)
    window = (*ones, size)
    squares = jax.lax.reduce_window(jnp.square(x), 0.0, jax.lax.add, window, (*ones, 1), "SAME")
    return x / (k + alpha * squares) ** beta


class AlexNet(nn.Module):
    """AlexNet for inference, without dropout, by default in torchvision's layout.

    The input is ONE image of 224 x 224 x 3; use `jax.vmap` for a batch. The network of the paper's
    Table 5 has inputs of 227 x 227 x 3 and, unlike the original, no groups:

        AlexNet(channels=(96, 256, 384, 384, 256), padding=0, normalize=local_response_norm)

    Attributes:
        channels: Output channels of the five convolutions.
        features: The width of each dense layer; the last is the number of classes.
        padding: Padding of the first convolution on each side, in pixels.
        normalize: Function of the outputs of the first two convolutions, after the ReLU; None for
            the identity.

    Reference: Krizhevsky et al. (2012); Krizhevsky (2014), arXiv:1404.5997, for the default.
    """

    channels: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)
    features: tuple[int, int, int] = (4096, 4096, 1000)
    padding: int = 2
    normalize: Callable[[Array], Array] | None = None

    @nn.compact
    def layers(self, x: Float[ArrayLike, "height width 3"]) -> dict[str, Float[Array, "..."]]:
        """Compute the output of each layer by name.

        The names are "conv1" to "conv5", after the ReLU; "norm1" and "norm2", with `normalize`;
        "pool1", "pool2" and "pool5"; "hidden1" and "hidden2", after the ReLU, and
        "hidden1_preactivation" and "hidden2_preactivation", before it; and "logits". Parameters are
        named by layer.
        """
        outputs = {}
        for i, (channels, kernel) in enumerate(zip(self.channels, _KERNELS, strict=True), start=1):
            strides, padding = (4, self.padding) if i == 1 else (1, kernel // 2)
            conv = nn.Conv(channels, (kernel, kernel), strides, padding, name=f"conv{i}")
            outputs[f"conv{i}"] = x = nn.relu(conv(x))
            if i <= 2 and self.normalize is not None:
                outputs[f"norm{i}"] = x = self.normalize(x)
            if i in _POOLED:
                outputs[f"pool{i}"] = x = nn.max_pool(x, (3, 3), (2, 2))
        return outputs | dense_layers(jnp.ravel(x), self.features, nn.relu)

    def __call__(self, x: Float[ArrayLike, "height width 3"]) -> Float[Array, " classes"]:
        """Compute the logits of one image."""
        return self.layers(x)["logits"]


def alexnet_from_torch(model: AlexNet, weights: Mapping[str, ArrayLike]) -> PyTree[Array]:
    """Convert torchvision's AlexNet weights to the parameters of an `AlexNet`.

        weights = load_torch_weights("alexnet-owt-7be5be79.pth")
        params = alexnet_from_torch(AlexNet(), weights)

    torchvision trained them on pixels in [0, 1] from which (0.485, 0.456, 0.406) was subtracted and
    which were divided by (0.229, 0.224, 0.225), per channel.

    Args:
        model: The model of the parameters.
        weights: Arrays by torchvision's names, "features.0.weight" to "classifier.6.bias".

    Returns:
        Parameters for `model.apply`.

    Raises:
        TypeError: If an entry is not floating.
        ValueError: If entries are missing, unknown or of the wrong shape; the message names them.
    """
    expected = {f"{name}.{kind}" for name in _TORCH_NAMES.values() for kind in ("weight", "bias")}
    entry = checked_entries(
        weights, expected, of="torchvision's alexnet", options="channels and features"
    )
    size = 227 - 2 * model.padding  # the smallest image that leaves `_CODE` x `_CODE` features
    image = jax.ShapeDtypeStruct((size, size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    params = {}
    for layer, name in _TORCH_NAMES.items():
        shape = shapes[layer]["kernel"].shape
        *window, inputs, outputs = shape
        kernel = entry(f"{name}.weight", (outputs, inputs, *window))
        # In PyTorch channels come before pixels, in kernels and in flattened features.
        if layer == "hidden1":
            kernel = kernel.reshape(outputs, -1, _CODE, _CODE)
        kernel = jnp.moveaxis(kernel, (0, 1), (-1, -2)).reshape(shape)
        params[layer] = {"kernel": kernel, "bias": entry(f"{name}.bias", (outputs,))}
    return {"params": params}
