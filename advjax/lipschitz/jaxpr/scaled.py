"""Nonnegative numbers that neither overflow nor underflow, for intermediate Lipschitz constants.

An intermediate constant may leave the range of float32 although that of the whole function does
not, as in `x * s * s / s / s` for s = 1e-30. A constant that underflows to 0 is not a bound.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Scalar = Float[Array, ""] | float

_TINY = float(np.finfo(np.float32).tiny)
_SMALLEST = -120  # a power of two that is negligible beside 1 and normal in float32
_OF_ZERO = -(2**16)  # the exponent of 0: so small that 0 never sets the scale of several numbers


class Scaled(NamedTuple):
    """The number `mantissa * 2**exponent`.

    Attributes:
        mantissa: In [1, 2), or 0 or infinite. A Python float where the number is known now.
        exponent: An integer.
    """

    mantissa: Scalar
    exponent: int | Int[Array, ""] = 0


def scaled(value: Scalar, exponent: int | Int[Array, ""] = 0) -> Scaled:
    """Return `value * 2**exponent`; infinite where the value is NaN."""
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        value = float(value)
    if isinstance(value, jax.Array):
        value = jnp.where(jnp.isnan(value), jnp.inf, value)
        fixed = jax.lax.stop_gradient(value)
        usable = (fixed > 0) & jnp.isfinite(fixed)
        power = jnp.where(usable, jnp.frexp(jnp.where(usable, fixed, 1))[1] - 1, 0)
        mantissa = _times_power(value, -power)
        return Scaled(mantissa, exponent + jnp.where(fixed == 0, _OF_ZERO, power))
    value = float(value)
    if math.isnan(value):
        value = math.inf
    if value == 0 or math.isinf(value):
        return Scaled(value, 0 if value else _OF_ZERO)
    fraction, exact = math.frexp(value)
    return Scaled(2 * fraction, exponent + exact - 1)


def unscaled(number: Scaled) -> Scalar:
    """Return the number itself, rounded up where it underflows in float32."""
    mantissa, exponent = number
    if isinstance(mantissa, float) and isinstance(exponent, int):
        if mantissa == 0 or math.isinf(mantissa):
            return mantissa
        # Infinite beyond the range of the dtype it will be converted to: the conversion would warn.
        if exponent >= jnp.finfo(jnp.result_type(float)).maxexp:
            return math.inf
        return max(math.ldexp(mantissa, exponent), _TINY)
    mantissa = _as_array(mantissa)
    info = jnp.finfo(mantissa.dtype)
    # Clipping the exponent from below rounds up.
    value = _times_power(mantissa, jnp.clip(exponent, info.minexp, info.maxexp - 1))
    beyond = (exponent >= info.maxexp) & (mantissa > 0)
    return jnp.where(beyond, jnp.inf, value)


def aligned(number: Scaled, exponent: int | Int[Array, ""]) -> Scalar:
    """Return `number / 2**exponent` for an exponent of at least its own; never rounded down."""
    if isinstance(number.exponent, int) and isinstance(exponent, int):
        return number.mantissa * 2.0 ** max(number.exponent - exponent, _SMALLEST)
    power = jnp.maximum(jnp.asarray(number.exponent - exponent), _SMALLEST)
    return _times_power(_as_array(number.mantissa), power)


def highest(numbers: Sequence[Scaled]) -> int | Int[Array, ""]:
    """Return the largest exponent of several numbers; 0 if there are none."""
    exponents = [number.exponent for number in numbers]
    if all(isinstance(exponent, int) for exponent in exponents):
        return max(exponents, default=0)
    return functools.reduce(jnp.maximum, exponents)


def largest(numbers: Sequence[Scaled]) -> Scaled:
    """Return the largest of at least one number."""
    exponent = highest(numbers)
    values = [aligned(number, exponent) for number in numbers]
    if all(isinstance(value, float) for value in values):
        return scaled(max(values), exponent)
    return scaled(functools.reduce(jnp.maximum, values), exponent)


def _as_array(value: Scalar) -> Float[Array, ""]:
    return jnp.asarray(value, jnp.result_type(float)) if isinstance(value, float) else value


def _times_power(value: Float[Array, ""], power: Int[Array, ""]) -> Float[Array, ""]:
    """`value * 2**power`, in two steps, as the power itself may be out of range."""
    half = power // 2
    return value * _power(half, value.dtype) * _power(power - half, value.dtype)


def _power(power: Int[Array, ""], dtype: jnp.dtype) -> Float[Array, ""]:
    """`2**power`, made from its bits to be exact."""
    info = jnp.finfo(dtype)
    integers = {32: jnp.int32, 64: jnp.int64}[info.bits]
    bits = (jnp.asarray(power, integers) + (1 - info.minexp)) << info.nmant
    return jax.lax.bitcast_convert_type(bits, dtype)
