"""The entry point: minimise one function in a box."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from advjax import checks
from advjax.solvers.base import Solver, SolverResult, SolverState, Status
from advjax.solvers.lbfgsb import lbfgsb
from advjax.types import Box


def minimize(
    fun: Callable[[Float[Array, "*shape"]], Float[Array, ""]],
    x0: Float[Array, "*shape"],
    *,
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    solver: Solver = lbfgsb(),  # noqa: B008
    max_evals: int = 1000,
) -> SolverResult:
    """Minimise a smooth function in a box.

    Args:
        fun: The objective: a scalar of one array.
        x0: Where to start, of any shape; a point outside the box is moved into it.
        box: `(lower, upper)`, each broadcast to `x0`; infinite bounds and `lower == upper` are
            fine. The default is the box of images, [0, 1].
        solver: The minimiser, ours by default; `solvers.jaxopt_lbfgsb()` and your own work alike.
        max_evals: The most evaluations of value and gradient.

    Returns:
        A `SolverResult`. Trouble is told by its `status`, never by an exception under `jit`, and
        `x` is finite, if `x0` is, and in the box all the same (`x0` itself if the box is empty).

    Raises:
        TypeError: If `x0` is not floating.
        ValueError: If a bound does not broadcast to `x0`, or `fun` does not return a scalar.
    """
    x0 = checks.floating("x0", x0)
    bounds = checks.box(box, x0)
    checks.scalar("fun", fun, x0)
    max_evals = checks.positive_int("max_evals", max_evals)
    start, flat_bounds = jnp.ravel(x0), Box(*map(jnp.ravel, bounds))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def value_and_grad(x):
        return jnp.asarray(fun(x.reshape(x0.shape)), x0.dtype), ()

    def running(state: SolverState):
        return (state.status == Status.RUNNING) & (state.num_evals < max_evals)

    def step(state: SolverState):
        return solver.step(value_and_grad, state, flat_bounds)

    state = solver.init(value_and_grad, start, flat_bounds)
    feasible = jnp.all(jnp.less_equal(*bounds))
    state = state._replace(
        x=jnp.where(feasible, state.x, start),
        status=jnp.where(feasible, state.status, Status.EMPTY_BOX),
    )
    end = jax.lax.while_loop(running, step, state)
    return SolverResult(
        x=end.x.reshape(x0.shape),
        value=end.value,
        grad=end.grad.reshape(x0.shape),
        error=end.error,
        status=jnp.where(end.status == Status.RUNNING, Status.BUDGET, end.status),
        num_evals=end.num_evals,
    )
