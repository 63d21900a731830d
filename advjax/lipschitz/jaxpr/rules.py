"""The table of rules: how each primitive acts on Lipschitz constants.

A rule takes an `Operation` and returns its Lipschitz constant, in L2: one for all of its results,
or a list with one for each (or the error that says why there is none). If it returns the very
object that is an input's constant, the operation is not listed as a layer. The rules here are
homogeneous: if all constants are multiplied by a factor, so is what they return.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array, Float

from advjax.lipschitz.jaxpr import elementwise, intervals
from advjax.lipschitz.jaxpr.scaled import Scalar, Scaled, aligned, highest, scaled
from advjax.lipschitz.jaxpr.values import (
    OWN_FUNCTION,
    Interval,
    NotLipschitzError,
    Operation,
    Signal,
    concrete,
    known_now,
)

Rule = Callable[[Operation], Any]

ROUNDING = 1 + 2.0**-20  # more than the error of the few float32 roundings of one rule

RULES: dict[str, Rule] = {}
FUNCTION_RULES: dict[Callable, Rule] = {}


_BOUNDED = (
    "Bound the function in a `box` or within a `radius`, or bound its operands with jnp.tanh or "
    "jnp.clip; or wrap the code around it in a function under jax.jit and register that function's "
    "constant with lipschitz.register_rule."
)


def register_rule(operation: str | Callable, rule: Rule) -> None:
    """Register how an operation acts on Lipschitz constants.

    The rule is trusted: a wrong rule makes a wrong bound. For an elementwise function of slope at
    most 2:

        register_rule("my_primitive", lambda op: 2 * op.inputs[0].constant)

    Args:
        operation: The name of a primitive as the error message gives it; or a function, whose
            operations are then not looked at. The function must be called under `jax.jit` (or be a
            `jax.custom_jvp`), as no other call shows in a jaxpr. It is recognised by its jaxpr for
            the arrays that it is called with, by itself or under one `jax.vmap` over all of them,
            so that another function of the same name is not mistaken for it. A function with
            static arguments is not recognised; wrap it in one without.
        rule: Maps an `Operation` to the Lipschitz constant of its results with respect to the
            input of the whole function, or to a list with a constant for each result. It computes
            this from `op.inputs`, each an array or a `Signal` with its `constant`. It replaces any
            earlier rule.

    Raises:
        TypeError: If `operation` is neither a string nor a named function.
    """
    if isinstance(operation, str):
        RULES[operation] = rule
        return
    name = getattr(operation, "__name__", None)
    if not callable(operation) or name is None:
        raise TypeError(
            f"operation: {operation!r}, expected the name of a primitive or a function under "
            "jax.jit."
        )
    if name == "<lambda>":
        raise TypeError(
            "operation: a lambda, expected a named function, as errors and breakdowns call it by "
            "its name; write it with `def` and put it under jax.jit."
        )
    is_traced = hasattr(operation, "trace") or isinstance(
        operation, jax.custom_jvp | jax.custom_vjp
    )
    FUNCTION_RULES[operation if is_traced else jax.jit(operation)] = rule


def function_rule(eqn: core.JaxprEqn) -> tuple[str, Rule] | None:
    """Find the name and the rule of the registered function that an equation calls, if any."""
    for function, rule in FUNCTION_RULES.items():
        name = function.__name__
        if eqn.params.get("name", name) == name and _calls(eqn, function):
            return name, rule
    return None


def _calls(eqn: core.JaxprEqn, function: Callable) -> bool:
    """Whether an equation is a call of the function: tracing it for the same operands gives it.

    The name proves nothing: `vmap`, `grad` and closures all make other functions of the same name.
    """
    avals: list[Any] = [v.aval for v in eqn.invars]
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype, weak_type=a.weak_type) for a in avals]
    for traced in (function, jax.vmap(function)):
        try:
            eqns = jax.make_jaxpr(traced)(*like).jaxpr.eqns
        except Exception:  # a function may raise anything for operands it was not written for
            continue
        if len(eqns) == 1 and _same_equation(eqns[0], eqn):
            return True
    return False


_IRRELEVANT = frozenset(  # parameters that do not change what is computed
    ["name", "jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "fwd", "bwd", "ctx_mesh"]
)


def _same_equation(one: core.JaxprEqn, other: core.JaxprEqn) -> bool:
    if one.primitive is not other.primitive or one.params.keys() != other.params.keys():
        return False
    return all(
        _same_value(one.params[key], other.params[key]) for key in one.params.keys() - _IRRELEVANT
    )


def _same_value(one: Any, other: Any) -> bool:  # noqa: PLR0911
    """Whether two parameters or constants are the same; False if this cannot be decided."""
    if one is other:
        return True
    if isinstance(one, core.ClosedJaxpr) and isinstance(other, core.ClosedJaxpr):
        return (
            _same_program(one.jaxpr, other.jaxpr)
            and len(one.consts) == len(other.consts)
            and all(map(_same_value, one.consts, other.consts))
        )
    if isinstance(one, core.Jaxpr) and isinstance(other, core.Jaxpr):
        return _same_program(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same_value, one, other))
    if isinstance(one, jax.Array | np.ndarray) or isinstance(other, jax.Array | np.ndarray):
        return (
            concrete(one, other)
            and np.shape(one) == np.shape(other)
            and jnp.result_type(one) == jnp.result_type(other)
            and bool(np.all(np.asarray(one) == np.asarray(other)))
        )
    try:
        return bool(one == other)
    except (TypeError, ValueError):
        return False


def _same_program(one: core.Jaxpr, other: core.Jaxpr) -> bool:
    """Whether two jaxprs have the same operations on the same variables."""
    numbers: tuple[dict, dict] = {}, {}

    def same_atoms(these: Sequence[Any], those: Sequence[Any]) -> bool:
        if len(these) != len(those):
            return False
        for pair in zip(these, those, strict=True):
            if any(isinstance(atom, core.Literal) for atom in pair):
                if not all(isinstance(atom, core.Literal) for atom in pair):
                    return False
                if not _same_value(*(np.asarray(atom.val) for atom in pair)):
                    return False
            else:
                a, b = (of.setdefault(v, len(of)) for of, v in zip(numbers, pair, strict=True))
                if a != b:
                    return False
            if pair[0].aval.str_short() != pair[1].aval.str_short():
                return False
        return True

    return (
        same_atoms([*one.constvars, *one.invars], [*other.constvars, *other.invars])
        and len(one.eqns) == len(other.eqns)
        and all(
            _same_equation(a, b)
            and same_atoms(a.invars, b.invars)
            and same_atoms(a.outvars, b.outvars)
            for a, b in zip(one.eqns, other.eqns, strict=True)
        )
        and same_atoms(one.outvars, other.outvars)
    )


def constants(layer: Operation, rule: Rule, results: int = 1) -> list[Scaled | NotLipschitzError]:
    """Compute the constants of an operation's results by its rule, rounded up.

    A homogeneous rule is given all constants divided by the same power of two, so that nothing that
    it computes underflows.

    Args:
        layer: The operation.
        rule: Its rule.
        results: The number of its results.

    Returns:
        For each result a constant, or the error that says why there is none.

    Raises:
        NotLipschitzError: If the rule raises it.
    """
    signals = {id(s): s for s in layer.signals}
    exponent: int | Array = 0
    if rule in _HOMOGENEOUS or getattr(rule, "homogeneous", False):
        exponent = highest([s.scaled for s in signals.values()])
        seen = {key: s.with_constant(aligned(s.scaled, exponent)) for key, s in signals.items()}
        layer = layer._replace(inputs=tuple(seen.get(id(x), x) for x in layer.inputs))
    else:
        seen = signals
    found = rule(layer)
    values = found if isinstance(found, list | tuple) else [found] * results

    def rounded_up(value: Any) -> Scaled | NotLipschitzError:
        if isinstance(value, NotLipschitzError):
            return value
        for key, signal in seen.items():
            if value is signal.constant:
                return signals[key].scaled
        return scaled(value * ROUNDING, exponent)

    return [rounded_up(value) for value in values]


def constant(layer: Operation, rule: Rule) -> Scaled:
    """Compute the constant of an operation with one result; NotLipschitzError if it has none."""
    found = constants(layer, rule)[0]
    if isinstance(found, NotLipschitzError):
        raise found
    return found


def homogeneous(rule: Rule) -> Rule:
    """Mark a rule as homogeneous: scaling all constants scales its result."""
    rule.homogeneous = True  # type: ignore[attr-defined]
    return rule


def _only(op: Operation, allowed: slice = slice(1)) -> Signal:
    """The one operand that depends on the input; NotLipschitzError if it is not an allowed one."""
    rest = op.signals
    if len(rest) != 1 or not any(x is rest[0] for x in op.inputs[allowed]):
        raise NotLipschitzError(
            "an operand other than its first depends on the input of the function", OWN_FUNCTION
        )
    return rest[0]


def _gain(factor: float) -> Rule:
    def rule(op: Operation) -> Scalar:
        constant = _only(op).constant
        return constant if factor == 1 else factor * constant

    return rule


def _spread(op: Operation, signal: Signal) -> Scalar:
    """The constant of a signal broadcast to the shape of the result."""
    copies = math.prod(op.shape) // max(signal.size, 1)
    return signal.constant if copies <= 1 else math.sqrt(copies) * signal.constant


def _hypot(*constants: Scalar) -> Scalar:
    if len(constants) == 1:
        return constants[0]
    if all(isinstance(c, float) for c in constants):
        return math.hypot(*constants)
    largest = functools.reduce(jnp.maximum, constants)
    safe = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    square = sum((constant / safe) ** 2 for constant in constants)
    rounded_up = 1 + len(constants) * jnp.finfo(jnp.result_type(largest)).eps
    return jnp.where(largest > 0, safe * jnp.sqrt(square) * rounded_up, largest)


def _sum(op: Operation) -> Scalar:
    constants = [_spread(op, signal) for signal in op.signals]
    return constants[0] if len(constants) == 1 else sum(constants[1:], constants[0])


def _joint(op: Operation) -> Scalar:
    """The rule of an operation whose entries are each 1-Lipschitz in the operands' entries."""
    return _hypot(*(_spread(op, signal) for signal in op.signals))


