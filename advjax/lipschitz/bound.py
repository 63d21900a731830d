"""The Lipschitz bound of a whole function, read off its jaxpr."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util
from jaxtyping import Array, Float, PyTree

from advjax.lipschitz import links, patterns
from advjax.lipschitz.chains import Method, lipsdp
from advjax.lipschitz.convolution import Convolution
from advjax.lipschitz.norms import Dense
from advjax.lipschitz.rules import (
    FUNCTION_RULES,
    LINEAR,
    RULES,
    NotLipschitzError,
    Rule,
    linear_layer,
)
from advjax.lipschitz.signals import Operation, Scalar, Signal, concrete

_ROUNDING = 1 + 2.0**-20  # more than the few roundings of one rule, in float32

_CALLS = {  # primitives that only call a jaxpr, and the parameter that holds it
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}


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
    return Bound(jnp.asarray(total * _ROUNDING), tuple(_layers(outputs)))


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
        return jnp.where(jnp.eye(n, dtype=bool), 0, steepest * _ROUNDING)
    chain = links.ending(dense)
    assert chain is not None
    return method(chain.kernels, chain.slopes).pairs * chain.start.constant * _ROUNDING


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


class Context(NamedTuple):
    """Where a jaxpr is called, and what is done with its operations."""

    apply: Callable[[Operation, Sequence[Any], dict], Sequence[Any]]
    label: str = ""
    source: str = ""


def walk(closed: core.ClosedJaxpr, args: Sequence[Any], context: Context) -> list[Any]:
    """The results of a jaxpr, each a `Signal` or, if no argument that is one matters, an array."""
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom):
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        here = context._replace(
            label="/".join(filter(None, [context.label, str(eqn.source_info.name_stack)])),
            # Inside a function that jax has traced before, the line is that of the call.
            source=source_info_util.summarize(eqn.source_info) or context.source,
        )
        results = _evaluate(eqn, [read(atom) for atom in eqn.invars], here)
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _evaluate(eqn: core.JaxprEqn, inputs: list[Any], context: Context) -> Sequence[Any]:
    name, params = eqn.primitive.name, eqn.params
    known = not any(isinstance(x, Signal) for x in inputs)
    function = params.get("name") if name in _CALLS else None
    if name in _CALLS and (known or function not in FUNCTION_RULES):
        return walk(_closed(params[_CALLS[name]]), inputs, context)
    if known:
        return _constants(eqn, inputs)
    if name == "scan":
        return _scan(params, inputs, context)
    if name == "cond" and not isinstance(inputs[0], Signal) and concrete(inputs[0]):
        branches = params["branches"]
        branch = branches[min(max(int(inputs[0]), 0), len(branches) - 1)]
        return walk(branch, inputs[1:], context)
    avals: list[Any] = [v.aval for v in eqn.outvars]
    op = Operation(
        name=function or name,
        inputs=tuple(inputs),
        params=params,
        shape=avals[0].shape,
        label=context.label,
        source=context.source,
    )
    return context.apply(op, avals, FUNCTION_RULES if function else RULES)


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
    return constant * _ROUNDING


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


def _constants(eqn: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
    """The results of an operation that the input does not reach."""

    def evaluate():
        out = eqn.primitive.bind(*inputs, **eqn.params)
        return out if eqn.primitive.multiple_results else [out]

    if concrete(*inputs):  # known now, even while a function around `bound` is traced
        with jax.ensure_compile_time_eval():
            return evaluate()
    return evaluate()


def _closed(jaxpr: Any) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def _scan(params: Any, inputs: list[Any], context: Context) -> list[Any]:
    """A loop of fixed length, unrolled."""
    if "ft_in" in params:  # since jax 0.12
        num_consts, num_carry, _ = map(len, params["ft_in"].unpack())
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    split = num_consts, num_consts + num_carry
    consts, carry, xs = inputs[: split[0]], inputs[split[0] : split[1]], inputs[split[1] :]
    steps = range(params["length"])
    rows = []
    for step in reversed(steps) if params["reverse"] else steps:
        here = [_row(x, step) for x in xs]
        results = walk(params["jaxpr"], [*consts, *carry, *here], context)
        carry, row = results[: len(carry)], results[len(carry) :]
        rows.append(row)
    rows = rows[::-1] if params["reverse"] else rows
    # Results that each come from one row, and from nothing else, move as their row does.
    shared = [x for x in [*inputs[: split[1]], *carry] if isinstance(x, Signal)]
    apart = not shared and sum(isinstance(x, Signal) for x in xs) == 1
    columns = zip(*rows, strict=True)
    return [*carry, *(_stacked(column, context, apart=apart) for column in columns)]


def _row(x: Any, step: int) -> Any:
    if isinstance(x, Signal):
        op = Operation("slice", (x,), {"step": step}, x.shape[1:])
        # The same constant, computed no more often than once.
        return Signal(x.shape[1:], x.dtype, lambda: x.constant, op, op, x.reason)
    return x[step]


def _stacked(column: Sequence[Any], context: Context, *, apart: bool) -> Any:
    signals = [x for x in column if isinstance(x, Signal)]
    if not signals:
        return jnp.stack(column)
    shape = (len(column), *column[0].shape)
    op = Operation("stack", tuple(column), {}, shape, context.label, context.source)
    reason = next((s.reason for s in signals if s.reason), "")
    largest = _largest([s.constant for s in signals])
    constant = largest if apart else RULES["stack"](op) * _ROUNDING
    return Signal(shape, signals[0].dtype, constant, op, op, reason)


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
            before = _largest([s.constant for s in op.signals])
            name = "/".join(filter(None, [op.label, op.name]))
            constant = jnp.asarray(signal.constant)
            gain = jnp.where(before > 0, constant / jnp.where(before > 0, before, 1), 0)
            yield Layer(name, op.source, gain, constant)


def _largest(constants: Sequence[Scalar]) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.asarray(c, float) for c in constants]))
