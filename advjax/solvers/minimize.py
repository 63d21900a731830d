"""The entry points: minimise one function of any variables, or many problems of one shape."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from advjax import checks
from advjax.functions import Function
from advjax.solvers import variables
from advjax.solvers.base import (
    Solver,
    SolverResult,
    SolverState,
    Status,
    ValueAndGrad,
    projected_gradient_norm,
    scale,
)
from advjax.solvers.lbfgsb import lbfgsb
from advjax.types import Box

_FADED = 1e-4  # of the largest gradient, below which the reference does not fall
_SMALL_IN_A_ROW = 5  # a few small decreases may be those of steps cut short, or of a long valley
_NARROWER = 8  # by what the number of lanes is divided when so few problems are left


class _Problem(NamedTuple):
    """What a program is compiled for."""

    variables: variables.Layout
    has_aux: bool
    solver: Solver


class _Data(NamedTuple):
    """What may change from call to call."""

    fun: Function
    args: tuple
    start: Float[Array, " n"]
    box: Box
    tol: Float[Array, ""]
    ftol: Float[Array, ""]
    max_evals: Int[Array, ""]


class _Progress(NamedTuple):
    state: SolverState
    largest: Float[Array, ""]  # gradient met so far
    reference: Float[Array, ""]  # gradient, which forgets the largest one with the iterations
    small: Int[Array, ""]  # decreases in a row
    iterations: Int[Array, ""]


def minimize(
    fun: Callable,
    x0: PyTree[Float[Array, "..."]],
    *,
    box: Any = None,
    args: tuple = (),
    has_aux: bool = False,
    solver: Solver = lbfgsb(memory=10),  # noqa: B008 an immutable default
    tol: float | None = None,
    ftol: float | None = None,
    max_evals: int = 15_000,
) -> SolverResult:
    """Minimise a smooth function, with bounds on its variables if there are any.

    Whether it stops depends neither on the scale of the objective nor, for `tol`, on a constant
    added to it. Without `jax.jit` around it, a second call with the same function and shapes
    compiles nothing, even if arrays that `fun` closes over have changed.

    The result may be differentiated with respect to `args`, the bounds, and whatever `fun` closes
    over: by the implicit function theorem on the variables that are not at a bound, so that the
    derivative is right where the minimum was found and its Hessian is positive definite there.

    Args:
        fun: The objective: `fun(x, *args)` is a scalar, or a pair of it and anything else.
        x0: Where to start: a pytree of floating arrays. What is outside the box is moved into it.
        box: `(lower, upper)`, each None, a number, an array that broadcasts to `x0`, or a pytree of
            these like `x0`. By default there are no bounds.
        args: Further arguments of `fun`, pytrees of arrays.
        has_aux: Whether `fun` returns a pair.
        solver: The minimiser, ours by default; `solvers.jaxopt_lbfgsb()` and your own work alike.
        tol: It has converged where the projected gradient has become this small beside those on the
            way: `||clip(x - grad / reference) - x||_2 <= tol`. The reference is the largest
            gradient met, halved with each iteration, down to a ten-thousandth. By default 1e-8, or
            the resolution of the numbers where that is coarser: 1.2e-7 in float32.
        ftol: It ends where five iterations in a row lower the value by no more than this fraction.
            By default four times the resolution of the numbers.
        max_evals: The most evaluations of value and gradient.

    Returns:
        A `SolverResult`. Trouble is told by its `status`, never by an exception under `jit`, and
        `x` is finite, if `x0` is, and in the box all the same (`x0` itself if the box is empty).

    Raises:
        TypeError: If a leaf of `x0` is not floating.
        ValueError: If `box` is no pair of bounds like `x0`, `fun` does not return a scalar, or an
            option is out of its range.
    """
    layout, x0 = variables.layout(x0)
    problem, data = _prepare(fun, layout, x0, args, has_aux, solver)
    data = data._replace(
        start=layout.flatten(x0),
        box=variables.bounds(box, x0, layout),
        tol=_tolerance("tol", tol, layout.dtype, least=1e-8, digits=1),
        ftol=_tolerance("ftol", ftol, layout.dtype, least=0, digits=4),
        max_evals=jnp.int32(checks.positive_int("max_evals", max_evals)),
    )
    return _outside(layout, _solve(problem, data))


def minimize_many(
    fun: Callable,
    x0s: PyTree[Float[Array, "problems ..."]],
    *,
    box: Any = None,
    args: tuple = (),
    has_aux: bool = False,
    solver: Solver = lbfgsb(memory=10),  # noqa: B008
    tol: float | None = None,
    ftol: float | None = None,
    max_evals: int = 15_000,
    batch_size: int = 64,
) -> SolverResult:
    """Minimise many problems of one shape, so that the hard ones do not hold up the others.

    As `jax.vmap(minimize)` returns, but a problem that is solved makes room for the next one, and
    the last ones go on in ever fewer lanes. Not to be differentiated; `jax.vmap(minimize)` may be.

    Args:
        fun: The objective of ONE problem: `fun(x, *args)`.
        x0s: Where to start: a pytree of arrays with a leading axis of problems.
        box: `(lower, upper)` as for `minimize`, each broadcast to `x0s`.
        args: Further arguments of `fun`, with a leading axis of problems.
        has_aux: Whether `fun` returns a pair.
        solver: The minimiser.
        tol: As for `minimize`.
        ftol: As for `minimize`.
        max_evals: The most evaluations of each problem.
        batch_size: How many problems are in work at the same time.

    Returns:
        A `SolverResult` with a leading axis of problems.

    Raises:
        TypeError: If a leaf of `x0s` is not floating.
        ValueError: As for `minimize`, or if the leading axes differ.
    """
    layout, x0s = variables.layout(x0s, batched=True)
    batch_size = checks.positive_int("batch_size", batch_size)
    count = len(jax.tree.leaves(x0s)[0])
    for leaf in jax.tree.leaves(args):
        if jnp.shape(leaf)[:1] != (count,):
            raise ValueError(
                f"args: an array of shape {jnp.shape(leaf)}, expected a leading axis of {count} "
                "problems; what they share goes into fun."
            )
    x0, first_args = jax.tree.map(operator.itemgetter(0), (x0s, args))
    problem, data = _prepare(fun, layout, x0, first_args, has_aux, solver)
    data = data._replace(
        args=args,
        start=layout.flatten(x0s, batched=True),
        box=variables.bounds(box, x0s, layout, batched=True),
        tol=_tolerance("tol", tol, layout.dtype, least=1e-8, digits=1),
        ftol=_tolerance("ftol", ftol, layout.dtype, least=0, digits=4),
        max_evals=jnp.int32(checks.positive_int("max_evals", max_evals)),
    )
    return _outside(layout, _solve_many(problem, data, min(batch_size, count)))


def _prepare(
    fun: Callable, layout: variables.Layout, x0: PyTree, args: tuple, has_aux: bool, solver: Solver
) -> tuple[_Problem, _Data]:
    """The problem, and its data as far as they are those of `fun`."""
    # What fun closes over becomes an argument: it may change, and it may be differentiated.
    fun = Function(fun).hoist(x0, *args)
    value = jax.eval_shape(fun, x0, *args)
    if has_aux:
        if not isinstance(value, tuple) or len(value) != 2:
            raise ValueError(f"fun: returns {type(value).__name__}, expected (value, aux).")
        value, _ = value
    checks.scalar("fun", value)
    nothing = jnp.zeros(())
    return _Problem(layout, has_aux, solver), _Data(
        fun, tuple(args), nothing, Box(), nothing, nothing, jnp.int32(0)
    )


def _tolerance(
    name: str, value: float | None, dtype: Any, *, least: float, digits: float
) -> Float[Array, ""]:
    """The value, or so many units of the last digit."""
    if value is None:
        value = max(least, digits * float(jnp.finfo(dtype).eps))
    return jnp.asarray(checks.number(name, value, minimum=0), dtype)


def _outside(layout: variables.Layout, result: SolverResult) -> SolverResult:
    return result._replace(x=layout.unflatten(result.x), grad=layout.unflatten(result.grad))


# One problem


def _objective(problem: _Problem, fun: Function, args: tuple) -> Callable:
    """The flat objective, `x -> (value, aux)`."""

    def objective(flat):
        out = fun(problem.variables.unflatten(flat), *args)
        value, aux = out if problem.has_aux else (out, ())
        return jnp.asarray(value, flat.dtype), aux

    return objective


def _value_and_grad(problem: _Problem, data: _Data) -> ValueAndGrad:
    return jax.value_and_grad(_objective(problem, data.fun, data.args), has_aux=True)


def _begin(problem: _Problem, data: _Data) -> _Progress:
    state = problem.solver.init(_value_and_grad(problem, data), data.start, data.box)
    feasible = jnp.all(jnp.less_equal(*data.box))
    state = state._replace(
        x=jnp.where(feasible, state.x, data.start),
        status=jnp.where(feasible, state.status, Status.EMPTY_BOX),
    )
    zero = jnp.zeros((), data.start.dtype)
    return _Progress(state, zero, zero, jnp.int32(0), jnp.int32(0))


def _running(data: _Data, progress: _Progress) -> Array:
    state = progress.state
    return (state.status == Status.RUNNING) & (state.num_evals < data.max_evals)


def _advance(problem: _Problem, data: _Data, progress: _Progress) -> _Progress:
    old = progress.state
    state = problem.solver.step(_value_and_grad(problem, data), old, data.box)
    scaled, exponent = scale(state.grad)
    largest = jnp.maximum(progress.largest, jnp.ldexp(jnp.linalg.norm(scaled), exponent))
    moved = old.evaluated & jnp.any(state.x != old.x)
    # A start far out in a steep valley must not set the scale of the gradients in its bottom.
    faded = jnp.where(moved, progress.reference / 2, progress.reference)
    reference = jnp.maximum(faded, _FADED * largest)
    reference = jnp.where(progress.iterations == 0, largest, reference)
    unit = jnp.where(reference > 0, reference, 1)
    error = projected_gradient_norm(state.x, state.grad / unit, data.box)

    size = jnp.maximum(jnp.abs(old.value), jnp.abs(state.value))
    is_small = old.value - state.value <= data.ftol * size
    small = jnp.where(moved, jnp.where(is_small, progress.small + 1, 0), progress.small)
    status = jnp.select(
        [state.evaluated & (error <= data.tol), small >= _SMALL_IN_A_ROW],
        [jnp.int32(Status.CONVERGED), jnp.int32(Status.SMALL_DECREASE)],
        state.status,
    )
    return _Progress(
        state._replace(status=status), largest, reference, small, progress.iterations + moved
    )


def _finish(progress: _Progress) -> SolverResult:
    end = progress.state
    status = jnp.where(end.status == Status.RUNNING, Status.BUDGET, end.status)
    return SolverResult(
        x=end.x,
        value=end.value,
        grad=end.grad,
        aux=end.aux,
        error=end.error,
        success=(status == Status.CONVERGED) | (status == Status.SMALL_DECREASE),
        status=status,
        num_iterations=progress.iterations,
        num_evals=end.num_evals,
    )


@functools.partial(jax.jit, static_argnums=0)
def _run(problem: _Problem, data: _Data) -> SolverResult:
    end = jax.lax.while_loop(
        functools.partial(_running, data),
        functools.partial(_advance, problem, data),
        _begin(problem, data),
    )
    return _finish(end)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solve(problem: _Problem, data: _Data) -> SolverResult:
    return _run(problem, data)


@_solve.defjvp
def _solve_jvp(problem: _Problem, primals: tuple[_Data], tangents: tuple[_Data]):
    """The implicit function theorem on the free variables; the others move with their bounds."""
    (data,), (rates,) = primals, tangents
    result = _solve(problem, data)
    x = result.x
    at_lower, at_upper = x <= data.box.lower, x >= data.box.upper
    free = ~(at_lower | at_upper)

    def evaluate(x, fun, args):
        (value, aux), grad = jax.value_and_grad(_objective(problem, fun, args), has_aux=True)(x)
        return value, aux, grad

    def rate(of_x):
        """Of value, aux and gradient, if x changes at a rate."""
        return jax.jvp(evaluate, (x, data.fun, data.args), (of_x, rates.fun, rates.args))[1]

    def on_free(vector):
        hessian = jax.jvp(
            lambda x: evaluate(x, data.fun, data.args)[2], (x,), (jnp.where(free, vector, 0),)
        )[1]
        return jnp.where(free, hessian, vector)

    def solve(matvec, right):
        tol = 10 * float(jnp.finfo(x.dtype).eps)
        return jax.scipy.sparse.linalg.cg(matvec, right, tol=tol, maxiter=10 * x.size)[0]

    of_bounds = jnp.where(at_lower, rates.box.lower, jnp.where(at_upper, rates.box.upper, 0))
    right = jnp.where(free, -rate(of_bounds)[2], 0)
    of_x = of_bounds + jax.lax.custom_linear_solve(on_free, right, solve, symmetric=True)
    of_value, of_aux, of_grad = rate(of_x)
    without = jax.tree.map(
        lambda leaf: (
            jnp.zeros_like(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.inexact)
            else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        result,
    )
    return result, without._replace(x=of_x, value=of_value, aux=of_aux, grad=of_grad)


# Many problems


@functools.partial(jax.jit, static_argnums=(0, 2))
def _solve_many(problem: _Problem, data: _Data, lanes: int) -> SolverResult:
    """Lanes that take the next problem when theirs is solved, and become fewer at the end."""
    count = len(data.start)
    axes = _Data(None, 0, 0, Box(0, 0), None, None, None)  # type: ignore[arg-type]

    def load(index):
        args, start, box = jax.tree.map(
            lambda leaf: leaf[jnp.minimum(index, count - 1)], (data.args, data.start, data.box)
        )
        return data._replace(args=args, start=start, box=box)

    begin = jax.vmap(functools.partial(_begin, problem), in_axes=(axes,))
    running = jax.vmap(_running, in_axes=(axes, 0))
    advance = jax.vmap(functools.partial(_advance, problem), in_axes=(axes, 0))

    def ended_in(work):
        return (work.problem < count) & ~running(work.data, work.progress)

    def any_ended(work):
        return jnp.any(ended_in(work))

    def refill(work):
        ended = ended_in(work)
        slot = jnp.where(ended, work.problem, count)

        def put(into, some):
            return into.at[slot].set(some, mode="drop")

        results = jax.tree.map(put, work.results, jax.vmap(_finish)(work.progress))
        index = jnp.where(ended, work.next + jnp.cumsum(ended) - 1, work.problem)
        new_data = load(index)
        fresh = begin(new_data)

        def choose(new, old):
            return jnp.where(jnp.reshape(ended, (-1,) + (1,) * (old.ndim - 1)), new, old)

        return work._replace(
            data=new_data,
            progress=jax.tree.map(choose, fresh, work.progress),
            problem=jnp.minimum(index, count).astype(jnp.int32),
            next=jnp.minimum(work.next + jnp.sum(ended), count).astype(jnp.int32),
            results=results,
        )

    def turn(work):
        work = work._replace(progress=advance(work.data, work.progress))
        return jax.lax.while_loop(any_ended, refill, work)

    index = jnp.arange(lanes, dtype=jnp.int32)
    first_data = load(index)
    progress = begin(first_data)
    blank = jax.eval_shape(jax.vmap(_finish), progress)
    results = jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape[1:]), leaf.dtype), blank)
    work = _Work(first_data, progress, index, jnp.int32(lanes), results)
    work = jax.lax.while_loop(any_ended, refill, work)  # of empty boxes, which end at once
    while True:
        narrower = lanes // _NARROWER
        enough = narrower if lanes > 1 else 0

        def many(work, enough=enough):
            return jnp.sum(work.problem < count) > enough

        work = jax.lax.while_loop(many, turn, work)
        if enough == 0:
            return work.results
        lanes = narrower
        kept = jnp.argsort(work.problem >= count, stable=True)[:lanes]
        progress, index = jax.tree.map(operator.itemgetter(kept), (work.progress, work.problem))
        work = work._replace(data=load(index), progress=progress, problem=index)


class _Work(NamedTuple):
    data: _Data
    progress: _Progress
    problem: Int[Array, " lanes"]  # in each lane, or their number where there is none left
    next: Int[Array, ""]
    results: SolverResult
