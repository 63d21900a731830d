"""The Lipschitz bound of a whole function, read off its jaxpr."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from advjax import checks
from advjax.lipschitz import intervals, links, patterns
from advjax.lipschitz.chains import ChainBound, Method, lipsdp, product
from advjax.lipschitz.convolution import Convolution
from advjax.lipschitz.norms import Dense
from advjax.lipschitz.rules import (
    LINEAR,
    ROUNDING,
    RULES,
    NotLipschitzError,
    Rule,
    linear_layer,
)
from advjax.lipschitz.signals import Interval, Operation, Scalar, Signal
from advjax.lipschitz.walk import Context, largest, walk
from advjax.types import Box


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One operation of a function that changes distances, or may.

    Attributes:
        name: The operation, after the names of the modules that it is in.
        source: The line of code that made it.
        gain: By how much it multiplies the largest constant of its inputs; infinite if unknown.
        constant: The bound from the input of the function up to here.
    """

    name: str = dataclasses.field(metadata={"static": True})
    source: str = dataclasses.field(metadata={"static": True})
    gain: Float[Array, ""]
    constant: Float[Array, ""]


class Bound(NamedTuple):
    """A Lipschitz bound of a function, in L2.

    Attributes:
        constant: `|fn(x) - fn(y)| <= constant |x - y|` for all x and y that were asked for;
            infinite where it exceeds its dtype, as a net of fifty layers may exceed float32.
        layers: What the bound is made of, in the order of evaluation.
    """

    constant: Float[Array, ""]
    layers: tuple[Layer, ...]


def bound(
    fn: Callable[..., PyTree[Array]],
    *example_inputs: PyTree[Float[Array, "..."]],
    method: Method | None = None,
    box: Box | None = None,
    radius: Float[ArrayLike, ""] | None = None,
) -> Bound:
    """A Lipschitz bound of any JAX function, read off its jaxpr.

    Each intermediate result has a constant with respect to the input: a layer multiplies it by the
    layer's certified norm, a sum of two results has at most the sum of theirs, so that branches
    that join are counted once each. The default of `jax.lax.platform_dependent` stands for all of
    its alternatives, which are to compute the same.

    Args:
        fn: A function of arrays. Its parameters are what it closes over (a `functools.partial` will
            do); they may be traced, and the bound is differentiable with respect to them.
        *example_inputs: Arrays of the shapes and dtypes of its arguments, or
            `jax.ShapeDtypeStruct`s; the values do not matter, but for a `radius`.
        method: How to bound convolutions and dense layers that only biases and nondecreasing
            activations are between, such as `lipsdp`, or with options
            `functools.partial(lipsdp, num_steps=500)`. Such a chain is then one layer of the
            breakdown. By default the product of the norms.
        box: Where the inputs are, a pair (lower, upper) that broadcasts to each of them. The bound
            then holds between any two inputs in the box, and is the smaller for it where a unit
            saturates or stays on one side of its ReLU. By default they may be anywhere.
        radius: How far, in L2, all inputs together may be from `example_inputs`. With a box, both.

    Returns:
        A `Bound`, in L2 over all inputs and all outputs taken together. It is that of the function
        in exact arithmetic; what evaluating it in float32 adds is not a matter of the input.

    Raises:
        TypeError: If an input is not floating, or not an array although there is a `radius`.
        ValueError: If `box` is not such a pair.
        NotLipschitzError: If there is an operation without a rule, or without a bound, on the way
            to the output; the message names it and its line, and says what to do. It is a
            `ValueError`.

    Source: Szegedy et al. (2013), section 4.3, with the corrections of Virmaux and Scaman (2018).
    """
    outputs = _outputs(fn, example_inputs, method, box, radius)
    total = RULES["concatenate"](Operation("", tuple(outputs), {}, ())) if outputs else 0.0
    return Bound(jnp.asarray(total * ROUNDING), tuple(_layers(outputs)))


