"""Radii within which no perturbation changes a prediction."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from advjax import checks


def certified_radius(
    logits: Float[ArrayLike, " classes"],
    label: Int[ArrayLike, ""],
    constant: Float[ArrayLike, "*pairs"],
) -> Float[Array, ""]:
    """The L2 radius around one example within which its predicted class cannot change.

    Args:
        logits: Logits of one example.
        label: Its class, in `[0, classes)`; it may be traced.
        constant: A Lipschitz bound of the logits, such as `bound(...).constant`; or a matrix with
            one of the difference of each two, such as `pairwise(...)`.

    Returns:
        The smallest, over the other classes, of the lead over it divided by the constant of the
        pair, which is at most `sqrt(2) constant`. In L2: for the paper's distortion divide it by
        `sqrt(x.size)`. It is 0 where the label is not the predicted class or a constant is not
        finite, and infinite where the label is predicted and the constants are 0.

    Raises:
        ValueError: If `logits` has a batch axis; `jax.vmap` it instead. If `constant` is neither a
            number nor such a matrix.
        TypeError: If `label` is not an integer.

    Source: Tsuzuku et al. (2018), proposition 1: a difference of two logits is `sqrt(2)` times as
    steep as all of them.
    """
    logits, label = checks.one_example(logits), checks.class_index("label", label)
    constant = jnp.asarray(constant, logits.dtype)
    if constant.shape not in {(), 2 * logits.shape}:
        raise ValueError(
            f"constant: shape {constant.shape}, expected a scalar or {2 * logits.shape}, one for "
            "each two logits."
        )
    steepness = constant[label] if constant.ndim else math.sqrt(2) * constant
    lead = jnp.maximum(logits[label] - logits, 0)
    rounded_down = 1 - 8 * jnp.finfo(logits.dtype).eps
    positive = steepness > 0
    radius = rounded_down * lead / jnp.where(positive, steepness, 1)
    flat = (steepness == 0) & (lead > 0)
    radii = jnp.where(positive, radius, jnp.where(flat, jnp.inf, 0))
    return jnp.min(jnp.where(jnp.arange(len(logits)) == label, jnp.inf, radii))
