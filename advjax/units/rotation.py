"""The rotation test of the paper's first claim: are single units more than random directions?"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from advjax import checks
from advjax.units.directions import (
    basis,
    centred,
    matrix,
    natural_basis,
    random_rotation,
    top_images,
)

_ROUNDING = 16  # statistics that differ by less than this many units of rounding count as equal


class Comparison(NamedTuple):
    """A statistic T of a basis, compared with the same statistic of random rotations of it.

    Attributes:
        identity: T(I), for the basis itself: a mean over its directions.
        rotated: T(Q_b), for each rotation Q_b of the basis.
        p_value: The p-value of the null hypothesis that the basis is a random one, against the
            alternative of a larger T(I): `(1 + #{T(Q_b) >= T(I)}) / (1 + rotations)`.
        effect: `T(I) - mean(T(Q_b))`, in the unit of the statistic.
        effect_size: The effect divided by the standard deviation of the T(Q_b).
        equivalence_p_value: The p-value of the null hypothesis that the absolute value of the
            effect is at least the margin, for T(Q_b) that are shifted by it: the larger of
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
    """A basis compared with random rotations of it, by two statistics of the top images.

    Attributes:
        purity: The comparison by `label_purity`.
        auc: The comparison by `concept_auc`.
    """

    purity: Comparison
    auc: Comparison


def label_purity(
    indices: Int[ArrayLike, "m k"], labels: Int[ArrayLike, " n"]
) -> Float[Array, " m"]:
    """Compute the fraction of each set of images that belongs to its commonest class.

    Args:
        indices: The indices of the images in each set, `(m, k)`, as in `TopImages`; draw them at
            random for a control.
        labels: The class of each image, `(n,)`.

    Returns:
        A fraction for each set, from 1 / k to 1.
    """
    classes = jnp.asarray(labels)[jnp.asarray(indices)]
    alike = jnp.sum(classes[:, :, None] == classes[:, None, :], axis=2)
    return jnp.max(alike, axis=1) / classes.shape[1]


def concept_auc(
    indices: Int[ArrayLike, "m k"], concepts: Shaped[ArrayLike, "n concepts"]
) -> Float[Array, " m"]:
    """Compute how well the best concept separates each set of images from all other images.

    Args:
        indices: The indices of the images in each set, `(m, k)`, as in `TopImages`; draw them at
            random for a control.
        concepts: The degree of each concept in each image, `(n, concepts)`: 0 or 1, or any number
            (such as the width of a stroke). Add the negative of a concept that may be absent.

    Returns:
        For each set the largest area under the ROC curve among the concepts: the probability that
        an image in the set has a higher degree than one outside, ties counting one half (the
        statistic of Mann and Whitney). For a concept of 0 and 1 it is
        `(1 + fraction in the set - fraction outside) / 2`.

    Raises:
        ValueError: If a set contains all images.
    """
    indices, concepts = jnp.asarray(indices), jnp.asarray(concepts)
    _fewer("indices", indices.shape[1], len(concepts))
    return _auc(indices, _ranks(concepts))


