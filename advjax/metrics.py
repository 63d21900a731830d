"""Measures of attacks and classifiers: distortion, margin, error rate."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from advjax import checks, losses
from advjax.functions import Function
from advjax.types import LogitsFn


def distortion(x: ArrayLike, x_adv: ArrayLike) -> Float[Array, ""]:
    """Compute the root mean square of a perturbation over the entries of one image.

    Args:
        x: An image of any shape, floating.
        x_adv: The perturbed image, of the same shape and unit.

    Returns:
        `sqrt(mean((x_adv - x)**2))`, in the unit of `x`; its gradient at `x_adv = x` is 0. The L2
        distance is `sqrt(x.size)` times as large: 28 times for MNIST.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If an image is not floating: the difference of bytes would wrap around.

    Reference: Szegedy et al. (2013), section 4.2.
    """
    x, x_adv = checks.floating("x", x), checks.floating("x_adv", x_adv)
    if x.shape != x_adv.shape:
        raise ValueError(f"x_adv: shape {x_adv.shape}, expected {x.shape}, the shape of x.")
    return losses.l2(x_adv - x) / math.sqrt(x.size)


def margin(logits: ArrayLike, label: ArrayLike) -> Float[Array, ""]:
    """Compute the difference between the logit of a class and the largest other logit.

    Args:
        logits: Logits of one example, `(classes,)`.
        label: The class, an integer in `[0, classes)`; it may be traced.

    Returns:
        `logits[label] - max(other logits)`: positive if `label` is predicted, 0 on the decision
        boundary.

    Raises:
        ValueError: If `logits` has a batch axis; use `jax.vmap` for a batch.
    """
    logits = checks.one_example(logits)
    others = jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits)
    return logits[label] - jnp.max(others)


def predictions(
    logits_fn: LogitsFn, images: ArrayLike, *, batch_size: int = 1000
) -> Int[Array, " n"]:
    """Compute the class that a classifier predicts for each of many images.

    It is compiled once for a function and shapes, and once for models that differ only in their
    parameters.

    Args:
        logits_fn: A classifier of one example.
        images: The images, `(n, *shape)`, at least one.
        batch_size: Number of images to classify at once. It limits the memory used and does not
            change the result.

    Returns:
        The index of the largest logit for each image.

    Raises:
        TypeError: If `logits_fn` is not callable or does not return floating logits.
        ValueError: If there are no images, `logits_fn` does not return `(classes,)`, or
            `batch_size` is not a positive integer.
    """
    images = jnp.asarray(images)
    if not images.size:
        raise ValueError(f"images: shape {images.shape}, expected at least one image.")
    checks.logits(logits_fn, images[0])
    batch_size = min(checks.positive_int("batch_size", batch_size), len(images))
    return _predictions(Function(logits_fn).hoist(images[0]), images, batch_size=batch_size)


@functools.partial(jax.jit, static_argnames="batch_size")
def _predictions(
    logits_fn: Function, images: Shaped[Array, "n *shape"], *, batch_size: int
) -> Int[Array, " n"]:
    return jax.lax.map(lambda x: jnp.argmax(logits_fn(x)), images, batch_size=batch_size)


def error_rate(
    logits_fn: LogitsFn, images: ArrayLike, labels: ArrayLike, *, batch_size: int = 1000
) -> float:
    """Compute the fraction of images that a classifier gets wrong.

    Args:
        logits_fn: A classifier of one example.
        images: The images, `(n, *shape)`.
        labels: Their classes, `(n,)`.
        batch_size: Number of images to classify at once; see `predictions`.

    Returns:
        A fraction in [0, 1].

    Raises:
        TypeError: If `logits_fn` is not callable or does not return floating logits.
        ValueError: If there are no images or not one label per image, or for the reasons of
            `predictions`.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    n = len(images)
    if n == 0 or labels.shape != (n,):
        raise ValueError(
            f"labels: shape {labels.shape} for {n} images, expected one label per image, and at "
            "least one image."
        )
    return float(jnp.mean(predictions(logits_fn, images, batch_size=batch_size) != labels))
