"""What a bounded minimiser is: two pure functions and the state between them."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from advjax.types import Box

ValueAndGrad = Callable[
    [Float[Array, "*shape"]],
    tuple[tuple[Float[Array, ""], PyTree], Float[Array, "*shape"]],
]
"""`x -> ((value, aux), grad)`, as `jax.value_and_grad(fun, has_aux=True)` makes it."""


class Status(enum.IntEnum):
    """Where a minimisation stands, or why it ended."""

    RUNNING = 0
    CONVERGED = 1
    """The projected gradient is within the tolerance."""
    STALLED = 2
    """No step lowers the value any more: the optimum to within rounding, or a kink."""
    NONFINITE = 3
    """The objective or its gradient is not finite at the starting point."""
    BUDGET = 4
    """The evaluations ran out."""
    EMPTY_BOX = 5
    """A lower bound lies above its upper bound (or is NaN): no point is feasible."""


class SolverState(NamedTuple):
    """The state of a minimisation between two evaluations.

    A caller whose objective changes may replace `value` and `grad` by those of the new objective
    at the same `x`, or have `x` evaluated again by the next step (`evaluate_again`); a step from a
    state that had ended starts a new line search.
    """

    x: Float[Array, "*shape"]
    """The best point so far, in the box."""
    value: Float[Array, ""]
    """Its objective; infinite before the first evaluation."""
    grad: Float[Array, "*shape"]
    """The gradient there; 0 before the first evaluation."""
    aux: PyTree
    """What else the objective returned there."""
    error: Float[Array, ""]
    """`||clip(x - grad) - x||_2`, the length of the projected gradient."""
    status: Int[Array, ""]
    num_evals: Int[Array, ""]
    memory: Any
    """What only the solver itself reads."""


InitFn = Callable[[ValueAndGrad, Float[Array, "*shape"], Box], SolverState]
StepFn = Callable[[ValueAndGrad, SolverState, Box], SolverState]


class Solver(NamedTuple):
    """A bounded minimiser as two pure functions, of one problem each; `jax.vmap` them for many.

    `x` may be of any shape, but flat is best: XLA's CPU backend takes up to twenty times as long
    for a sum over the axes of an image as for one over a vector.

    Attributes:
        init: `(value_and_grad, x0, box) -> state`. Evaluates nothing: the first step evaluates
            `x0`, moved into the box.
        step: `(value_and_grad, state, box) -> state`. Makes one evaluation: a trial point that is
            either accepted or brings the next trial nearer, so that the line search is part of the
            state and no loop is nested in another.
    """

    init: InitFn
    step: StepFn


class SolverResult(NamedTuple):
    """The outcome of `minimize`.

    Attributes:
        x: The best point found, in the box.
        value: The objective there.
        grad: Its gradient there.
        error: `||clip(x - grad) - x||_2`, 0 at a stationary point.
        status: A `Status`.
        num_evals: How often value and gradient were evaluated, line search included.
    """

    x: Float[Array, "*shape"]
    value: Float[Array, ""]
    grad: Float[Array, "*shape"]
    error: Float[Array, ""]
    status: Int[Array, ""]
    num_evals: Int[Array, ""]


def initial_state(
    value_and_grad: ValueAndGrad, x0: Float[Array, "*shape"], box: Box, memory: Any
) -> SolverState:
    """The state before the first evaluation, for a solver's `init`.

    Args:
        value_and_grad: `x -> ((value, aux), grad)`, of which only the shapes are asked for.
        x0: Where to start.
        box: `(lower, upper)`; `x0` is moved into it.
        memory: What the solver keeps for itself.

    Returns:
        A `SolverState` whose value is infinite, so that the first step evaluates `x0`.
    """
    (_, aux), _ = jax.eval_shape(value_and_grad, x0)
    return SolverState(
        x=jnp.clip(x0, box.lower, box.upper),
        value=jnp.full((), jnp.inf, x0.dtype),
        grad=jnp.zeros_like(x0),
        aux=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux),
        error=jnp.full((), jnp.inf, x0.dtype),
        status=jnp.int32(Status.RUNNING),
        num_evals=jnp.int32(0),
        memory=memory,
    )


def evaluate_again(state: SolverState) -> SolverState:
    """The state whose next step evaluates `x` itself, under an objective that has changed."""
    return state._replace(
        value=jnp.full_like(state.value, jnp.inf), grad=jnp.zeros_like(state.grad)
    )


def projected_gradient_norm(
    x: Float[Array, "*shape"], grad: Float[Array, "*shape"], box: Box
) -> Float[Array, ""]:
    """How far a point is from being stationary in the box.

    Args:
        x: A point in the box.
        grad: The objective's gradient there.
        box: `(lower, upper)`.

    Returns:
        `||clip(x - grad) - x||_2`: 0 where, and only where, no direction into the box descends.
    """
    # As a step rather than a point: next to a large x, x - grad would round a small grad away.
    step = jnp.clip(-grad, jnp.subtract(box.lower, x), jnp.subtract(box.upper, x))
    return jnp.linalg.norm(jnp.ravel(step))
