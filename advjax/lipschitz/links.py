"""Chains of dense layers, as they are found in a jaxpr from their last layer back."""

import math
from typing import Any, NamedTuple

from jaxtyping import Array, Float

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


class Chain(NamedTuple):
    """Dense layers, and the largest slopes between them.

    Attributes:
        start: What the first is applied to.
        kernels: Of each layer.
        slopes: Of what is between each two.
    """

    start: Signal
    kernels: tuple[Float[Array, "in out"], ...]
    slopes: tuple[float, ...]


def ending(op: Operation) -> Chain | None:
    """The longest chain whose last dense layer is an operation; None unless it is one."""
    dense = _dense(op)
    if dense is None:
        return None
    signal, kernel, axis = dense[:3]
    kernels = [kernel]
    slopes: list[float] = []
    while True:
        behind, slope = _activated(signal)
        dense = None if behind.operation is None else _dense(behind.operation)
        if dense is None or dense[3] != axis:
            return Chain(signal, tuple(kernels[::-1]), tuple(slopes[::-1]))
        signal, kernel, axis = dense[:3]
        kernels.append(kernel)
        slopes.append(slope)


def is_link(op: Operation) -> bool:
    """Whether an operation may be part of a chain."""
    return _dense(op) is not None or _slope(op) is not None


def last_dense(signal: Signal) -> Operation | None:
    """The dense layer that a signal is but for a bias."""
    behind, slope = _activated(signal, _SHIFTS)
    op = behind.operation
    return op if op is not None and _dense(op) is not None and slope == 1 else None


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


def _slope(op: Operation, names: Any = _SLOPES) -> float | None:
    """The largest slope of an elementwise operation; None unless it is one."""
    if op.name not in names or len(op.signals) != 1 or op.signals[0].shape != op.shape:
        return None
    if op.inputs[1 if op.name == "clamp" else 0] is not op.signals[0] and op.name in _ORDERED:
        return None
    if op.params.keys() & {"jaxpr", "call_jaxpr"}:  # a registered function, of any meaning
        return None
    return _SLOPES[op.name]


def _activated(signal: Signal, names: Any = _SLOPES) -> tuple[Signal, float]:
    """What a signal is an elementwise function of, and the largest slope of that."""
    total = 1.0
    while signal.layer is not None:
        slope = _slope(signal.layer, names)
        if slope is None:
            break
        total *= slope
        (signal,) = signal.layer.signals
    return signal, total
