"""The interface of a bounded minimiser: two pure functions, and the state between them."""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from advjax.types import Box

ValueAndGrad = Callable[
    [Float[Array, "*shape"]],
    tuple[tuple[Float[Array, ""], PyTree], Float[Array, "*shape"]],
]
"""`x -> ((value, aux), grad)`, as `jax.value_and_grad(fun, has_aux=True)` makes it."""


class Status(enum.IntEnum):
    """The status of a minimisation: whether it is running, or why it ended."""

    RUNNING = 0
    CONVERGED = 1
    """The projected gradient is within the caller's tolerance."""
    STALLED = 2
    """No step lowers the value any more: at the optimum up to rounding, or at a kink."""
    NONFINITE = 3
    """The objective or its gradient is not finite at the starting point."""
    BUDGET = 4
    """The evaluations ran out."""
    EMPTY_BOX = 5
    """A lower bound lies above its upper bound (or is NaN): no point is feasible."""
    SMALL_DECREASE = 6
    """The value decreases by no more than the caller's relative tolerance."""


class SolverState(NamedTuple):
    """The state of a minimisation between two evaluations.

    When its objective changes, the caller either replaces `value` and `grad` by those of the new
    objective at the same `x`, or asks for a re-evaluation (`reevaluate`). A step from a stalled
    state starts a new line search.
    """

    x: Float[Array, "*shape"]
    """The best point so far, in the box."""
    value: Float[Array, ""]
    """Its objective; infinite before the first evaluation."""
    grad: Float[Array, "*shape"]
    """The gradient there; 0 before the first evaluation."""
    aux: PyTree
    """The auxiliary output of the objective there."""
    error: Float[Array, ""]
    """`||clip(x - grad) - x||_2`, the length of the projected gradient."""
    evaluated: Bool[Array, ""]
    """Whether `value` and `grad` belong to `x`; if not, the next step evaluates `x`."""
    status: Int[Array, ""]
    """`RUNNING`, `STALLED` or `NONFINITE`; the caller decides about `CONVERGED`."""
    num_evals: Int[Array, ""]
    """Number of evaluations of the objective's value and gradient."""
    memory: Any
    """The solver's own state, which nothing else reads."""


@runtime_checkable
class InitFn(Protocol):
    """`(value_and_grad, x0, box, first_step=None) -> state`, without an evaluation."""

    def __call__(
        self,
        value_and_grad: ValueAndGrad,
        x0: Float[Array, "*shape"],
        box: Box,
        first_step: Float[ArrayLike, ""] | None = None,
    ) -> SolverState: ...


StepFn = Callable[[ValueAndGrad, SolverState, Box], SolverState]


class Solver(NamedTuple):
    """A bounded minimiser as two pure functions, of one problem each; `jax.vmap` them for many.

    A solver steps; its caller decides when to stop, by `state.error` or by any other criterion.

    `x` may have any shape, but a vector is best: XLA's CPU backend takes up to twenty times as long
    to sum over the axes of an image as over a vector.

    Attributes:
        init: `(value_and_grad, x0, box, first_step=None) -> state`. Evaluates nothing: the first
            step evaluates `x0`, moved into the box. `first_step` is the caller's estimate of the
            inverse curvature: the first trial step is minus the gradient times this. By default
            the solver chooses a step that does not depend on the scale of the objective.
        step: `(value_and_grad, state, box) -> state`. Makes one evaluation, at a trial point that
            is accepted, or rejected for a shorter step next time. The line search is thus part of
            the state, and no loop is nested in another.
    """

    init: InitFn
    step: StepFn


class SolverResult(NamedTuple):
    """The outcome of `minimize`.

    Attributes:
        x: The best point found, in the box; a pytree like `x0`.
        value: The objective there.
        grad: Its gradient there, a pytree like `x0`.
        aux: The auxiliary output of the objective there, `()` without `has_aux`.
        error: `||clip(x - grad) - x||_2`, 0 at a stationary point.
        success: Whether a tolerance was met: the status is `CONVERGED` or `SMALL_DECREASE`.
        status: A `Status`.
        num_iterations: Number of accepted steps.
        num_evals: Number of evaluations of value and gradient, those of the line search included.
    """

    x: PyTree[Float[Array, "..."]]
    value: Float[Array, ""]
    grad: PyTree[Float[Array, "..."]]
    aux: PyTree
    error: Float[Array, ""]
    success: Bool[Array, ""]
    status: Int[Array, ""]
    num_iterations: Int[Array, ""]
    num_evals: Int[Array, ""]


