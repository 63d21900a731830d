"""The two terms of an attack's objective: a classification loss, and norms of a perturbation."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax import checks


def cross_entropy(logits: ArrayLike, target: ArrayLike) -> Float[Array, ""]:
    """Compute the negative log-likelihood of one class under a softmax.

    Args:
        logits: Logits of one example, `(classes,)`.
        target: The class, an integer in `[0, classes)`; it may be traced.

    Returns:
        `-log softmax(logits)[target]`, in nats; finite however large the logits are.

    Raises:
        ValueError: If `logits` or `target` has a batch axis; use `jax.vmap` for a batch.
        TypeError: If `target` is not an integer.
    """
    logits = checks.one_example(logits)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, checks.class_index("target", target)
    )


def squared_l2(r: Float[ArrayLike, "*shape"]) -> Float[Array, ""]:
    """Compute the squared Euclidean norm of a perturbation.

    Args:
        r: A perturbation of one example, of any shape.

    Returns:
        `sum(r**2)`, in the squared unit of `r`; smooth everywhere.
    """
    return jnp.sum(jnp.square(jnp.ravel(r)))


def l2(r: Float[ArrayLike, "*shape"]) -> Float[Array, ""]:
    """Compute the Euclidean norm of a perturbation.

    Args:
        r: A perturbation of one example, of any shape.

    Returns:
        `sqrt(sum(r**2))`, in the unit of `r`. Its gradient at `r = 0`, where every attack starts,
        is 0 and not NaN.
    """
    return optax.safe_norm(jnp.ravel(r), 0.0)


def l1(r: Float[ArrayLike, "*shape"]) -> Float[Array, ""]:
    """Compute the sum of the absolute values of a perturbation.

    Args:
        r: A perturbation of one example, of any shape.

    Returns:
        `sum(|r|)`, in the unit of `r`. Its gradient is the sign of each entry, and 0 where an entry
        is 0.
    """
    return jnp.sum(_absolute(r))


def linf(r: Float[ArrayLike, "*shape"]) -> Float[Array, ""]:
    """Compute the largest absolute value in a perturbation.

    Args:
        r: A perturbation of one example, of any shape.

    Returns:
        `max(|r|)`, in the unit of `r`. Its gradient is the sign of the largest entry, divided
        equally among entries of that size, and 0 at `r = 0`.
    """
    return jnp.max(_absolute(r), initial=0.0)


def _absolute(r: Float[ArrayLike, "*shape"]) -> Float[Array, " entries"]:
    """The absolute values, with a gradient of 0 at 0, where that of `jnp.abs` is 1."""
    r = jnp.ravel(r)
    return r * jnp.sign(r)
