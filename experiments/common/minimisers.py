"""Our minimiser, SciPy's and those of the JAX libraries, each as a function that gives its trace.

A trace is the objective at each evaluation, in sequence. Evaluations are those of the objective;
SciPy, ours and jaxopt take a gradient with each, the others with some.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from advjax import Box, solvers
from experiments.common.solver_problems import Problem

Trace = list[float]
Minimiser = Callable[[Problem, int], Trace]
"""`(problem, budget) -> trace`, with at most `budget` evaluations."""


def require_peers() -> None:
    """Raise, with the remedy, if a package that the peers need is not installed."""
    if importlib.util.find_spec("optimistix") is None:
        raise ImportError(
            "peers: optimistix is not installed, expected it to compare with; "
            "pip install optimistix, or leave the peers out."
        )


# --- ours ------------------------------------------------------------------------------------


def ours(problem: Problem, budget: int, *, memory: int = 10) -> Trace:
    """Our solver, without a tolerance."""
    return trace_and_status(problem, budget, memory=memory)[0]


def trace_and_status(
    problem: Problem, budget: int, *, memory: int = 10, scale: float = 1.0
) -> tuple[Trace, int]:
    """Our solver on the objective times `scale`; the trace is of the objective itself.

    It is stepped from outside, so that it is compiled once for each number of variables.

    Args:
        problem: The problem.
        budget: The most evaluations.
        memory: The number of pairs that the solver keeps.
        scale: What the objective is multiplied by.

    Returns:
        The trace, and the `solvers.Status` at its end.
    """
    init, trial_point, next_state = _parts_of_a_step(memory)
    box = _box(problem)
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: scale * problem.fun(x)))
    state = init(jnp.asarray(problem.x0, float), box)
    trace: Trace = []
    while len(trace) < budget and state.status == solvers.Status.RUNNING:
        value, grad = value_and_grad(trial_point(state, box))
        state = next_state(state, value, grad, box)
        trace.append(float(value) / scale)
    return trace, int(state.status)


@functools.cache
def _parts_of_a_step(memory: int) -> tuple[Callable, Callable, Callable]:
    """The start; from a state to its trial point; and from the value there to the next state."""
    solver = solvers.lbfgsb(memory=memory)

    def init(x0: Array, box: Box) -> solvers.SolverState:
        return solver.init(lambda x: ((jnp.sum(x), ()), x), x0, box)

    def trial_point(state: solvers.SolverState, box: Box) -> Array:
        points = []

        def record(x: Array) -> tuple[tuple[Array, Any], Array]:
            points.append(x)
            return (jnp.zeros((), x.dtype), ()), x

        solver.step(record, state, box)
        return points[0]

    def next_state(
        state: solvers.SolverState, value: Array, grad: Array, box: Box
    ) -> solvers.SolverState:
        return solver.step(lambda x: ((value, ()), grad), state, box)

    return jax.jit(init), jax.jit(trial_point), jax.jit(next_state)


def _box(problem: Problem) -> Box:
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(bound, float), problem.x0.shape)
        for bound in (problem.lower, problem.upper)
    )
    return Box(lower, upper)


# --- others ----------------------------------------------------------------------------------


def scipy(problem: Problem, budget: int) -> Trace:
    """SciPy's L-BFGS-B, run until rounding stops it."""
    from scipy import optimize

    value_and_grad = jax.jit(jax.value_and_grad(problem.fun))
    trace: Trace = []

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = value_and_grad(x)
        trace.append(float(value))
        return float(value), np.asarray(grad)

    lower, upper = map(np.asarray, _box(problem))
    optimize.minimize(
        fun,
        np.clip(problem.x0, lower, upper),
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(lower, upper),
        options={"maxcor": 10, "ftol": 1e-16, "gtol": 1e-12, "maxfun": budget, "maxiter": budget},
    )
    return trace


def jaxopt(problem: Problem, budget: int) -> Trace:
    """Jaxopt's L-BFGS-B, guarded."""
    fun, trace = _recorded(problem)
    solvers.minimize(
        fun,
        jnp.asarray(problem.x0, float),
        box=_box(problem),
        solver=solvers.jaxopt_lbfgsb(),
        tol=1e-12,
        ftol=0,
        max_evals=budget,
    )
    jax.effects_barrier()
    return trace[:budget]


def optimistix(problem: Problem, budget: int) -> Trace:
    """Optimistix's L-BFGS, which knows no bounds."""
    import optimistix

    fun, trace = _recorded(problem)
    optimistix.minimise(
        fun,
        optimistix.LBFGS(rtol=1e-12, atol=1e-12, history_length=10),
        jnp.asarray(problem.x0, float),
        max_steps=budget,
        throw=False,
    )
    jax.effects_barrier()
    return trace[:budget]


def optax(problem: Problem, budget: int) -> Trace:
    """Optax's L-BFGS with its zoom line search, run as in its documentation, without bounds."""
    import optax

    fun, trace = _recorded(problem)
    optimizer = optax.lbfgs(memory_size=10)
    value_and_grad = optax.value_and_grad_from_state(fun)
    Carry = tuple[Array, Any, Array]

    def step(carry: Carry) -> Carry:
        x, state, count = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = optimizer.update(grad, state, x, value=value, grad=grad, value_fn=fun)
        return optax.apply_updates(x, updates), state, count + 1

    def running(carry: Carry) -> Array:
        _, state, count = carry
        grad = optax.tree.get(state, "grad")
        return (count == 0) | ((count < budget) & (optax.tree.norm(grad) > 1e-12))

    @jax.jit
    def run(x0: Array) -> Carry:
        return jax.lax.while_loop(running, step, (x0, optimizer.init(x0), jnp.zeros((), int)))

    jax.block_until_ready(run(jnp.asarray(problem.x0, float)))
    jax.effects_barrier()
    return trace[:budget]


def _recorded(problem: Problem) -> tuple[Callable, Trace]:
    """The objective as a function that records its values, inside a compiled program too."""
    trace: Trace = []

    def fun(x: Float[Array, " n"], *_: Any) -> Float[Array, ""]:
        value = problem.fun(x)
        jax.debug.callback(lambda value: trace.append(float(value)), value, ordered=True)
        return value

    return fun, trace


OURS_AND_SCIPY: dict[str, Minimiser] = {
    "advjax, memory 4": functools.partial(ours, memory=4),
    "advjax, memory 10": ours,
    "SciPy": scipy,
}
PEERS: dict[str, Minimiser] = {"jaxopt": jaxopt, "optimistix": optimistix, "optax": optax}
"""They take hours on 1,000 variables or more."""
WITHOUT_BOUNDS = ("optimistix", "optax")
