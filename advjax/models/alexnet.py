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
_POOLED = (1, 2, 5)  # the convolutions that a max-pooling follows
_CODE = 6  # height and width of the features that the dense layers take

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
    x: Float[Array, "*shape channels"],
    *,
    size: int = 5,
    k: float = 2.0,
    alpha: float = 1e-4,
    beta: float = 0.75,
) -> Float[Array, "*shape channels"]:
    """Divide each feature by a power of the squares around it, `x / (k + alpha * sum(x^2))^beta`.

    Args:
        x: Features, with the channels along the last axis.
        size: How many channels the sum is over, with the feature's own in the middle.
        k: See above.
        alpha: See above; not divided by `size`, unlike PyTorch's and Caffe's.
        beta: See above.

    Returns:
        An array like `x`.

    Source: Krizhevsky et al. (2012), section 3.3.
    """
    ones = (1,) * (x.ndim - 1)
    window = (*ones, size)
    squares = jax.lax.reduce_window(jnp.square(x), 0.0, jax.lax.add, window, (*ones, 1), "SAME")
    return x / (k + alpha * squares) ** beta


class AlexNet(nn.Module):
    """AlexNet for inference, without dropout, by default as torchvision lays it out.

    It takes ONE image of 224 x 224 x 3; use `jax.vmap` for a batch. The one of the paper's Table 5
    takes 227 x 227 x 3, and is not split into two groups as the original was:

        AlexNet(channels=(96, 256, 384, 384, 256), padding=0, normalize=local_response_norm)

    Attributes:
        channels: Those of the five convolutions.
        features: The width of each dense layer; the last is the number of classes.
        padding: Of the first convolution, on each side.
        normalize: What the first two convolutions are followed by, after the ReLU.

    Source: Krizhevsky et al. (2012); Krizhevsky (2014), arXiv:1404.5997, for the default.
    """

    channels: tuple[int, int, int, int, int] = (64, 192, 384, 256, 256)
    features: tuple[int, int, int] = (4096, 4096, 1000)
    padding: int = 2
    normalize: Callable[[Array], Array] | None = None

    @nn.compact
    def layers(self, x: Float[Array, "height width 3"]) -> dict[str, Float[Array, "..."]]:
        """The output of each layer by its name.

        These are "conv1" to "conv5" after the ReLU, "norm1" and "norm2" if it normalizes, "pool1",
        "pool2" and "pool5", "hidden1" and "hidden2" after the ReLU and, as "hidden1_preactivation"
        and so on, before it, and "logits". Parameters are named by layer.
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

    def __call__(self, x: Float[Array, "height width 3"]) -> Float[Array, " classes"]:
        """The logits of one image."""
        return self.layers(x)["logits"]


def alexnet_from_torch(model: AlexNet, weights: Mapping[str, ArrayLike]) -> PyTree[Array]:
    """The parameters of an `AlexNet` from the weights of torchvision's.

        weights = load_torch_weights("alexnet-owt-7be5be79.pth")
        params = alexnet_from_torch(AlexNet(), weights)

    torchvision trained them on pixels in [0, 1], minus (0.485, 0.456, 0.406) and divided by (0.229,
    0.224, 0.225) channel by channel.

    Args:
        model: Whose parameters they will be.
        weights: Arrays by torchvision's names, "features.0.weight" to "classifier.6.bias".

    Returns:
        Parameters for `model.apply`.

    Raises:
        TypeError: If an entry is not floating.
        ValueError: If entries are missing, unknown or of a wrong shape; the message names them.
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
        # PyTorch has channels before pixels, in its kernels and in the features that it flattens.
        if layer == "hidden1":
            kernel = kernel.reshape(outputs, -1, _CODE, _CODE)
        kernel = jnp.moveaxis(kernel, (0, 1), (-1, -2)).reshape(shape)
        params[layer] = {"kernel": kernel, "bias": entry(f"{name}.bias", (outputs,))}
    return {"params": params}
