"""The Lipschitz bound of a whole function, read off its jaxpr."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from advjax import checks
from advjax.lipschitz.jaxpr import chains, intervals, patterns, products
from advjax.lipschitz.jaxpr.interpreter import Context, enclosures, interpret
from advjax.lipschitz.jaxpr.rules import (
    COMPLEX,
    ROUNDING,
    RULES,
    Rule,
    bilinear,
    constant,
    constants,
    homogeneous,
)
from advjax.lipschitz.jaxpr.scaled import Scalar, Scaled, largest, scaled, unscaled
from advjax.lipschitz.jaxpr.values import (
    Interval,
    NotLipschitzError,
    Operation,
    Signal,
    concrete,
    known_now,
)
from advjax.lipschitz.linear import layers
from advjax.lipschitz.linear.layers import Conv, Dense
from advjax.lipschitz.linear.lipsdp import ChainBound, Method, lipsdp
from advjax.lipschitz.linear.lipsdp import product as product_of_norms
from advjax.lipschitz.linear.norms import upper_norm
from advjax.types import Box


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One operation of a function that may change distances.

    Attributes:
        name: The modules that it is in and the operation, separated by slashes.
        source: The line of code that it comes from.
        gain: The factor by which it multiplies the largest constant of its inputs; infinite if
            unknown.
        constant: The Lipschitz bound of its result with respect to the function's input.
    """

    name: str = dataclasses.field(metadata={"static": True})
    source: str = dataclasses.field(metadata={"static": True})
    gain: Float[Array, ""]
    constant: Float[Array, ""]


class Bound(NamedTuple):
    """A Lipschitz bound of a function, in L2.

    Attributes:
        constant: `|fn(x) - fn(y)| <= constant |x - y|` for all x and y in question; infinite where
            it exceeds the range of its dtype, as a network of fifty layers may with float32. From
            `pairwise` a matrix, with such a constant for the difference of each two outputs.
        layers: The operations that contribute to the bound, in the order of evaluation.
        radius: The L2 distance from the example inputs within which it holds; infinite without a
            `radius`, and 0 if the example inputs are outside the `box`. A bound with a `box` holds
            between inputs in that box only, whatever the radius.
    """

    constant: Float[Array, "*pairs"]
    layers: tuple[Layer, ...]
    radius: Float[ArrayLike, ""] = math.inf


def bound(
    fn: Callable[..., PyTree[Array]],
    *example_inputs: PyTree[Float[ArrayLike, "..."] | jax.ShapeDtypeStruct],
    method: Method | None = None,
    box: Box | None = None,
    radius: Float[ArrayLike, ""] | None = None,
) -> Bound:
    """Bound the Lipschitz constant of any JAX function, read off its jaxpr.

    Each intermediate result has a constant with respect to the input. A linear layer multiplies it
    by the layer's certified norm, and a sum has at most the sum of the constants of its terms. Of
    `jax.lax.platform_dependent` the default is bounded; all alternatives must compute the same.

    Args:
        fn: A function of arrays. It binds its parameters, as by `functools.partial` or a closure;
            they may be traced, and the bound is differentiable with respect to them.
        *example_inputs: Arrays of the shapes and dtypes of its arguments, or
            `jax.ShapeDtypeStruct`s; the values do not matter without a `radius`.
        method: How to bound a chain of convolutions and dense layers with only biases and
            nondecreasing activations between them: `lipsdp`, `eclipse`, or with options
            `functools.partial(lipsdp, num_steps=500)`. Such a chain is then one layer of the
            breakdown. By default the bound is the product of the norms.
        box: A pair `(lower, upper)` that the inputs lie between, each bound broadcast to each
            input. The bound then holds between any two inputs in the box, and is smaller where a
            unit saturates or stays on one side of its ReLU. By default the inputs are unbounded.
        radius: The largest L2 distance of all inputs together from `example_inputs`. With a box,
            the inputs satisfy both.

    Returns:
        A `Bound`, in L2 over all inputs and all outputs taken together. It is that of the function
        in exact arithmetic: it does not cover the rounding of a function that computes in bfloat16,
        say. The bound itself is computed in float32 at least, and rounded up. It is infinite if a
        traced `box` or `radius` is invalid.

    Raises:
        TypeError: If an input is not floating, or not an array although there is a `radius`.
        ValueError: If `box` is not such a pair, or if a bound or `radius` is invalid: a lower bound
            above the upper, a negative radius, or NaN.
        NotLipschitzError: If an operation on the way to the output has no rule, or no bound. The
            message names the operation and its line, and suggests a fix. It is a `ValueError`.

    Reference: Szegedy et al. (2013), section 4.3, with the corrections of Virmaux and Scaman
    (2018).
    """
    region = _region(fn, example_inputs, box, radius)
    outputs = _outputs(region, method)
    return Bound(_array(_total(outputs)), tuple(_layers(outputs)), region.certifies)


