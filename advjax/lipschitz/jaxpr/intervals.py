"""Intervals that contain the entries of intermediate results, and the slopes of activations there.

Intervals are propagated entry by entry and rounded outwards, so that they hold for the function in
exact arithmetic. A linear operation T maps `[m - r, m + r]` to `T m` plus or minus `|T| r`. In
floating point, T m has an error of at most gamma(k) |T| |m| for sums of k terms (Higham, 2002,
chapter 3), and |T| r a relative error of gamma(k).

Reference: Gowal et al. (2018) for the propagation of intervals through networks.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax.lipschitz.jaxpr import elementwise
from advjax.lipschitz.jaxpr.elementwise import Elementwise
from advjax.lipschitz.jaxpr.values import Interval, Operation, Signal, known_now

# Exact, and nondecreasing in each input that may be a signal.
_ORDERED = frozenset(
    [
        *("broadcast_in_dim", "concatenate", "copy", "gather", "pad", "reshape", "rev", "slice"),
        *("squeeze", "transpose", "select_n", "clamp", "max", "min", "reduce_max", "reduce_min"),
        *("reduce_window_max", "reduce_window_min"),
    ]
)

_ULPS = 64  # more than the error of an elementary function and a few operations after it


@known_now
def enclosure(  # noqa: PLR0911
    op: Operation, inputs: Sequence[Any]
) -> Interval | None:
    """Enclose the entries of an operation's result.

    Args:
        op: The operation.
        inputs: For each operand that is a signal its `Interval`, or None if it is unknown; for any
            other operand the array.

    Returns:
        An `Interval`, or None if nothing is known.
    """
    known = all(isinstance(x, Interval) for x in inputs if x is None or isinstance(x, Interval))
    if not known or op.params.keys() & {"jaxpr", "call_jaxpr"}:
        return None
    if not all(jnp.issubdtype(s.dtype, jnp.floating) for s in op.signals):
        return None
    # In float32 at least, whatever the function computes in.
    dtype = jnp.result_type(jnp.float32, *(x.lower for x in inputs if isinstance(x, Interval)))
    row = elementwise.row(op)
    if row is not None:
        return _image(row, Interval(*(end.astype(dtype) for end in inputs[0])))
    if op.name == "row":
        return Interval(*(end[op.params["step"]] for end in inputs[0]))
    if op.name == "stack":
        return Interval(*(jnp.stack([_end(x, end) for x in inputs]) for end in (0, 1)))
    if op.name == "convert_element_type":
        return inputs[0] if jnp.issubdtype(op.params["new_dtype"], jnp.floating) else None
    if op.name == "mul" and len(op.signals) == 2:
        return _between_products(*inputs, same=op.inputs[0] is op.inputs[1])
    if not hasattr(jax.lax, f"{op.name}_p"):
        return None
    apply = functools.partial(_apply, op, dtype)
    if op.name in _ORDERED:
        return Interval(*(apply(*(_end(x, end) for x in inputs)) for end in (0, 1)))
    if op.name in ("add", "sub"):
        one, other = (Interval(_end(x, 0), _end(x, 1)) for x in inputs)
        if op.name == "sub":
            other = Interval(*other[::-1])
        return _widened(apply(one.lower, other.lower), apply(one.upper, other.upper))
    terms = _terms(op)
    return None if terms is None else _linear(op, inputs, terms, apply)


def _apply(op: Operation, dtype: Any, *values: Any, **params: Any) -> Array:
    """Apply an operation to other operands, in another precision and with other parameters."""
    # Literals of a jaxpr are numbers, with a dtype or without.
    arrays = [jnp.asarray(v) if hasattr(v, "dtype") else jnp.asarray(v, dtype) for v in values]
    arrays = [v.astype(dtype) if jnp.issubdtype(v.dtype, jnp.floating) else v for v in arrays]
    if op.params.get("preferred_element_type") is not None:
        params |= {"preferred_element_type": dtype}
    return getattr(jax.lax, f"{op.name}_p").bind(*arrays, **{**op.params, **params})


def _image(row: Elementwise, interval: Interval) -> Interval | None:
    """The values of an elementwise function on an interval."""
    lower, upper = interval
    if row.increasing:
        ends = row.fn(lower), row.fn(upper)
    elif row.decreasing:
        ends = row.fn(upper), row.fn(lower)
    elif row.even:
        farthest = jnp.maximum(jnp.abs(lower), jnp.abs(upper))
        ends = row.fn(jnp.clip(0, lower, upper)), row.fn(farthest)
    else:
        ends = jnp.full_like(lower, row.low), jnp.full_like(upper, row.high)
    bounded = math.isfinite(row.low) and math.isfinite(row.high)
    lower, upper = _widened(*ends, absolute=float(bounded), ulps=_ULPS)
    low, high = _rounded_outwards(row.low, row.high, lower.dtype)
    return Interval(jnp.maximum(lower, low), jnp.minimum(upper, high))


def _rounded_outwards(low: float, high: float, dtype: Any) -> tuple[Any, Any]:
    """Convert two numbers to a dtype, the first rounded down and the second up."""
    kind = np.dtype(dtype).type
    nearest = kind(low), kind(high)
    return (
        nearest[0] if float(nearest[0]) <= low else np.nextafter(nearest[0], kind(-np.inf)),
        nearest[1] if float(nearest[1]) >= high else np.nextafter(nearest[1], kind(np.inf)),
    )


def _between_products(one: Interval, other: Interval, *, same: bool) -> Interval:
    """Enclose the products of entries in two intervals; squares if both are the same entries."""
    ends = [a * b for a in one for b in other]
    # An infinite end times 0 is NaN, which minimum and maximum keep and `_widened` makes infinite.
    lower = functools.reduce(jnp.minimum, ends)
    upper = functools.reduce(jnp.maximum, ends)
    lower, upper = _widened(lower, upper)
    return Interval(jnp.maximum(lower, 0) if same else lower, upper)


_RANGES = {"softmax": (0.0, 1.0)}


def anywhere(signal: Signal, depth: int = 16, found: dict[int, Interval] | None = None) -> Interval:
    """Enclose the entries of a signal: for the inputs in question, or without a region for any.

    Args:
        signal: The signal.
        depth: How many operations to look back: a few are enough to find a bounded activation.
        found: The intervals found so far, by the identity of the signal.

    Returns:
        An `Interval`, infinite where nothing is known.
    """
    if signal.interval is not None:
        return signal.interval
    found = {} if found is None else found
    if id(signal) in found:
        return found[id(signal)]
    is_real = jnp.issubdtype(signal.dtype, jnp.floating)
    dtype = jnp.promote_types(signal.dtype, jnp.float32) if is_real else jnp.float32

    @known_now
    def between(low: float, high: float) -> Interval:
        return _widened(jnp.full(signal.shape, low, dtype), jnp.full(signal.shape, high, dtype))

    result = between(-jnp.inf, jnp.inf)
    op, layer = signal.operation, signal.layer
    if layer is not op and layer is not None:
        row = elementwise.TABLE.get(layer.name)
        ends = (row.low, row.high) if row else _RANGES.get(layer.name)
        result = result if ends is None else between(*ends)
    elif op is not None and depth > 0:
        inputs = [anywhere(x, depth - 1, found) if isinstance(x, Signal) else x for x in op.inputs]
        enclosed = enclosure(op, inputs)
        result = result if enclosed is None else enclosed
    found[id(signal)] = result
    return result


def _end(value: Any, end: int) -> Any:
    return value[end] if isinstance(value, Interval) else value


def _terms(op: Operation) -> int | None:
    """How many products a linear operation sums for an entry; None for any other operation."""
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
    error = (terms + 4) * eps  # at least gamma(terms + 4), as long as that is below 1
    middle = interval.lower / 2 + interval.upper / 2
    radius = jnp.maximum(interval.upper - middle, middle - interval.lower) * (1 + 2 * eps)

    def result(value: Array, magnitudes: bool) -> Array:
        others = (jnp.abs(x) if magnitudes else x for x in inputs if x is not interval)
        return apply(*(value if x is interval else next(others) for x in inputs), **accurate)

    spread = result(radius + error * jnp.abs(middle), magnitudes=True) * (1 + 2 * error)
    centre = result(middle, magnitudes=False)
    underflow = (terms + 4) * float(jnp.finfo(dtype).tiny)
    return _widened(centre - spread - underflow, centre + spread + underflow, scale=centre)


def _widened(
    lower: Array,
    upper: Array,
    *,
    absolute: float = 0.0,
    scale: Array | float = 0.0,
    ulps: int = 4,
) -> Interval:
    """Round an interval outwards; an end that is NaN, as `inf - inf` is, becomes infinite."""
    eps = float(jnp.finfo(lower.dtype).eps)
    tiny = float(jnp.finfo(lower.dtype).tiny)
    down = ulps * eps * (jnp.abs(lower) + jnp.abs(scale) + absolute) + tiny
    up = ulps * eps * (jnp.abs(upper) + jnp.abs(scale) + absolute) + tiny
    lower, upper = lower - down, upper + up
    return Interval(
        jnp.where(jnp.isnan(lower), -jnp.inf, lower), jnp.where(jnp.isnan(upper), jnp.inf, upper)
    )


@known_now
def intersection(one: Interval, other: Interval) -> Interval:
    """Intersect two intervals."""
    return Interval(jnp.maximum(one.lower, other.lower), jnp.minimum(one.upper, other.upper))


@known_now
def widened_by(interval: Interval, distance: Float[ArrayLike, "..."]) -> Interval:
    """Widen an interval by a distance on both sides, entry by entry."""
    distance = jnp.asarray(distance, interval.lower.dtype)
    return _widened(interval.lower - distance, interval.upper + distance, scale=distance)


@known_now
def slope_on(row: Elementwise, interval: Interval) -> Float[Array, "*shape"] | float:
    """The largest slope of an elementwise function on intervals, rounded up."""
    if row.slope_on is None:
        return row.slope
    eps = float(jnp.finfo(interval.lower.dtype).eps)
    slope = row.slope_on(*interval) * (1 + _ULPS * eps) + _ULPS * eps
    return jnp.minimum(jnp.where(jnp.isnan(slope), jnp.inf, slope), row.slope)


@known_now
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
    row = elementwise.row(op)
    if row is not None:
        return slope_on(row, signal.interval)
    others = [x for x in op.inputs if x is not signal]
    if op.name == "max":
        return jnp.where(upper <= others[0], 0.0, steepest)
    if op.name == "min":
        return jnp.where(lower >= others[0], 0.0, steepest)
    if op.name == "clamp":
        return jnp.where((upper <= others[0]) | (lower >= others[1]), 0.0, steepest)
    return steepest
