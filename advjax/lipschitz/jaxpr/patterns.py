"""Functions that are Lipschitz although the operations that they consist of are not.

GELU is a product of two functions of its input, and softmax a quotient. Each is recognised at its
last operation, by comparing the operations before it with those of the function.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from advjax.lipschitz.jaxpr import elementwise
from advjax.lipschitz.jaxpr.interpreter import Context, interpret
from advjax.lipschitz.jaxpr.rules import Rule
from advjax.lipschitz.jaxpr.values import Operation, Signal, concrete

Found = tuple[Operation, float] | None


def match(op: Operation, like: Any) -> Found:
    """Find the function that an operation completes.

    Args:
        op: The operation.
        like: The shape and dtype of its result.

    Returns:
        The function as an operation on its one argument, with its Lipschitz constant; or None.
    """
    complex_numbers = any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in op.signals)
    if complex_numbers or not jnp.issubdtype(like.dtype, jnp.floating):
        return None
    for pattern in (_softmax, _log_softmax, _log_sum_exp, _normalisation):
        found = pattern(op)
        if found is not None:
            return found
    return _elementwise(op, like)


def _as(op: Operation, name: str, signal: Signal, gain: float) -> Found:
    return op._replace(name=name, inputs=(signal,)), gain


# Elementwise functions

_FUNCTIONS: dict[str, tuple[Callable, tuple[float, ...]]] = {
    **{
        name: (row.fn, ())
        for name, row in elementwise.TABLE.items()
        if not hasattr(jax.lax, f"{name}_p")
    },
    **{name: (function.fn, (0.5,)) for name, function in elementwise.PARAMETRIC.items()},
}
"""The functions to recognise, and examples of the scalars that they take."""


def _elementwise(op: Operation, like: Any) -> Found:
    if op.name not in ("mul", "select_n", "add", "div"):
        return None
    value = Signal(like.shape, like.dtype, math.inf, op)
    for name in _FUNCTIONS:
        reference, leaves = _reference(name, like.shape, like.dtype)
        bindings = _unify(reference, value, {})
        if bindings is None:
            continue
        x, *scalars = (bindings[id(leaf)] for leaf in leaves)
        if isinstance(x, Signal) and all(concrete(s) for s in scalars):
            slope = (
                elementwise.PARAMETRIC[name].row(float(scalars[0])).slope
                if scalars
                else elementwise.TABLE[name].slope
            )
            return _as(op, name, x, slope) if math.isfinite(slope) else None
    return None


@functools.lru_cache(maxsize=1024)
def _reference(name: str, shape: tuple[int, ...], dtype: Any) -> tuple[Signal, list[Signal]]:
    """Trace a function to signals: its result and its arguments."""
    function, scalars = _FUNCTIONS[name]
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype), *scalars)
    leaves = [Signal(v.aval.shape, v.aval.dtype, 1.0) for v in closed.jaxpr.invars]

    def record(op: Operation, avals: Sequence[Any], function_rule: Rule | None) -> Sequence[Any]:
        # A program in which the scalar is a constant has no conversion of it.
        if op.name == "copy" or (op.name == "convert_element_type" and not op.shape):
            return op.inputs
        return [Signal(a.shape, a.dtype, math.inf, op) for a in avals]

    return interpret(closed, leaves, Context(record))[0], leaves


def _unify(reference: Any, value: Any, bindings: dict[int, Any]) -> dict[int, Any] | None:
    """Match a value with a reference, both traced programs.

    Args:
        reference: The result of the function to recognise, or an intermediate result of it.
        value: What may be the same in the program at hand.
        bindings: The arguments of the function that have been found, by their identity.

    Returns:
        The bindings with those of this value; None if it does not match.
    """
    if not isinstance(reference, Signal):
        same = not isinstance(value, Signal) and concrete(value) and _equal(reference, value)
        return bindings if same else None
    if reference.operation is None:
        return _bind(reference, value, bindings)
    if not isinstance(value, Signal) or not value.made_by(reference.operation.name):
        return None
    if not _equal_params(reference.params, value.params):
        return None
    commutes = value.made_by("mul", "add")
    for inputs in (value.inputs, value.inputs[::-1])[: 2 if commutes else 1]:
        found: dict[int, Any] | None = bindings
        for a, b in zip(reference.inputs, inputs, strict=True):
            found = None if found is None else _unify(a, b, found)
        if found is not None:
            return found
    return None


def _bind(leaf: Signal, value: Any, bindings: dict[int, Any]) -> dict[int, Any] | None:
    bound = bindings.get(id(leaf))
    if bound is None:
        if isinstance(value, Signal) and value.shape == leaf.shape:
            return bindings | {id(leaf): value}
        if not isinstance(value, Signal) and np.shape(value) == leaf.shape == ():
            return bindings | {id(leaf): value}
        return None
    if isinstance(bound, Signal) or isinstance(value, Signal):
        return bindings if bound is value else None
    return bindings if concrete(bound, value) and _equal(bound, value) else None


def _equal(one: Array, other: Array) -> bool:
    return np.shape(one) == np.shape(other) and bool(np.all(np.asarray(one) == np.asarray(other)))


def _equal_params(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        one[key] == other[key] for key in one if key not in ("sharding", "out_sharding")
    )


# Softmax and its relatives, in which a shift of all entries of a group cancels or is added again


def _softmax(op: Operation) -> Found:
    """`e / sum(e)` with `e = exp(x - shift)`: its Jacobian's norm is at most 1/2."""
    if op.name != "div" or len(op.signals) != 2:
        return None
    numerator, denominator = op.inputs
    axes = _summed(denominator, numerator)
    if axes is None or not numerator.made_by("exp") or numerator.shape != op.shape:
        return None
    return _as(op, "softmax", _unshifted(numerator.inputs[0], axes)[0], 1 / 2)


