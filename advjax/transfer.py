"""Whether what misleads one net misleads another, and the controls to hold that against."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from advjax import checks, metrics
from advjax.types import Box, LogitsFn


class Transfer(NamedTuple):
    """Which share of each row's images each column's net gets wrong.

    Attributes:
        rate: `wrong / total`, in [0, 1]; NaN where no image counts.
        wrong: How many of the images that count the net gets wrong.
        total: How many images count: all, or for net transfer those that it had right.
    """

    rate: Float[Array, "rows columns"]
    wrong: Int[Array, "rows columns"]
    total: Int[Array, "rows columns"]


class Interval(NamedTuple):
    """A confidence interval, by its ends."""

    lower: Float[Array, "*shape"]
    upper: Float[Array, "*shape"]


def transfer_matrix(
    logits_fns: Sequence[LogitsFn],
    xs_adv: Sequence[Float[ArrayLike, "n *shape"]] | Float[Array, "rows n *shape"],
    labels: Int[ArrayLike, " n"],
    *,
    xs: Float[ArrayLike, "n *shape"] | None = None,
    batch_size: int = 1000,
) -> Transfer:
    """How often each net errs on the images that were distorted for each other one.

    Args:
        logits_fns: The nets of the columns, each of ONE example.
        xs_adv: For each row its images: the same n ones, distorted for the row's net, or by a
            control. Images whose attack failed count like the others.
        labels: The true classes of the n images.
        xs: The n images before they were distorted. With them each column counts only those of
            which its net had the class right: net transfer, which clean errors do not add to.
        batch_size: How many images to classify at once; it bounds the memory, not the result.

    Returns:
        A `Transfer`, whose `wrong` and `total` go into `wilson_interval` as they are.

    Raises:
        TypeError: If images are not floating, labels not integers, or a net no function.
        ValueError: If there is no net or no row, the images of the rows differ in shape, there is
            not one label for each, or a net does not return `(classes,)`.

    Source: Szegedy et al. (2013), section 4.2, Tables 2 and 4; there `xs` plays no part.
    """
    if not len(logits_fns) or not len(xs_adv):
        raise ValueError(
            f"logits_fns, xs_adv: {len(logits_fns)} nets and {len(xs_adv)} rows, expected at least "
            "one of each."
        )
    rows = [checks.floating(f"xs_adv[{i}]", row) for i, row in enumerate(xs_adv)]
    named = {f"xs_adv[{i}]": row for i, row in enumerate(rows)}
    if xs is not None:
        named["xs"] = checks.floating("xs", xs)
    for name, images in named.items():
        if images.shape != rows[0].shape:
            raise ValueError(
                f"{name}: shape {images.shape}, expected {rows[0].shape} as xs_adv[0]."
            )
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: dtype {labels.dtype}, expected integer class indices.")
    if not rows[0].size or labels.shape != rows[0].shape[:1]:
        raise ValueError(
            f"labels: shape {labels.shape} for images {rows[0].shape}, expected one label for each "
            "of at least one image along the leading axis."
        )

    # Every net sees all rows in one pass, which compiles it once.
    n, image_shape = len(labels), rows[0].shape[1:]
    images = jnp.stack(list(named.values())).reshape(-1, *image_shape)
    batch_size = min(checks.positive_int("batch_size", batch_size), len(images))

    def predict(logits_fn: LogitsFn) -> Int[Array, " images"]:
        checks.logits(logits_fn, images[0])
        return jax.lax.map(lambda x: jnp.argmax(logits_fn(x)), images, batch_size=batch_size)

    predictions = jnp.stack([predict(logits_fn) for logits_fn in logits_fns], axis=1)
    missed = predictions.reshape(-1, n, len(logits_fns)) != labels[None, :, None]
    counted = jnp.ones_like(missed[0]) if xs is None else ~missed[-1]
    wrong = jnp.sum(missed[: len(rows)] & counted[None], axis=1)
    total = jnp.broadcast_to(jnp.sum(counted, axis=0), wrong.shape)
    rate = jnp.where(total > 0, wrong / jnp.maximum(total, 1), jnp.nan)
    return Transfer(rate=rate, wrong=wrong, total=total)


def magnify(
    x: Float[ArrayLike, "*shape"],
    x_adv: Float[ArrayLike, "*shape"],
    rms: float | Float[Array, ""],
    *,
    box: Box | tuple | None = None,
) -> Float[Array, "*shape"]:
    """The image distorted in the same direction, by an RMS of one's choice.

    Args:
        x: An image of any shape; `jax.vmap` for many.
        x_adv: The distorted image, of the same shape and unit.
        rms: The RMS of the new distortion over the entries, in the unit of `x`. The paper's printed
            formula divides by an L2 length instead, which would be 28 times less on MNIST.
        box: `(lower, upper)` to clip the answer to, which leaves an RMS of at most `rms`; by
            default, as in the paper, it may leave every box.

    Returns:
        `x + rms * (x_adv - x) / distortion(x, x_adv)`; `x` itself where the two are equal.

    Raises:
        TypeError: If an image is not floating.
        ValueError: If the shapes differ, `rms` is not one number of at least 0, or a bound does
            not broadcast to `x`.

    Source: Szegedy et al. (2013), section 4.2, Table 4.
    """
    x, x_adv = checks.floating("x", x), checks.floating("x_adv", x_adv)
    r = _difference(x, x_adv)
    length = metrics.distortion(jnp.zeros_like(r), r)
    scale = checks.nonnegative("rms", rms, r.dtype) / jnp.where(length > 0, length, 1)
    return _add(x, scale * r, box)


def gaussian(
    key: Array,
    x: Float[ArrayLike, "*shape"],
    rms: float | Float[Array, ""],
    *,
    box: Box | tuple | None = None,
) -> Float[Array, "*shape"]:
    """The image under Gaussian noise: the paper's control.

    Args:
        key: A random key, another one for each image.
        x: An image of any shape; `jax.vmap` for many.
        rms: The noise's standard deviation, which is its RMS up to chance: one draw's own differs
            by about `1 / sqrt(2 * x.size)` of it, 2.5 % on MNIST.
        box: `(lower, upper)` to clip the answer to; by default, as far as the paper tells, it is
            not. `rms` remains that of the noise as asked for: a pixel on a bound loses half its
            variance to clipping, so an MNIST digit, four fifths of it black, is left with about
            0.75 `rms`. Measure it by `metrics.distortion`.

    Returns:
        `x + rms * noise`, an image like `x`.

    Raises:
        TypeError: If `x` is not floating.
        ValueError: If `rms` is not one number of at least 0, or a bound does not broadcast to `x`.

    Source: Szegedy et al. (2013), section 4.2, Tables 2 and 4.
    """
    x = checks.floating("x", x)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    noise = jax.random.normal(key, x.shape, wide)
    return _add(x, checks.nonnegative("rms", rms, wide) * noise, box)


def random_signs(
    key: Array,
    x: Float[ArrayLike, "*shape"],
    x_adv: Float[ArrayLike, "*shape"],
    *,
    box: Box | tuple | None = None,
) -> Float[Array, "*shape"]:
    """The image distorted by as much in every pixel, but up or down by chance.

    A closer control than Gaussian noise: the new distortion lies on the same pixels and has the
    same length in every norm; only its direction is lost.

    Args:
        key: A random key, another one for each image.
        x: An image of any shape; `jax.vmap` for many.
        x_adv: The distorted image, of the same shape and unit.
        box: `(lower, upper)` to clip the answer to, which shortens the distortion where a pixel on
            a bound is sent outwards; by default it is not clipped.

    Returns:
        `x + s * (x_adv - x)` with each entry of s -1 or 1, by a fair coin.

    Raises:
        TypeError: If an image is not floating.
        ValueError: If the shapes differ, or a bound does not broadcast to `x`.
    """
    x, x_adv = checks.floating("x", x), checks.floating("x_adv", x_adv)
    r = _difference(x, x_adv)
    return _add(x, jax.random.rademacher(key, x.shape, r.dtype) * r, box)


def wilson_interval(
    k: Int[ArrayLike, "*shape"], n: Int[ArrayLike, "*shape"], *, confidence: float = 0.95
) -> Interval:
    """Wilson's score interval for a share, of which k cases in n were seen.

    Args:
        k: How many of the cases, in [0, n].
        n: How many cases there were; of the shape of `k`, or a scalar.
        confidence: How often such an interval should hold the truth, in (0, 1).

    Returns:
        An `Interval` in [0, 1], elementwise: without a case all of it, and NaN where `k` is not in
        [0, n].

    Raises:
        ValueError: If `confidence` is not between 0 and 1.

    Source: Wilson (1927), without a correction for continuity.
    """
    confidence = checks.share("confidence", confidence)
    z2 = statistics.NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    k, n = jnp.asarray(k, float), jnp.asarray(n, float)
    centre = (k + z2 / 2) / (n + z2)
    half = jnp.sqrt(z2 * (k * (n - k) / jnp.maximum(n, 1) + z2 / 4)) / (n + z2)
    possible = (k >= 0) & (k <= n)
    # At the ends the two terms are equal but for rounding.
    lower = jnp.where(k == 0, 0, jnp.maximum(centre - half, 0))
    upper = jnp.where(k == n, 1, jnp.minimum(centre + half, 1))
    return Interval(jnp.where(possible, lower, jnp.nan), jnp.where(possible, upper, jnp.nan))


def _difference(x: Float[Array, "*shape"], x_adv: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x_adv - x`, in float32 at least; ValueError if the shapes differ."""
    if x.shape != x_adv.shape:
        raise ValueError(f"x_adv: shape {x_adv.shape}, expected {x.shape}, that of x.")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return x_adv.astype(wide) - x.astype(wide)


def _add(
    x: Float[Array, "*shape"], r: Float[Array, "*shape"], box: Box | tuple | None
) -> Float[Array, "*shape"]:
    """`x + r` in the precision of `x`, clipped to a box if there is one."""
    moved = x + r
    if box is not None:
        moved = jnp.clip(moved, *map(jnp.asarray, checks.box(box, x)))
    return moved.astype(x.dtype)
