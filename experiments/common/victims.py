"""Images to attack, each with a class to reach; and the attacks on all of them."""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from advjax import attacks, data, runner
from experiments.common.networks import Network

ATTACKS = (attacks.lbfgs, attacks.minimum_norm)
"""The paper's attack, and the exact one."""


class Victims(NamedTuple):
    """Test images to attack, with a class for each to reach."""

    indices: Int[np.ndarray, " n"]
    images: Float[np.ndarray, " n *shape"]
    labels: Int[np.ndarray, " n"]
    targets: Int[np.ndarray, " n"]

    def first(self, count: int) -> "Victims":
        """The first of them."""
        return Victims(*(field[:count] for field in self))


def victims(network: Network, test: data.Dataset, count: int | None = None) -> Victims:
    """The first images that a network gets right, all if None, each with a fixed other class."""
    predictions = jax.vmap(network.logits_fn)(test.images).argmax(axis=1)
    indices = np.flatnonzero(predictions == test.labels)[:count]
    labels = test.labels[indices]
    targets = (labels + 1 + np.arange(len(indices)) % 9) % 10
    return Victims(indices, test.images[indices], labels, targets)


def random_victims(key: Key[Array, ""], split: data.Dataset, count: int) -> Victims:
    """Random images, whether or not a network gets them right, each with a random other class.

    With one key a larger number begins with the images of a smaller one.
    """
    image_key, target_key = jax.random.split(key)
    indices = np.asarray(jax.random.permutation(image_key, len(split.labels)))[:count]
    labels = split.labels[indices]
    shifts = np.asarray(jax.random.randint(target_key, split.labels.shape, 1, 10))[: len(labels)]
    return Victims(indices, split.images[indices], labels, (labels + shifts) % 10)


def attack_victims(
    attack: attacks.Attack, chosen: Victims, title: str = "attack"
) -> attacks.AttackResult:
    """Attacks each image towards its target, with a progress bar of this title."""
    return runner.attack_images(attack, chosen.images, chosen.targets, progress=title)


def attack_every_class(
    attack: attacks.Attack, chosen: Victims, title: str = "attack"
) -> attacks.AttackResult:
    """The nearest of the nine other classes, as `attacks.untargeted` finds it, with a progress bar.

    With a lane of the runner for each target it takes a fraction of the time, as no image waits for
    the slowest of its targets.
    """
    classes = np.arange(10)
    others = np.stack([classes[classes != label] for label in chosen.labels])
    each = Victims(*(np.repeat(field, 9, axis=0) for field in chosen))
    every = attack_victims(attack, each._replace(targets=others.ravel()), title)
    nearest = np.where(every.success, every.distortion, np.inf).reshape(-1, 9).argmin(axis=1)
    return jax.tree.map(lambda leaf: leaf[9 * np.arange(len(others)) + nearest], every)
