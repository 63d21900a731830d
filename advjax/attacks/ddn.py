"""Where a search may start, other than from the image itself."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, losses, sharding
from advjax.types import Box, LogitsFn

_REACH = 1.3  # the first radius, times the distance to the target if the loss were linear
_STEP = 0.07  # by what share the radius shrinks or grows


class Start(NamedTuple):
    """A way to find a first candidate.

    Attributes:
        find: `(logits_fn, x, target, box) -> x0` in the box, adversarial or not.
        num_evals: How many evaluations of the model's value and gradient that takes.
    """

    find: Callable[[LogitsFn, Float[Array, "*shape"], Int[Array, ""], Box], Float[Array, "*shape"]]
    num_evals: int


def decoupled(*, num_steps: int = 30) -> Start:
    """Start from the nearest adversarial image on a walk of normalised gradients.

    Large networks have many local minima, and a search that starts from the image ends in the first
    one on its way. This walk takes long steps around the image instead, on a sphere whose radius
    shrinks when the target is reached and grows when it is not.

    Args:
        num_steps: How many steps to take, each an evaluation of the model's value and gradient.

    Returns:
        A `Start` for `minimum_norm`. Where the walk finds no adversarial image, the search starts
        from its last point.

    Raises:
        TypeError: If `num_steps` is not an integer.
        ValueError: If it is not positive.

    Source: Rony et al. (2019), arXiv:1811.09600: Decoupled Direction and Norm, algorithm 1; here
    with a first radius that follows from the gradient.
    """
    return _decoupled(checks.positive_int("num_steps", num_steps))


@functools.cache  # equal options make equal starts, which share one compilation
def _decoupled(num_steps: int) -> Start:
    return Start(functools.partial(_walk, num_steps=num_steps), num_steps)


def _walk(
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    target: Int[Array, ""],
    box: Box,
    *,
    num_steps: int,
) -> Float[Array, "*shape"]:
    """The nearest adversarial image on the walk, or its last point."""

    def loss(r: Float[Array, "*shape"]) -> tuple[Float[Array, ""], Bool[Array, ""]]:
        logits = logits_fn((x + r).astype(x.dtype))
        return losses.cross_entropy(logits, target), jnp.argmax(logits) == target

    def step(i: Int[Array, ""], walk: tuple[Array, ...]) -> tuple[Array, ...]:
        r, radius, first_radius, best, nearest = walk
        (value, reached), grad = jax.value_and_grad(loss, has_aux=True)(r)
        size, slope = losses.l2(r), losses.l2(grad)
        closer = reached & (size < nearest)
        best, nearest = jnp.where(closer, r, best), jnp.where(closer, size, nearest)

        first_radius = jnp.where(i == 0, _REACH * value / _positive(slope), first_radius)
        changed = radius * jnp.where(reached, 1 - _STEP, 1 + _STEP)
        radius = jnp.where(i == 0, first_radius, changed)
        length = first_radius * (0.01 + 0.99 * (1 + jnp.cos(jnp.pi * i / num_steps)) / 2)
        r = r - length * grad / _positive(slope)
        r = radius * r / _positive(losses.l2(r))
        r = jnp.clip(x + r, *box) - x
        return jnp.where(jnp.isfinite(r), r, 0), radius, first_radius, best, nearest

    zero = jnp.zeros((), x.dtype)
    walk = jnp.zeros_like(x), zero, zero, jnp.zeros_like(x), zero + jnp.inf
    walk = sharding.vary_like(walk, (x, target, box))
    last, _, _, best, nearest = jax.lax.fori_loop(0, num_steps, step, walk)
    return jnp.clip(x + jnp.where(jnp.isfinite(nearest), best, last), *box)


def _positive(length: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(length > 0, length, 1)
