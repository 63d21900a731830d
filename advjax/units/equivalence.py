"""Whether an effect, measured on several networks, is too small to matter."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import scipy.special
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax import checks


class EquivalenceTest(NamedTuple):
    """The result of `equivalence_test`.

    Attributes:
        mean: The mean of the effects.
        lower: The lower end of its confidence interval.
        upper: The upper end of its confidence interval.
        p_value: The p-value of the null hypothesis that the absolute value of the mean is at least
            the margin: small if the effects are shown to be equivalent to zero.
    """

    mean: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    p_value: Float[Array, ""]


def equivalence_test(
    effects: ArrayLike, *, margin: float, confidence: float = 0.95
) -> EquivalenceTest:
    """Test whether an effect, measured on several networks, is too small to matter.

    A large p-value of a test for a difference does not show that there is none. Two one-sided
    t-tests ask instead whether the mean effect is shown to be below the margin and above its
    negative.

    Args:
        effects: The effect in each of at least two networks that differ in their seeds, `(seeds,)`,
            floating, for example from `rotation_test`.
        margin: The smallest effect that would matter, in the unit of the effects, above 0. Choose
            it before looking at them.
        confidence: The confidence level of the interval of the mean, in (0, 1).

    Returns:
        An `EquivalenceTest`; its interval and p-value are from Student's t distribution with
        `seeds - 1` degrees of freedom.

    Raises:
        TypeError: If `effects` are not floating.
        ValueError: If there are fewer than two effects, or an option is out of its range.

    Reference: Schuirmann (1987).
    """
    effects = checks.floating("effects", effects)
    if effects.ndim != 1 or len(effects) < 2:
        raise ValueError(f"effects: shape {effects.shape}, expected (seeds,) of at least 2 seeds.")
    margin = checks.number("margin", margin, minimum=0, exclusive=True)
    confidence = checks.fraction("confidence", confidence)
    freedom = len(effects) - 1
    mean = jnp.mean(effects)
    error = jnp.std(effects, ddof=1) / math.sqrt(len(effects))
    half = error * float(scipy.special.stdtrit(freedom, (1 + confidence) / 2))
    nearer = margin - jnp.abs(mean)  # the test against the nearer margin has the larger p-value
    tail = _t_tails(nearer, error, freedom) / 2
    return EquivalenceTest(mean, mean - half, mean + half, jnp.where(nearer > 0, tail, 1 - tail))


def _t_tails(
    difference: Float[Array, ""], error: Float[Array, ""], freedom: int
) -> Float[Array, ""]:
    """The probability mass of Student's t in both tails beyond `difference / error`."""
    square = freedom * error**2
    return jax.scipy.special.betainc(freedom / 2, 0.5, square / (square + difference**2))
