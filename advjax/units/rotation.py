"""The rotation test of the paper's claim 1: do single units mean more than random directions?"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from advjax import checks
from advjax.units.directions import centred, matrix, natural_basis, random_rotation, top_images

_ROUNDING = 16  # times the precision: statistics that are nearer than this count as equal


class Comparison(NamedTuple):
    """One statistic of a basis beside the same one of its random rotations.

    Attributes:
        identity: T(I), of the basis as it is: a mean over its directions.
        rotated: T(Q_b), of each rotation of it.
        p_value: Of the null that the basis is a random one, against a T(I) that is larger:
            `(1 + #{T(Q_b) >= T(I)}) / (1 + rotations)`.
        effect: `T(I) - mean T(Q_b)`, in the unit of the statistic.
        effect_size: The effect over the standard deviation of the T(Q_b).
        equivalence_p_value: Of the null that the effect is the margin or more, either way, which
            moves the T(Q_b) as they are by it: the larger of
            `(1 + #{T(Q_b) + margin <= T(I)}) / (1 + rotations)` and
            `(1 + #{T(Q_b) - margin >= T(I)}) / (1 + rotations)`.
    """

    identity: Float[Array, ""]
    rotated: Float[Array, " rotations"]
    p_value: Float[Array, ""]
    effect: Float[Array, ""]
    effect_size: Float[Array, ""]
    equivalence_p_value: Float[Array, ""]


class RotationTest(NamedTuple):
    """A basis against its random rotations, by two statistics of the top images.

    Attributes:
        purity: By `label_purity`.
        auc: By `concept_auc`.
    """

    purity: Comparison
    auc: Comparison


def label_purity(
    indices: Int[ArrayLike, "m k"], labels: Int[ArrayLike, " n"]
) -> Float[Array, " m"]:
    """How far each set of images is of one class.

    Args:
        indices: The images of each set, as in `TopImages`, or drawn at random for a control.
        labels: The class of each image.

    Returns:
        The share of each set that is of its commonest class: from 1 / k to 1.
    """
    classes = jnp.asarray(labels)[jnp.asarray(indices)]
    alike = jnp.sum(classes[:, :, None] == classes[:, None, :], axis=2)
    return jnp.max(alike, axis=1) / classes.shape[1]


def concept_auc(
    indices: Int[ArrayLike, "m k"], concepts: Shaped[ArrayLike, "n concepts"]
) -> Float[Array, " m"]:
    """How well the concept that does it best tells each set of images from all the others.

    Args:
        indices: The images of each set, as in `TopImages`, or drawn at random for a control.
        concepts: How much of each concept is in each image, `(n, concepts)`: 0 or 1, or any
            degree (the width of a stroke). Add its negative for a concept that may be absent.

    Returns:
        The largest over the concepts of the area under the ROC curve: the chance that an image of
        the set has more of it than one outside, an equal degree counting half (the statistic of
        Mann and Whitney). For a 0/1 concept it is `(1 + share in the set - share outside) / 2`.

    Raises:
        ValueError: If the sets leave no image outside.
    """
    indices, concepts = jnp.asarray(indices), jnp.asarray(concepts)
    _fewer("indices", indices.shape[1], len(concepts))
    return _auc(indices, _ranks(concepts))


def rotation_test(
    key: Array,
    features: Float[ArrayLike, "n d"],
    labels: Int[ArrayLike, " n"],
    *,
    directions: Float[ArrayLike, "m d"] | None = None,
    concepts: Shaped[ArrayLike, "n concepts"] | None = None,
    k: int = 10,
    rotations: int = 999,
    margin: float = 0.05,
    batch_size: int = 4,
) -> RotationTest:
    """Test whether the top images of single units have more in common than those of a random basis.

    For a basis E, the mean over its directions of `label_purity` and of `concept_auc` of their top
    k images is T(I). Each rotation Q_b of the centred features, from the Haar measure, gives the
    T(Q_b) of the basis `E Q_b`. If the units are no more than some basis of their space (if the
    features' distribution, given the labels, does not change when rotated) then all the T have
    the same distribution, and the p-value is below alpha at most alpha of the time. That it is
    larger is no evidence of the paper's claim, that there is no difference: for this there is the
    equivalence test, and over several nets `equivalence_test` of their effects.

    Controls are other arguments: `features` of an untrained net, of another layer, before its
    non-linearity, images flattened (their units are pixels), or Gaussian noise (sets of images at
    random); `directions=principal_axes(features)`.

    Args:
        key: A random key.
        features: The features of each image, held out from training. Leave dead units out: their
            top images are the first ones.
        labels: The class of each image.
        directions: The basis E, its directions in rows; by default that of the units.
        concepts: How much of each concept is in each image, `(n, concepts)`; by default whether it
            is of each class.
        k: How many top images, less than n.
        rotations: How many random rotations; no p-value is below `1 / (1 + rotations)`.
        margin: The smallest effect that would matter, in the unit of the statistics: for purity
            0.05 is half an image in ten, for the AUC about one.
        batch_size: How many rotations to try at once. The memory is that of
            `batch_size * n * m` scores; the result does not depend on it but for rounding.

    Returns:
        A `RotationTest`. Features that are not finite give NaN statistics, and p-values of 1.

    Raises:
        TypeError: If `features` are not floating, or `labels` not integers, or traced while there
            are no `concepts`.
        ValueError: If shapes do not agree, `k` is not in [1, n), or an option is out of its range.

    Source: Bau et al. (2017) for the rotations; Phipson and Smyth (2010) for the 1 in the p-value;
    Schuirmann (1987) for the two one-sided tests of equivalence.
    """
    features = matrix("features", features)
    n, d = features.shape
    directions = natural_basis(d) if directions is None else matrix("directions", directions)
    _fewer("k", checks.positive_int("k", k), n)
    rotations = checks.positive_int("rotations", rotations)
    batch_size = min(checks.positive_int("batch_size", batch_size), rotations)
    margin = checks.number("margin", margin, minimum=0, exclusive=True)
    concepts = _classes(labels) if concepts is None else jnp.asarray(concepts)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: dtype {labels.dtype}, expected integer class indices.")
    if labels.shape != (n,):
        raise ValueError(f"labels: shape {labels.shape}, expected ({n},), one for each image.")
    if concepts.ndim != 2 or len(concepts) != n:
        raise ValueError(
            f"concepts: shape {concepts.shape}, expected ({n}, concepts), a row for each image."
        )

    identity, rotated = _statistics(
        key,
        features,
        directions,
        labels,
        _ranks(concepts),
        k=k,
        rotations=rotations,
        batch_size=batch_size,
    )
    return RotationTest(*(_compare(*pair, margin) for pair in zip(identity, rotated, strict=True)))


@functools.partial(jax.jit, static_argnames=("k", "rotations", "batch_size"))
def _statistics(key, features, directions, labels, ranks, *, k, rotations, batch_size):
    """The mean purity and AUC of a basis, and of its rotations; NaN if features are not finite."""
    valid = jnp.where(jnp.all(jnp.isfinite(features)), 1, jnp.nan)
    features = centred(features)

    def statistics(directions):
        indices = top_images(features, directions, k=k).indices
        purity, auc = label_purity(indices, labels), _auc(indices, ranks)
        return valid * jnp.mean(purity), valid * jnp.mean(auc)

    def rotate(key):
        rotation = random_rotation(key, features.shape[1]).astype(directions.dtype)
        return statistics(jnp.matmul(directions, rotation, precision="highest"))

    keys = jax.random.split(key, rotations)
    return statistics(directions), jax.lax.map(rotate, keys, batch_size=batch_size)


def _compare(
    identity: Float[Array, ""], rotated: Float[Array, " rotations"], margin: float
) -> Comparison:
    """The tests of one statistic; a NaN never counts as evidence."""
    # Such means of fractions are often equal, but for the order in which they were summed.
    near = _ROUNDING * jnp.finfo(rotated.dtype).eps
    effect = identity - jnp.mean(rotated)

    def p_value(far):
        return (1 + jnp.sum(~far)) / (1 + len(rotated))

    return Comparison(
        identity=identity,
        rotated=rotated,
        p_value=p_value(rotated < identity - near),
        effect=effect,
        effect_size=jnp.where(jnp.abs(effect) <= near, 0, effect / jnp.std(rotated, ddof=1)),
        equivalence_p_value=jnp.maximum(
            p_value(rotated + margin > identity + near),
            p_value(rotated - margin < identity - near),
        ),
    )


def _ranks(concepts: Array) -> Float[Array, "n concepts"]:
    """The images' ranks by each concept, from 1; equal ones share the mean of theirs."""
    return jax.scipy.stats.rankdata(concepts, axis=0)


def _auc(indices: Int[Array, "m k"], ranks: Float[Array, "n concepts"]) -> Float[Array, " m"]:
    """The best concept's AUC for each set, from the sum of its ranks."""
    n, k = len(ranks), indices.shape[1]
    above = jnp.sum(ranks[indices], axis=1) - k * (k + 1) / 2
    return jnp.max(above, axis=1) / (k * (n - k))


def _fewer(name: str, k: int, n: int) -> None:
    """ValueError unless k images leave some of the n outside."""
    if k >= n:
        raise ValueError(f"{name}: {k} images of {n}, expected fewer, so that some are outside.")


def _classes(labels: Any) -> Array:
    """Whether each image is of each class that occurs."""
    if isinstance(labels, jax.core.Tracer):
        raise TypeError(
            "labels: traced, so that their number of classes is not known; pass "
            "concepts=jax.nn.one_hot(labels, classes) as well."
        )
    return jnp.asarray(np.reshape(labels, (-1, 1)) == np.unique(labels))
