"""The entry point: minimise one function in a box."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from advjax import checks
from advjax.solvers.base import (
    Solver,
    SolverResult,
    SolverState,
    Status,
    projected_gradient_norm,
    scale,
)
from advjax.solvers.lbfgsb import lbfgsb
from advjax.types import Box


def minimize(
    fun: Callable[[Float[Array, "*shape"]], Float[Array, ""]],
    x0: Float[Array, "*shape"],
    *,
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    solver: Solver = lbfgsb(),  # noqa: B008
    tol: float | None = None,
    max_evals: int = 1000,
) -> SolverResult:
    """Minimise a smooth function in a box.

    Without `jax.jit` around it, a second call with the same function and shapes compiles nothing.
    Like a function given to `jax.jit`, `fun` is then taken for pure: arrays that it closes over are
    constants. Those inside a callable pytree (`jax.tree_util.Partial`, `functools.partial`, an
    Equinox module) may change from call to call.

    Args:
        fun: The objective: a scalar of one array.
        x0: Where to start, of any shape; a point outside the box is moved into it.
        box: `(lower, upper)`, each broadcast to `x0`; infinite bounds and `lower == upper` are
            fine. The default is the box of images, [0, 1].
        solver: The minimiser, ours by default; `solvers.jaxopt_lbfgsb()` and your own work alike.
        tol: It has converged where the projected gradient has become this small beside the largest
            gradient on the way, whatever the scale of the objective:
            `||clip(x - grad / largest) - x||_2 <= tol`. By default 1e-8, or the
            resolution of the numbers where that is coarser: 1.2e-7 in float32.
        max_evals: The most evaluations of value and gradient.

    Returns:
        A `SolverResult`. Trouble is told by its `status`, never by an exception under `jit`, and
        `x` is finite, if `x0` is, and in the box all the same (`x0` itself if the box is empty).

    Raises:
        TypeError: If `x0` is not floating.
        ValueError: If a bound does not broadcast to `x0`, `fun` does not return a scalar, `tol` is
            negative, or `max_evals` is not a positive integer.
    """
    x0 = checks.floating("x0", x0)
    bounds = checks.box(box, x0)
    checks.scalar("fun", fun, x0)
    if tol is None:
        tol = max(1e-8, float(jnp.finfo(x0.dtype).eps))
    tol = checks.number("tol", tol, minimum=0)
    max_evals = checks.positive_int("max_evals", max_evals)
    static, arrays = _split(fun)
    return _minimize(static, arrays, x0, bounds, jnp.asarray(tol, x0.dtype), max_evals, solver)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _minimize(
    static: "_Static",
    arrays: list[Array],
    x0: Float[Array, "*shape"],
    bounds: Box,
    tol: Float[Array, ""],
    max_evals: Array,
    solver: Solver,
) -> SolverResult:
    fun = _join(static, arrays)
    start, flat_bounds = jnp.ravel(x0), Box(*map(jnp.ravel, bounds))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def value_and_grad(x):
        return jnp.asarray(fun(x.reshape(x0.shape)), x0.dtype), ()

    def scaled_error(state: SolverState, largest):
        unit = jnp.where(largest > 0, largest, 1)
        return projected_gradient_norm(state.x, state.grad / unit, flat_bounds)

    def running(carry):
        state, _ = carry
        return (state.status == Status.RUNNING) & (state.num_evals < max_evals)

    def step(carry):
        state, largest = carry
        state = solver.step(value_and_grad, state, flat_bounds)
        scaled, exponent = scale(state.grad)
        largest = jnp.maximum(largest, jnp.ldexp(jnp.linalg.norm(scaled), exponent))
        converged = state.evaluated & (scaled_error(state, largest) <= tol)
        status = jnp.where(converged, Status.CONVERGED, state.status).astype(jnp.int32)
        return state._replace(status=status), largest

    state = solver.init(value_and_grad, start, flat_bounds)
    feasible = jnp.all(jnp.less_equal(*bounds))
    state = state._replace(
        x=jnp.where(feasible, state.x, start),
        status=jnp.where(feasible, state.status, Status.EMPTY_BOX),
    )
    end, _ = jax.lax.while_loop(running, step, (state, jnp.zeros((), x0.dtype)))
    return SolverResult(
        x=end.x.reshape(x0.shape),
        value=end.value,
        grad=end.grad.reshape(x0.shape),
        error=end.error,
        status=jnp.where(end.status == Status.RUNNING, Status.BUDGET, end.status),
        num_evals=end.num_evals,
    )


class _Static:
    """A callable without its arrays: what a compiled program is looked up by."""

    def __init__(self, treedef: Any, leaves: tuple):
        self.treedef, self.leaves = treedef, leaves
        self._hash = hash((treedef, leaves))

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        # The hashes first: trees of unlike metadata may refuse to be compared.
        return (
            isinstance(other, _Static)
            and self._hash == other._hash
            and self.leaves == other.leaves
            and self.treedef == other.treedef
        )


def _split(fun: Callable) -> tuple[_Static, list[Array]]:
    """A callable as something hashable, and the arrays of a callable pytree."""
    if type(fun) is functools.partial:
        fun = jax.tree_util.Partial(fun.func, *fun.args, **fun.keywords)
    leaves, treedef = jax.tree.flatten(fun)
    arrays = [leaf for leaf in leaves if _is_array(leaf)]
    rest = tuple(_ARRAY if _is_array(leaf) else leaf for leaf in leaves)
    try:
        return _Static(treedef, rest), arrays
    except TypeError:  # not hashable: nothing to find it by but its identity
        return _Static(None, (_ById(fun),)), []


def _join(static: _Static, arrays: list[Array]) -> Callable:
    if static.treedef is None:
        return static.leaves[0].fun
    remaining = iter(arrays)
    leaves = [next(remaining) if leaf is _ARRAY else leaf for leaf in static.leaves]
    return jax.tree.unflatten(static.treedef, leaves)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


class _ById:
    def __init__(self, fun: Callable):
        self.fun = fun

    def __hash__(self):
        return id(self.fun)

    def __eq__(self, other):
        return isinstance(other, _ById) and self.fun is other.fun


_ARRAY = object()  # the place of an array among the leaves