def _together(op: Operation) -> Scalar:
    return _hypot(*(signal.constant for signal in op.signals))


def _mul(op: Operation) -> Scalar:
    """`x y - x' y' = x (y - y') + y' (x - x')`, entry by entry."""
    left, right = op.inputs
    if len(op.signals) == 1:
        signal, factor = (left, right) if isinstance(left, Signal) else (right, left)
        return _spread(op, signal) * _largest(factor)
    why = "both factors depend on the input of the function"
    one, other = (_magnitude(x, why) for x in op.inputs)
    return one * _spread(op, right) + other * _spread(op, left)


def _div(op: Operation) -> Scalar:
    """A product with `1 / y`, whose slope is `1 / y^2`."""
    numerator, denominator = op.inputs
    if not isinstance(denominator, Signal):
        return _spread(op, numerator) * _largest(denominator, inverse=True)
    distance = _distance_from_zero(intervals.anywhere(denominator))
    if concrete(distance) and float(distance) == 0:
        raise NotLipschitzError(
            "the denominator depends on the input of the function, and may be 0", _BOUNDED
        )
    found = _largest_of(numerator) / distance**2 * _spread(op, denominator)
    if isinstance(numerator, Signal):
        found = found + _spread(op, numerator) / distance
    return found


@known_now
def _distance_from_zero(interval: Interval) -> Float[Array, ""]:
    return jnp.min(jnp.abs(jnp.clip(0, *interval)), initial=jnp.inf)


