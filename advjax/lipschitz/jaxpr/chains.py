"""Chains of convolutions and dense layers, found in a jaxpr from their last layer back."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from advjax.lipschitz.jaxpr import elementwise
from advjax.lipschitz.jaxpr.intervals import largest_slope
from advjax.lipschitz.jaxpr.products import Layer, Product, Window, convolution, product
from advjax.lipschitz.jaxpr.values import Operation, Signal

# Elementwise and nondecreasing, with the largest slope.
_SLOPES = {
    **{
        name: row.slope
        for name, row in elementwise.TABLE.items()
        if row.increasing and math.isfinite(row.slope)
    },
    "celu": elementwise.PARAMETRIC["celu"].row(1.0).slope,  # that of every celu that increases
    **dict.fromkeys(["max", "min", "clamp"], 1.0),
    **dict.fromkeys(["add", "add_any", "sub", "copy", "copy_p", "stop_gradient"], 1.0),
}
_ONE_SIDED = ("clamp", "sub")  # nondecreasing in one of their operands only
_SHIFTS = ("add", "add_any", "sub", "copy", "copy_p")
_REARRANGEMENTS = ("reshape", "squeeze", "broadcast_in_dim", "transpose")

Slope = Float[Array, "*units"] | float


class Chain(NamedTuple):
    """Convolutions and dense layers, and the largest slopes between them.

    Attributes:
        start: The operand of the first layer.
        layers: The layers, convolutions before dense layers.
        slopes: The largest slope between each two layers, for the inputs in question; in a local
            bound one for each unit.
        steepest: The largest slope between each two layers, for any input.
    """

    start: Signal
    layers: tuple[Layer, ...]
    slopes: tuple[Slope, ...]
    steepest: tuple[float, ...]


class _Link(NamedTuple):
    """An operation that applies a layer to each example along its other axes.

    Attributes:
        signal: The operand.
        layer: The layer.
        inputs: The axes of the operand that hold one example, in the layer's order.
        outputs: The same axes of the result.
    """

    signal: Signal
    layer: Layer
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def ending(op: Operation) -> Chain | None:
    """Find the longest chain that ends in an operation; None if the operation is not a layer."""
    link = _link(op)
    if link is None:
        return None
    layers: list[Layer] = []
    slopes: list[tuple[Slope, float]] = []
    while (join := _join(link)) is not None:
        layers.append(join.layer)
        slopes.append((join.slope, join.steepest))
        link = join.before
    here, anywhere = zip(*slopes[::-1], strict=True) if slopes else ((), ())
    is_global = all(isinstance(slope, float) for slope in here)
    chain = (link.layer, *layers[::-1])
    return Chain(link.signal, chain, anywhere if is_global else here, anywhere)


def along_units(op: Operation, values: Float[Array, " units"]) -> Float[Array, "*units"]:
    """Reshape values for the units or channels of a layer to broadcast with its result."""
    link = _link(op)
    assert link is not None
    return jnp.expand_dims(values, tuple(a for a in range(len(op.shape)) if a != link.outputs[-1]))


def is_link(op: Operation) -> bool:
    """Whether an operation may be part of a chain."""
    return _link(op) is not None or _slope(op) is not None or _is_rearrangement(op)


def last_dense(signal: Signal) -> Operation | None:
    """The dense layer that computes a value, ignoring biases."""
    while signal.layer is not None and _slope(signal.layer, _SHIFTS) is not None:
        (signal,) = signal.layer.signals
    op = signal.operation
    return op if op is not None and _dense(op) is not None else None


# Layers


def _link(op: Operation) -> _Link | None:
    if not all(math.prod(shape) for shape in (op.shape, *map(np.shape, op.inputs))):
        return None  # a layer without entries ends a chain: its constant is 0
    return _dense(op) or _convolution(op)


def _dense(op: Operation) -> _Link | None:
    if op.name != "dot_general" or len(op.signals) != 1:
        return None
    contract, batch = op.params["dimension_numbers"]
    side = 0 if isinstance(op.inputs[1], Signal) else 1
    kernel, signal = op.inputs[side], op.inputs[1 - side]
    is_real = jnp.issubdtype(jnp.result_type(kernel), jnp.floating)
    if batch[0] or len(contract[0]) != 1 or kernel.ndim != 2 or not is_real:
        return None
    (matrix,) = product(op).kernel
    units = len(op.shape) - 1 if side == 1 else 0
    return _Link(signal, Product(matrix), tuple(contract[1 - side]), (units,))


def _convolution(op: Operation) -> _Link | None:
    if op.name != "conv_general_dilated" or len(op.signals) != 1:
        return None
    params, signal = op.params, op.inputs[0]
    if signal is not op.signals[0] or params["batch_group_count"] != 1:
        return None
    if any(dilation != 1 for dilation in params["lhs_dilation"]):
        return None
    before, _, after = params["dimension_numbers"]
    axes = ((*spec[2:], spec[1]) for spec in (before, after))
    return _Link(signal, convolution(op), *axes)


# Between two layers


class _Join(NamedTuple):
    """Two layers with nothing but biases and activations between them.

    Attributes:
        before: The first layer.
        layer: The second layer, with its inputs in the order of the first one's outputs.
        slope: The largest slope between them, for the inputs in question; in a local bound one for
            each unit.
        steepest: The largest slope between them, for any input.
    """

    before: _Link
    layer: Layer
    slope: Slope
    steepest: float


def _join(link: _Link) -> _Join | None:
    """The layer before a layer; None if another operation is between them, or none before it."""
    signal, between = link.signal, []
    while signal.layer is not None and (
        _slope(signal.layer) is not None or _is_rearrangement(signal.layer)
    ):
        between.append(signal.layer)
        (signal,) = signal.layer.signals
    before = None if signal.operation is None else _link(signal.operation)
    if before is None:
        return None
    # Number the results of the layer before, and rearrange the numbers as the program does.
    places = made = np.arange(signal.size).reshape(signal.shape)
    local: Slope = 1.0
    steepest = 1.0
    for op in between[::-1]:
        slope = _slope(op)
        if slope is None:
            places = _rearranged(op, places)
            continue
        steepest *= slope
        here = largest_slope(op, slope)
        if isinstance(here, jax.Array):
            here = jnp.zeros(signal.size, here.dtype).at[places.ravel()].set(here.ravel())
        local = local * here
    layer = _taking(link, before, _rows(places, link.inputs), _rows(made, before.outputs))
    if layer is None:
        return None
    if isinstance(before.layer, Window):
        # A channel has one slope, and one of its many pixels nearly always has the largest.
        local = steepest
    elif isinstance(local, jax.Array):
        local = jnp.max(_rows(local.reshape(signal.shape), before.outputs), axis=0, initial=0)
    return _Join(before, layer, local, steepest)


def _taking(
    link: _Link,
    before: _Link,
    taken: Int[np.ndarray, "examples units"],
    made: Int[np.ndarray, "others outputs"],
) -> Layer | None:
    """Reorder a layer's inputs to match the outputs of the layer before.

    Args:
        link: The layer.
        before: The layer before it.
        taken: For each example of the layer, the numbers of the results that it reads.
        made: For each example of the layer before, the numbers of its results.

    Returns:
        The layer; None if one of its examples reads several examples of the layer before, if
        examples differ in their order, or if a convolution's inputs are not in order.
    """
    numbers = np.empty(made.size, int)
    numbers[made] = np.arange(made.size).reshape(made.shape)
    examples, units = np.divmod(numbers[taken], made.shape[1])
    order = units[0] if len(units) else units
    same = np.all(examples == examples[:, :1]) and np.all(units == order)
    if taken.shape[1] != made.shape[1] or not same:
        return None
    if isinstance(link.layer, Product):
        return Product(link.layer.kernel[np.argsort(order)])
    is_image = before.layer.output_shape == link.layer.input_shape
    return link.layer if is_image and np.all(order == np.arange(len(order))) else None


def _rows(array: Any, axes: tuple[int, ...]) -> Any:
    """Reshape an array to rows that run along some axes, in the order given."""
    others = [a for a in range(array.ndim) if a not in axes]
    row = math.prod(array.shape[a] for a in axes)
    return array.transpose(*others, *axes).reshape(-1, row)


def local_slope(op: Operation) -> Slope | None:
    """The largest slope of each entry of an elementwise operation, for the inputs in question."""
    steepest = _slope(op)
    return None if steepest is None else largest_slope(op, steepest)


def _slope(op: Operation, names: Any = _SLOPES) -> float | None:
    """The largest slope, for any input, of a nondecreasing elementwise operation; else None."""
    if op.name not in names or len(op.signals) != 1 or op.signals[0].shape != op.shape:
        return None
    if op.inputs[1 if op.name == "clamp" else 0] is not op.signals[0] and op.name in _ONE_SIDED:
        return None
    if op.params.keys() & {"jaxpr", "call_jaxpr"}:  # a registered function of the same name
        return None
    return _SLOPES[op.name]


def _is_rearrangement(op: Operation) -> bool:
    """Whether the result has each entry of the one signal exactly once."""
    if op.name not in _REARRANGEMENTS or len(op.signals) != 1:
        return False
    return op.signals[0].size == math.prod(op.shape) and op.params.get("dimensions") is None


def _rearranged(op: Operation, entries: np.ndarray) -> np.ndarray:
    if op.name == "transpose":
        return entries.transpose(op.params["permutation"])
    return entries.reshape(op.shape)
