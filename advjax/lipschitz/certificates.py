"""Radii within which no perturbation changes a prediction."""

import enum
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from advjax import checks
from advjax.lipschitz.bound import Bound, pairwise
from advjax.lipschitz.jaxpr.values import NotLipschitzError
from advjax.lipschitz.linear.lipsdp import Method, eclipse
from advjax.types import Box, LogitsFn

# The default rounding error of a logit, relative to the larger of two: 1,024 roundings, but no more
# than 1,024 of float32 where the logits themselves are coarser.
_ERROR = 2.0**-13
_ROUNDINGS = 2

_FIRST_THICKNESS = 2  # of all shells together, relative to the radius if slopes did not change


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
    margins = _certain_margins(logits, label, error)
    radius = jnp.asarray(math.inf, margins.dtype)
    if isinstance(constant, Bound):
        radius, constant = jnp.asarray(constant.radius, margins.dtype), constant.constant
    constant = jnp.asarray(constant, margins.dtype)
    if constant.shape not in {(), 2 * logits.shape}:
        raise ValueError(
            f"constant: shape {constant.shape}, expected a scalar or {2 * logits.shape}, one for "
            "each two logits."
        )
    if not constant.ndim:
        steepness = jnp.full_like(margins, math.sqrt(2) * constant)
    else:
        steepness = constant[label]
    return jnp.minimum(jnp.min(_quotients(margins, steepness)), radius)


class Status(enum.IntEnum):
    """What a certificate is, or why there is none."""

    CERTIFIED = 1
    """No perturbation up to the radius changes the class."""
    NOT_PREDICTED = 2
    """The label is not the predicted class, or the margin is no larger than its rounding."""
    OUTSIDE_BOX = 3
    """The example is outside the box that it is to be certified in."""
    UNBOUNDED = 4
    """No finite Lipschitz constant was found near the example."""


class Certificate(NamedTuple):
    """A certified radius of one example.

    Attributes:
        radius: No perturbation of an L2 norm below this changes the class; 0 without a certificate.
            For the paper's distortion divide it by `sqrt(x.size)`.
        nearest: The class whose margin limits the radius.
        status: A `lipschitz.Status`.
    """

    radius: Float[Array, ""]
    nearest: Int[Array, ""]
    status: Int[Array, ""]


def certify(
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    label: Int[ArrayLike, ""],
    *,
    box: Box | None = None,
    method: Method = eclipse,
    num_shells: int = 16,
    error: Float[ArrayLike, ""] | None = None,
) -> Certificate:
    """Certify the largest L2 radius that Lipschitz bounds near one example allow.

    Around the example lie balls of radii t_1 < t_2 < ... A bound L_i of the difference of two
    logits that holds in the i-th ball means that the margin falls by no more than
    `L_i (t_i - t_(i-1))` on the way through its shell. The certified radius is where these falls
    add up to the margin. It exceeds what any single ball certifies, since the first shells are
    crossed at their own, smaller slopes. A shell that would take half of what is left of a margin
    is tried again half as thick.

    Args:
        logits_fn: The network: one example to its logits.
        x: One example; `jax.vmap` for many.
        label: Its class, in `[0, classes)`; it may be traced.
        box: A pair (lower, upper) that broadcasts to `x`. Perturbed examples are in it too, which
            makes the bounds smaller. By default they may be anywhere.
        method: How to bound a chain of layers: `lipschitz.eclipse`, or `lipschitz.lipsdp`, which is
            tighter and takes many times as long.
        num_shells: The number of shells tried. The time is proportional to it.
        error: The most that a logit may differ from its exact value, as in `certified_radius`.

    Returns:
        A `Certificate`. It holds in exact arithmetic of the network, whose computed logits may be
        off by `error`.

    Raises:
        TypeError: If `x` is not floating or `label` not an integer.
        ValueError: If the logits have a batch axis, or `num_shells` is not a positive integer.
        NotLipschitzError: If there is an operation without a bound near `x`.
    """
    x, label = checks.floating("x", x), checks.class_index("label", label)
    num_shells = checks.positive_int("num_shells", num_shells)
    logits = checks.one_example(logits_fn(x))
    margins = _certain_margins(logits, label, error)

    def steepness(radius: Float[Array, ""] | None) -> tuple[Array, Array]:
        """Of each margin, within a radius, and the radius that it holds in."""
        found = pairwise(logits_fn, x, method=method, box=box, radius=radius)
        return found.constant[label].astype(margins.dtype), jnp.asarray(found.radius)

    radius_everywhere, nearest_everywhere = _everywhere(steepness, margins)
    at_example, _ = steepness(jnp.zeros((), margins.dtype))
    of_ball = jnp.min(_quotients(margins, at_example))
    reach = jnp.where(jnp.isfinite(of_ball) & (of_ball > 0), of_ball, _reach(x, box))
    start = _Walk(
        t=jnp.zeros((), margins.dtype),
        thickness=reach * _FIRST_THICKNESS / num_shells,
        rest=margins,
        radius=radius_everywhere,
        nearest=nearest_everywhere,
        outside=jnp.bool_(False),
    )
    end, _ = jax.lax.scan(
        lambda walk, _: (_through_shell(walk, steepness), None), start, length=num_shells
    )
    radius = jnp.where(end.outside, 0, end.radius)
    status = jnp.select(
        [jnp.min(margins) <= 0, end.outside, radius <= 0],
        [jnp.int32(s) for s in (Status.NOT_PREDICTED, Status.OUTSIDE_BOX, Status.UNBOUNDED)],
        jnp.int32(Status.CERTIFIED),
    )
    return Certificate(radius, end.nearest, status)


