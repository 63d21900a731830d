"""Projected L-BFGS for boxes, flat: one evaluation per step, with the line search as state.

Each step moves along the quasi-Newton direction of the coordinates that are free at the current
point, projected back into the box (the two-metric projection of Bertsekas, 1982). At every step the
history is masked to the coordinates that are free then, so that it stays of use when the active set
changes, or the caller changes the objective.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from advjax import checks
from advjax.solvers.base import (
    Solver,
    SolverState,
    Status,
    ValueAndGrad,
    initial_state,
    projected_gradient_norm,
    scale,
)
from advjax.types import Box

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would multiply in half precision
_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant (Nocedal and Wright, 2006, section 3.1)
_SHRINK = (0.1, 0.5)  # the least and the largest factor for a rejected step
_FIRST_SHRINK = 1e-3  # the least factor while there is no pair, and the first step is a guess
_FIRST_LENGTH = 1.0  # of the first step, if the caller does not know the curvature
_ROUNDING = 4.0  # the error of a value, in units of its last digit
_NEARER = 0.5  # a projected gradient shorter than this times the shortest so far is progress too
_GROWTH = 4.0  # of the step along a direction without positive curvature
_BLOCK = 4096  # coordinates of the history that fit into a CPU cache
_LARGE = 16 * _BLOCK  # from this size on, a history is read in blocks
_MAX_REJECTIONS = 15  # in a row; then the history is dropped, and the next time the solver stalls
_MAX_IDLE = 5  # accepted steps in a row without progress beyond rounding


class _Memory(NamedTuple):
    """A ring buffer of steps and gradient changes, pair k in slot `k % memory`, and counters."""

    history: Float[Array, "rows size"]
    """The steps, one per row, and below them the gradient changes. Each row is scaled by a power of
    two to a largest entry of about 1, so that no inner product overflows or underflows, however
    steep or flat the objective."""
    exponents: Int[Array, " memory"]
    """For each pair, the exponent of the step's scale less that of the gradient change's."""
    rounding: Float[Array, " memory"]
    """For each pair, the rounding error of the inner product of its step and gradient change."""
    num_pairs: Int[Array, ""]
    """Number of pairs since the history was last dropped, those overwritten since included."""
    inverse_curvature: Float[Array, ""]
    """`s.y / y.y` of the newest pair; 0 before the first."""
    first_step: Float[Array, ""] | None
    """The caller's estimate of the inverse curvature; None if there is none."""
    step_size: Float[Array, ""]
    """The factor of the next trial step along the search direction."""
    rejections: Int[Array, ""]
    """Number of trial points rejected in a row."""
    idle: Int[Array, ""]
    """Number of accepted steps in a row without progress beyond rounding."""
    least_error: Float[Array, ""]
    """The shortest projected gradient since the value last decreased by more than rounding."""


def lbfgsb(*, memory: int = 4) -> Solver:
    """Make a limited-memory BFGS method for box constraints, designed for `jax.vmap`.

    Args:
        memory: Number of pairs of steps and gradient changes to keep. The state holds `2 * memory`
            arrays of the size of `x`, and most of a step's time goes into reading them.

    Returns:
        A `Solver` with one evaluation per step. A trial point whose value or gradient is not finite
        is rejected like any other bad step. The status becomes `STALLED` when rounding hides any
        further decrease.

    Raises:
        ValueError: If `memory` is not a positive integer.
    """
    return _make(checks.positive_int("memory", memory))


