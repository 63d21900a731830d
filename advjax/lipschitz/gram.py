"""An upper bound of a matrix norm that holds in floating point: the Gram iteration, certified.

Let `|.|` be the spectral norm. Then `|A|^2 = |A^H A|`, so that after T squarings any crude bound of
the last matrix, such as its Frobenius norm, bounds `|A|` with the excess's 2^T-th root (Delattre et
al., 2023). What rounding adds is bounded as follows, for u the unit roundoff and
gamma(k) = k u / (1 - k u) (Higham, 2002, chapter 3).

A real inner product of k terms, in any order and with or without fused operations, errs by at most
gamma(k) times the product of the magnitudes. Summed in blocks of b terms whose results are added
one after the other, k is b plus the number of blocks. Real and imaginary parts of a complex one are
real ones of twice the length, so that the modulus errs by at most sqrt(2) gamma(2 k) <= gamma(3 k).
Hence `fl(A^H A) = A^H A + E` with |E_ij| <= gamma(k) (|A|^T |A|)_ij in magnitudes, and

    |A|^2 <= |fl(A^H A)| + gamma(k) s^2,   s = min(Frobenius norm, sqrt(max row sum max column sum))

since s bounds the norm of the matrix of magnitudes. No symmetry of the computed matrix is used.
The matrices are scaled by powers of two, which is exact, to a largest entry in [1/2, 1); what
underflows then is at most 2^-126 an entry, far below the one unit of roundoff added for it.

It takes a matrix product of IEEE precision: `Precision.HIGHEST`, on CPU and GPU.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

from advjax.lipschitz.estimates import power_of_two

_BLOCK = 128  # rows summed at once: few enough for gamma, enough for a fast product
SQUARINGS = 8


def gamma(terms: int, dtype: jnp.dtype) -> float:
    """Higham's gamma: the relative error of `terms` roundings."""
    error = terms * float(jnp.finfo(dtype).eps) / 2
    if error >= 0.5:
        raise ValueError(
            f"{terms} roundings in {dtype} leave no digit; use jax_enable_x64 and float64."
        )
    return error / (1 - error)


def norm_bound(matrix: Inexact[Array, "rows cols"]) -> Float[Array, ""]:
    """An upper bound of the spectral norm of a matrix; infinite unless it is finite."""
    if matrix.shape[0] < matrix.shape[1]:
        matrix = matrix.T
    square, first = _squared(matrix)
    last, rest = jax.lax.scan(lambda m, _: _squared(m), square, length=SQUARINGS - 1)
    rounded_up = 1 + gamma(4, matrix.dtype)

    def unsquared(bound, step):
        scale, error = step
        return scale * jnp.sqrt(bound + error * rounded_up) * rounded_up, None

    bound, _ = jax.lax.scan(unsquared, magnitude_bound(last), rest, reverse=True)
    bound, _ = unsquared(bound, first)
    # Subnormal entries, which arithmetic may take for 0.
    flushed = (bound == 0) & is_nonzero(matrix)
    least = float(jnp.finfo(matrix.dtype).tiny) * (1 + math.sqrt(matrix.size))
    bound = jnp.where(flushed, least, bound)
    return jnp.where(jnp.isfinite(bound), bound, jnp.inf)


def is_nonzero(x: Inexact[Array, "..."]) -> Bool[Array, ""]:
    """Whether any entry is not 0, by its bits: comparisons may take subnormal numbers for 0."""
    if jnp.iscomplexobj(x):
        return is_nonzero(x.real) | is_nonzero(x.imag)
    integers = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jnp.any(jax.lax.bitcast_convert_type(x, integers) << 1 != 0)


def _squared(matrix: Inexact[Array, "rows cols"]) -> tuple[Inexact[Array, "cols cols"], tuple]:
    """`A^H A` for the scaled matrix A, with the scale and a bound of the rounding."""
    scale = power_of_two(matrix)
    matrix = matrix / scale
    return product(matrix, matrix), (scale, rounding(matrix, matrix))


def magnitude_bound(matrix: Inexact[Array, "rows cols"]) -> Float[Array, ""]:
    """An upper bound of the norm of the magnitudes, rounded up, for entries of order 1."""
    magnitudes = jnp.abs(matrix)
    # Without the barrier XLA may merge the two sums into one of rows * cols terms, whose error has
    # no useful bound.
    squares = jax.lax.optimization_barrier(jnp.sum(magnitudes**2, axis=1))
    row_sums, column_sums = (jnp.max(jnp.sum(magnitudes, axis), initial=0) for axis in (1, 0))
    square = jnp.minimum(jnp.sum(squares), row_sums * column_sums)
    return jnp.sqrt(square) * (1 + gamma(sum(matrix.shape) + 8, matrix.dtype))


def product(a: Inexact[Array, "rows m"], b: Inexact[Array, "rows n"]) -> Inexact[Array, "m n"]:
    """`a^H b`, the rows summed in blocks."""
    blocks = -(-len(a) // _BLOCK)
    if blocks <= 1:
        return _product(a, b)

    def split(matrix):
        padded = jnp.pad(matrix, ((0, blocks * _BLOCK - len(matrix)), (0, 0)))
        return padded.reshape(blocks, _BLOCK, -1)

    def add(total, pair):
        return total + _product(*pair), None

    zeros = jnp.zeros((a.shape[1], b.shape[1]), jnp.result_type(a, b))
    return jax.lax.scan(add, zeros, (split(a), split(b)))[0]


def rounding(a: Inexact[Array, "rows m"], b: Inexact[Array, "rows n"]) -> Float[Array, ""]:
    """A bound of the norm of what `product` errs by, for entries of order 1."""
    terms = min(len(a), _BLOCK) + -(-len(a) // _BLOCK) + 1
    if jnp.iscomplexobj(a):
        terms *= 3
    return gamma(terms, a.dtype) * magnitude_bound(a) * magnitude_bound(b)


def _product(a: Inexact[Array, "rows m"], b: Inexact[Array, "rows n"]) -> Inexact[Array, "m n"]:
    return jnp.matmul(jnp.conj(a.T), b, precision=jax.lax.Precision.HIGHEST)
