"""What an attack trades off: a classification loss and the size of a perturbation."""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from advjax import checks


def cross_entropy(
    logits: Float[ArrayLike, " classes"], target: Int[ArrayLike, ""]
) -> Float[Array, ""]:
    """The negative log-likelihood of one class under a softmax.

    Args:
        logits: Unnormalised log-probabilities of one example.
        target: The class, in `[0, classes)`; it may be traced.

    Returns:
        `-log softmax(logits)[target]`, in nats: finite however large the logits are.

    Raises:
        ValueError: If `logits` or `target` has a batch axis; `jax.vmap` the loss instead.
        TypeError: If `target` is not an integer.
    """
    logits = checks.one_example(logits)
    return optax.softmax_cross_entropy_with_integer_labels(
        logits, checks.class_index("target", target)
    )


def squared_l2(r: Float[ArrayLike, "..."]) -> Float[Array, ""]:
    """The squared Euclidean length of a perturbation of any shape.

    Args:
        r: A perturbation, the whole of it (no batch axis).

    Returns:
        `sum(r**2)`: smooth everywhere.
    """
    return jnp.sum(jnp.square(jnp.ravel(r)))


def l2(r: Float[ArrayLike, "..."]) -> Float[Array, ""]:
    """The Euclidean length of a perturbation of any shape.

    Args:
        r: A perturbation, the whole of it (no batch axis).

    Returns:
        `sqrt(sum(r**2))`, whose gradient at `r = 0`, where every attack starts, is 0 and not NaN.
    """
    return optax.safe_norm(jnp.ravel(r), 0.0)


def l1(r: Float[ArrayLike, "..."]) -> Float[Array, ""]:
    """The sum of the absolute values of a perturbation of any shape.

    Args:
        r: A perturbation, the whole of it (no batch axis).

    Returns:
        `sum(|r|)`, in the unit of `r`. Its gradient is the sign of each entry, and 0 where an entry
        is 0.
    """
    return jnp.sum(_absolute(r))


def linf(r: Float[ArrayLike, "..."]) -> Float[Array, ""]:
    """The largest absolute value in a perturbation of any shape.

    Args:
        r: A perturbation, the whole of it (no batch axis).

    Returns:
        `max(|r|)`, in the unit of `r`. Its gradient is the sign of the largest entry, divided
        equally where several are as large, and 0 at `r = 0`.
    """
    return jnp.max(_absolute(r), initial=0.0)


def _absolute(r: Float[ArrayLike, "..."]) -> Float[Array, " entries"]:
    """The absolute values, with a gradient of 0 at 0, where that of `jnp.abs` is 1."""
    r = jnp.ravel(r)
    return r * jnp.sign(r)
