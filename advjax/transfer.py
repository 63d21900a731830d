"""Transfer of adversarial examples between networks, with controls to compare it with."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from advjax import checks, metrics
from advjax.types import Box, LogitsFn


class Transfer(NamedTuple):
    """The fraction of each row's images that each column's network gets wrong.

    Attributes:
        rate: `wrong / total`, in [0, 1]; NaN where `total` is 0.
        wrong: Number of counted images that the network gets wrong.
        total: Number of counted images: all of them, or, for net transfer, those that the network
            got right before they were distorted.
    """

    rate: Float[Array, "rows columns"]
    wrong: Int[Array, "rows columns"]
    total: Int[Array, "rows columns"]


class Interval(NamedTuple):
    """The two ends of a confidence interval."""

    lower: Float[Array, "*shape"]
    upper: Float[Array, "*shape"]


def transfer_matrix(
    logits_fns: Sequence[LogitsFn],
    xs_adv: Sequence[ArrayLike] | Array,
    labels: ArrayLike,
    *,
    xs: ArrayLike | None = None,
    batch_size: int = 1000,
) -> Transfer:
    """Measure how often each network errs on the images that were distorted for each other one.

    Args:
        logits_fns: The networks of the columns, each a function of ONE example.
        xs_adv: The images of each row, `(rows, n, *shape)`: the same n images, distorted for the
            network of the row, or by a control. Images on which the attack failed are counted too.
        labels: The true classes of the n images, `(n,)`.
        xs: The n images before they were distorted, `(n, *shape)`. With them a column counts only
            those that its network classified correctly: net transfer, without clean errors.
        batch_size: Number of images to classify at once. It limits the memory used and does not
            change the result.

    Returns:
        A `Transfer`; pass `wrong` and `total` to `wilson_interval` for confidence intervals.

    Raises:
        TypeError: If images are not floating, labels are not integers, or a network is not
            callable.
        ValueError: If there is no network or no row, if the rows differ in shape, if there is not
            one label per image, or if a network does not return `(classes,)`.

    Reference: Szegedy et al. (2013), section 4.2, Tables 2 and 4, where `xs` is not used.
    """
    if not len(logits_fns) or not len(xs_adv):
        raise ValueError(
            f"logits_fns, xs_adv: {len(logits_fns)} networks and {len(xs_adv)} rows, expected at "
            "least one of each."
        )
    rows = [checks.floating(f"xs_adv[{i}]", row) for i, row in enumerate(xs_adv)]
    named = {f"xs_adv[{i}]": row for i, row in enumerate(rows)}
    if xs is not None:
        named["xs"] = checks.floating("xs", xs)
    for name, images in named.items():
        if images.shape != rows[0].shape:
            raise ValueError(
                f"{name}: shape {images.shape}, expected {rows[0].shape}, the shape of xs_adv[0]."
            )
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: dtype {labels.dtype}, expected integer class indices.")
    if not rows[0].size or labels.shape != rows[0].shape[:1]:
        raise ValueError(
            f"labels: shape {labels.shape} for images of shape {rows[0].shape}, expected one label "
            "per image along the leading axis, and at least one image."
        )

    # Each network sees all rows in one pass, so that it is compiled once.
    n, image_shape = len(labels), rows[0].shape[1:]
    images = jnp.stack(list(named.values())).reshape(-1, *image_shape)
    columns = [metrics.predictions(f, images, batch_size=batch_size) for f in logits_fns]
    predictions = jnp.stack(columns, axis=1)
    missed = predictions.reshape(-1, n, len(logits_fns)) != labels[None, :, None]
    counted = jnp.ones_like(missed[0]) if xs is None else ~missed[-1]
    wrong = jnp.sum(missed[: len(rows)] & counted[None], axis=1)
    total = jnp.broadcast_to(jnp.sum(counted, axis=0), wrong.shape)
    rate = jnp.where(total > 0, wrong / jnp.maximum(total, 1), jnp.nan)
    return Transfer(rate=rate, wrong=wrong, total=total)


def magnify(
    x: ArrayLike,
    x_adv: ArrayLike,
    rms: ArrayLike,
    *,
    box: Box | tuple[ArrayLike, ArrayLike] | None = None,
) -> Float[Array, "*shape"]:
    """Rescale the perturbation of an image to a given RMS.

    Args:
        x: An image of any shape, floating; use `jax.vmap` for a batch.
        x_adv: The distorted image, of the same shape and unit.
        rms: The RMS of the new perturbation over the entries of the image, in the unit of `x`. The
            paper's printed formula divides by the L2 norm instead, which would give 1/28 of it on
            MNIST.
        box: `(lower, upper)` to clip the result to, after which the RMS is at most `rms`; by
            default, as in the paper, the result is not clipped.

    Returns:
        `x + rms * (x_adv - x) / distortion(x, x_adv)`; `x` itself if the two are equal.

    Raises:
        TypeError: If an image is not floating.
        ValueError: If the shapes differ, `rms` is not one nonnegative number, or a bound does not
            broadcast to `x`.

    Reference: Szegedy et al. (2013), section 4.2, Table 4.
    """
    x, x_adv = checks.floating("x", x), checks.floating("x_adv", x_adv)
    r = _difference(x, x_adv)
    length = metrics.distortion(jnp.zeros_like(r), r)
    # Where the images are equal, 0 is divided by 1, so that the result is x and not NaN.
    scale = checks.nonnegative("rms", rms, r.dtype) / jnp.where(length > 0, length, 1)
    return _add(x, scale * r, box)


def gaussian(
    key: Key[Array, ""],
    x: ArrayLike,
    rms: ArrayLike,
    *,
    box: Box | tuple[ArrayLike, ArrayLike] | None = None,
) -> Float[Array, "*shape"]:
    """Add Gaussian noise to an image: the paper's control.

    Args:
        key: A random key, a different one for each image.
        x: An image of any shape, floating; use `jax.vmap` for a batch.
        rms: The standard deviation of the noise, in the unit of `x`. The RMS of one draw differs
            from it by about `rms / sqrt(2 * x.size)`, 2.5 % on MNIST.
        box: `(lower, upper)` to clip the result to; by default it is not clipped, as the paper does
            not mention it. Clipping reduces the RMS: a pixel on a bound loses half its variance, so
            that an MNIST digit, four fifths of which is black, is left with about `0.75 * rms`.
            Measure it with `metrics.distortion`.

    Returns:
        `x + rms * noise`, an image like `x`.

    Raises:
        TypeError: If `x` is not floating.
        ValueError: If `rms` is not one nonnegative number, or a bound does not broadcast to `x`.

    Reference: Szegedy et al. (2013), section 4.2, Tables 2 and 4.
    """
    x = checks.floating("x", x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    noise = jax.random.normal(key, x.shape, wide)
    return _add(x, checks.nonnegative("rms", rms, wide) * noise, box)


def random_signs(
    key: Key[Array, ""],
    x: ArrayLike,
    x_adv: ArrayLike,
    *,
    box: Box | tuple[ArrayLike, ArrayLike] | None = None,
) -> Float[Array, "*shape"]:
    """Give each entry of a perturbation a random sign.

    This is a closer control than Gaussian noise: the new perturbation is in the same pixels and has
    the same norms; only its direction is random.

    Args:
        key: A random key, a different one for each image.
        x: An image of any shape, floating; use `jax.vmap` for a batch.
        x_adv: The distorted image, of the same shape and unit.
        box: `(lower, upper)` to clip the result to, which shortens the perturbation where a pixel
            would leave the box; by default it is not clipped.

    Returns:
        `x + s * (x_adv - x)`, each entry of s being -1 or 1 with equal probability.

    Raises:
        TypeError: If an image is not floating.
        ValueError: If the shapes differ, or a bound does not broadcast to `x`.
    """
    x, x_adv = checks.floating("x", x), checks.floating("x_adv", x_adv)
    r = _difference(x, x_adv)
    return _add(x, jax.random.rademacher(key, x.shape, r.dtype) * r, box)


def wilson_interval(k: ArrayLike, n: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Compute Wilson's score interval for a proportion, given k successes in n trials.

    Args:
        k: Number of successes, an array of any shape with entries in [0, n].
        n: Number of trials, of the shape of `k`, or a scalar.
        confidence: The confidence level, in (0, 1).

    Returns:
        An `Interval` in [0, 1], elementwise: [0, 1] where n is 0, and NaN where `k` is not in
        [0, n].

    Raises:
        ValueError: If `confidence` is not between 0 and 1.

    Reference: Wilson (1927), without continuity correction.
    """
    confidence = checks.fraction("confidence", confidence)
    z2 = statistics.NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    k, n = jnp.asarray(k, float), jnp.asarray(n, float)
    centre = (k + z2 / 2) / (n + z2)
    half = jnp.sqrt(z2 * (k * (n - k) / jnp.maximum(n, 1) + z2 / 4)) / (n + z2)
    possible = (k >= 0) & (k <= n)
    # At k = 0 and k = n the two terms are equal except for rounding, so the end is exactly 0 or 1.
    lower = jnp.where(k == 0, 0, jnp.maximum(centre - half, 0))
    upper = jnp.where(k == n, 1, jnp.minimum(centre + half, 1))
    return Interval(jnp.where(possible, lower, jnp.nan), jnp.where(possible, upper, jnp.nan))


def _difference(x: Float[Array, "*shape"], x_adv: Float[Array, "..."]) -> Float[Array, "*shape"]:
    """`x_adv - x`, in float32 at least; ValueError if the shapes differ."""
    if x.shape != x_adv.shape:
        raise ValueError(f"x_adv: shape {x_adv.shape}, expected {x.shape}, the shape of x.")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x_adv.astype(wide) - x.astype(wide)


def _add(
    x: Float[Array, "*shape"],
    r: Float[Array, "*shape"],
    box: Box | tuple[ArrayLike, ArrayLike] | None,
) -> Float[Array, "*shape"]:
    """`x + r` in the dtype of `x`, clipped to the box unless it is None."""
    moved = x + r
    if box is not None:
        moved = jnp.clip(moved, *map(jnp.asarray, checks.box(box, x)))
    return moved.astype(x.dtype)