def pairwise(
    fn: Callable[..., PyTree[Array]],
    *example_inputs: PyTree[Float[ArrayLike, "..."] | jax.ShapeDtypeStruct],
    method: Method = lipsdp,
    box: Box | None = None,
    radius: Float[ArrayLike, ""] | None = None,
) -> Bound:
    """Bound the Lipschitz constant of the difference of each two outputs of a function.

    They certify larger radii than the bound of all outputs together: none exceeds `sqrt(2)` times
    that bound.

    Args:
        fn: A function of arrays whose result is one vector, such as logits.
        *example_inputs: Arrays of the shapes and dtypes of its arguments, or
            `jax.ShapeDtypeStruct`s; the values do not matter without a `radius`.
        method: How to bound the chain of layers that the function ends in, such as `lipsdp`.
        box: A pair `(lower, upper)` that the inputs lie between; by default they are unbounded.
        radius: The largest L2 distance of all inputs together from `example_inputs`; by default
            they are unbounded.

    Returns:
        A `Bound` for `certified_radius` whose `constant` is a symmetric matrix. If the function
        does not end in a dense layer, every pair has `sqrt(2)` times the bound of the function.

    Raises:
        TypeError: If an input is not floating, or not an array although there is a `radius`.
        ValueError: If the result is not one vector, or `box` or `radius` is invalid.
        NotLipschitzError: If an operation on the way to the output has no bound.
    """
    out = jax.eval_shape(fn, *example_inputs)
    if not hasattr(out, "shape") or len(out.shape) != 1:
        raise ValueError(f"fn: returns {out}, expected one vector; use jax.vmap for a batch.")
    region = _region(fn, example_inputs, box, radius)
    outputs = _outputs(region, method)
    n, breakdown = out.shape[0], tuple(_layers(outputs))
    if not outputs:
        return Bound(jnp.zeros((n, n)), breakdown, region.certifies)
    dense = chains.last_dense(outputs[0])
    if dense is None:
        steepest = _array(scaled(math.sqrt(2) * ROUNDING * outputs[0].constant))
        pairs = jnp.where(jnp.eye(n, dtype=bool), 0, steepest)
    else:
        chain = chains.ending(dense)
        assert chain is not None
        found = _chain_bound(method, chain).pairs
        pairs = found * chain.start.constant * ROUNDING
        # Round up what underflows, and what is NaN as 0 times infinity.
        tiny = jnp.finfo(pairs.dtype).tiny
        pairs = jnp.where(found > 0, jnp.maximum(pairs, tiny), pairs)
        pairs = jnp.where(jnp.isnan(pairs), jnp.inf, pairs)
    return Bound(pairs, breakdown, region.certifies)


def linear_layers(
    fn: Callable[..., PyTree[Array]],
    *example_inputs: PyTree[Float[ArrayLike, "..."] | jax.ShapeDtypeStruct],
) -> list[layers.Layer]:
    """Find the dense layers and convolutions of a function.

    Args:
        fn: A function of arrays, such as a network with its parameters bound.
        *example_inputs: Arrays of the shapes and dtypes of its arguments, or
            `jax.ShapeDtypeStruct`s.

    Returns:
        A `Dense` or `Conv` for each, in the order of evaluation. Its kernel has a leading axis, of
        size 1 except for a batched product, whose kernels act on different inputs; use `jax.vmap`
        on the layer.
    """
    found = []

    def record(op: Operation, avals: Sequence[Any], function_rule: Rule | None) -> list[Signal]:
        if function_rule is None and products.is_product(op):
            found.append(_stack(products.product(op)))
        return [Signal(a.shape, a.dtype, 1.0, op, op) for a in avals]

    program = jax.make_jaxpr(fn)(*example_inputs)
    inputs = [Signal(v.aval.shape, v.aval.dtype, 1.0) for v in program.jaxpr.invars]
    interpret(program, inputs, Context(record))
    return found


# Where programs meet arrays: the products of a jaxpr as layers


