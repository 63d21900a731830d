"""Between what the entries of an intermediate result are, and how steep activations are there.

Bounds are propagated entry by entry, rounded outwards: what they hold for is the function in exact
arithmetic. A linear operation T takes `[m - r, m + r]` to `T m` plus or minus `|T| r`. In floating
point T m is off by at most gamma(k) |T| |m| for sums of k terms (Higham, 2002, chapter 3), and the
sum |T| r by gamma(k) of itself.

Source: Gowal et al. (2018) for the propagation of intervals through networks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax.lipschitz.gram import gamma
from advjax.lipschitz.signals import Interval, Operation

# Exact, and nondecreasing in each input that may be a signal.
_ORDERED = frozenset(
    [
        *("broadcast_in_dim", "concatenate", "copy", "gather", "pad", "reshape", "rev", "slice"),
        *("squeeze", "transpose", "select_n", "clamp", "max", "min", "reduce_max", "reduce_min"),
        *("reduce_window_max", "reduce_window_min"),
    ]
)

# Nondecreasing elementwise functions with their derivatives, which are even and fall with |z|.
_SMOOTH: dict[str, Callable[[Array], Array]] = {
    "logistic": lambda z: jax.nn.sigmoid(z) * jax.nn.sigmoid(-z),
    "tanh": lambda z: 4 * jax.nn.sigmoid(2 * z) * jax.nn.sigmoid(-2 * z),
    "erf": lambda z: 2 / math.sqrt(math.pi) * jnp.exp(-(z**2)),
    "atan": lambda z: 1 / (1 + z**2),
    "asinh": lambda z: jax.lax.rsqrt(1 + z**2),
}

_ULPS = 64  # more than elementary functions and a few operations after them are off by


def enclosure(op: Operation, inputs: Sequence[Any]) -> Interval | None:
    """What the entries of a result are between.

    Args:
        op: An operation.
        inputs: For each input of it an `Interval` where it is a signal, or None if that is unknown,
            and else the array.

    Returns:
        An `Interval`, or None where nothing is known.
    """
    primitive = getattr(jax.lax, f"{op.name}_p", None)
    known = all(isinstance(x, Interval) for x in inputs if x is None or isinstance(x, Interval))
    if primitive is None or not known or op.params.keys() & {"jaxpr", "call_jaxpr"}:
        return None
    dtype = op.signals[0].dtype

    def apply(*values, **params):
        # Literals of a jaxpr are plain numbers.
        arrays = [v if hasattr(v, "dtype") else jnp.asarray(v, dtype) for v in values]
        return primitive.bind(*arrays, **{**op.params, **params})

    if op.name in _ORDERED:
        return Interval(*(apply(*(_end(x, end) for x in inputs)) for end in (0, 1)))
    if op.name in _SMOOTH:
        return _widened(*(apply(end) for end in inputs[0]), absolute=1.0)
    if op.name in ("add", "sub"):
        one, other = (Interval(_end(x, 0), _end(x, 1)) for x in inputs)
        if op.name == "sub":
            other = Interval(*other[::-1])
        return _widened(apply(one.lower, other.lower), apply(one.upper, other.upper))
    if op.name == "neg":
        return Interval(-inputs[0].upper, -inputs[0].lower)
    terms = _terms(op)
    return None if terms is None else _linear(op, inputs, terms, apply)


def _end(value: Any, end: int) -> Any:
    return value[end] if isinstance(value, Interval) else value


def _terms(op: Operation) -> int | None:
    """How many products are summed up for an entry of a linear operation; None if it is not one."""
    if len(op.signals) != 1 or (op.name == "div" and op.signals[0] is not op.inputs[0]):
        return None
    if op.name in ("mul", "div"):
        return 1
    if op.name == "reduce_sum":
        return math.prod(op.signals[0].shape[axis] for axis in op.params["axes"])
    if op.name == "dot_general":
        (contracted, _), _ = op.params["dimension_numbers"]
        return math.prod(op.inputs[0].shape[axis] for axis in contracted)
    if op.name == "conv_general_dilated" and op.signals[0] is op.inputs[0]:
        outputs = op.params["dimension_numbers"].rhs_spec[0]
        return math.prod(op.inputs[1].shape) // op.inputs[1].shape[outputs]
    return None


def _linear(op: Operation, inputs: Sequence[Any], terms: int, apply: Callable) -> Interval | None:
    (interval,) = (x for x in inputs if isinstance(x, Interval))
    dtype = interval.lower.dtype
    eps = float(jnp.finfo(dtype).eps)
    if (terms + 4) * eps >= 1:  # as for a long sum in half precision
        return None
    if "precision" in op.params:
        highest = jax.lax.Precision.HIGHEST
        accurate = {"precision": (highest, highest)}
    else:
        accurate = {}
    error = gamma(terms + 4, dtype)
    middle = interval.lower / 2 + interval.upper / 2
    radius = jnp.maximum(interval.upper - middle, middle - interval.lower) * (1 + 2 * eps)

    def result(value, magnitudes):
        others = (jnp.abs(x) if magnitudes else x for x in inputs if x is not interval)
        return apply(*(value if x is interval else next(others) for x in inputs), **accurate)

    spread = result(radius + error * jnp.abs(middle), magnitudes=True) * (1 + 2 * error)
    centre = result(middle, magnitudes=False)
    underflow = (terms + 4) * float(jnp.finfo(dtype).tiny)
    return _widened(centre - spread - underflow, centre + spread + underflow, scale=centre)


def _widened(
    lower: Array, upper: Array, *, absolute: float = 0.0, scale: Array | float = 0.0
) -> Interval:
    """Rounded outwards; infinite where an infinite bound made a NaN of it."""
    eps = float(jnp.finfo(lower.dtype).eps)
    ulps = _ULPS if absolute else 4
    tiny = float(jnp.finfo(lower.dtype).tiny)
    down = ulps * eps * (jnp.abs(lower) + jnp.abs(scale) + absolute) + tiny
    up = ulps * eps * (jnp.abs(upper) + jnp.abs(scale) + absolute) + tiny
    lower, upper = lower - down, upper + up
    return Interval(
        jnp.where(jnp.isnan(lower), -jnp.inf, lower), jnp.where(jnp.isnan(upper), jnp.inf, upper)
    )


def intersection(one: Interval, other: Interval) -> Interval:
    """What is in both."""
    return Interval(jnp.maximum(one.lower, other.lower), jnp.minimum(one.upper, other.upper))


def widened_by(interval: Interval, distance: Float[ArrayLike, "..."]) -> Interval:
    """All that is within a distance of an interval, entry by entry."""
    distance = jnp.asarray(distance, interval.lower.dtype)
    return _widened(interval.lower - distance, interval.upper + distance, scale=distance)


def largest_slope(op: Operation, steepest: float) -> Float[Array, "*shape"] | float:
    """The largest slope of a nondecreasing elementwise operation on the interval of its input.

    Args:
        op: The operation, of one signal.
        steepest: Its largest slope anywhere.

    Returns:
        The slope of each entry; where nothing is known of the input, the largest anywhere.
    """
    (signal,) = op.signals
    if signal.interval is None:
        return steepest
    lower, upper = signal.interval
    if op.name in _SMOOTH:
        eps = float(jnp.finfo(lower.dtype).eps)
        nearest = jnp.clip(0, lower, upper)
        slope = _SMOOTH[op.name](nearest) * (1 + _ULPS * eps) + _ULPS * eps
        return jnp.minimum(slope, steepest)
    others = [x for x in op.inputs if x is not signal]
    if op.name == "max":
        return jnp.where(upper <= others[0], 0.0, steepest)
    if op.name == "min":
        return jnp.where(lower >= others[0], 0.0, steepest)
    if op.name == "clamp":
        return jnp.where((upper <= others[0]) | (lower >= others[1]), 0.0, steepest)
    return steepest
