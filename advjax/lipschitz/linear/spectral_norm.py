"""An upper bound of a matrix norm that holds in floating point: the Gram iteration, certified.

Let `|.|` be the spectral norm. Then `|A|^2 = |A^H A|`. After T such squarings take any crude bound
of the last matrix, such as its Frobenius norm: if it is too large by a factor f, the bound of `|A|`
that follows is too large by the 2^T-th root of f (Delattre et al., 2023). With rounding,
`fl(A^H A) = A^H A + E` where |E_ij| <= gamma(k) (|A|^T |A|)_ij in magnitudes (`rounding.py`). So

    |A|^2 <= |fl(A^H A)| + gamma(k) s^2,   s = min(Frobenius norm, sqrt(max row sum max column sum))

since s bounds the norm of the matrix of magnitudes. The computed matrix need not be symmetric.
The matrices are scaled by powers of two, which is exact, to a largest entry in [1/2, 1). What
underflows then is at most 2^-126 per entry, far below the one unit roundoff that is added for it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact

from advjax.lipschitz.linear.rounding import (
    gamma,
    is_nonzero,
    magnitude_bound,
    power_of_two,
    product,
    rounding,
)

SQUARINGS = 8


def norm_bound(matrix: Inexact[Array, "rows cols"]) -> Float[Array, ""]:
    """An upper bound of the spectral norm of a matrix; infinite unless it is finite."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    square, first = _squared(matrix)
    last, rest = jax.lax.scan(lambda m, _: _squared(m), square, length=SQUARINGS - 1)
    rounded_up = 1 + gamma(4, matrix.dtype)

    def unsquared(bound: Float[Array, ""], step: tuple) -> tuple[Float[Array, ""], None]:
        """From a bound of a squared matrix to one of the matrix before it."""
        scale, error = step
        return scale * jnp.sqrt(bound + error * rounded_up) * rounded_up, None

    bound, _ = jax.lax.scan(unsquared, magnitude_bound(last), rest, reverse=True)
    bound, _ = unsquared(bound, first)
    # XLA may flush subnormal entries to 0, and the bound must not.
    flushed = (bound == 0) & is_nonzero(matrix)
    least = float(jnp.finfo(matrix.dtype).tiny) * (1 + math.sqrt(matrix.size))
    bound = jnp.where(flushed, least, bound)
    return jnp.where(jnp.isfinite(bound), bound, jnp.inf)


def _squared(matrix: Inexact[Array, "rows cols"]) -> tuple[Inexact[Array, "cols cols"], tuple]:
    """`A^H A` for the scaled matrix A, with the scale and a bound of the rounding error."""
    scale = power_of_two(matrix)
    matrix = matrix / scale
    return product(matrix, matrix), (scale, rounding(matrix, matrix))
