"""The entry point: minimise one function in a box."""

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
    value_and_grad = jax.value_and_grad(lambda x: (jnp.asarray(fun(x), x0.dtype), ()), has_aux=True)

    def running(state: SolverState):
        return (state.status == Status.RUNNING) & (state.num_evals < max_evals)

    def step(state: SolverState):
        return solver.step(value_and_grad, state, bounds)

    start = solver.init(value_and_grad, x0, bounds)
    feasible = jnp.all(jnp.less_equal(bounds.lower, bounds.upper))
    start = start._replace(
        x=jnp.where(feasible, start.x, x0),
        status=jnp.where(feasible, start.status, Status.EMPTY_BOX),
    )
    end = jax.lax.while_loop(running, step, start)
    return SolverResult(
        x=end.x,
        value=end.value,
        grad=end.grad,
        error=end.error,
        status=jnp.where(end.status == Status.RUNNING, Status.BUDGET, end.status),
        num_evals=end.num_evals,
    )