def pairwise(
    fn: Callable[..., PyTree[Array]],
    *example_inputs: PyTree[Float[Array, "..."]],
    method: Method = lipsdp,
    box: Box | None = None,
    radius: Float[ArrayLike, ""] | None = None,
) -> Float[Array, "classes classes"]:
    """Lipschitz bounds of the difference of each two outputs of a function.

    They certify more than the bound of all outputs does: `sqrt(2)` times that is what each pair has
    at most.

    Args:
        fn: As for `bound`; its result is one vector, such as logits.
        *example_inputs: As for `bound`.
        method: As for `bound`.
        box: As for `bound`.
        radius: As for `bound`. The bounds then certify no more than this radius.

    Returns:
        A symmetric matrix for `certified_radius`. Where the function does not end in a dense layer,
        the pairs all have `sqrt(2)` times the bound of the function.

    Raises:
        TypeError: As for `bound`.
        ValueError: As for `bound`, or if the result is not one vector.
    """
    outputs = _outputs(fn, example_inputs, method, box, radius)
    out = jax.eval_shape(fn, *example_inputs)
    if len(jnp.shape(out)) != 1 or not hasattr(out, "shape"):
        raise ValueError(f"fn: returns {out}, expected one vector; use jax.vmap for a batch.")
    n = out.shape[0]
    if not outputs:
        return jnp.zeros((n, n), out.dtype)
    dense = links.last_dense(outputs[0])
    if dense is None:
        steepest = math.sqrt(2) * jnp.asarray(outputs[0].constant, out.dtype)
        return jnp.where(jnp.eye(n, dtype=bool), 0, steepest * ROUNDING)
    chain = links.ending(dense)
    assert chain is not None
    return _chain_bound(method, chain).pairs * chain.start.constant * ROUNDING


def linear_layers(
    fn: Callable[..., PyTree[Array]], *example_inputs: PyTree[Float[Array, "..."]]
) -> list[tuple[Dense | Convolution, Float[Array, "blocks *kernel"]]]:
    """The dense layers and convolutions of a function, each with its kernels."""
    found = []

    def record(op, avals, rules):
        if rules is RULES and op.name in LINEAR:
            found.append(linear_layer(op))
        return [Signal(a.shape, a.dtype, 1.0, op, op) for a in avals]

    closed = jax.make_jaxpr(fn)(*example_inputs)
    walk(
        closed,
        [Signal(v.aval.shape, v.aval.dtype, 1.0) for v in closed.jaxpr.invars],
        Context(record),
    )
    return found


def _outputs(
    fn: Callable[..., PyTree[Array]],
    example_inputs: Sequence[Any],
    method: Method | None,
    box: Box | None,
    radius: Float[ArrayLike, ""] | None,
) -> list[Signal]:
    """What depends on the input among the results of a function."""
    for leaf in jax.tree.leaves(example_inputs):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"example_inputs: dtype {jnp.result_type(leaf)}, expected floating ones; bind what "
                "is no input with functools.partial."
            )
    closed = jax.make_jaxpr(fn)(*example_inputs)
    inputs = [
        _input(leaf, v.aval, box, radius)
        for leaf, v in zip(jax.tree.leaves(example_inputs), closed.jaxpr.invars, strict=True)
    ]
    context = Context(functools.partial(_apply, method, radius))
    outputs = [x for x in walk(closed, inputs, context) if isinstance(x, Signal)]
    for signal in outputs:
        if signal.reason:
            raise NotLipschitzError(signal.reason)
    return outputs


def _input(leaf: Any, aval: Any, box: Box | None, radius: Float[ArrayLike, ""] | None) -> Signal:
    """An input of the function, and where it is."""
    interval = centre = None
    if radius is not None:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(f"example_inputs: {leaf}, expected the array that `radius` is around.")
        x = jnp.asarray(leaf, aval.dtype)
        centre = Interval(x, x)
        interval = intervals.widened_by(centre, radius)
    if box is not None:
        like = jnp.zeros(aval.shape, aval.dtype)
        lower, upper = checks.box(box, like)
        ends = Interval(like + lower, like + upper)
        interval = ends if interval is None else intervals.intersection(interval, ends)
    return Signal(aval.shape, aval.dtype, 1.0, interval=interval, centre=centre)