def _largest_of(value: Any) -> Scalar:
    if isinstance(value, Signal):
        return _magnitude(value, "the denominator depends on the input of the function")
    return _largest(value)


def _magnitude(signal: Signal, why: str) -> Scalar:
    """The largest magnitude of the entries of a signal; NotLipschitzError if it has no bound."""
    lower, upper = map(_largest, intervals.anywhere(signal))
    if isinstance(lower, float) and isinstance(upper, float):
        found: Scalar = max(lower, upper)
    else:
        found = jnp.maximum(lower, upper)
    if concrete(found) and not np.isfinite(found):
        raise NotLipschitzError(f"{why}, and is not bounded", _BOUNDED)
    return found


def _largest(array: Array, *, inverse: bool = False) -> Scalar:
    """The largest magnitude of the entries, or of their inverses."""
    if concrete(array):
        with jax.ensure_compile_time_eval(), np.errstate(divide="ignore"):
            # The magnitudes are real even of complex numbers, and float64 represents all of them.
            known = np.abs(np.asarray(array)).astype(np.float64)
            return float(np.max(1 / known if inverse else known, initial=0))
    magnitudes = jnp.abs(array)
    magnitudes = magnitudes.astype(jnp.promote_types(magnitudes.dtype, jnp.float32))
    return jnp.max(1 / magnitudes if inverse else magnitudes, initial=0)