@functools.cache  # equal options return the same solver, whose programs are compiled once
def _make(memory: int) -> Solver:
    def init(
        value_and_grad: ValueAndGrad,
        x0: Float[Array, "*shape"],
        box: Box,
        first_step: Float[ArrayLike, ""] | None = None,
    ) -> SolverState:
        start = _Memory(
            history=jnp.zeros((2 * memory, x0.size), x0.dtype),
            exponents=jnp.zeros(memory, jnp.int32),
            rounding=jnp.zeros(memory, x0.dtype),
            num_pairs=jnp.int32(0),
            inverse_curvature=jnp.zeros((), x0.dtype),
            first_step=_checked(first_step, x0.dtype),
            step_size=jnp.ones((), x0.dtype),
            rejections=jnp.int32(0),
            idle=jnp.int32(0),
            least_error=jnp.full((), jnp.inf, x0.dtype),
        )
        return initial_state(value_and_grad, x0, box, start)

    def step(value_and_grad: ValueAndGrad, state: SolverState, box: Box) -> SolverState:
        old, known = state.memory, state.evaluated
        idle = jnp.where(state.status == Status.RUNNING, old.idle, 0)
        # With a gradient of 0 the trial point is x itself: an unevaluated state is evaluated.
        state = state._replace(grad=jnp.where(known, state.grad, 0))

        # The trial point is on the projection arc: a shorter step is projected again. On the
        # straight segment to the first projection a variable would approach its bound for ever
        # without reaching it.
        def on_arc(direction: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
            return jnp.clip(state.x + old.step_size * direction, box.lower, box.upper)

        trial = on_arc(_direction(state.x, state.grad, old, box))
        descends = jnp.vdot(state.grad, trial - state.x) < 0
        # Projection may turn a quasi-Newton step uphill; a projected gradient step never is.
        trial = jnp.where(descends, trial, on_arc(_steepest(state.x, state.grad, old, box)))
        (value, aux), grad = value_and_grad(trial)

        moved, change = trial - state.x, grad - state.grad
        slope, new_slope = jnp.vdot(state.grad, moved), jnp.vdot(grad, moved)
        decrease = state.value - value
        digit = jnp.finfo(value.dtype).eps * jnp.abs(state.value)
        rounding = jnp.where(known, _ROUNDING * digit, 0)
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
        # Where rounding hides the decrease of the value, the slopes at both ends estimate it more
        # accurately: the approximate Wolfe condition of Hager and Zhang (2005).
        sufficient = -_SUFFICIENT_DECREASE * jnp.minimum(slope, 0)
        by_gradients = -(slope + new_slope) / 2
        accepted = finite & (
            ~known
            | (decrease >= sufficient + rounding)
            | ((decrease >= -rounding) & (by_gradients >= sufficient))
        )

        def choose(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

        rejections = jnp.where(accepted, 0, old.rejections + 1)
        exhausted = rejections > _MAX_REJECTIONS
        pairs = _remember(old, moved, change, keep=accepted & known, forget=exhausted)
        x, grad = choose((trial, grad), (state.x, state.grad))
        evaluated = known | accepted
        error = jnp.where(evaluated, projected_gradient_norm(x, grad, box), jnp.inf)
        # At the optimum, accepted steps only shuffle the last digit. A projected gradient that
        # shrinks is progress even so: the value of a flat valley changes by less than rounding.
        gained = (decrease > rounding) | ~known
        nearer = error < _NEARER * old.least_error
        least_error = jnp.where(gained | nearer, error, old.least_error)
        idle = jnp.where(accepted, jnp.where(gained | nearer, 0, idle + 1), idle)

        status = jnp.select(
            [~evaluated, (exhausted & (old.num_pairs == 0)) | (idle >= _MAX_IDLE)],
            [jnp.int32(Status.NONFINITE), jnp.int32(Status.STALLED)],
            jnp.int32(Status.RUNNING),
        )
        # Without positive curvature no new pair scales the next step, so that it is lengthened.
        one = jnp.ones_like(slope)
        curved = ~known | (new_slope > slope)
        longer = jnp.where(curved, one, _GROWTH * old.step_size)
        shorter = old.step_size * _shrinkage(-decrease, slope, finite, first=old.num_pairs == 0)
        return SolverState(
            x=x,
            value=jnp.where(accepted, value, state.value),
            grad=grad,
            aux=choose(aux, state.aux),
            error=error,
            evaluated=evaluated,
            status=status,
            num_evals=state.num_evals + 1,
            memory=pairs._replace(
                step_size=jnp.select([exhausted, accepted], [one, longer], shorter),
                rejections=jnp.where(exhausted, 0, rejections),
                idle=idle,
                least_error=least_error,
            ),
        )

    return Solver(init, step)


def _checked(first_step: Float[ArrayLike, ""] | None, dtype: Any) -> Float[Array, ""] | None:
    """`first_step` as an array; ValueError if a number that is not positive."""
    if isinstance(first_step, int | float):
        checks.number("first_step", first_step, minimum=0, exclusive=True)
    return None if first_step is None else jnp.asarray(first_step, dtype)


def _free(
    x: Float[Array, "*shape"], grad: Float[Array, "*shape"], box: Box
) -> Bool[Array, "*shape"]:
    """Which coordinates are free: minus the gradient does not push them against a bound."""
    return ~(((x <= box.lower) & (grad > 0)) | ((x >= box.upper) & (grad < 0)))


def _steepest(
    x: Float[Array, "*shape"], grad: Float[Array, "*shape"], memory: _Memory, box: Box
) -> Float[Array, "*shape"]:
    """Minus the gradient on the free coordinates, times the estimate of the inverse curvature."""
    scaled, exponent = scale(jnp.where(_free(x, grad, box), grad, 0))
    return -_inverse_curvature(memory, scaled, exponent) * scaled


def _inverse_curvature(
    memory: _Memory, scaled_grad: Float[Array, "*shape"], exponent: Int[Array, ""]
) -> Float[Array, ""]:
    """The factor for the scaled gradient of the free coordinates: inverse curvature times scale."""
    if memory.first_step is None:
        length = jnp.linalg.norm(jnp.ravel(scaled_grad))
        first = _FIRST_LENGTH / jnp.where(length > 0, length, 1)
    else:
        first = jnp.ldexp(memory.first_step, exponent)
    known = memory.inverse_curvature > 0
    return jnp.where(known, jnp.ldexp(memory.inverse_curvature, exponent), first)


def _direction(
    x: Float[Array, "*shape"], grad: Float[Array, "*shape"], memory: _Memory, box: Box
) -> Float[Array, "*shape"]:
    """Minus the inverse Hessian times the gradient, on the free coordinates; 0 on the others.

    The two-loop recursion, with each pair masked to the free coordinates. A pair without positive
    curvature there is left out. All vectors of the recursion are linear combinations of the
    gradient and the pairs, so that it runs on coefficients once the inner products are known.
    """
    free = _free(x, grad, box)
    scaled_grad, exponent = scale(jnp.where(free, grad, 0))
    flat_grad, flat_free = jnp.ravel(scaled_grad), jnp.ravel(free)
    size = len(memory.rounding)
    products = _inner_products(memory.history, flat_grad, flat_free)

    ages = jnp.arange(size)
    slots = (memory.num_pairs - 1 - ages) % size  # newest first
    rows = jnp.append(slots, size + slots)
    products = products[jnp.append(slots, size)][:, rows]
    usable = (ages < memory.num_pairs) & (jnp.diagonal(products[:size]) > memory.rounding[slots])
    scales = jnp.ldexp(jnp.ones(size, x.dtype), memory.exponents[slots] + exponent)
    identity = _inverse_curvature(memory, scaled_grad, exponent)
    of_pairs, of_grad = _two_loop_recursion(products, usable, scales, identity)

    weights = jnp.zeros(2 * size, x.dtype).at[rows].set(of_pairs)
    r = jnp.matmul(weights, memory.history, precision=_HIGHEST) + of_grad * flat_grad
    r = jnp.where(free, r.reshape(x.shape), 0)
    # Even a free coordinate on its bound may be pushed outwards by the recursion: it must not move.
    outwards = ((x <= box.lower) & (r > 0)) | ((x >= box.upper) & (r < 0))
    return jnp.where(outwards, 0, -r)


def _inner_products(
    history: Float[Array, "rows n"], grad: Float[Array, " n"], free: Bool[Array, " n"]
) -> Float[Array, "vectors rows"]:
    """Inner products, over the free coordinates, of gradient changes and gradient with all rows.

    It is enough to mask one factor of each product.

    Returns:
        A row for each gradient change and a last one for the gradient; a column for each row of the
        history.
    """
    size = len(history) // 2

    def at_once(history: Array, grad: Array, free: Array) -> Array:
        rows = jnp.where(free, jnp.concatenate([history[size:], grad[None]]), 0)
        return jnp.matmul(rows, history.T, precision=_HIGHEST)

    def one_by_one(history: Array, grad: Array, free: Array) -> Array:
        # XLA's CPU backend takes twice as long for one product of matrices of such shapes.
        vectors = (*history[size:], grad)
        return jnp.stack(
            [
                jnp.matmul(history, jnp.where(free, vector, 0), precision=_HIGHEST)
                for vector in vectors
            ]
        )

    def in_blocks(history: Array, grad: Array, free: Array) -> Array:
        # A history larger than the caches is thus read once, rather than once for each row.
        def add(i: Int[Array, ""], total: Array) -> Array:
            start = i * _BLOCK
            some = (
                jax.lax.dynamic_slice_in_dim(history, start, _BLOCK, axis=1),
                jax.lax.dynamic_slice_in_dim(grad, start, _BLOCK),
                jax.lax.dynamic_slice_in_dim(free, start, _BLOCK),
            )
            return total + at_once(*some)

        blocks = len(grad) // _BLOCK
        rest = at_once(*(array[..., blocks * _BLOCK :] for array in (history, grad, free)))
        return jax.lax.fori_loop(0, blocks, add, rest)

    return jax.lax.platform_dependent(
        history,
        grad,
        free,
        cpu=in_blocks if len(grad) >= _LARGE else one_by_one,
        default=at_once,
    )


def _two_loop_recursion(
    products: Float[Array, "vectors rows"],
    usable: Bool[Array, " memory"],
    scales: Float[Array, " memory"],
    identity: Float[Array, ""],
) -> tuple[Float[Array, " rows"], Float[Array, ""]]:
    """The inverse Hessian times the gradient g, as coefficients of the pairs and of g.

    Nocedal and Wright (2006), algorithm 7.4. Each of its two loops solves a triangular system;
    written as such, it takes the same time to compile for any memory.

    Args:
        products: Inner products of the gradient changes y and, in the last row, of g, with the
            steps s and then with the changes y, newest first. All vectors are the scaled ones.
        usable: Whether to use each pair.
        scales: For each pair, the scale of s times that of g divided by that of y.
        identity: The initial inverse Hessian, a multiple of the identity, for when the newest pair
            is not usable.

    Returns:
        The coefficients of the steps, followed by those of the changes; and the coefficient of g.
    """
    size = len(usable)
    ys, yy = products[:size, :size], products[:size, size:]
    gs, gy = products[size, :size], products[size, size:]
    newest = usable[0]
    identity = jnp.where(newest, scales[0] * ys[0, 0] / jnp.where(newest, yy[0, 0], 1), identity)

    both = usable[:, None] & usable[None, :]
    # The products of s_i with the y_j that are as new or newer. The rows of unusable pairs are rows
    # of the identity, so that the system stays regular and their coefficients are 0.
    triangle = jnp.where(both, jnp.tril(ys.T), jnp.diag((~usable).astype(ys.dtype)))

    def solve(right: Float[Array, " memory"], *, transpose: bool) -> Float[Array, " memory"]:
        right = jnp.where(usable, right, 0)[:, None]
        return jax.lax.linalg.triangular_solve(
            triangle, right, left_side=True, lower=True, transpose_a=transpose
        )[:, 0]

    alphas = solve(gs, transpose=False)
    r_y = identity * (gy - jnp.matmul(yy, alphas, precision=_HIGHEST))
    of_steps = solve(jnp.diagonal(ys) * scales * alphas - r_y, transpose=True)
    return jnp.append(of_steps, -identity * alphas), identity


def _remember(
    memory: _Memory,
    step: Float[ArrayLike, "*shape"],
    grad_change: Float[ArrayLike, "*shape"],
    *,
    keep: Bool[ArrayLike, ""],
    forget: Bool[ArrayLike, ""],
) -> _Memory:
    """Overwrite the oldest pair with a new one if its curvature is positive; or drop all pairs."""
    (s, of_step), (y, of_change) = scale(jnp.ravel(step)), scale(jnp.ravel(grad_change))
    s_y, y_y = jnp.vdot(s, y), jnp.vdot(y, y)
    keep = keep & (s_y > 0)
    inverse_curvature = jnp.ldexp(s_y / jnp.where(keep, y_y, 1), of_step - of_change)
    size = len(memory.rounding)
    slot = jnp.where(keep, memory.num_pairs % size, 2 * size)  # beyond the end: dropped
    rounding = jnp.finfo(s.dtype).eps * jnp.linalg.norm(s) * jnp.sqrt(y_y)
    return memory._replace(
        history=memory.history.at[slot].set(s, mode="drop").at[size + slot].set(y, mode="drop"),
        exponents=memory.exponents.at[slot].set(of_step - of_change, mode="drop"),
        rounding=memory.rounding.at[slot].set(rounding, mode="drop"),
        inverse_curvature=jnp.where(keep, inverse_curvature, memory.inverse_curvature),
        num_pairs=jnp.where(forget, 0, memory.num_pairs + keep),
    )


def _shrinkage(
    increase: Float[Array, ""],
    slope: Float[Array, ""],
    finite: Bool[Array, ""],
    *,
    first: Bool[Array, ""],
) -> Float[Array, ""]:
    """The factor for a rejected step: to the minimum of the parabola through both values, clipped.

    The parabola has the old point's slope. Where it has no minimum, or a value is not finite, the
    least factor is taken.
    """
    curvature = increase - slope
    usable = finite & (curvature > 0)
    factor = jnp.where(usable, -slope / (2 * jnp.where(usable, curvature, 1)), _SHRINK[0])
    least = jnp.where(first & usable, _FIRST_SHRINK, _SHRINK[0])
    return jnp.clip(factor, least, _SHRINK[1])
