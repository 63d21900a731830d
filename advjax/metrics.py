"""Measures of attacks and classifiers: distortion, margin, error rate."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, losses
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


def error_rate(
    logits_fn: LogitsFn, images: ArrayLike, labels: ArrayLike, *, batch_size: int = 1000
) -> float:
    """Compute the fraction of images that a classifier gets wrong.

    A second call with the same function, or with another model of the same shapes, does not compile
    again. As with `jax.jit`, what a closure refers to is read when it is compiled: after training
    an object in place, pass the object itself if it is a pytree, or a new closure.

    Args:
        logits_fn: A classifier of one example: a function, or a callable pytree such as
            `functools.partial(model.apply, params)`, whose arrays may differ from call to call.
        images: The images, `(n, *shape)`.
        labels: Their classes, `(n,)`.
        batch_size: Number of images to classify at once. It limits the memory used and does not
            change the result.

    Returns:
        A fraction in [0, 1].

    Raises:
        ValueError: If there are no images or not one label per image, or if `batch_size` is not a
            positive integer.
    """
    images, labels = jnp.asarray(images), jnp.asarray(labels)
    n = len(images)
    if n == 0 or labels.shape != (n,):
        raise ValueError(
            f"labels: shape {labels.shape} for {n} images, expected one label per image, and at "
            "least one image."
        )

    batch_size = min(checks.positive_int("batch_size", batch_size), n)
    static, arrays = _split(logits_fn)
    return float(_error_rate(static, arrays, images, labels, batch_size=batch_size))


@functools.partial(jax.jit, static_argnums=0, static_argnames="batch_size")
def _error_rate(
    static: "_Static",
    arrays: list[Array],
    images: Float[Array, "n *shape"],
    labels: Int[Array, " n"],
    *,
    batch_size: int,
) -> Float[Array, ""]:
    def wrong(example: tuple[Array, Array]) -> Bool[Array, ""]:
        image, label = example
        return jnp.argmax(static.join(arrays)(image)) != label

    return jnp.mean(jax.lax.map(wrong, (images, labels), batch_size=batch_size))


class _Static:
    """A function without its arrays: equal to another one that calls the same code.

    What cannot be hashed is told by its identity; as it is referred to here, its id is not reused.
    """

    def __init__(self, treedef: Any, leaves: list[Any]):
        self.treedef, self.leaves = treedef, leaves
        self.key = (_hashable(treedef), *map(_hashable, leaves))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self.key == other.key

    def join(self, arrays: list[Array]) -> Callable[..., Any]:
        arrays_left = iter(arrays)
        leaves = [next(arrays_left) if leaf is None else leaf for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)


def _hashable(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return type(value), id(value)
    return type(value), value  # 1 and 1.0 are equal, but do not compute the same


def _split(fn: Callable[..., Any]) -> tuple[_Static, list[Array]]:
    """A function's static part, with None in place of its arrays, and the arrays."""
    if type(fn) is functools.partial:
        fn = jax.tree_util.Partial(fn.func, *fn.args, **fn.keywords)
    leaves, treedef = jax.tree.flatten(fn)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
    arrays = [leaf for leaf, is_one in zip(leaves, is_array, strict=True) if is_one]
    rest = [None if is_one else leaf for leaf, is_one in zip(leaves, is_array, strict=True)]
    return _Static(treedef, rest), arrays
