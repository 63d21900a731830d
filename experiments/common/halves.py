"""The halves P1 and P2 of the training images, and the networks of Tables 3 and 4 on them."""

import jax
import numpy as np

from advjax import data
from experiments.common import networks, paper


def divide(seed: int, train: data.Dataset) -> tuple[data.Dataset, data.Dataset]:
    """Split the training images into the halves P1 and P2 of a seed."""
    order = jax.random.permutation(jax.random.fold_in(jax.random.key(seed), 3), len(train.labels))
    p1, p2 = (
        data.Dataset(train.images[half], train.labels[half], train.source)
        for half in np.split(np.asarray(order), [len(order) // 2])
    )
    return p1, p2


def train_on_halves(
    seed: int, halves: tuple[data.Dataset, data.Dataset], *, steps: int | None
) -> dict[str, networks.Network]:
    """Train the networks of the paper: those with a prime on P2, the others on P1."""
    trained = {}
    for name in paper.TABLE3:
        prime = name.endswith("'")
        key = jax.random.key(seed)
        network = networks.load_or_train(
            jax.random.fold_in(key, 1) if prime else key,
            name.removesuffix("'"),
            halves[prime],
            steps=steps,
        )
        trained[name] = network._replace(name=name)
    return trained
