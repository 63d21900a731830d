"""The Lipschitz bound of a whole function, read off its jaxpr."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from advjax.lipschitz import links, patterns
from advjax.lipschitz.chains import Method, lipsdp
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
from advjax.lipschitz.signals import Operation, Scalar, Signal
from advjax.lipschitz.walk import Context, largest, walk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One operation of a function that changes distances, or may.

    Attributes:
        name: The operation, after the names of the modules that it is in.
        source: The line of code that made it.
        gain: By how much it multiplies the largest constant of its inputs.
        constant: The bound from the input of the function up to here.
    """

    name: str = dataclasses.field(metadata={"static": True})
    source: str = dataclasses.field(metadata={"static": True})
    gain: Float[Array, ""]
    constant: Float[Array, ""]


class Bound(NamedTuple):
    """A Lipschitz bound of a function, in L2.

    Attributes:
        constant: `|fn(x) - fn(y)| <= constant |x - y|` for all x and y.
        layers: What the bound is made of, in the order of evaluation.
    """

    constant: Float[Array, ""]
    layers: tuple[Layer, ...]


def bound(
    fn: Callable[..., PyTree[Array]],
    *example_inputs: PyTree[Float[Array, "..."]],
    method: Method | None = None,
) -> Bound:
    """A Lipschitz bound of any JAX function, read off its jaxpr.

    Each intermediate result has a constant with respect to the input: a layer multiplies it by the
    layer's certified norm, a sum of two results has at most the sum of theirs, so that branches
    that join are counted once each.

    Args:
        fn: A function of arrays. Its parameters are what it closes over (a `functools.partial` will
            do); they may be traced, and the bound is differentiable with respect to them.
        *example_inputs: Arrays of the shapes and dtypes of its arguments, or
            `jax.ShapeDtypeStruct`s; the values do not matter.
        method: How to bound dense layers that only biases and nondecreasing activations are
            between, such as `lipsdp`, or with options `functools.partial(lipsdp, num_steps=500)`.
            Such a chain is then one layer of the breakdown. By default the product of the norms.

    Returns:
        A `Bound`, in L2 over all inputs and all outputs taken together. It is that of the function
        in exact arithmetic; what evaluating it in float32 adds is not a matter of the input.

    Raises:
        TypeError: If an input is not floating.
        NotLipschitzError: If there is an operation without a rule, or without a bound, on the way
            to the output; the message names it and its line, and says what to do. It is a
            `ValueError`.

    Source: Szegedy et al. (2013), section 4.3, with the corrections of Virmaux and Scaman (2018).
    """
    outputs = _outputs(fn, example_inputs, method)
    total = RULES["concatenate"](Operation("", tuple(outputs), {}, ())) if outputs else 0.0
    return Bound(jnp.asarray(total * ROUNDING), tuple(_layers(outputs)))


def pairwise(
    fn: Callable[..., PyTree[Array]],
    *example_inputs: PyTree[Float[Array, "..."]],
    method: Method = lipsdp,
) -> Float[Array, "classes classes"]:
    """Lipschitz bounds of the difference of each two outputs of a function.

    They certify more than the bound of all outputs does: `sqrt(2)` times that is what each pair has
    at most.

    Args:
        fn: As for `bound`; its result is one vector, such as logits.
        *example_inputs: As for `bound`.
        method: As for `bound`.

    Returns:
        A symmetric matrix for `certified_radius`. Where the function does not end in a dense layer,
        the pairs all have `sqrt(2)` times the bound of the function.

    Raises:
        TypeError: As for `bound`.
        ValueError: As for `bound`, or if the result is not one vector.
    """
    outputs = _outputs(fn, example_inputs, method)
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
    return method(chain.kernels, chain.slopes).pairs * chain.start.constant * ROUNDING


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
    fn: Callable[..., PyTree[Array]], example_inputs: Sequence[Any], method: Method | None
) -> list[Signal]:
    """What depends on the input among the results of a function."""
    for leaf in jax.tree.leaves(example_inputs):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"example_inputs: dtype {jnp.result_type(leaf)}, expected floating ones; bind what "
                "is no input with functools.partial."
            )
    closed = jax.make_jaxpr(fn)(*example_inputs)
    inputs = [Signal(v.aval.shape, v.aval.dtype, 1.0) for v in closed.jaxpr.invars]
    context = Context(functools.partial(_apply, method))
    outputs = [x for x in walk(closed, inputs, context) if isinstance(x, Signal)]
    for signal in outputs:
        if signal.reason:
            raise NotLipschitzError(signal.reason)
    return outputs


def _apply(method: Method | None, op: Operation, avals: Sequence[Any], rules: dict) -> list[Signal]:
    """The results of an operation, by a pattern that it completes or by its rule."""
    found = patterns.match(op, avals[0]) if rules is RULES else None
    layer, rule = op, rules.get(op.name)
    if found is not None:
        layer, gain = found
        rule = functools.partial(_times, gain)
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
    return [Signal(a.shape, a.dtype, constant, op, layer, reason) for a in avals]


def _rounded_up(layer: Operation, rule: Rule) -> Scalar:
    constant = rule(layer)
    if any(constant is signal.constant for signal in layer.signals):
        return constant
    return constant * ROUNDING


def _times(gain: Scalar, layer: Operation) -> Scalar:
    return gain * layer.inputs[0].constant


def _chained(method: Method, op: Operation, rule: Rule) -> tuple[Operation, Rule]:
    """The chain that ends in an operation, as one layer, if it has more layers than that one."""
    chain = links.ending(op)
    if chain is None or len(chain.kernels) == 1:
        return op, rule
    layer = op._replace(name=f"{op.name} ({len(chain.kernels)} layers)", inputs=(chain.start,))
    return (
        layer,
        lambda layer: method(chain.kernels, chain.slopes).constant * layer.inputs[0].constant,
    )


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
            yield Layer(name, op.source, gain, constant)
