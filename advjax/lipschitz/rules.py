"""How each primitive acts on Lipschitz constants, and the table of them.

A rule takes an `Operation` and returns a constant, in L2, that holds for each of its results. Where
it returns the very constant of an input, the operation is not listed as a layer.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from advjax.lipschitz.convolution import Convolution
from advjax.lipschitz.norms import Dense, Linear, conv, upper_norm
from advjax.lipschitz.signals import Operation, Scalar, Signal, concrete

Rule = Callable[[Operation], Scalar]

ROUNDING = 1 + 2.0**-20  # more than the few roundings of one rule, in float32

RULES: dict[str, Rule] = {}
FUNCTION_RULES: dict[str, Rule] = {}


class NotLipschitzError(ValueError):
    """An operation has no Lipschitz constant that holds for every input, or none is known."""


def register_rule(operation: str | Callable, rule: Rule) -> None:
    """Tell `bound` how an operation acts on Lipschitz constants.

    The rule is trusted: the bound is as right as it is. For an elementwise function of slope at
    most 2, say:

        register_rule("my_primitive", lambda op: 2 * op.inputs[0].constant)

    Args:
        operation: The name of a primitive as the error message gives it, or a function under
            `jax.jit` (or `jax.custom_jvp`), which is then recognised by its name and not looked
            into.
        rule: From an `Operation` to a Lipschitz constant of its results with respect to the
            input of the whole function, made from `op.inputs`, each a `Signal` with its `constant`
            or an array. It replaces a rule that is there.

    Raises:
        TypeError: If `operation` is neither a string nor a named function.
    """
    if isinstance(operation, str):
        RULES[operation] = rule
    elif callable(operation) and hasattr(operation, "__name__"):
        FUNCTION_RULES[operation.__name__] = rule
    else:
        raise TypeError(
            f"operation: {operation!r}, expected the name of a primitive or a jitted function."
        )


def _only(op: Operation, allowed: slice = slice(1)) -> Signal:
    """The one signal among the inputs, which must be among the allowed ones."""
    rest = op.signals
    if len(rest) != 1 or not any(x is rest[0] for x in op.inputs[allowed]):
        raise NotLipschitzError("more than its operand depends on the input of the function")
    return rest[0]


def _gain(factor: float) -> Rule:
    def rule(op):
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
    """Results of which each entry is one of the inputs' entries, or 1-Lipschitz in them."""
    return _hypot(*(_spread(op, signal) for signal in op.signals))


def _together(op: Operation) -> Scalar:
    return _hypot(*(signal.constant for signal in op.signals))


def _mul(op: Operation) -> Scalar:
    if len(op.signals) > 1:
        raise NotLipschitzError("both factors depend on the input of the function")
    left, right = op.inputs
    signal, factor = (left, right) if isinstance(left, Signal) else (right, left)
    return _spread(op, signal) * _largest(factor)


def _div(op: Operation) -> Scalar:
    numerator, denominator = op.inputs
    if isinstance(denominator, Signal):
        raise NotLipschitzError("the denominator depends on the input of the function")
    return _spread(op, numerator) * _largest(1 / jnp.asarray(denominator))


def _largest(array: Array) -> Scalar:
    if concrete(array):
        with jax.ensure_compile_time_eval():
            return float(np.max(np.abs(np.asarray(array, np.float64)), initial=0))
    return jnp.max(jnp.abs(array), initial=0)


def _broadcast(op: Operation) -> Scalar:
    return _spread(op, _only(op))


def _reduce_sum(op: Operation) -> Scalar:
    signal = _only(op)
    return math.sqrt(math.prod(signal.shape[a] for a in op.params["axes"])) * signal.constant


def _convert(op: Operation) -> Scalar:
    if not jnp.issubdtype(op.params["new_dtype"], jnp.floating):
        raise NotLipschitzError("rounding to integers is not continuous")
    return _only(op).constant


def _integer_pow(op: Operation) -> Scalar:
    if op.params["y"] != 1:
        raise NotLipschitzError("its slope has no bound")
    return _only(op).constant


def _select(op: Operation) -> Scalar:
    which, *_ = op.inputs
    if isinstance(which, Signal):
        raise NotLipschitzError("the choice depends on the input of the function")
    return _joint(op)


def _linear(op: Operation) -> Scalar:
    layer, kernels = linear_layer(op)
    return _largest_norm(layer, kernels) * op.signals[0].constant


@functools.partial(jax.jit, static_argnums=0)
def _largest_norm(
    layer: Dense | Convolution, kernels: Float[Array, "blocks *kernel"]
) -> Float[Array, ""]:
    return jnp.max(jax.lax.map(functools.partial(upper_norm, layer), kernels))


def linear_layer(op: Operation) -> tuple[Dense | Convolution, Float[Array, "blocks *kernel"]]:
    """The layer that a product or a convolution is, and its kernels, that see different inputs."""
    return LINEAR[op.name](op)


