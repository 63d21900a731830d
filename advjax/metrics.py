"""What is reported of an attack or a classifier."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from advjax import checks, losses
from advjax.types import LogitsFn


def distortion(
    x: Float[ArrayLike, "*shape"], x_adv: Float[ArrayLike, "*shape"]
) -> Float[Array, ""]:
    """The root mean square of a perturbation over the entries of one image.

    Args:
        x: An image of any shape.
        x_adv: The perturbed image, of the same shape and unit.

    Returns:
        `sqrt(mean((x_adv - x)**2))`, in the unit of `x`; its gradient at `x_adv = x` is 0. For an
        L2 distance multiply by `sqrt(x.size)`, 28 for MNIST.

    Raises:
        ValueError: If the shapes differ.
        TypeError: If an image is not floating: the difference of bytes would wrap around.

    Source: Szegedy et al. (2013), section 4.2.
    """
    x, x_adv = checks.floating("x", x), checks.floating("x_adv", x_adv)
    if x.shape != x_adv.shape:
        raise ValueError(f"x_adv: shape {x_adv.shape}, expected {x.shape}, that of x.")
    return losses.l2(x_adv - x) / math.sqrt(x.size)


def margin(logits: Float[ArrayLike, " classes"], label: Int[ArrayLike, ""]) -> Float[Array, ""]:
    """By how much one class leads all the others.

    Args:
        logits: Logits of one example.
        label: The class, in `[0, classes)`; it may be traced.

    Returns:
        `logits[label]` less the largest other logit: positive when `label` is predicted, 0 on the
        decision boundary.

    Raises:
        ValueError: If `logits` has a batch axis; `jax.vmap` the margin instead.
    """
    logits = checks.one_example(logits)
    others = jnp.where(jnp.arange(len(logits)) == label, -jnp.inf, logits)
    return logits[label] - jnp.max(others)


def error_rate(
    logits_fn: LogitsFn,
    images: Float[ArrayLike, " n *shape"],
    labels: Int[ArrayLike, " n"],
    *,
    batch_size: int = 1000,
) -> float:
    """The share of images that a classifier gets wrong.

    Args:
        logits_fn: A classifier of one example.
        images: The images, along the leading axis.
        labels: Their classes.
        batch_size: How many images to classify at once; it bounds the memory, not the result.

    Returns:
        A share in [0, 1].

    Raises:
        ValueError: If there are no images, or not one label for each, or `batch_size` is not a
            positive integer.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    n = len(images)
    if n == 0 or labels.shape != (n,):
        raise ValueError(
            f"labels: shape {labels.shape} for {n} images, expected one label for each of "
            "at least one image."
        )

    def wrong(example):
        image, label = example
        return jnp.argmax(logits_fn(image)) != label

    batch_size = min(checks.positive_int("batch_size", batch_size), n)
    mistakes = jax.lax.map(wrong, (images, labels), batch_size=batch_size)
    return float(jnp.mean(mistakes))
