"""Images to attack, each with a target class, and attacks on all of them."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from advjax import attacks, data, runner
from experiments.common.networks import Network

ATTACKS = (attacks.lbfgs, attacks.minimum_norm)
"""The paper's attack and the exact one, each a function of the network."""


class Victims(NamedTuple):
    """Images to attack, each with a target class."""

    indices: Int[np.ndarray, " n"]
    images: Float[np.ndarray, " n *shape"]
    labels: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]

    def first(self, count: int) -> "Victims":
        """Keep the first of them."""
        return Victims(*(field[:count] for field in self))


def victims(network: Network, test: data.Dataset, count: int | None = None) -> Victims:
    """The first images that a network gets right (all if None), each with a fixed target."""
    predictions = jax.vmap(network.logits_fn)(test.images).argmax(axis=1)
    indices = np.flatnonzero(predictions == test.labels)[:count]
    labels = test.labels[indices]
    targets = (labels + 1 + np.arange(len(indices)) % 9) % 10
    return Victims(indices, test.images[indices], labels, targets)


def random_victims(key: Key[Array, ""], split: data.Dataset, count: int) -> Victims:
    """Draw images, right or wrong, each with a random other class as its target.

    With the same key, a larger draw begins with the images of a smaller one.
    """
    image_key, target_key = jax.random.split(key)
    indices = np.asarray(jax.random.permutation(image_key, len(split.labels)))[:count]
    labels = split.labels[indices]
    shifts = np.asarray(jax.random.randint(target_key, split.labels.shape, 1, 10))[: len(labels)]
    return Victims(indices, split.images[indices], labels, (labels + shifts) % 10)


def attack_victims(
    attack: attacks.Attack, chosen: Victims, title: str = "attack"
) -> attacks.AttackResult:
    """Attack each image towards its target, with a titled progress bar."""
    return runner.attack_images(attack, chosen.images, chosen.targets, progress=title)


def attack_every_class(
    attack: attacks.Attack, chosen: Victims, title: str = "attack"
) -> attacks.AttackResult:
    """Find the nearest of the nine other classes, as `attacks.untargeted` does.

    Each pair of image and target has a lane of the runner, which takes a fraction of the time since
    no image waits for its slowest target.
    """
    classes = np.arange(10)
    others = np.stack([classes[classes != label] for label in chosen.labels])
    each = Victims(*(np.repeat(field, 9, axis=0) for field in chosen))
    every = attack_victims(attack, each._replace(targets=others.ravel()), title)
    nearest = np.where(every.success, every.distortion, np.inf).reshape(-1, 9).argmin(axis=1)
    return jax.tree.map(lambda leaf: leaf[9 * np.arange(len(others)) + nearest], every)