def _log_softmax(op: Operation) -> Found:
    """`y - log sum exp(y)`, whose Jacobian is an oblique projection, `I - 1 p^T`.

    Its norm is that of `1 p^T`, `sqrt(classes) |p|`, for a vector p of probabilities.
    """
    if op.name != "sub" or len(op.signals) != 2:
        return None
    y, log = op.inputs
    terms = _exponentials(*_peeled(log))
    if terms is None:
        return None
    x, axes, dims = terms
    if (
        x is not y
        or y.shape != op.shape
        or dims != tuple(a for a in range(len(y.shape)) if a not in axes)
    ):
        return None
    classes = math.prod(y.shape[a] for a in axes)
    return _as(op, "log_softmax", _unshifted(y, axes)[0], math.sqrt(classes))


def _log_sum_exp(op: Operation) -> Found:
    """`log sum exp(x - shift) + shift`, whose gradient is a softmax, of length at most 1."""
    if op.name == "log":
        terms = _exponentials(*_peeled(Signal(op.shape, None, math.inf, op)))
        return None if terms is None else _as(op, "logsumexp", terms[0], _copies(op, *terms[:2]))
    if op.name != "add" or len(op.signals) != 2:
        return None
    for log, shift in (op.inputs, op.inputs[::-1]):
        terms = _exponentials(*_peeled(log))
        if terms is not None:
            y, axes, dims = terms
            x, subtracted = _unshifted(y, axes)
            if subtracted is not None and _same(subtracted, shift, y, axes, dims):
                return _as(op, "logsumexp", x, _copies(op, y, axes))
    return None


def _copies(op: Operation, y: Signal, axes: tuple[int, ...]) -> float:
    """The norm of broadcasting a sum over axes of y to the result's shape: the root of copies."""
    sums = y.size // max(math.prod(y.shape[a] for a in axes), 1)
    return math.sqrt(math.prod(op.shape) / max(sums, 1))


def _exponentials(
    log: Signal, dims: tuple[int, ...]
) -> tuple[Signal, tuple[int, ...], tuple[int, ...]] | None:
    """Find y and the axes of `log(sum(exp(y)))`, and the places of its other axes in the result."""
    if not log.made_by("log"):
        return None
    total, dims = _peeled(log.inputs[0], dims)
    if total.made_by("abs"):
        total, dims = _peeled(total.inputs[0], dims)
    if not total.made_by("reduce_sum") or not total.inputs[0].made_by("exp"):
        return None
    return total.inputs[0].inputs[0], total.params["axes"], dims


def _unshifted(y: Signal, axes: tuple[int, ...]) -> tuple[Signal, Signal | None]:
    """Split `y = x - shift` if the shift is constant along the axes; else return y and None."""
    if y.made_by("sub") and len(y.signals) == 2:
        x, shift = y.inputs
        inner, dims = _peeled(shift)
        varying = {d for d, size in zip(dims, inner.shape, strict=True) if size != 1}
        if x.shape == y.shape and not varying & set(axes):
            return x, shift
    return y, None


def _same(spread: Signal, shift: Signal, y: Signal, axes: tuple[int, ...], dims: tuple) -> bool:
    """Whether the shift subtracted before the sum over axes is the one added after it."""
    (one, where), (other, there) = _peeled(spread), _peeled(shift)
    kept = [a for a in range(len(y.shape)) if a not in axes]

    def varying(places: Sequence[int], sizes: Sequence[int]) -> list[int]:
        # An axis of size 1 may have been kept or left out.
        return [place for place, size in zip(places, sizes, strict=True) if size != 1]

    sizes = [y.shape[a] for a in kept]
    return (
        one is other
        and varying(where, one.shape) == varying(kept, sizes)
        and varying(there, one.shape) == varying(dims, sizes)
    )


def _peeled(signal: Signal, dims: tuple[int, ...] | None = None) -> tuple[Signal, tuple[int, ...]]:
    """Undo broadcasts: the signal that was broadcast, and where its axes are in the result."""
    dims = tuple(range(len(signal.shape))) if dims is None else dims
    while signal.made_by("broadcast_in_dim", "stop_gradient"):
        if signal.made_by("broadcast_in_dim"):
            dims = tuple(dims[a] for a in signal.params["broadcast_dimensions"])
        signal = signal.inputs[0]
    return signal, dims


