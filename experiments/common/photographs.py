"""EfficientNet-Lite0 and photographs, for the experiments on networks of ImageNet's size."""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from advjax import data, models
from experiments.common import networks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OSTRICH = 9
"""The class "ostrich, Struthio camelus", which the paper turns photographs into."""


class Photographs(NamedTuple):
    """Photographs, and which of them a net can be misled about."""

    dataset: data.Dataset
    victims: networks.Victims
    """Those that the net gets right, but for ostriches, each to become one."""


def load_net() -> networks.Net:
    """EfficientNet-Lite0 with the weights of its package; it takes pixels in [0, 1]."""
    model = models.EfficientNetLite0()
    weights = models.load_torch_weights(models.efficientnet_lite0_weights())
    return networks.Net(
        "EfficientNet-Lite0", model, models.efficientnet_lite0_from_torch(model, weights)
    )


def load_photographs(net: networks.Net, folder: Path | None, *, count: int | None) -> Photographs:
    """The photographs of a folder, or foolbox's twenty.

    Args:
        net: Decides which of them are victims.
        folder: As for `data.load_photographs`.
        count: How many victims at most.

    Returns:
        All photographs, and the first victims among them. Where a photograph's class is not told,
        that which the net gives it counts.
    """
    dataset = data.load_photographs(folder=folder)
    predicted = np.asarray(predict(net.logits_fn, dataset.images))
    labels = np.where(dataset.labels < 0, predicted, dataset.labels)
    right = np.flatnonzero((predicted == labels) & (labels != OSTRICH))[:count]
    return Photographs(
        dataset,
        networks.Victims(right, dataset.images[right], labels[right], np.full(len(right), OSTRICH)),
    )


@jax.jit
def predict(logits_fn: jax.tree_util.Partial, images: Float[Array, "n *shape"]) -> Int[Array, " n"]:
    """The class that a net gives each image."""
    return jax.lax.map(lambda image: logits_fn(image).argmax(), images, batch_size=4)


def save(figure: "Figure", path: Path, *, scale: int = 2) -> None:
    """Writes a figure of photographs in so many times its size and 256 colours, for fewer bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    figure.set_dpi(scale * figure.dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(256).save(path)