def _layer(product: products.Layer) -> layers.Layer:
    if isinstance(product, products.Product):
        return Dense(product.kernel)
    return Conv(
        product.kernel,
        product.input_shape,
        strides=product.strides,
        padding=product.padding,
        dilation=product.dilation,
        groups=product.groups,
    )


def _stack(product: products.Layer) -> layers.Layer:
    """Convert a product whose kernel has a leading axis to a layer whose kernel has one."""
    return jax.vmap(lambda kernel: _layer(product._replace(kernel=kernel)))(product.kernel)


def _linear(op: Operation) -> Scalar:
    """The rule of products with constant kernels: the largest norm of the layers side by side."""
    if not math.prod(op.shape) or not all(math.prod(jnp.shape(x)) for x in op.inputs):
        return 0.0
    if len(op.signals) == 2:
        return bilinear(op)
    return _largest_norm(_stack(products.product(op))) * op.signals[0].constant


@jax.jit
def _largest_norm(stack: layers.Layer) -> Float[Array, ""]:
    return jnp.max(jax.lax.map(upper_norm, stack))


RULES |= dict.fromkeys(("dot_general", "conv_general_dilated"), homogeneous(_linear))


# The inputs and their region


class _Region(NamedTuple):
    """A traced function and the inputs in question.

    Attributes:
        program: The jaxpr of the function.
        inputs: Its inputs, with the intervals that they lie in.
        radius: Their largest distance from the example; None if unlimited.
        certifies: The radius within which a bound holds: 0 if the example is outside the box.
    """

    program: core.ClosedJaxpr
    inputs: list[Signal]
    radius: Float[Array, ""] | None
    certifies: Float[ArrayLike, ""]


def _region(
    fn: Callable[..., PyTree[Array]],
    example_inputs: Sequence[Any],
    box: Box | None,
    radius: Float[ArrayLike, ""] | None,
) -> _Region:
    leaves = jax.tree.leaves(example_inputs)
    for leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"example_inputs: dtype {jnp.result_type(leaf)}, expected floating inputs; bind "
                "any other argument with functools.partial."
            )
    program = jax.make_jaxpr(fn)(*example_inputs)
    avals = [v.aval for v in program.jaxpr.invars]
    boxes = [None if box is None else _ends(box, aval) for aval in avals]
    valid = [_is_box(ends) for ends in boxes if ends is not None]
    if not _is_true(valid):
        raise ValueError(
            "box: a lower bound above its upper bound, or NaN, expected lower <= upper."
        )
    if radius is None:
        infinite = _unless(valid)
        inputs = [
            Signal(aval.shape, aval.dtype, infinite, interval=ends)
            for aval, ends in zip(avals, boxes, strict=True)
        ]
        return _Region(program, inputs, None, jnp.asarray(math.inf))

    if jnp.shape(radius):
        raise ValueError(f"radius: shape {jnp.shape(radius)}, expected one number; use jax.vmap.")
    if not _is_true([not_negative := _is_not_negative(radius)]):
        raise ValueError(f"radius: {radius}, expected a number of at least 0.")
    radius = jnp.asarray(radius, jnp.result_type(float))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TypeError(
            "example_inputs: shapes, expected arrays: `radius` is a distance from them."
        )
    examples = [_example(leaf, aval) for leaf, aval in zip(leaves, avals, strict=True)]
    numbers = [_is_number(x) for x in examples]
    if not _is_true(numbers):
        raise ValueError("example_inputs: NaN, expected numbers: `radius` is a distance from them.")
    infinite = _unless([*valid, not_negative, *numbers])
    inputs, outside = [], []
    for x, ends, aval in zip(examples, boxes, avals, strict=True):
        # An example outside the box is projected onto it, which brings it no farther from any
        # point of the box: the bound holds there, though it certifies nothing about the example.
        nearest = x if ends is None else _clip(x, ends)
        outside.append(jnp.any(nearest != x))
        centre = Interval(nearest, nearest)
        interval = intervals.widened_by(centre, radius)
        interval = interval if ends is None else intervals.intersection(interval, ends)
        inputs.append(Signal(aval.shape, aval.dtype, infinite, interval=interval, centre=centre))
    certifies = jnp.where(jnp.any(jnp.asarray(outside, bool)), 0, radius)
    return _Region(program, inputs, radius, certifies)


