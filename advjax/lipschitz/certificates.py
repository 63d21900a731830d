"""Radii within which no perturbation changes a prediction."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from advjax import checks
from advjax.lipschitz.bound import Bound

# The default rounding error of a logit, relative to the larger of two: 1,024 roundings, but no more
# than 1,024 of float32 where the logits themselves are coarser.
_ERROR = 2.0**-13
_ROUNDINGS = 2


def certified_radius(
    logits: Float[ArrayLike, " classes"],
    label: Int[ArrayLike, ""],
    constant: Bound | Float[ArrayLike, "*pairs"],
    *,
    error: Float[ArrayLike, ""] | None = None,
) -> Float[Array, ""]:
    """Certify an L2 radius around one example within which its predicted class cannot change.

    The bound holds for the network in exact arithmetic, and so does the certificate. The computed
    logits differ from the exact ones by rounding errors. How large these are depends on the inside
    of the network, which the logits do not show: pass it as `error`.

    Args:
        logits: Logits of one example.
        label: Its class, in `[0, classes)`; it may be traced.
        constant: A Lipschitz bound of the logits: what `bound` or `pairwise` returns. A number, or
            a matrix with one for the difference of each two logits, is taken to hold everywhere;
            pass a local bound as the `Bound` itself, which knows its radius.
        error: The largest rounding error of a logit. By default 1.2e-4 of the larger magnitude of
            the two logits compared, a thousand roundings of float32 (and two roundings of coarser
            logits). Pass it for a network that computes in bfloat16 or TF32 and returns float32
            logits, or whose logits are small differences of large numbers.

    Returns:
        The L2 radius: the smallest over the other classes of `(margin - 2 error) / constant`, where
        the margin is the logit of the label less that of the class, and the constant that of the
        pair, or `sqrt(2)` times that of all logits. Divide it by `sqrt(x.size)` for the paper's
        distortion. It is at most the radius in which the `Bound` holds. With a `box` it certifies
        images in the box only, around an example in the box. It is 0 if the label is not certainly
        the predicted class or a constant is not finite, and infinite if the label is predicted and
        the constants are 0 everywhere.

    Raises:
        TypeError: If `label` is not an integer.
        ValueError: If `logits` has a batch axis (use `jax.vmap`), or `constant` is neither a number
            nor such a matrix.

    Reference: Tsuzuku et al. (2018), proposition 1: the constant of a difference of two logits is
    at most `sqrt(2)` times that of all logits.
    """
    logits, label = checks.one_example(logits), checks.class_index("label", label)
    roundoff = float(jnp.finfo(logits.dtype).eps)
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    logits = logits.astype(dtype)
    radius = jnp.asarray(math.inf, dtype)
    if isinstance(constant, Bound):
        radius, constant = jnp.asarray(constant.radius, dtype), constant.constant
    constant = jnp.asarray(constant, dtype)
    if constant.shape not in {(), 2 * logits.shape}:
        raise ValueError(
            f"constant: shape {constant.shape}, expected a scalar or {2 * logits.shape}, one for "
            "each two logits."
        )
    steepness = constant[label] if constant.ndim else math.sqrt(2) * constant
    top = logits[label]
    if error is None:
        # Each of the two logits may be off; an infinite one, as of a masked class, is exact.
        relative = max(_ROUNDINGS * roundoff, min(_ERROR, 1024 * roundoff))
        larger = jnp.maximum(jnp.abs(top), jnp.abs(logits))
        error = jnp.where(jnp.isfinite(larger), relative * larger, 0)
    margin = jnp.maximum(top - logits - 2 * jnp.asarray(error, dtype), 0)
    rounded_down = 1 - 8 * jnp.finfo(dtype).eps
    usable = (steepness > 0) & jnp.isfinite(steepness)
    within = rounded_down * margin / jnp.where(usable, steepness, 1)
    flat = (steepness == 0) & (margin > 0)
    radii = jnp.where(usable, within, jnp.where(flat, jnp.inf, 0))
    others = jnp.arange(len(logits)) != label
    return jnp.minimum(jnp.min(jnp.where(others, radii, jnp.inf)), radius)
