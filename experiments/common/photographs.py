"""EfficientNet-Lite0 and photographs, for the experiments on networks of ImageNet's size."""

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from advjax import data, models
from experiments.common.networks import Network
from experiments.common.victims import Victims

OSTRICH = 9
"""The class "ostrich, Struthio camelus", which the paper turns photographs into."""


class Subjects(NamedTuple):
    """A network, photographs, and those of them to attack."""

    network: Network
    dataset: data.Dataset
    victims: Victims
    """Those that the network gets right, except ostriches; the target is "ostrich"."""

    @property
    def splits(self) -> tuple[data.Dataset, ...]:
        """The data sets that are measured on."""
        return (self.dataset,)


def load_network() -> Network:
    """Load EfficientNet-Lite0 with its package's weights; it takes pixels in [0, 1]."""
    model = models.EfficientNetLite0()
    weights = models.load_torch_weights(models.efficientnet_lite0_weights())
    return Network(
        "EfficientNet-Lite0", model, models.efficientnet_lite0_from_torch(model, weights)
    )


def load_subjects(
    network: Network, folder: Path | None, *, count: int | None, stride: int = 1
) -> Subjects:
    """Load the photographs of a folder, or foolbox's twenty, and choose those to attack.

    Args:
        network: The network that they are attacked for.
        folder: See `data.load_photographs`.
        count: The maximum number of photographs to attack. If the class of a photograph is unknown,
            the network's prediction counts as its class.
        stride: Keep every stride-th row and column of the attacked photographs, for a trial.
    """
    dataset = data.load_photographs(folder=folder)
    predicted = np.asarray(predict(network.logits_fn, dataset.images))
    labels = np.where(dataset.labels < 0, predicted, dataset.labels)
    right = np.flatnonzero((predicted == labels) & (labels != OSTRICH))[:count]
    images = dataset.images[right, ::stride, ::stride]
    victims = Victims(right, images, labels[right], np.full(len(right), OSTRICH))
    return Subjects(network, dataset, victims)


@jax.jit
def predict(logits_fn: jax.tree_util.Partial, images: Float[Array, "n *shape"]) -> Int[Array, " n"]:
    """The class that a network predicts for each image."""
    return jax.lax.map(lambda image: logits_fn(image).argmax(), images, batch_size=4)
