"""Directions in the space of a layer's features, and the images that go farthest along them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from advjax import checks


class TopImages(NamedTuple):
    """The images that go farthest along each direction, the farthest first.

    Attributes:
        indices: Their places along the leading axis of the features.
        scores: Their inner products with the direction.
    """

    indices: Int[Array, "m k"]
    scores: Float[Array, "m k"]


def top_images(
    features: Float[ArrayLike, "n d"], directions: Float[ArrayLike, "m d"], *, k: int = 10
) -> TopImages:
    """The images whose features go farthest along each direction, from one matrix product.

    Args:
        features: The features phi(x) of each image.
        directions: The directions v, of any length: `natural_basis` for the units themselves,
            `random_directions`, `principal_axes`, or others.
        k: How many images for each direction, at most n.

    Returns:
        `TopImages`, `(m, k)` each: the largest `<phi(x), v>` first. Of equal ones the image with
        the lower index comes first, so a dead unit has the first k images.

    Raises:
        TypeError: If `features` or `directions` are not floating.
        ValueError: If they are not matrices of as many columns, or `k` is not in [1, n].

    Source: Szegedy et al. (2013), section 3, Figures 1 to 4.
    """
    features = matrix("features", features)
    directions = matrix("directions", directions)
    if directions.shape[1] != features.shape[1]:
        raise ValueError(
            f"directions: shape {directions.shape}, expected (m, {features.shape[1]}), as features "
            f"are {features.shape}."
        )
    k = checks.positive_int("k", k)
    if k > len(features):
        raise ValueError(f"k: {k}, expected at most {len(features)}, the number of images.")
    products = jnp.matmul(directions, features.T, precision="highest")
    scores, indices = jax.lax.top_k(products, k)
    return TopImages(indices=indices, scores=scores)


def natural_basis(d: int) -> Float[Array, "d d"]:
    """The directions of the units themselves.

    Args:
        d: How many units there are.

    Returns:
        The identity: a direction in each row.

    Raises:
        ValueError: If `d` is not a positive integer.
    """
    return jnp.eye(checks.positive_int("d", d))


def random_directions(key: Array, m: int, d: int) -> Float[Array, "m d"]:
    """Directions in all of which the units have an equal part, on average.

    Args:
        key: A random key.
        m: How many directions.
        d: How many units there are.

    Returns:
        Independent unit vectors, uniform on the sphere: a direction in each row. The paper does
        not tell the distribution of its own; their length does not matter to `top_images`.

    Raises:
        ValueError: If `m` or `d` is not a positive integer.
    """
    v = jax.random.normal(key, (checks.positive_int("m", m), checks.positive_int("d", d)))
    return v / jnp.linalg.norm(v, axis=1, keepdims=True)


def random_rotation(key: Array, d: int) -> Float[Array, "d d"]:
    """A rotation drawn uniformly: from the Haar measure of SO(d).

    Args:
        key: A random key.
        d: The dimension.

    Returns:
        An orthogonal matrix of determinant 1, whose rows are a random basis.

    Raises:
        ValueError: If `d` is not a positive integer.

    Source: Stewart (1980): the Q of a Gaussian matrix's QR decomposition with its signs fixed,
    made of the reflections alone. `jax.random.orthogonal`, which draws reflections too, calls
    LAPACK; the threads of that wait for each other on a busy CPU, at ten times this one's time.
    """
    d = checks.positive_int("d", d)
    gaussians = jnp.triu(jax.random.normal(key, (d, d)))
    signs = jnp.where(jnp.diag(gaussians) < 0, -1.0, 1.0)
    signs = signs.at[-1].set((-1) ** (d - 1) * jnp.prod(signs[:-1]))  # the determinant is then 1

    def reflect(i, q):
        x = gaussians[i]
        normal = x.at[i].add(signs[i] * jnp.linalg.norm(x))
        normal /= jnp.linalg.norm(normal)
        return q - 2 * jnp.outer(jnp.matmul(q, normal, precision="highest"), normal)

    return signs[:, None] * jax.lax.fori_loop(0, d - 1, reflect, jnp.eye(d))


def principal_axes(features: Float[ArrayLike, "n d"]) -> Float[Array, "d d"]:
    """The directions of the largest variance, a basis that the units have no part in choosing.

    Args:
        features: The features of each image; they need not be centred.

    Returns:
        The eigenvectors of their covariance, the largest variance first: a direction in each row,
        of unit length. Of its two signs each has the one that makes its largest entry positive.

    Raises:
        TypeError: If `features` are not floating.
        ValueError: If they are not a matrix.
    """
    features = centred(matrix("features", features))
    _, vectors = jnp.linalg.eigh(jnp.matmul(features.T, features, precision="highest"))
    axes = vectors.T[::-1]
    largest = jnp.argmax(jnp.abs(axes), axis=1, keepdims=True)
    return axes * jnp.where(jnp.take_along_axis(axes, largest, axis=1) < 0, -1, 1)


def matrix(name: str, array: Any) -> Float[Array, "rows d"]:
    """`array` in float32 at least; an error unless a floating matrix with entries."""
    array = checks.floating(name, array)
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"{name}: shape {array.shape}, expected a matrix with the features in columns; flatten "
            "each image's by reshape(n, -1)."
        )
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def centred(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The features less their means."""
    return features - jnp.mean(features, axis=0, keepdims=True)
