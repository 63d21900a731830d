"""A jaxpr interpreter: evaluates a jaxpr with a user-supplied handler per operation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from advjax.lipschitz.jaxpr import intervals
from advjax.lipschitz.jaxpr.rules import RULES, Rule, constant, function_rule
from advjax.lipschitz.jaxpr.scaled import largest
from advjax.lipschitz.jaxpr.values import Interval, Operation, Signal, concrete

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


class Context(NamedTuple):
    """The handler of a jaxpr's operations, and the place from which the jaxpr is called.

    Attributes:
        apply: The handler. It takes an operation, the shapes and dtypes of its results, and the
            rule of the registered function that it calls, if any, and returns the results.
        label: The names of the modules around the call, separated by slashes.
        source: The line of code of the call.
    """

    apply: Callable[[Operation, Sequence[Any], Rule | None], Sequence[Any]]
    label: str = ""
    source: str = ""


def interpret(closed: core.ClosedJaxpr, args: Sequence[Any], context: Context) -> list[Any]:
    """Evaluate a jaxpr on arguments of which some are a `Signal`.

    Operations on arrays alone are evaluated; one on a `Signal` is passed to the handler. Calls,
    scans and conditions with a known index are entered.

    Args:
        closed: The jaxpr.
        args: Its arguments, each an array or a `Signal`.
        context: The handler of operations on signals.

    Returns:
        The results, each a `Signal` if it depends on one, and otherwise an array.
    """
    env = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    env |= dict(zip(closed.jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for eqn in closed.jaxpr.eqns:
        here = context._replace(
            label="/".join(filter(None, [context.label, str(eqn.source_info.name_stack)])),
            # JAX caches traces: inside a function traced before, the line of the call is missing.
            source=source_info_util.summarize(eqn.source_info) or context.source,
        )
        results = _evaluate(eqn, [read(atom) for atom in eqn.invars], here)
        env |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in closed.jaxpr.outvars]


def _evaluate(eqn: core.JaxprEqn, inputs: list[Any], context: Context) -> Sequence[Any]:
    name, params = eqn.primitive.name, eqn.params
    known = not any(isinstance(x, Signal) for x in inputs)
    if not eqn.outvars and not known:  # an effect, such as a print: no output depends on it
        return []
    function = None if known or name not in _CALLS else function_rule(eqn)
    if name in _CALLS and function is None:
        return interpret(_closed(params[_CALLS[name]]), inputs, context)
    if known:
        return _constants(eqn, inputs)
    if name == "scan":
        return _scan(params, inputs, context)
    if name == "cond" and not isinstance(inputs[0], Signal) and concrete(inputs[0]):
        return interpret(_branch(params, int(inputs[0])), inputs[1:], context)
    avals: list[Any] = [v.aval for v in eqn.outvars]
    called, rule = function or (name, None)
    op = Operation(
        name=called,
        inputs=tuple(inputs),
        params=params,
        shape=avals[0].shape,
        label=context.label,
        source=context.source,
    )
    return context.apply(op, avals, rule)


def _branch(params: Any, index: int) -> core.ClosedJaxpr:
    """The branch that a condition of known index takes."""
    branches, platforms = params["branches"], params.get("branches_platforms")
    if platforms is not None and platforms[-1] is None:
        return branches[-1]  # the default; the other platforms' branches must compute the same
    return branches[min(max(index, 0), len(branches) - 1)]


def _constants(eqn: core.JaxprEqn, inputs: list[Any]) -> Sequence[Any]:
    """The results of an operation that does not depend on the input."""

    def evaluate() -> Sequence[Any]:
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
    rows, carries = [], list(carry)
    for step in reversed(steps) if params["reverse"] else steps:
        here = [_row(x, step) for x in xs]
        results = interpret(params["jaxpr"], [*consts, *carry, *here], context)
        carry, row = results[: len(carry)], results[len(carry) :]
        carries += carry
        rows.append(row)
    rows = rows[::-1] if params["reverse"] else rows
    # If each row of the results depends on one row of the input alone, and rows share nothing, the
    # constant of the stack is the largest of theirs rather than the root of the sum of squares.
    shared = [x for x in [*consts, *carries] if isinstance(x, Signal)]
    apart = not shared and sum(isinstance(x, Signal) for x in xs) == 1
    columns = zip(*rows, strict=True)
    return [*carry, *(_stacked(column, context, apart=apart) for column in columns)]


def _row(x: Any, step: int) -> Any:
    if isinstance(x, Signal):
        op = Operation("row", (x,), {"step": step}, x.shape[1:])
        # The constant of the whole array, computed once for all rows.
        places = enclosures(op)
        return Signal(x.shape[1:], x.dtype, lambda: x.scaled, op, op, x.reason, *places)
    return x[step]


def _stacked(column: Sequence[Any], context: Context, *, apart: bool) -> Any:
    signals = [x for x in column if isinstance(x, Signal)]
    if not signals:
        return jnp.stack(column)
    shape = (len(column), *column[0].shape)
    op = Operation("stack", tuple(column), {}, shape, context.label, context.source)
    reason = next((s.reason for s in signals if s.reason), "")
    scaled = largest([s.scaled for s in signals]) if apart else constant(op, RULES["stack"])
    return Signal(shape, signals[0].dtype, scaled, op, op, reason, *enclosures(op))


def enclosures(op: Operation) -> tuple[Interval | None, Interval | None]:
    """Enclose the entries of a result: for all inputs in question, and at the example."""
    inputs = [(x.interval, x.centre) if isinstance(x, Signal) else (x, x) for x in op.inputs]
    interval, centre = (intervals.enclosure(op, list(x)) for x in zip(*inputs, strict=True))
    return interval, centre