def rotation_test(
    key: Key[Array, ""],
    features: ArrayLike,
    labels: ArrayLike,
    *,
    directions: ArrayLike | None = None,
    concepts: ArrayLike | None = None,
    k: int = 10,
    rotations: int = 999,
    margin: float = 0.05,
    batch_size: int = 4,
) -> RotationTest:
    """Test whether the top images of single units have more in common than those of a random basis.

    For a basis E, T(I) is the mean over its directions of `label_purity`, and of `concept_auc`, of
    their top k images among the centred features. For a rotation Q_b, drawn from the Haar measure,
    T(Q_b) is that of the basis `E Q_b`. If the basis is not special (if, given the labels, the
    distribution of the features does not change when they are rotated), all the T have the same
    distribution, and the p-value is below alpha with probability at most alpha. A large p-value is
    not evidence for the paper's claim that there is no difference. For that there is the
    equivalence test, and over several networks `equivalence_test` of their effects.

    Other arguments give controls: `features` of an untrained network, of another layer, before its
    activation, flattened images (whose units are pixels), or Gaussian noise (random sets of
    images); `directions=principal_axes(features)`.

    Args:
        key: A random key.
        features: The features of each image, `(n, d)`, floating; take images that were not used
            for training. Leave out dead units: their top images are the first k.
        labels: The class of each image, `(n,)`.
        directions: The basis E, `(m, d)`, one direction per row; by default the units.
        concepts: The degree of each concept in each image, `(n, concepts)`; by default whether the
            image belongs to each class.
        k: Number of top images, less than n.
        rotations: Number of random rotations; no p-value is below `1 / (1 + rotations)`.
        margin: The smallest effect that would matter, in the unit of the statistics. For purity
            0.05 is half an image in ten; for the AUC it is about one image.
        batch_size: Number of rotations to evaluate at once. It needs memory for
            `batch_size * n * m` scores, and changes the result by rounding alone.

    Returns:
        A `RotationTest`. Features that are not finite give NaN statistics and p-values of 1.

    Raises:
        TypeError: If `features` are not floating, `labels` are not integers, or `labels` are traced
            and there are no `concepts`.
        ValueError: If shapes do not match, `k` is not in [1, n), or an option is out of its range.

    Reference: Bau et al. (2017) for the rotations; Phipson and Smyth (2010) for the 1 in the
    p-value; Schuirmann (1987) for the two one-sided tests of equivalence.
    """
    features = matrix("features", features)
    n, d = features.shape
    directions = natural_basis(d) if directions is None else basis(directions, features)
    _fewer("k", checks.positive_int("k", k), n)
    rotations = checks.positive_int("rotations", rotations)
    batch_size = min(checks.positive_int("batch_size", batch_size), rotations)
    margin = checks.number("margin", margin, minimum=0, exclusive=True)
    concepts = _classes(labels) if concepts is None else jnp.asarray(concepts)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: dtype {labels.dtype}, expected integer class indices.")
    if labels.shape != (n,):
        raise ValueError(f"labels: shape {labels.shape}, expected ({n},), one per image.")
    if concepts.ndim != 2 or len(concepts) != n:
        raise ValueError(
            f"concepts: shape {concepts.shape}, expected ({n}, concepts), one row per image."
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
def _statistics(
    key: Key[Array, ""],
    features: Float[Array, "n d"],
    directions: Float[Array, "m d"],
    labels: Int[Array, " n"],
    ranks: Float[Array, "n concepts"],
    *,
    k: int,
    rotations: int,
    batch_size: int,
) -> tuple[tuple[Float[Array, ""], ...], tuple[Float[Array, " rotations"], ...]]:
    """The mean purity and AUC of a basis, and of its rotations; NaN if features are not finite."""
    valid = jnp.where(jnp.all(jnp.isfinite(features)), 1, jnp.nan)
    features = centred(features)

    def statistics(directions: Float[Array, "m d"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        indices = top_images(features, directions, k=k).indices
        purity, auc = label_purity(indices, labels), _auc(indices, ranks)
        return valid * jnp.mean(purity), valid * jnp.mean(auc)

    def rotate(key: Key[Array, ""]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        rotation = random_rotation(key, features.shape[1]).astype(directions.dtype)
        return statistics(jnp.matmul(directions, rotation, precision="highest"))

    keys = jax.random.split(key, rotations)
    return statistics(directions), jax.lax.map(rotate, keys, batch_size=batch_size)


def _compare(
    identity: Float[Array, ""], rotated: Float[Array, " rotations"], margin: float
) -> Comparison:
    """The tests of one statistic; a NaN never counts as evidence."""
    # Means of fractions are often equal except for rounding, which depends on the order of the sum.
    near = _ROUNDING * jnp.finfo(rotated.dtype).eps
    effect = identity - jnp.mean(rotated)

    def p_value(far: Bool[Array, " rotations"]) -> Float[Array, ""]:
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


def _ranks(concepts: Shaped[Array, "n concepts"]) -> Float[Array, "n concepts"]:
    """The ranks of the images by each concept, from 1; ties get the mean of their ranks."""
    return jax.scipy.stats.rankdata(concepts, axis=0)


def _auc(indices: Int[Array, "m k"], ranks: Float[Array, "n concepts"]) -> Float[Array, " m"]:
    """The AUC of the best concept for each set, from the sum of the ranks in the set."""
    n, k = len(ranks), indices.shape[1]
    above = jnp.sum(ranks[indices], axis=1) - k * (k + 1) / 2
    return jnp.max(above, axis=1) / (k * (n - k))


def _fewer(name: str, k: int, n: int) -> None:
    """ValueError unless k is less than n."""
    if k >= n:
        raise ValueError(f"{name}: {k} images of {n}, expected fewer than all.")


def _classes(labels: Any) -> Bool[Array, "n classes"]:
    """Whether each image belongs to each class that occurs."""
    if isinstance(labels, jax.core.Tracer):
        raise TypeError(
            "labels: traced, expected concrete labels to count the classes; pass "
            "concepts=jax.nn.one_hot(labels, classes) too."
        )
    return jnp.asarray(np.reshape(labels, (-1, 1)) == np.unique(labels))