def _broadcast(op: Operation) -> Scalar:
    return _spread(op, _only(op))


def _reduce_sum(op: Operation) -> Scalar:
    signal = _only(op)
    return math.sqrt(math.prod(signal.shape[a] for a in op.params["axes"])) * signal.constant


def _convert(op: Operation) -> Scalar:
    new = jnp.dtype(op.params["new_dtype"])
    if jnp.issubdtype(new, jnp.inexact) and new.itemsize > 1:
        # The bound is that of exact arithmetic, which leaves out rounding to 16 bits or more. An
        # 8-bit number is rather a quantisation on purpose.
        return _only(op).constant
    raise NotLipschitzError(f"rounding to {new} is not continuous", OWN_FUNCTION)


def _reduce_precision(op: Operation) -> Scalar:
    info = jnp.finfo(_only(op).dtype)
    kept = op.params["mantissa_bits"] >= info.nmant and op.params["exponent_bits"] >= info.nexp
    if not kept:
        raise NotLipschitzError("rounding to fewer bits is not continuous", OWN_FUNCTION)
    return _only(op).constant


def _elementwise(op: Operation) -> Scalar:
    """A function of the table: its largest slope, for any input or on its operand's interval."""
    row = elementwise.row(op)
    signal = _only(op)
    assert row is not None
    slope: Any = row.slope
    if not math.isfinite(slope):
        slope = _largest(intervals.slope_on(row, intervals.anywhere(signal)))
        if concrete(slope) and not np.isfinite(slope):
            raise NotLipschitzError("its slope is not bounded", _BOUNDED)
    is_one = isinstance(slope, float) and slope == 1
    return signal.constant if is_one else slope * signal.constant


def _sort(op: Operation) -> list[Scalar | NotLipschitzError]:
    """Sorted keys are 1-Lipschitz; operands that are sorted along with them jump."""
    keys = op.inputs[: op.params["num_keys"]]
    if not any(isinstance(key, Signal) for key in keys):
        return [x.constant if isinstance(x, Signal) else 0.0 for x in op.inputs]
    first = keys[0].constant if isinstance(keys[0], Signal) else 0.0
    moved = NotLipschitzError("entries sorted by another operand jump", OWN_FUNCTION)
    return [first, *[moved] * (len(op.inputs) - 1)]


def _select(op: Operation) -> Scalar:
    which, *_ = op.inputs
    if isinstance(which, Signal):
        raise NotLipschitzError("the choice depends on the input of the function", OWN_FUNCTION)
    return _joint(op)


def _transform(op: Operation) -> Scalar:
    """A discrete Fourier transform. In half a spectrum all but two entries stand for two."""
    length = math.prod(op.params["fft_lengths"])
    kind = jax.lax.FftType(op.params["fft_type"]).name
    norms = {
        "FFT": math.sqrt(length),
        "RFFT": math.sqrt(length),
        "IFFT": 1 / math.sqrt(length) if length else 0.0,
        "IRFFT": math.sqrt(2 / length) if length else 0.0,
    }
    if kind not in norms:
        raise NotLipschitzError(f"there is no rule for {kind}", OWN_FUNCTION)
    return norms[kind] * _only(op).constant


def bilinear(op: Operation) -> Scalar:
    """`X Y - X' Y' = X (Y - Y') + (X - X') Y'`, with the Frobenius norms of X and Y'."""
    if op.name != "dot_general":
        raise NotLipschitzError("the kernel depends on the input of the function", OWN_FUNCTION)
    _, batch = op.params["dimension_numbers"]
    norms = []
    for side, signal in enumerate(op.inputs):
        _magnitude(signal, "both factors depend on the input of the function")
        norms.append(_length(intervals.anywhere(signal), batch[side]))
    left, right = op.inputs
    return norms[0] * right.constant + norms[1] * left.constant


@known_now
def _length(interval: Interval, batched: tuple[int, ...]) -> Float[Array, ""]:
    """The largest L2 norm of entries in an interval, over all positions along the batch axes."""
    magnitudes = jnp.maximum(jnp.abs(interval.lower), jnp.abs(interval.upper))
    largest = jnp.max(magnitudes, initial=0)
    # Scaled, so that no square underflows or overflows.
    squares = jnp.square(magnitudes / jnp.where(largest > 0, largest, 1))
    others = tuple(a for a in range(squares.ndim) if a not in batched)
    length = jnp.sqrt(jnp.max(jnp.sum(squares, axis=others), initial=0))
    return largest * length * (1 + squares.size * float(jnp.finfo(squares.dtype).eps))