def _apply(
    method: Method | None,
    radius: Float[ArrayLike, ""] | None,
    op: Operation,
    avals: Sequence[Any],
    rules: dict,
) -> list[Signal]:
    """The results of an operation, by a pattern that it completes or by its rule."""
    found = patterns.match(op, avals[0]) if rules is RULES else None
    layer, rule = op, rules.get(op.name)
    if found is not None:
        layer, gain = found
        rule = functools.partial(_times, gain)
    slope = links.local_slope(layer) if rules is RULES else None
    if isinstance(slope, jax.Array):
        rule = functools.partial(_times, jnp.max(slope, initial=0))
    reason = next((s.reason for s in layer.signals if s.reason), "")
    constant: Scalar | Callable[[], Scalar] = float("inf")
    if reason:
        pass
    elif rule is None:
        reason = _unsupported(op, "there is no rule for it")
    elif method is not None and links.is_link(layer):
        # Of a chain only the last layer is asked for its constant.
        layer, rule = _chained(method, layer, rule)
        constant = functools.partial(_rounded_up, layer, rule)
    else:
        try:
            constant = _rounded_up(layer, rule)
        except NotLipschitzError as error:
            reason = _unsupported(op, str(error))
    interval = centre = None
    if rules is RULES and not reason:
        interval, centre = _location(op, radius)
    return [Signal(a.shape, a.dtype, constant, op, layer, reason, interval, centre) for a in avals]


def _location(
    op: Operation, radius: Float[ArrayLike, ""] | None
) -> tuple[Interval | None, Interval | None]:
    """What the entries of a result are between, in all and at the example inputs."""
    interval, centre = (
        intervals.enclosure(op, [pick(x) if isinstance(x, Signal) else x for x in op.inputs])
        for pick in (lambda signal: signal.interval, lambda signal: signal.centre)
    )
    if interval is not None and centre is not None and radius is not None:
        chain = links.ending(op)
        if chain is not None:
            # An entry moves by no more than its own Lipschitz constant times the radius.
            lengths = product(chain.layers, chain.slopes).outputs * chain.start.constant
            reach = links.along_units(op, lengths * radius * ROUNDING)
            interval = intervals.intersection(interval, intervals.widened_by(centre, reach))
    return interval, centre


def _rounded_up(layer: Operation, rule: Rule) -> Scalar:
    constant = rule(layer)
    if any(constant is signal.constant for signal in layer.signals):
        return constant
    return constant * ROUNDING


def _times(gain: Scalar, layer: Operation) -> Scalar:
    return gain * layer.signals[0].constant


def _chained(method: Method, op: Operation, rule: Rule) -> tuple[Operation, Rule]:
    """The chain that ends in an operation, as one layer, if it has more layers than that one."""
    chain = links.ending(op)
    if chain is None or len(chain.layers) == 1:
        return op, rule
    layer = op._replace(name=f"{op.name} ({len(chain.layers)} layers)", inputs=(chain.start,))
    return (
        layer,
        lambda layer: _chain_bound(method, chain).constant * layer.inputs[0].constant,
    )


def _chain_bound(method: Method, chain: links.Chain) -> ChainBound:
    found = method(chain.layers, chain.steepest)
    if chain.slopes is chain.steepest:
        return found
    # What the multipliers that a method finds are worth need not fall with the slopes.
    return jax.tree.map(jnp.minimum, found, method(chain.layers, chain.slopes))


def _unsupported(op: Operation, why: str) -> str:
    where = " ".join(filter(None, [op.label and f"in {op.label}", op.source and f"at {op.source}"]))
    return (
        f"{op.name} {where or 'at an unknown line'}: {why}. Tell its constant with "
        f'lipschitz.register_rule("{op.name}", rule), or put what it is a part of in a function '
        "under jax.jit and register a rule for that."
    )


def _layers(outputs: Sequence[Signal]) -> Iterator[Layer]:
    """The operations that outputs are made of and that do not leave the constant as it is."""
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
        elif not any(signal.constant is s.constant for s in op.signals):
            before = largest([s.constant for s in op.signals])
            name = "/".join(filter(None, [op.label, op.name]))
            constant = jnp.asarray(signal.constant)
            gain = jnp.where(before > 0, constant / jnp.where(before > 0, before, 1), 0)
            gain = jnp.where(jnp.isfinite(constant), gain, jnp.inf)
            yield Layer(name, op.source, gain, constant)
