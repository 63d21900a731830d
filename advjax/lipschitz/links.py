"""Chains of dense layers, as they are found in a jaxpr from their last layer back."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from advjax.lipschitz.intervals import largest_slope
from advjax.lipschitz.patterns import SELU_SLOPE
from advjax.lipschitz.signals import Operation, Signal

# Elementwise and nondecreasing, with the largest slope.
_SLOPES = {
    **dict.fromkeys(["max", "min", "clamp", "tanh", "atan", "asinh"], 1.0),
    **dict.fromkeys(["softplus", "celu", "soft_sign", "hard_tanh"], 1.0),
    **dict.fromkeys(["add", "add_any", "sub", "copy", "copy_p", "stop_gradient"], 1.0),
    "logistic": 1 / 4,
    "erf": 2 / math.sqrt(math.pi) * (1 + 2.0**-23),
    "selu": SELU_SLOPE,
}
_ORDERED = ("clamp", "sub")  # nondecreasing in one of their operands only
_SHIFTS = ("add", "add_any", "sub", "copy", "copy_p")


Slope = Float[Array, "*units"] | float


class Chain(NamedTuple):
    """Dense layers, and the largest slopes between them.

    Attributes:
        start: What the first is applied to.
        kernels: Of each layer.
        slopes: Of what is between each two; of each unit, where the bound is a local one.
        steepest: The same for a bound that is not.
    """

    start: Signal
    kernels: tuple[Float[Array, "in out"], ...]
    slopes: tuple[Slope, ...]
    steepest: tuple[float, ...]


def ending(op: Operation) -> Chain | None:
    """The longest chain whose last dense layer is an operation; None unless it is one."""
    dense = _dense(op)
    if dense is None:
        return None
    signal, kernel, axis = dense[:3]
    kernels = [kernel]
    slopes: list[tuple[Slope, float]] = []
    while True:
        behind, slope, steepest = _activated(signal)
        dense = None if behind.operation is None else _dense(behind.operation)
        if dense is None or dense[3] != axis:
            here, anywhere = zip(*slopes[::-1], strict=True) if slopes else ((), ())
            is_global = all(isinstance(slope, float) for slope in here)
            return Chain(signal, tuple(kernels[::-1]), anywhere if is_global else here, anywhere)
        slopes.append((_of_units(slope, axis), steepest))
        signal, kernel, axis = dense[:3]
        kernels.append(kernel)


def along_units(op: Operation, values: Float[Array, " units"]) -> Float[Array, "*units"]:
    """Values for the units of a dense layer, shaped to be broadcast to its result."""
    dense = _dense(op)
    assert dense is not None
    return jnp.expand_dims(values, tuple(a for a in range(len(op.shape)) if a != dense[3]))


def is_link(op: Operation) -> bool:
    """Whether an operation may be part of a chain."""
    return _dense(op) is not None or _slope(op) is not None


def last_dense(signal: Signal) -> Operation | None:
    """The dense layer that a signal is but for a bias."""
    behind, *_ = _activated(signal, _SHIFTS)
    op = behind.operation
    return op if op is not None and _dense(op) is not None else None


def _dense(op: Operation) -> tuple[Signal, Any, int, int] | None:
    """The signal, the kernel (in, out), and the axes of the features before and behind it."""
    if op.name != "dot_general" or len(op.signals) != 1:
        return None
    contract, batch = op.params["dimension_numbers"]
    side = 0 if isinstance(op.inputs[1], Signal) else 1
    kernel, signal = op.inputs[side], op.inputs[1 - side]
    if batch[0] or len(contract[0]) != 1 or kernel.ndim != 2:
        return None
    (before,), (rows,) = contract[1 - side], contract[side]
    behind = len(op.shape) - 1 if side == 1 else 0
    return signal, kernel if rows == 0 else kernel.T, before, behind


def local_slope(op: Operation) -> Slope | None:
    """The largest slope of an elementwise operation where the bound is asked for, by entries."""
    steepest = _slope(op)
    return None if steepest is None else largest_slope(op, steepest)


def _slope(op: Operation, names: Any = _SLOPES) -> float | None:
    """The largest slope of an elementwise operation; None unless it is one."""
    if op.name not in names or len(op.signals) != 1 or op.signals[0].shape != op.shape:
        return None
    if op.inputs[1 if op.name == "clamp" else 0] is not op.signals[0] and op.name in _ORDERED:
        return None
    if op.params.keys() & {"jaxpr", "call_jaxpr"}:  # a registered function, of any meaning
        return None
    return _SLOPES[op.name]


def _of_units(slope: Slope, axis: int) -> Slope:
    """The largest slope of each unit, which are along an axis."""
    if isinstance(slope, float):
        return slope
    return jnp.max(slope, axis=tuple(a for a in range(slope.ndim) if a != axis), initial=0)


def _activated(signal: Signal, names: Any = _SLOPES) -> tuple[Signal, Slope, float]:
    """What a signal is an elementwise function of, and the largest slopes of that."""
    local: Slope = 1.0
    total = 1.0
    while signal.layer is not None:
        slope = _slope(signal.layer, names)
        if slope is None:
            break
        total *= slope
        local = local * largest_slope(signal.layer, slope)
        (signal,) = signal.layer.signals
    return signal, local, total
