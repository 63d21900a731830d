"""Whether an effect is too small to matter, over several nets."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax import checks

_LARGEST_T = 1e4  # where the search for a quantile of Student's t begins


class EquivalenceTest(NamedTuple):
    """Whether a mean effect is too small to matter.

    Attributes:
        mean: The mean of the effects.
        lower: The lower end of its confidence interval.
        upper: The upper end.
        p_value: Of the null that the mean is the margin or more, either way: small where the
            effects are shown to be equivalent to none.
    """

    mean: Float[Array, ""]
    lower: Float[Array, ""]
    upper: Float[Array, ""]
    p_value: Float[Array, ""]


def equivalence_test(
    effects: Float[ArrayLike, " seeds"], *, margin: float, confidence: float = 0.95
) -> EquivalenceTest:
    """Test whether an effect, measured on several nets, is too small to matter.

    "No difference" cannot be a conclusion from a large p-value. Two one-sided t-tests ask instead
    whether the mean effect is shown to be below the margin, and above its negative.

    Args:
        effects: The effect in each of at least two nets that differ by their seeds, as from
            `rotation_test`.
        margin: The smallest effect that would matter, in the same unit, above 0; choose it
            before looking.
        confidence: That of the interval of the mean, in (0, 1).

    Returns:
        An `EquivalenceTest`, its interval and p-value by Student's t with `seeds - 1` degrees of
        freedom.

    Raises:
        TypeError: If `effects` are not floating.
        ValueError: If there are not at least two of them, or an option is out of its range.

    Source: Schuirmann (1987).
    """
    effects = checks.floating("effects", effects)
    if effects.ndim != 1 or len(effects) < 2:
        raise ValueError(f"effects: shape {effects.shape}, expected (seeds,) of at least 2 seeds.")
    margin = checks.number("margin", margin, minimum=0, exclusive=True)
    confidence = checks.share("confidence", confidence)
    freedom = len(effects) - 1
    mean = jnp.mean(effects)
    error = jnp.std(effects, ddof=1) / math.sqrt(len(effects))
    half = error * _t_quantile(1 - confidence, freedom)
    nearer = margin - jnp.abs(mean)  # the test against the nearer margin has the larger p-value
    tail = _t_tails(nearer, error, freedom) / 2
    return EquivalenceTest(mean, mean - half, mean + half, jnp.where(nearer > 0, tail, 1 - tail))


def _t_tails(
    difference: Float[Array, ""], error: Float[Array, ""] | float, freedom: int
) -> Float[Array, ""]:
    """The mass of Student's t in both tails beyond `difference / error`."""
    square = freedom * error**2
    return jax.scipy.special.betainc(freedom / 2, 0.5, square / (square + difference**2))


def _t_quantile(tails: float, freedom: int) -> Float[Array, ""]:
    """Beyond which Student's t has the given mass in both tails, by bisection."""

    def halve(_, bracket):
        lower, upper = bracket
        middle = (lower + upper) / 2
        inside = _t_tails(middle, 1.0, freedom) > tails
        return jnp.where(inside, middle, lower), jnp.where(inside, upper, middle)

    ends = jnp.zeros(()), jnp.full((), _LARGEST_T)
    return jax.lax.fori_loop(0, 60, halve, ends)[1]
