"""Error bounds of floating-point sums and products, for norms that are certified with rounding.

A real inner product of k terms, in any order and with or without fused operations, has an error of
at most `gamma(k) = k u / (1 - k u)` times the inner product of the magnitudes, where u is the unit
roundoff (Higham, 2002, chapter 3). If it is summed in blocks of b terms, whose results are added
one after the other, k is b plus the number of blocks. The real and the imaginary part of a complex
inner product are real ones of twice the length, so that the modulus of the error is at most
`sqrt(2) gamma(2 k) <= gamma(3 k)`.

This presumes matrix products in IEEE precision: `Precision.HIGHEST`, on CPU and GPU.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Inexact

_BLOCK = 128  # rows summed at once: few enough for gamma, enough for a fast product


def gamma(terms: int, dtype: jnp.dtype) -> float:
    """Compute Higham's gamma, the relative error of `terms` roundings; ValueError if it is useless.

    A relative error of 1/2 leaves no correct digit.
    """
    error = terms * float(jnp.finfo(dtype).eps) / 2
    if error >= 0.5:
        raise ValueError(
            f"terms: {terms} roundings in {dtype}, expected fewer, as no digit of the sum would be "
            "certain; use jax_enable_x64 and float64."
        )
    return error / (1 - error)


def power_of_two(x: Array) -> Float[Array, ""]:
    """The power of two just above the largest magnitude in an array; 1 if that is 0."""
    largest = jnp.max(jnp.abs(x), initial=0)
    fraction, _ = jnp.frexp(largest)
    # Dividing a number by its fraction is exact, whereas exp2 of an exponent may be rounded.
    return jnp.where(largest > 0, largest / jnp.where(largest > 0, fraction, 1), 1)


def is_nonzero(x: Inexact[Array, "..."]) -> Bool[Array, ""]:
    """Whether any entry is not 0, by its bits, as XLA's comparisons may flush subnormals to 0."""
    if jnp.iscomplexobj(x):
        return is_nonzero(x.real) | is_nonzero(x.imag)
    integers = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jnp.any(jax.lax.bitcast_convert_type(x, integers) << 1 != 0)  # without the sign bit


def magnitude_bound(matrix: Inexact[Array, "rows cols"]) -> Float[Array, ""]:
    """Bound the spectral norm of the matrix of magnitudes, rounded up, for entries of order 1.

    The smaller of the Frobenius norm and `sqrt(max row sum * max column sum)`; either bounds the
    norm of the matrix itself too.
    """
    magnitudes = jnp.abs(matrix)
    # Without the barrier XLA may merge the two sums into one of rows * cols terms, whose error has
    # no useful bound.
    squares = jax.lax.optimization_barrier(jnp.sum(magnitudes**2, axis=1))
    row_sums, column_sums = (jnp.max(jnp.sum(magnitudes, axis), initial=0) for axis in (1, 0))
    square = jnp.minimum(jnp.sum(squares), row_sums * column_sums)
    return jnp.sqrt(square) * (1 + gamma(sum(matrix.shape) + 8, matrix.dtype))


def product(a: Inexact[Array, "rows m"], b: Inexact[Array, "rows n"]) -> Inexact[Array, "m n"]:
    """Compute `a^H b`, summing the rows in blocks."""
    blocks = -(-len(a) // _BLOCK)
    if blocks <= 1:
        return _product(a, b)

    def split(matrix: Inexact[Array, "rows cols"]) -> Inexact[Array, "blocks block cols"]:
        padded = jnp.pad(matrix, ((0, blocks * _BLOCK - len(matrix)), (0, 0)))
        return padded.reshape(blocks, _BLOCK, -1)

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _product(*pair), None

    zeros = jnp.zeros((a.shape[1], b.shape[1]), jnp.result_type(a, b))
    return jax.lax.scan(add, zeros, (split(a), split(b)))[0]


def rounding(a: Inexact[Array, "rows m"], b: Inexact[Array, "rows n"]) -> Float[Array, ""]:
    """Bound the norm of the rounding error of `product(a, b)`, for entries of order 1."""
    terms = min(len(a), _BLOCK) + -(-len(a) // _BLOCK) + 1
    if jnp.iscomplexobj(a):
        terms *= 3
    return gamma(terms, a.dtype) * magnitude_bound(a) * magnitude_bound(b)


def _product(a: Inexact[Array, "rows m"], b: Inexact[Array, "rows n"]) -> Inexact[Array, "m n"]:
    return jnp.matmul(jnp.conj(a.T), b, precision=jax.lax.Precision.HIGHEST)
