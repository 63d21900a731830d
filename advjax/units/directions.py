"""Directions in the feature space of a layer, and the images that project furthest on them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from advjax import checks


class TopImages(NamedTuple):
    """The images with the largest inner products with each direction, in descending order.

    Attributes:
        indices: Their indices along the leading axis of the features.
        scores: Their inner products with the direction.
    """

    indices: Int[Array, "m k"]
    scores: Float[Array, "m k"]


def top_images(features: ArrayLike, directions: ArrayLike, *, k: int = 10) -> TopImages:
    """Find the images whose features have the largest inner products with each direction.

    Args:
        features: The features phi(x) of each image, `(n, d)`, floating.
        directions: The directions v, `(m, d)`, of any length: `natural_basis` for the units
            themselves, `random_directions`, `principal_axes`, or others.
        k: Number of images for each direction, at most n.

    Returns:
        `TopImages`, `(m, k)` each, the largest `<phi(x), v>` first. Among equal ones the image with
        the lower index comes first, so that a dead unit gets the first k images.

    Raises:
        TypeError: If `features` or `directions` are not floating.
        ValueError: If they are not matrices with the same number of columns, or `k` is not in
            [1, n].

    Reference: Szegedy et al. (2013), section 3, Figures 1 to 4.
    """
    features = matrix("features", features)
    directions = basis(directions, features)
    k = checks.positive_int("k", k)
    if k > len(features):
        raise ValueError(f"k: {k}, expected at most {len(features)}, the number of images.")
    # The default precision of accelerators could change the order.
    products = jnp.matmul(directions, features.T, precision="highest")
    scores, indices = jax.lax.top_k(products, k)
    return TopImages(indices=indices, scores=scores)


def natural_basis(d: int) -> Float[Array, "d d"]:
    """Return the directions of the units themselves.

    Args:
        d: Number of units.

    Returns:
        The identity matrix, one direction per row.

    Raises:
        ValueError: If `d` is not a positive integer.
    """
    return jnp.eye(checks.positive_int("d", d))


def random_directions(key: Key[Array, ""], m: int, d: int) -> Float[Array, "m d"]:
    """Draw directions uniformly.

    Args:
        key: A random key.
        m: Number of directions.
        d: Number of units.

    Returns:
        Independent unit vectors, uniform on the sphere, one per row. The paper does not say how its
        directions are distributed; their length does not matter to `top_images`.

    Raises:
        ValueError: If `m` or `d` is not a positive integer.
    """
    v = jax.random.normal(key, (checks.positive_int("m", m), checks.positive_int("d", d)))
    return v / jnp.linalg.norm(v, axis=1, keepdims=True)


def random_rotation(key: Key[Array, ""], d: int) -> Float[Array, "d d"]:
    """Draw a rotation uniformly, from the Haar measure on SO(d).

    Args:
        key: A random key.
        d: The dimension.

    Returns:
        An orthogonal matrix of determinant 1, whose rows are a random basis.

    Raises:
        ValueError: If `d` is not a positive integer.

    Reference: Stewart (1980): the Q of the QR decomposition of a Gaussian matrix, with fixed signs,
    as a product of Householder reflections. `jax.random.orthogonal` also draws matrices of
    determinant -1, and on a busy CPU the LAPACK threads that it uses make it ten times slower.
    """
    d = checks.positive_int("d", d)
    gaussians = jnp.triu(jax.random.normal(key, (d, d)))
    signs = jnp.where(jnp.diag(gaussians) < 0, -1.0, 1.0)
    signs = signs.at[-1].set((-1) ** (d - 1) * jnp.prod(signs[:-1]))  # for a determinant of 1

    def reflect(i: Int[Array, ""] | int, q: Float[Array, "d d"]) -> Float[Array, "d d"]:
        x = gaussians[i]
        normal = x.at[i].add(signs[i] * jnp.linalg.norm(x))
        normal /= jnp.linalg.norm(normal)
        return q - 2 * jnp.outer(jnp.matmul(q, normal, precision="highest"), normal)

    return signs[:, None] * jax.lax.fori_loop(0, d - 1, reflect, jnp.eye(d))


def principal_axes(features: ArrayLike) -> Float[Array, "d d"]:
    """Compute the principal axes of features, a basis that does not depend on the units.

    Args:
        features: The features of each image, `(n, d)`, floating; they need not be centred.

    Returns:
        The unit eigenvectors of their covariance, one per row, the largest variance first. The sign
        of each makes its entry of largest absolute value positive.

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
    """`array`, in float32 at least; an error unless it is a floating matrix and not empty."""
    array = checks.floating(name, array)
    if array.ndim != 2 or not array.size:
        raise ValueError(
            f"{name}: shape {array.shape}, expected a matrix with one row per image or direction; "
            "flatten features with reshape(n, -1)."
        )
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def basis(directions: Any, features: Float[Array, "n d"]) -> Float[Array, "m d"]:
    """`directions` as a matrix; an error unless it has one column per feature."""
    directions = matrix("directions", directions)
    if directions.shape[1] != features.shape[1]:
        raise ValueError(
            f"directions: shape {directions.shape}, expected (m, {features.shape[1]}) for features "
            f"of shape {features.shape}."
        )
    return directions


def centred(features: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """The features minus their means over the images."""
    return features - jnp.mean(features, axis=0, keepdims=True)