def _dot_general(op: Operation) -> tuple[Dense, Float[Array, "blocks in out"]]:
    if len(op.signals) > 1:
        raise NotLipschitzError("both factors depend on the input of the function")
    contract, batch = op.params["dimension_numbers"]
    side = 0 if isinstance(op.inputs[1], Signal) else 1
    kernel = op.inputs[side]
    contracted, batched = contract[side], batch[side]
    free = [a for a in range(kernel.ndim) if a not in (*contracted, *batched)]
    kernel = jnp.transpose(kernel, (*batched, *contracted, *free))
    rows = math.prod(kernel.shape[len(batched) : len(batched) + len(contracted)])
    blocks = math.prod(kernel.shape[: len(batched)])
    # The axes that only the signal has repeat the product, which does not change the norm.
    return Dense(), kernel.reshape(blocks, rows, -1)


def _convolution(op: Operation) -> tuple[Dense | Convolution, Float[Array, "1 *window in out"]]:
    kernel, layer = convolution(op)
    return layer, kernel[None]


def convolution(op: Operation) -> Linear:
    """The convolution that an operation is; NotLipschitzError if it is another function."""
    params = op.params
    signal = op.inputs[0]
    if isinstance(op.inputs[1], Signal):
        raise NotLipschitzError("the kernel depends on the input of the function")
    if params["batch_group_count"] != 1:
        raise NotLipschitzError("batch_group_count is not supported")
    lhs, rhs, _ = params["dimension_numbers"]
    kernel = jnp.transpose(op.inputs[1], (*rhs[2:], rhs[1], rhs[0]))
    # Zeros put between the pixels leave the norm of the image as it is.
    size = [
        max((signal.shape[axis] - 1) * d + 1, 0)
        for axis, d in zip(lhs[2:], params["lhs_dilation"], strict=True)
    ]
    return conv(
        kernel,
        (*size, signal.shape[lhs[1]]),
        strides=params["window_strides"],
        padding=params["padding"],
        dilation=params["rhs_dilation"],
        groups=params["feature_group_count"],
    )


LINEAR: dict[str, Callable[[Operation], tuple[Dense | Convolution, Array]]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}


def _windows(op: Operation) -> list[np.ndarray]:
    """For each axis the matrix (positions, windows) of what each window covers."""
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


def _window(size, window, stride, padding, base_dilation, dilation):
    low, high = padding
    span = (size - 1) * base_dilation + 1
    outs = max((span + low + high - (window - 1) * dilation - 1) // stride + 1, 0)
    at = np.arange(outs)[:, None] * stride + np.arange(window) * dilation - low
    position, out = np.arange(size) * base_dilation, np.zeros((size, outs))
    for tap in at.T:
        out += position[:, None] == tap
    return out


def _max_pool(op: Operation) -> Scalar:
    # A result moves by no more than the largest move in its window, and an entry is in so many.
    overlap = math.prod(w.sum(1).max(initial=0) for w in _windows(op))
    constant = _only(op).constant
    return constant if overlap <= 1 else math.sqrt(overlap) * constant


def _sum_pool(op: Operation) -> Scalar:
    # The Kronecker product of the sums along each axis.
    norm = math.prod(np.linalg.norm(w, 2) if w.size else 0.0 for w in _windows(op))
    return float(norm) * (1 + 1e-12) * _only(op).constant


def _cumsum(op: Operation) -> Scalar:
    signal = _only(op)
    length = signal.shape[op.params["axis"]]
    return float(np.linalg.norm(np.tri(length), 2)) * (1 + 1e-12) * signal.constant


def _gather(op: Operation) -> Scalar:
    """As many copies of an entry as the indices ask for."""
    signal, *indices = op.inputs
    _only(op)

    def gather(x):
        return jax.lax.gather_p.bind(x, *indices, **op.params)

    like = jax.ShapeDtypeStruct(signal.shape, jnp.float32)
    ones = jnp.ones(op.shape, jnp.float32)
    (copies,) = jax.linear_transpose(gather, like)(ones)
    return jnp.sqrt(jnp.max(copies, initial=0)) * signal.constant


_NONEXPANSIVE = """
    abs asinh atan copy copy_p cos dynamic_slice neg pad real reduce_max reduce_min
    reduce_precision reshape rev sin slice sort split squeeze stop_gradient tanh transpose
    unstack
"""

RULES |= {name: _gain(1) for name in _NONEXPANSIVE.split()}
RULES |= {
    "clamp": lambda op: _only(op, slice(1, 2)).constant,
    "logistic": _gain(1 / 4),
    "erf": _gain(2 / math.sqrt(math.pi)),
    "erfc": _gain(2 / math.sqrt(math.pi)),
    "max": _joint,
    "min": _joint,
    "add": _sum,
    "add_any": _sum,
    "sub": _sum,
    "mul": _mul,
    "div": _div,
    "concatenate": _together,
    "stack": _together,
    "optimization_barrier": _together,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce_sum,
    "convert_element_type": _convert,
    "integer_pow": _integer_pow,
    "select_n": _select,
    **dict.fromkeys(LINEAR, _linear),
    "reduce_window_max": _max_pool,
    "reduce_window_min": _max_pool,
    "reduce_window_sum": _sum_pool,
    "cumsum": _cumsum,
    "gather": _gather,
}