_is_box = known_now(lambda ends: jnp.all(ends.lower <= ends.upper))
_is_not_negative = known_now(lambda radius: jnp.asarray(radius) >= 0)
_is_number = known_now(lambda x: ~jnp.any(jnp.isnan(x)))
_clip = known_now(lambda x, ends: jnp.clip(x, ends.lower, ends.upper))


@known_now
def _example(leaf: Float[ArrayLike, "*shape"], aval: Any) -> Float[Array, "*shape"]:
    return jnp.asarray(leaf, aval.dtype).astype(jnp.promote_types(aval.dtype, jnp.float32))


@known_now
def _ends(box: Box, aval: Any) -> Interval:
    """The box as an interval for one input, rounded outwards."""
    dtype = jnp.promote_types(aval.dtype, jnp.float32)
    like = jnp.zeros(aval.shape, dtype)
    lower, upper = (like + end for end in checks.box(box, like))
    if aval.dtype != dtype:  # bfloat16 inputs may have been clipped to the box as bfloat16
        low, high = (end.astype(aval.dtype).astype(dtype) for end in (lower, upper))
        inverted = lower > upper  # left as it is, to be reported as an error
        lower, upper = (
            jnp.where(inverted, lower, jnp.minimum(lower, low)),
            jnp.where(inverted, upper, jnp.maximum(upper, high)),
        )
    # A bound such as 0.1 has been rounded to nearest, which may be inside the box.
    return Interval(
        jnp.where(lower < upper, jnp.nextafter(lower, -jnp.inf), lower),
        jnp.where(lower < upper, jnp.nextafter(upper, jnp.inf), upper),
    )


def _is_true(conditions: Sequence[Array]) -> bool:
    """Whether all conditions that are known now are true."""
    return all(bool(condition) for condition in conditions if concrete(condition))


def _unless(conditions: Sequence[Array]) -> Scalar:
    """The constant of an input: 1, or infinite where a traced condition turns out false."""
    traced = [condition for condition in conditions if not concrete(condition)]
    return jnp.where(functools.reduce(jnp.logical_and, traced), 1, jnp.inf) if traced else 1.0


def _outputs(region: _Region, method: Method | None) -> list[Signal]:
    """The results of a function that depend on its inputs."""
    context = Context(functools.partial(_apply, method, region.radius))
    results = interpret(region.program, region.inputs, context)
    outputs = [x for x in results if isinstance(x, Signal)]
    for signal in outputs:
        if signal.reason:
            raise NotLipschitzError(signal.reason)
    return outputs


def _total(outputs: Sequence[Signal]) -> Scaled:
    """The constant of all outputs together."""
    if not outputs:
        return scaled(0.0)
    total = constant(Operation("", tuple(outputs), {}, ()), RULES["concatenate"])
    return scaled(total.mantissa * ROUNDING, total.exponent)


def _array(number: Scaled) -> Float[Array, ""]:
    return jnp.asarray(unscaled(number), jnp.result_type(float))


def _apply(
    method: Method | None,
    radius: Float[ArrayLike, ""] | None,
    op: Operation,
    avals: Sequence[Any],
    function_rule: Rule | None,
) -> list[Signal]:
    """Bound the results of an operation, by a pattern that it completes or by its rule."""
    is_primitive = function_rule is None
    found = patterns.match(op, avals[0]) if is_primitive else None
    layer, rule = op, RULES.get(op.name) if is_primitive else function_rule
    if found is not None:
        layer, gain = found
        rule = _times(gain)
    slope = chains.local_slope(layer) if is_primitive else None
    if isinstance(slope, jax.Array):
        rule = _times(jnp.max(slope, initial=0))
    reason = next((s.reason for s in layer.signals if s.reason), "")
    values: Sequence[Scaled | Callable[[], Scaled] | NotLipschitzError]
    values = [scaled(math.inf)] * len(avals)
    if reason:
        pass
    elif rule is None:
        reason = _unsupported(op, "there is no rule for it")
    elif is_primitive and layer is op and op.name not in COMPLEX and _is_complex(op, avals):
        reason = _unsupported(op, "there is no rule for it in complex numbers")
    elif method is not None and chains.is_link(layer):
        # Evaluated when it is needed: only the last layer of a chain is asked for its constant.
        layer, rule = _chained(method, layer, rule)
        values = [functools.partial(constant, layer, rule)]
    else:
        try:
            values = constants(layer, rule, len(avals))
        except NotLipschitzError as error:
            reason = _unsupported(op, str(error), error.remedy)
    interval = centre = None
    if is_primitive and not reason:
        interval, centre = _location(op, radius)

    def result(aval: Any, value: Any) -> Signal:
        why = reason
        if isinstance(value, NotLipschitzError):
            why = _unsupported(op, str(value), value.remedy)
        elif not why and not jnp.issubdtype(aval.dtype, jnp.inexact):
            why = _unsupported(op, f"a result of dtype {aval.dtype} is not continuous")
        found = scaled(math.inf) if why else value
        return Signal(aval.shape, aval.dtype, found, op, layer, why, interval, centre)

    return [result(*each) for each in zip(avals, values, strict=True)]


