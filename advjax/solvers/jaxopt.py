"""jaxopt's L-BFGS-B behind the interface of our own solver, guarded against its defects.

jaxopt 0.8.5 is no longer maintained, and three of its defects matter here. Each has a test that
fails, and so tells us, once jaxopt is fixed:

- If rounding puts a free coordinate of the Cauchy point just outside the box, the subspace step
  leaves the box by far. Guard: jaxopt is given bounds that are wider by `slack`, and the points
  that it evaluates and returns are clipped.
- The ring buffer of past steps is not reordered before the lower triangle of S^T Y is taken, so
  that the matrix is wrong once the buffer has wrapped. Guard: the buffer is rolled after each
  update, so that the oldest pair always comes first.
- With `linesearch="backtracking"` it can diverge. Guard: always the zoom line search.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from advjax import checks
from advjax.solvers.base import (
    Solver,
    SolverState,
    Status,
    ValueAndGrad,
    initial_state,
    projected_gradient_norm,
)
from advjax.types import Box


def jaxopt_lbfgsb(*, memory: int = 10, slack: float = 1e-6) -> Solver:
    """Wrap `jaxopt.LBFGSB` as a `Solver`, with guards against its defects.

    A step is one whole iteration with its line search, and makes as many evaluations as that needs:
    `num_evals` counts them, and the last step may exceed a budget. Under `jax.vmap` every lane
    waits for the slowest line search. `lbfgsb` needs far less time and fewer evaluations.

    Args:
        memory: Number of pairs of steps and gradient changes to keep.
        slack: How much wider the bounds given to jaxopt are than the box, in the unit of `x`.

    Returns:
        A `Solver`. Its status becomes `STALLED` if the line search fails. It ignores the
        `first_step` of `init`: the first step of jaxopt is as long as the gradient.

    Raises:
        ValueError: If `memory` is not a positive integer, or `slack` is negative.
    """
    return _make(checks.positive_int("memory", memory), checks.number("slack", slack, minimum=0))


@functools.cache  # equal options return the same solver, whose programs are compiled once
def _make(memory: int, slack: float) -> Solver:
    with warnings.catch_warnings():  # jaxopt warns that it is unmaintained
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        import jaxopt

    def method(value_and_grad: ValueAndGrad) -> Any:
        return jaxopt.LBFGSB(
            fun=value_and_grad,
            value_and_grad=True,
            has_aux=True,
            history_size=memory,
            linesearch="zoom",
            implicit_diff=False,
        )

    def init(
        value_and_grad: ValueAndGrad,
        x0: Float[Array, "*shape"],
        box: Box,
        first_step: Float[ArrayLike, ""] | None = None,
    ) -> SolverState:
        shapes = jax.eval_shape(method(value_and_grad).init_state, x0, None)
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        one = jnp.ones((), x0.dtype)
        return initial_state(value_and_grad, x0, box, blank._replace(theta=one, stepsize=one))

    def step(value_and_grad: ValueAndGrad, state: SolverState, box: Box) -> SolverState:
        known = state.memory._replace(value=state.value, grad=state.grad, aux=state.aux)

        def evaluate() -> tuple[Float[Array, "*shape"], Any]:
            (value, aux), grad = value_and_grad(state.x)
            evals = known.num_fun_eval + 1
            return state.x, known._replace(value=value, grad=grad, aux=aux, num_fun_eval=evals)

        def clipped(x: Float[Array, "*shape"]) -> Any:
            return value_and_grad(jnp.clip(x, box.lower, box.upper))

        def iterate() -> tuple[Float[Array, "*shape"], Any]:
            bounds = jnp.subtract(box.lower, slack), jnp.add(box.upper, slack)
            x, new = method(clipped).update(state.x, known, bounds)
            return jnp.clip(x, box.lower, box.upper), _oldest_first(new, memory)

        x, new = jax.lax.cond(state.evaluated, iterate, evaluate)
        finite = jnp.isfinite(new.value) & jnp.all(jnp.isfinite(new.grad) & jnp.isfinite(x))
        x, kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), (x, new), (state.x, known))
        evaluated = state.evaluated | finite
        error = jnp.where(evaluated, projected_gradient_norm(x, kept.grad, box), jnp.inf)
        return SolverState(
            x=x,
            value=kept.value,
            grad=kept.grad,
            aux=kept.aux,
            error=error,
            evaluated=evaluated,
            status=jnp.select(
                [~evaluated, ~finite | new.failed_linesearch],
                [jnp.int32(Status.NONFINITE), jnp.int32(Status.STALLED)],
                jnp.int32(Status.RUNNING),
            ),
            num_evals=new.num_fun_eval,
            memory=kept._replace(num_fun_eval=new.num_fun_eval),
        )

    return Solver(init, step)


def _oldest_first(state: Any, memory: int) -> Any:
    """Roll the full history of a jaxopt state, so that the oldest pair comes first."""
    full = state.num_updates > memory

    def roll(history: Float[Array, "memory *shape"]) -> Float[Array, "memory *shape"]:
        return jnp.where(full, jnp.roll(history, -1, axis=0), history)

    return state._replace(
        s_history=roll(state.s_history),
        y_history=roll(state.y_history),
        num_updates=jnp.where(full, memory, state.num_updates),
    )
