"""How long attacks take, and their gradients alone."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from advjax import attacks, losses
from advjax.types import LogitsFn

BATCH_SIZE = 100
"""The batch size at which gradients are timed."""


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """Return the result of a function, and the seconds of the best of three calls once compiled."""
    result = jax.block_until_ready(function(*arguments))
    return result, min(seconds_of(function, *arguments) for _ in range(3))


def vmapped(attack: attacks.Attack) -> Callable[..., attacks.AttackResult]:
    """Compile an attack for batches, with the parameters of its model as arguments."""
    return functools.partial(_attack_batch, jax.device_put(attack))


@jax.jit
def _attack_batch(attack: attacks.Attack, xs: Array, targets: Array) -> attacks.AttackResult:
    return jax.vmap(attack)(xs, targets)


def time_of_a_gradient(
    logits_fn: jax.tree_util.Partial, xs: np.ndarray, targets: np.ndarray, *, repeats: int = 100
) -> float:
    """The seconds per image of the loss and its gradient in one batch: the best of many calls."""
    arguments = jax.device_put((logits_fn, xs, targets))
    return min(seconds_of(gradients, *arguments) for _ in range(repeats)) / len(xs)


@jax.jit
def gradients(logits_fn: LogitsFn, xs: Array, targets: Array) -> tuple[Array, Array]:
    """The cross-entropy of each image of a batch, and its gradient."""

    def loss(x: Array, target: Array) -> Array:
        return losses.cross_entropy(logits_fn(x), target)

    return jax.vmap(jax.value_and_grad(loss))(xs, targets)


def seconds_of(function: Callable[..., Any], *arguments: Any) -> float:
    """Time one call of a function."""
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - start
