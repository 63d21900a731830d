"""Attacks on many images, in batches, with a progress bar."""

import functools
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Int
from tqdm import tqdm

from advjax.attacks import AttackResult
from advjax.types import LogitsFn

BATCH_SIZE = 32


# A net enters as `jax.tree_util.Partial(model.apply, params)`, its parameters as arguments: the
# nets of one architecture share a compilation.
@functools.partial(jax.jit, static_argnums=0)
def _attack_batch(
    attack: Callable[..., AttackResult], logits_fn: LogitsFn, xs: ArrayLike, targets: ArrayLike
) -> AttackResult:
    return jax.vmap(functools.partial(attack, logits_fn))(xs, targets)


def attack_images(
    attack: Callable[..., AttackResult],
    logits_fn: jax.tree_util.Partial,
    images: Float[ArrayLike, " n *shape"],
    targets: Int[ArrayLike, " n"],
    *,
    title: str = "",
) -> tuple[AttackResult, float]:
    """Attacks images in batches of one size, so that one compilation serves them all.

    Args:
        attack: `(logits_fn, x, target) -> AttackResult`, such as `attacks.lbfgs`.
        logits_fn: The net, a pytree.
        images: The images, along the leading axis; at least one.
        targets: A class for each.
        title: What the progress bar says.

    Returns:
        An `AttackResult` of NumPy arrays with a leading axis n, and the seconds it took, without
        compiling.
    """
    images, targets = np.asarray(images), np.asarray(targets)
    n = len(images)
    # The last batch is filled up with images from the start, which are cut off again.
    order = np.resize(np.arange(n), (-(-n // BATCH_SIZE), BATCH_SIZE))
    batches = []
    with tqdm(total=n, desc=f"{title} (compiling)", unit="image") as bar:
        jax.block_until_ready(_attack_batch(attack, logits_fn, images[order[0]], targets[order[0]]))
        bar.set_description(title)
        bar.unpause()
        start = time.perf_counter()
        for batch in order:
            result = _attack_batch(attack, logits_fn, images[batch], targets[batch])
            batches.append(jax.tree.map(np.asarray, result))
            bar.update(min(BATCH_SIZE, n - bar.n))
        seconds = time.perf_counter() - start
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:n], *batches), seconds