def initial_state(
    value_and_grad: ValueAndGrad, x0: Float[Array, "*shape"], box: Box, memory: Any
) -> SolverState:
    """Make the state before the first evaluation, for a solver's `init`.

    Args:
        value_and_grad: `x -> ((value, aux), grad)`, which is traced for its shapes alone.
        x0: The initial point.
        box: `(lower, upper)`; `x0` is moved into it.
        memory: The solver's own state.

    Returns:
        A `SolverState` that is not evaluated, so that the first step evaluates `x0`.
    """
    (_, aux), _ = jax.eval_shape(value_and_grad, x0)
    return SolverState(
        x=jnp.clip(x0, box.lower, box.upper),
        value=jnp.full((), jnp.inf, x0.dtype),
        grad=jnp.zeros_like(x0),
        aux=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), aux),
        error=jnp.full((), jnp.inf, x0.dtype),
        evaluated=jnp.bool_(False),
        status=jnp.int32(Status.RUNNING),
        num_evals=jnp.int32(0),
        memory=memory,
    )


def next_state(
    value_and_grad: ValueAndGrad,
    state: SolverState,
    x: Float[Array, "*shape"],
    box: Box,
    memory: Any,
) -> SolverState:
    """Evaluate the objective at a point and move there, for a solver's `step`.

    Args:
        value_and_grad: `x -> ((value, aux), grad)`.
        state: The previous state.
        x: The new point; it is moved into the box.
        box: `(lower, upper)`.
        memory: The solver's own state.

    Returns:
        The `SolverState` at that point, better or not.
    """
    x = jnp.clip(x, box.lower, box.upper)
    (value, aux), grad = value_and_grad(x)
    return state._replace(
        x=x,
        value=value,
        grad=grad,
        aux=aux,
        error=projected_gradient_norm(x, grad, box),
        evaluated=jnp.bool_(True),
        num_evals=state.num_evals + 1,
        memory=memory,
    )


def reevaluate(state: SolverState) -> SolverState:
    """Make the next step evaluate `x` itself, under an objective that has changed.

    The gradient becomes 0, so that a solver that ignores `evaluated` stays at `x`.

    Args:
        state: The state under the old objective.

    Returns:
        The same state, not evaluated.
    """
    return state._replace(evaluated=jnp.bool_(False), grad=jnp.zeros_like(state.grad))


def projected_gradient_norm(
    x: Float[Array, "*shape"], grad: Float[Array, "*shape"], box: Box
) -> Float[Array, ""]:
    """Compute how far a point is from being stationary in the box.

    Args:
        x: A point in the box.
        grad: The objective's gradient there.
        box: `(lower, upper)`.

    Returns:
        `||clip(x - grad) - x||_2`: 0 if and only if no feasible direction is a descent direction.
    """
    # Clip the step rather than the point: x - grad would lose a small gradient beside a large x.
    step = jnp.clip(-grad, jnp.subtract(box.lower, x), jnp.subtract(box.upper, x))
    scaled, exponent = scale(jnp.ravel(step))
    return jnp.ldexp(jnp.linalg.norm(scaled), exponent)


def scale(vector: Float[Array, "*shape"]) -> tuple[Float[Array, "*shape"], Int[Array, ""]]:
    """Divide a vector by a power of two, so that squares of its entries stay in range.

    Args:
        vector: Finite numbers of any scale.

    Returns:
        The scaled vector, whose largest entry is about 1, and the exponent: `vector = scaled *
        2**exponent`, exactly except for entries that underflow beside the largest.
    """
    exponent = jnp.frexp(jnp.max(jnp.abs(vector), initial=0))[1]
    return jnp.ldexp(vector, -exponent), exponent