def _is_complex(op: Operation, avals: Sequence[Any]) -> bool:
    dtypes = [x.dtype for x in (*op.signals, *avals)]
    return any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes)


def _location(
    op: Operation, radius: Float[ArrayLike, ""] | None
) -> tuple[Interval | None, Interval | None]:
    """Enclose the entries of a result, and use the radius where that gives smaller intervals."""
    interval, centre = enclosures(op)
    if interval is not None and centre is not None and radius is not None:
        chain = chains.ending(op)
        if chain is not None:
            # An entry changes by at most its own Lipschitz constant times the radius.
            lengths = (
                product_of_norms(_layers_of(chain), chain.slopes).outputs * chain.start.constant
            )
            reach = chains.along_units(op, lengths * radius * ROUNDING)
            interval = intervals.intersection(interval, intervals.widened_by(centre, reach))
    return interval, centre


def _times(gain: Scalar) -> Rule:
    return homogeneous(lambda layer: gain * layer.signals[0].constant)


def _chained(method: Method, op: Operation, rule: Rule) -> tuple[Operation, Rule]:
    """Replace an operation by the whole chain that ends in it, if that has several layers."""
    chain = chains.ending(op)
    if chain is None or len(chain.layers) == 1:
        return op, rule
    layer = op._replace(name=f"{op.name} ({len(chain.layers)} layers)", inputs=(chain.start,))
    return layer, homogeneous(
        lambda layer: _chain_bound(method, chain).constant * layer.inputs[0].constant
    )


def _layers_of(chain: chains.Chain) -> list[layers.Layer]:
    return [_layer(product) for product in chain.layers]


def _chain_bound(method: Method, chain: chains.Chain) -> ChainBound:
    found = method(_layers_of(chain), chain.steepest)
    if chain.slopes is chain.steepest:
        return found
    # Smaller slopes may give a larger bound, as the method finds other multipliers: take the least.
    return jax.tree.map(jnp.minimum, found, method(_layers_of(chain), chain.slopes))


def _unsupported(op: Operation, why: str, remedy: str = "") -> str:
    where = " ".join(filter(None, [op.label and f"in {op.label}", op.source and f"at {op.source}"]))
    remedy = remedy or (
        f'Register its constant with lipschitz.register_rule("{op.name}", rule), or wrap the code '
        "around it in a function under jax.jit and register a rule for that."
    )
    return f"{op.name} {where or 'at an unknown line'}: {why}. {remedy}"


def _layers(outputs: Sequence[Signal]) -> Iterator[Layer]:
    """Walk back from the outputs: the operations that change the constant, in evaluation order."""
    seen: set[int] = set()
    stack: list[tuple[Signal, bool]] = [(signal, False) for signal in reversed(outputs)]
    while stack:
        signal, ready = stack.pop()
        op = signal.layer
        if op is None or (not ready and id(signal) in seen):
            continue
        if not ready:
            seen.add(id(signal))
            stack.append((signal, True))
            stack.extend((s, False) for s in reversed(op.signals))
        elif not any(signal.scaled is s.scaled for s in op.signals):
            before = largest([s.scaled for s in op.signals])
            name = "/".join(filter(None, [op.label, op.name]))
            after = jnp.asarray(signal.constant)
            yield Layer(name, op.source, _gain(signal.scaled, before, after), after)


def _gain(after: Scaled, before: Scaled, constant: Float[Array, ""]) -> Float[Array, ""]:
    """The ratio of two constants; infinite where the first exceeds its dtype."""
    positive = jnp.asarray(before.mantissa) > 0
    ratio = jnp.asarray(after.mantissa) / jnp.where(positive, before.mantissa, 1)
    gain = unscaled(scaled(ratio, after.exponent - before.exponent))
    return jnp.where(jnp.isfinite(constant), jnp.where(positive, gain, 0), jnp.inf)
