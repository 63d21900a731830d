"""A table of elementwise functions: slopes, ranges, monotonicity.

Each such fact is written once, here. The tests compare each row with `jax.grad` on a grid.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from advjax.lipschitz.jaxpr.values import Operation


class Elementwise(NamedTuple):
    """A function of one number.

    Attributes:
        fn: The function, on arrays.
        slope: The largest absolute value of its derivative; infinite if there is none.
        slope_on: The same on intervals, from their lower and upper ends, up to rounding; None to
            use `slope` on every interval.
        increasing: Whether it never decreases.
        decreasing: Whether it never increases.
        even: Whether it is even, and grows with the distance from 0.
        low: A lower bound of its values.
        high: An upper bound of its values.
    """

    fn: Callable[[Array], Array]
    slope: float
    slope_on: Callable[[Array, Array], Array] | None = None
    increasing: bool = False
    decreasing: bool = False
    even: bool = False
    low: float = -math.inf
    high: float = math.inf


def _falling(derivative: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """The slope on intervals for an even derivative that falls away from 0.

    The largest derivative is at the point of the interval nearest to 0.
    """
    return lambda lower, upper: derivative(jnp.clip(0, lower, upper))


def _positive(derivative: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """The slope on intervals for a falling derivative of a function of positive numbers."""

    def slope(lower: Array, upper: Array) -> Array:
        return jnp.where(lower > 0, derivative(jnp.where(lower > 0, lower, 1)), jnp.inf)

    return slope


def _of_sigmoid(z: Array) -> Array:
    return jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)


def _of_erf(z: Array) -> Array:
    return 2 / math.sqrt(math.pi) * jnp.exp(-(z**2))


def _magnitude(lower: Array, upper: Array) -> Array:
    return jnp.maximum(jnp.abs(lower), jnp.abs(upper))


# Largest slopes without a closed form were found by a dense search, and rounded up. Each of these
# derivatives has one smooth maximum, so that the search cannot miss it.
SELU_SLOPE = 1.75810

_ERF = 2 / math.sqrt(math.pi) * (1 + 2.0**-23)

TABLE: dict[str, Elementwise] = {
    # Primitives
    "tanh": Elementwise(
        jnp.tanh, 1.0, _falling(lambda z: 4 * _of_sigmoid(2 * z)), increasing=True, low=-1, high=1
    ),
    "logistic": Elementwise(
        jax.nn.sigmoid, 1 / 4, _falling(_of_sigmoid), increasing=True, low=0.0, high=1.0
    ),
    "erf": Elementwise(jax.lax.erf, _ERF, _falling(_of_erf), increasing=True, low=-1.0, high=1.0),
    "erfc": Elementwise(jax.lax.erfc, _ERF, _falling(_of_erf), decreasing=True, low=0.0, high=2.0),
    "atan": Elementwise(
        jnp.arctan,
        1.0,
        _falling(lambda z: 1 / (1 + z**2)),
        increasing=True,
        low=-1.5708,
        high=1.5708,
    ),
    "asinh": Elementwise(
        jnp.arcsinh, 1.0, _falling(lambda z: jax.lax.rsqrt(1 + z**2)), increasing=True
    ),
    "sin": Elementwise(jnp.sin, 1.0, low=-1.0, high=1.0),
    "cos": Elementwise(jnp.cos, 1.0, low=-1.0, high=1.0),
    "abs": Elementwise(jnp.abs, 1.0, even=True, low=0.0),
    "neg": Elementwise(jnp.negative, 1.0, decreasing=True),
    "exp": Elementwise(
        jnp.exp, math.inf, lambda lower, upper: jnp.exp(upper), increasing=True, low=0.0
    ),
    "exp2": Elementwise(
        jnp.exp2,
        math.inf,
        lambda lower, upper: math.log(2) * jnp.exp2(upper),
        increasing=True,
        low=0.0,
    ),
    "expm1": Elementwise(
        jnp.expm1, math.inf, lambda lower, upper: jnp.exp(upper), increasing=True, low=-1.0
    ),
    "log": Elementwise(jnp.log, math.inf, _positive(lambda z: 1 / z), increasing=True),
    "log1p": Elementwise(
        jnp.log1p,
        math.inf,
        lambda lower, upper: _positive(lambda z: 1 / z)(1 + lower, 1 + upper),
        increasing=True,
    ),
    "sqrt": Elementwise(
        jnp.sqrt, math.inf, _positive(lambda z: 0.5 / jnp.sqrt(z)), increasing=True, low=0.0
    ),
    "rsqrt": Elementwise(
        lambda z: jnp.where(z > 0, jax.lax.rsqrt(jnp.where(z > 0, z, 1)), jnp.inf),
        math.inf,
        _positive(lambda z: 0.5 / (z * jnp.sqrt(z))),
        decreasing=True,
        low=0.0,
    ),
    "square": Elementwise(
        jnp.square, math.inf, lambda lower, upper: 2 * _magnitude(lower, upper), even=True, low=0.0
    ),
    # Functions of jax.nn, recognised by their last operation
    "gelu": Elementwise(lambda x: jax.nn.gelu(x, approximate=False), 1.12905, low=-0.17),
    "gelu_tanh": Elementwise(lambda x: jax.nn.gelu(x, approximate=True), 1.12905, low=-0.1701),
    "silu": Elementwise(jax.nn.silu, 1.09985, low=-0.2785),
    "mish": Elementwise(jax.nn.mish, 1.08855, low=-0.3089),
    "softplus": Elementwise(jax.nn.softplus, 1.0, increasing=True, low=0.0),
    "selu": Elementwise(jax.nn.selu, SELU_SLOPE, increasing=True, low=-1.7581),
    "hard_tanh": Elementwise(jax.nn.hard_tanh, 1.0, increasing=True, low=-1.0, high=1.0),
    "soft_sign": Elementwise(jax.nn.soft_sign, 1.0, increasing=True, low=-1.0, high=1.0),
}


def integer_power(y: int) -> Elementwise:
    """The row of `x**y`."""

    def slope_on(lower: Array, upper: Array) -> Array:
        if y >= 1:
            return y * _magnitude(lower, upper) ** (y - 1)
        nearest = jnp.clip(0, lower, upper)
        away = nearest != 0
        return jnp.where(away, -y * jnp.abs(jnp.where(away, nearest, 1.0)) ** (y - 1), jnp.inf)

    if y in (0, 1):
        return Elementwise(lambda x: x**y, float(y), increasing=True)
    return Elementwise(
        lambda x: x**y,
        math.inf,
        slope_on,
        increasing=y > 0 and y % 2 == 1,
        even=y > 0 and y % 2 == 0,
        low=-math.inf if y % 2 else 0.0,
    )


class Parametric(NamedTuple):
    """Elementwise functions with a scalar parameter.

    Attributes:
        fn: The function, of an array and the scalar.
        row: The row of the table for a value of the scalar.
    """

    fn: Callable[[Array, Any], Array]
    row: Callable[[float], Elementwise]


def _parametric(fn: Callable, slope: Callable[[float], float], low: Callable) -> Parametric:
    def row(scalar: float) -> Elementwise:
        return Elementwise(
            lambda x: fn(x, scalar), slope(scalar), increasing=scalar > 0, low=low(scalar)
        )

    return Parametric(fn, row)


PARAMETRIC: dict[str, Parametric] = {
    "elu": _parametric(
        jax.nn.elu, lambda alpha: max(1.0, abs(alpha)), lambda alpha: min(0.0, -alpha)
    ),
    "leaky_relu": _parametric(
        jax.nn.leaky_relu,
        lambda slope: max(1.0, abs(slope)),
        lambda slope: -math.inf if slope > 0 else 0.0,
    ),
    "celu": _parametric(
        jax.nn.celu,
        lambda alpha: 1.0 if alpha > 0 else math.inf,
        lambda alpha: -alpha if alpha > 0 else -math.inf,
    ),
}
"""Functions of jax.nn with a scalar parameter, also recognised by their last operation."""


def row(op: Operation) -> Elementwise | None:
    """Look up the row of a primitive that is applied to one signal; None if there is none."""
    if len(op.inputs) != 1 or len(op.signals) != 1 or op.params.keys() & {"jaxpr", "call_jaxpr"}:
        return None
    if op.name == "integer_pow":
        return integer_power(op.params["y"])
    return TABLE.get(op.name)
