"""The result of an attack, and the status of data that it cannot start from."""

import enum
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from advjax import checks
from advjax.types import Box


class Status(enum.IntEnum):
    """The status of an attack: whether it is running, or why it ended."""

    RUNNING = 0
    CONVERGED = 1
    """The search met its tolerance."""
    ALREADY_TARGET = 2
    """The model assigns the target class to the image as it is: there was nothing to do."""
    BUDGET = 3
    """The evaluations ran out. `success` tells whether the target was reached before; a larger
    `max_evals` would find a nearer image."""
    STALLED = 4
    """The target was reached, but the search could not meet its tolerance: typical of kinks and of
    logits in half precision. The image is adversarial, though perhaps not the nearest."""
    NOT_FOUND = 5
    """The search ended without reaching the target, and more evaluations would not help: probably
    the model assigns that class to no image in the box."""
    NONFINITE = 6
    """The image, or the model's logits or their gradient there, are infinite or NaN."""
    INVALID_TARGET = 7
    """The class is not one of the model's."""
    EMPTY_BOX = 8
    """A lower bound is above its upper bound, or a bound is NaN: no image is feasible."""
    OUTSIDE_BOX = 9
    """The image is outside the box: probably pixels in 0..255 with the box [0, 1]. Scale the image
    or pass its box. (Outside of `jit` and `vmap` this raises.)"""
    VANISHING_GRADIENT = 10
    """The gradient at the clean image is zero, or too small to matter within the box: the model
    returns probabilities or predictions instead of logits, it stops or rounds gradients, or its
    units are saturated. `success` tells whether the target was reached all the same; the distance
    then means little. Return the logits before the softmax."""


_UNTRIED = (Status.NONFINITE, Status.INVALID_TARGET, Status.EMPTY_BOX, Status.OUTSIDE_BOX)


class AttackResult(NamedTuple):
    """The outcome of an attack on one image.

    Attributes:
        x_adv: The adversarial image, in the box and finite. If none was found, the candidate with
            the largest margin.
        success: Whether the model assigns the target class to `x_adv`, predicted once more.
        distortion: The RMS of `x_adv - x` over the entries of `x`, the paper's measure.
        multiplier: The weight of the loss or of the constraints where `x_adv` was found: c for
            `lbfgs`, the sum of the multipliers for `minimum_norm`. 0 if `x_adv` is the image.
        prediction: The class that the model assigns to `x_adv`.
        status: A `Status`.
        num_evals: Number of evaluations of the model's value and gradient, line searches included.
    """

    x_adv: Float[Array, "*shape"]
    success: Bool[Array, ""]
    distortion: Float[Array, ""]
    multiplier: Float[Array, ""]
    prediction: Int[Array, ""]
    status: Int[Array, ""]
    num_evals: Int[Array, ""]


def admission(
    x: Float[Array, "*shape"], label: Int[Array, ""], num_classes: int, box: Box
) -> Int[Array, ""]:
    """Check the data of an attack, for the `init` of a method.

    Args:
        x: The image.
        label: The class to reach or to leave.
        num_classes: The number of classes of the model.
        box: `(lower, upper)`, each broadcast to `x`.

    Returns:
        `Status.RUNNING` if the attack can start, or else the status that says what is wrong.
    """
    lower, upper = map(jnp.asarray, box)
    return first_that_holds(
        (~jnp.all((lower <= upper) & (lower < jnp.inf) & (upper > -jnp.inf)), Status.EMPTY_BOX),
        (~jnp.all(jnp.isfinite(x)), Status.NONFINITE),
        ((label < 0) | (label >= num_classes), Status.INVALID_TARGET),
        (checks.is_outside(x, box), Status.OUTSIDE_BOX),
    )


def first_that_holds(*cases: tuple[Bool[Array, ""], int | Int[Array, ""]]) -> Int[Array, ""]:
    """Return the status of the first case whose condition holds, or else `RUNNING`.

    `jnp.select` would stack the conditions, which may be sharded in different ways.
    """
    status = jnp.int32(Status.RUNNING)
    for condition, value in reversed(cases):
        status = jnp.where(condition, jnp.int32(value), status)
    return status


def is_untried(status: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a status says that the attack could not start."""
    return jnp.isin(status, jnp.array(_UNTRIED))