def _summed(total: Signal, terms: Signal) -> tuple[int, ...] | None:
    """The axes that `terms` is summed over to make `total`, broadcast back; None if it is not."""
    total, dims = _peeled(total)
    if not total.made_by("reduce_sum") or total.inputs[0] is not terms:
        return None
    axes = total.params["axes"]
    return axes if dims == tuple(a for a in range(len(terms.shape)) if a not in axes) else None


# Local response normalisation


def _normalisation(op: Operation) -> Found:
    """`x / (k + a S(x^2))^b`, where S sums over windows that contain their centre, or over groups.

    With D = k + a S(x^2) the Jacobian is diag(D^-b) - B, B_ij = 2 a b x_i x_j D_i^(-b-1) for j in
    the window of i. For groups that do not overlap it is symmetric with norm k^-b if b <= 1. In
    general |B v|^2 <= max |B_i|^2 m |v|^2 for the rows B_i and m windows that share an entry, and
    |B_i| <= 2 b t / (1 + t)^(b + 1) k^-b with t = a S_i / k, which is largest at t = 1 / b. So

        L <= k^-b (1 + 2 sqrt(m) b^(b + 1) / (b + 1)^(b + 1)).
    """
    if op.name not in ("div", "mul") or len(op.signals) != 2:
        return None
    for x, factor in (op.inputs, op.inputs[::-1])[: 1 if op.name == "div" else 2]:
        power = _power(*_peeled(factor), 1 if op.name == "div" else -1)
        if power is not None and x.shape == op.shape:
            base, dims, beta = power
            windows = _windows(base, dims, x)
            if windows is not None:
                return _as(op, "normalise", x, _normalised(windows[0], beta, windows[1]))
    return None


def _normalised(k: float, beta: float, windows: int) -> float:
    if windows == 1 and beta <= 1:
        return k**-beta * (1 + 1e-12)
    spill = 2 * math.sqrt(windows) * (beta / (beta + 1)) ** (beta + 1)
    return k**-beta * (1 + spill) * (1 + 1e-12)


def _power(
    factor: Signal, dims: tuple[int, ...], sign: int
) -> tuple[Signal, tuple[int, ...], float] | None:
    """The base and the exponent of a power, the exponent times the sign; None if not positive."""
    if factor.made_by("sqrt", "rsqrt"):
        beta = 0.5 if factor.made_by("sqrt") else -0.5
    elif factor.made_by("integer_pow"):
        beta = float(factor.params["y"])
    elif factor.made_by("pow"):
        beta = _scalar(factor.inputs[1]) or 0.0
    else:
        return None
    return (*_peeled(factor.inputs[0], dims), sign * beta) if sign * beta > 0 else None


def _scalar(value: Any) -> float | None:
    """The value of a constant whose entries are all the same; else None."""
    if isinstance(value, Signal) or not concrete(value) or not np.size(value):
        return None
    first = float(np.ravel(value)[0])
    return first if np.all(np.asarray(value) == np.ravel(value)[0]) else None


def _windows(base: Signal, dims: tuple[int, ...], x: Signal) -> tuple[float, int] | None:
    """The k of `k + a S(x^2)`, and the number of windows of S that share an entry."""
    k, sums = None, base
    while sums.made_by(*(("add",) if k is None else ("mul", "div"))) and len(sums.signals) == 1:
        reciprocal = sums.made_by("div") and not isinstance(sums.inputs[0], Signal)
        sums, dims, number = _with_scalar(sums, dims)
        if reciprocal or number is None or number <= 0:
            return None
        k = number if k is None else k
    if k is None or not sums.inputs or not _is_square(sums.inputs[0], x):
        return None
    if sums.made_by("reduce_sum"):
        kept = tuple(a for a in range(len(x.shape)) if a not in sums.params["axes"])
        return (k, 1) if dims == kept else None
    if sums.made_by("reduce_window_sum") and dims == tuple(range(len(x.shape))):
        return (k, math.prod(sums.params["window_dimensions"])) if _contains_centre(sums) else None
    return None


def _with_scalar(
    signal: Signal, dims: tuple[int, ...]
) -> tuple[Signal, tuple[int, ...], float | None]:
    """Split an operation on a signal and a number: the signal, its axes, and the number."""
    (inner,) = signal.signals
    (other,) = (value for value in signal.inputs if value is not inner)
    return (*_peeled(inner, dims), _scalar(other))


def _is_square(squares: Any, x: Signal) -> bool:
    if not isinstance(squares, Signal):
        return False
    if squares.made_by("square"):
        return squares.inputs[0] is x
    if squares.made_by("integer_pow"):
        return squares.params["y"] == 2 and squares.inputs[0] is x
    return squares.made_by("mul") and all(s is x for s in squares.inputs)


def _contains_centre(op: Signal) -> bool:
    params = op.params
    ones = (1,) * len(params["window_dimensions"])
    return (
        tuple(params["window_strides"]) == ones
        and tuple(params["base_dilation"]) == ones
        and tuple(params["window_dilation"]) == ones
        and op.shape == op.inputs[0].shape
        and all(
            0 <= low < window
            for (low, _), window in zip(params["padding"], params["window_dimensions"], strict=True)
        )
    )