def _windows(op: Operation) -> list[np.ndarray]:
    """For each axis the matrix (positions, windows) that marks what each window covers."""
    params = op.params
    return [
        _window(*axis)
        for axis in zip(
            _only(op).shape,
            params["window_dimensions"],
            params["window_strides"],
            params["padding"],
            params["base_dilation"],
            params["window_dilation"],
            strict=True,
        )
    ]


def _window(
    size: int,
    window: int,
    stride: int,
    padding: tuple[int, int],
    base_dilation: int,
    dilation: int,
) -> Float[np.ndarray, "positions windows"]:
    low, high = padding
    span = (size - 1) * base_dilation + 1
    outs = max((span + low + high - (window - 1) * dilation - 1) // stride + 1, 0)
    at = np.arange(outs)[:, None] * stride + np.arange(window) * dilation - low
    position, out = np.arange(size) * base_dilation, np.zeros((size, outs))
    for tap in at.T:
        out += position[:, None] == tap
    return out


def _max_pool(op: Operation) -> Scalar:
    # A result changes by at most the largest change in its window, and an entry is in at most
    # `overlap` windows: the squares of the changes are counted as often.
    overlap = math.prod(w.sum(1).max(initial=0) for w in _windows(op))
    constant = _only(op).constant
    return constant if overlap <= 1 else math.sqrt(overlap) * constant


def _sum_pool(op: Operation) -> Scalar:
    # The sum over windows is the Kronecker product of the sums along each axis.
    norm = math.prod(np.linalg.norm(w, 2) if w.size else 0.0 for w in _windows(op))
    return float(norm) * (1 + 1e-12) * _only(op).constant


def _cumsum(op: Operation) -> Scalar:
    signal = _only(op)
    length = signal.shape[op.params["axis"]]
    return float(np.linalg.norm(np.tri(length), 2)) * (1 + 1e-12) * signal.constant


def _gather(op: Operation) -> Scalar:
    """Every index copies an entry: the norm is the root of the largest number of copies."""
    signal, *indices = op.inputs
    _only(op)

    def gather(x: Array) -> Array:
        return jax.lax.gather_p.bind(x, *indices, **op.params)

    like = jax.ShapeDtypeStruct(signal.shape, jnp.float32)
    ones = jnp.ones(op.shape, jnp.float32)
    (copies,) = jax.linear_transpose(gather, like)(ones)
    return jnp.sqrt(jnp.max(copies, initial=0)) * signal.constant


_NONEXPANSIVE = """
    conj copy copy_p dynamic_slice imag pad real reduce_max reduce_min reshape rev slice split
    squeeze stop_gradient transpose unstack
"""

RULES |= {name: _gain(1) for name in _NONEXPANSIVE.split()}
RULES |= {name: _elementwise for name in elementwise.TABLE if hasattr(jax.lax, f"{name}_p")}
RULES |= {
    "clamp": lambda op: _only(op, slice(1, 2)).constant,
    "max": _joint,
    "min": _joint,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "mul": _mul,
    "div": _div,
    "complex": _joint,
    "concatenate": _together,
    "stack": _together,
    "optimization_barrier": _together,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce_sum,
    "convert_element_type": _convert,
    "integer_pow": _elementwise,
    "reduce_precision": _reduce_precision,
    "sort": _sort,
    "top_k": _gain(1),
    "fft": _transform,
    "select_n": _select,
    "reduce_window_max": _max_pool,
    "reduce_window_min": _max_pool,
    "reduce_window_sum": _sum_pool,
    "cumsum": _cumsum,
    "gather": _gather,
}

_HOMOGENEOUS = frozenset(RULES.values())

# Operations whose rule also holds for complex numbers.
_LINEAR_IN_COMPLEX = """
    abs add add_any broadcast_in_dim complex concatenate conj convert_element_type copy copy_p
    cumsum div dot_general dynamic_slice fft gather imag mul neg optimization_barrier pad real
    reduce_sum reshape rev select_n slice split squeeze stack stop_gradient sub transpose unstack
"""
COMPLEX = frozenset(_LINEAR_IN_COMPLEX.split())