Steepness = Callable[[Float[Array, ""] | None], tuple[Array, Array]]


class _Walk(NamedTuple):
    """How far from the example the shells have come, and what is left of the margins there."""

    t: Float[Array, ""]
    thickness: Float[Array, ""]  # of the next shell
    rest: Float[Array, " classes"]
    radius: Float[Array, ""]  # certified so far
    nearest: Int[Array, ""]
    outside: Bool[Array, ""]  # whether the example is outside the box


def _through_shell(walk: _Walk, steepness: Steepness) -> _Walk:
    """Try one more shell: cross it if it takes less than half of every margin."""
    eps = 4 * jnp.finfo(walk.rest.dtype).eps  # of each quantity, rounded to the safe side
    end = walk.t + walk.thickness
    slopes, certifies = steepness(end)
    distances = jnp.minimum((1 - eps) * _over(walk.rest, slopes), (1 - eps) * walk.thickness)
    radius = (1 - eps) * (walk.t + jnp.min(distances))
    fall = (1 + eps) * slopes * (walk.thickness + eps * end)
    rest = jnp.where(jnp.isinf(walk.rest), jnp.inf, walk.rest - fall - eps * walk.rest)
    crossed = jnp.all(rest >= walk.rest / 2)
    return _Walk(
        t=jnp.where(crossed, end, walk.t),
        thickness=jnp.where(crossed, walk.thickness, walk.thickness / 2),
        rest=jnp.where(crossed, rest, walk.rest),
        radius=jnp.maximum(walk.radius, radius),
        nearest=jnp.where(
            radius > walk.radius, jnp.argmin(_over(walk.rest, slopes)), walk.nearest
        ).astype(jnp.int32),
        outside=walk.outside | (certifies < end),
    )


def _everywhere(
    steepness: Steepness, margins: Float[Array, " classes"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The radius that a bound of all inputs certifies, 0 if there is none, and the class."""
    try:
        radii = _quotients(margins, steepness(None)[0])
    except NotLipschitzError:
        radii = jnp.zeros_like(margins)
    return jnp.min(radii), jnp.argmin(radii).astype(jnp.int32)


def _reach(x: Float[Array, "*shape"], box: Box | None) -> Float[Array, ""]:
    """How far from an example to look where the slopes there do not tell: through its box."""
    steps = x if box is None else jnp.maximum(*(jnp.abs(x - end) for end in checks.box(box, x)))
    length = jnp.linalg.norm(jnp.ravel(steps))
    return jnp.where(length > 0, length, 1)


def _certain_margins(
    logits: Float[Array, " classes"],
    label: Int[Array, ""],
    error: Float[ArrayLike, ""] | None,
) -> Float[Array, " classes"]:
    """The label's margins over the other classes, at least, whatever the rounding; 0 if none."""
    roundoff = float(jnp.finfo(logits.dtype).eps)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    top = logits[label]
    if error is None:
        # Each of the two logits may be off; an infinite one, as of a masked class, is exact.
        relative = max(_ROUNDINGS * roundoff, min(_ERROR, 1024 * roundoff))
        larger = jnp.maximum(jnp.abs(top), jnp.abs(logits))
        error = jnp.where(jnp.isfinite(larger), relative * larger, 0)
    margins = jnp.maximum(top - logits - 2 * jnp.asarray(error, logits.dtype), 0)
    return jnp.where(jnp.arange(len(logits)) == label, jnp.inf, margins)


def _quotients(
    margins: Float[Array, " classes"], steepness: Float[Array, " classes"]
) -> Float[Array, " classes"]:
    """How far from the example each margin lasts."""
    rounded_down = 1 - 8 * jnp.finfo(margins.dtype).eps
    return rounded_down * _over(margins, steepness)


def _over(margins: Float[Array, "*n"], steepness: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Their quotient; 0 for no margin or no finite slope, infinite for a margin without a slope."""
    usable = (steepness > 0) & jnp.isfinite(steepness) & jnp.isfinite(margins)
    within = jnp.maximum(margins, 0) / jnp.where(usable, steepness, 1)
    flat = (margins > 0) & ((steepness == 0) | jnp.isinf(margins))
    return jnp.where(usable, within, jnp.where(flat, jnp.inf, 0))
