"""Projected L-BFGS for boxes, flat: one evaluation a step, the line search as state.

Each step moves along the quasi-Newton direction of the coordinates that are free at the current
point, projected back into the box (the two-metric projection of Bertsekas, 1982). The history is
masked to the free coordinates anew at every step, so it outlives changes of the active set, and
changes of the objective by its caller.
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
_SHRINK = (0.1, 0.5)  # by how much a rejected step may be shortened
_FIRST_SHRINK = 1e-3  # by how much at most while there is no pair, and the first step is a guess
_FIRST_LENGTH = 1.0  # of the first step, where the caller does not know the curvature
_ROUNDING = 4.0  # of values, in units of their last digit
_NEARER = 0.5  # a shorter projected gradient than this many times the least is a gain, too
_GROWTH = 4.0  # of the step along a direction without positive curvature
_BLOCK = 4096  # coordinates of the history that stay in a cache
_LARGE = 16 * _BLOCK
_MAX_REJECTIONS = 15  # in a row; then the history is dropped, then the solver gives up
_MAX_IDLE = 5  # accepted steps in a row that gain no more than rounding


class _Memory(NamedTuple):
    """Pairs of steps and gradient changes, in a ring: the k-th ever is in slot k modulo memory."""

    history: Float[Array, "rows size"]
    """The steps, one a row, and below them the gradient changes."""
    exponents: Int[Array, " memory"]
    """Each row is scaled by a power of two to a largest entry about 1, so that no inner product of
    steep or flat objectives overflows or vanishes. Of each pair: the exponent of the step's factor
    less that of the change's."""
    rounding: Float[Array, " memory"]
    """Of each pair: what the inner product of the two must exceed to be more than rounding."""
    num_pairs: Int[Array, ""]
    """How many there were since the last were forgotten."""
    inverse_curvature: Float[Array, ""]
    """`s.y / y.y` of the newest pair; 0 before the first."""
    first_step: Float[Array, ""] | None
    """The inverse curvature that the caller expects; None if it does not know."""
    step_size: Float[Array, ""]
    rejections: Int[Array, ""]
    idle: Int[Array, ""]
    least_error: Float[Array, ""]
    """Of the points since the value last gained more than rounding."""


def lbfgsb(*, memory: int = 4) -> Solver:
    """A limited-memory BFGS method for box constraints, made for `jax.vmap`.

    Args:
        memory: How many pairs of steps and gradient changes it remembers. The state holds
            `2 * memory` arrays of the size of `x`, and a step's time is mostly reading them.

    Returns:
        A `Solver`, one evaluation a step. A trial point whose value or gradient is not finite is
        rejected like any other bad step. It ends as `STALLED` where rounding hides any further
        decrease.

    Raises:
        ValueError: If `memory` is not a positive integer.
    """
    return _make(checks.positive_int("memory", memory))


@functools.cache  # so that equal options are one solver, whose programs are compiled once
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
        state = state._replace(grad=jnp.where(known, state.grad, 0))  # so that the trial is x

        # The trial lies on the projection arc: a shorter step is projected anew. Along the straight
        # segment to the first projection a variable would creep towards its bound for ever.
        def on_arc(direction):
            return jnp.clip(state.x + old.step_size * direction, box.lower, box.upper)

        trial = on_arc(_direction(state.x, state.grad, old, box))
        descends = jnp.vdot(state.grad, trial - state.x) < 0
        trial = jnp.where(descends, trial, on_arc(_steepest(state.x, state.grad, old, box)))
        (value, aux), grad = value_and_grad(trial)

        moved, change = trial - state.x, grad - state.grad
        slope, new_slope = jnp.vdot(state.grad, moved), jnp.vdot(grad, moved)
        decrease = state.value - value
        digit = jnp.finfo(value.dtype).eps * jnp.abs(state.value)
        rounding = jnp.where(known, _ROUNDING * digit, 0)
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
        # Where rounding hides the decrease of the value, the gradients tell it better: the
        # approximate Wolfe condition of Hager and Zhang (2005).
        sufficient = -_SUFFICIENT_DECREASE * jnp.minimum(slope, 0)
        by_gradients = -(slope + new_slope) / 2
        accepted = finite & (
            ~known
            | (decrease >= sufficient + rounding)
            | ((decrease >= -rounding) & (by_gradients >= sufficient))
        )

        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

        rejections = jnp.where(accepted, 0, old.rejections + 1)
        exhausted = rejections > _MAX_REJECTIONS
        pairs = _remember(old, moved, change, keep=accepted & known, forget=exhausted)
        x, grad = choose((trial, grad), (state.x, state.grad))
        evaluated = known | accepted
        error = jnp.where(evaluated, projected_gradient_norm(x, grad, box), jnp.inf)
        gained = (decrease > rounding) | ~known
        nearer = error < _NEARER * old.least_error
        least_error = jnp.where(gained | nearer, error, old.least_error)
        idle = jnp.where(accepted, jnp.where(gained | nearer, 0, idle + 1), idle)

        status = jnp.select(
            [~evaluated, (exhausted & (old.num_pairs == 0)) | (idle >= _MAX_IDLE)],
            [jnp.int32(Status.NONFINITE), jnp.int32(Status.STALLED)],
            jnp.int32(Status.RUNNING),
        )
        # Without positive curvature no pair tells the next step's length, so that it grows.
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


def _free(x: Float[Array, "*shape"], grad: Float[Array, "*shape"], box: Box):
    """The coordinates that minus the gradient does not push against a bound."""
    return ~(((x <= box.lower) & (grad > 0)) | ((x >= box.upper) & (grad < 0)))


def _steepest(
    x: Float[Array, "*shape"], grad: Float[Array, "*shape"], memory: _Memory, box: Box
) -> Float[Array, "*shape"]:
    """Minus the gradient on the free coordinates, times what is known of the inverse curvature."""
    scaled, exponent = scale(jnp.where(_free(x, grad, box), grad, 0))
    return -_inverse_curvature(memory, scaled, exponent) * scaled


def _inverse_curvature(
    memory: _Memory, scaled_grad: Float[Array, "*shape"], exponent: Int[Array, ""]
) -> Float[Array, ""]:
    """By what to multiply the scaled gradient of the free coordinates."""
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

    The two-loop recursion with each pair cut to the free coordinates, and a pair whose curvature is
    not positive there left out. All its vectors are combinations of the gradient and the pairs, so
    that it runs on their coefficients once the inner products are known.
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
    # A free coordinate on its bound that the recursion would push outwards cannot move.
    outwards = ((x <= box.lower) & (r > 0)) | ((x >= box.upper) & (r < 0))
    return jnp.where(outwards, 0, -r)


def _inner_products(
    history: Float[Array, "rows n"], grad: Float[Array, " n"], free: Bool[Array, " n"]
) -> Float[Array, "vectors rows"]:
    """Those of the gradient changes and of the gradient with all rows, over the free coordinates.

    With one factor of each product cut to the free coordinates, the other may stay as it is.
    """
    size = len(history) // 2

    def at_once(history, grad, free):
        rows = jnp.where(free, jnp.concatenate([history[size:], grad[None]]), 0)
        return jnp.matmul(rows, history.T, precision=_HIGHEST)

    def one_by_one(history, grad, free):
        # One product of matrices takes XLA's CPU backend twice as long, for shapes like these.
        vectors = (*history[size:], grad)
        return jnp.stack(
            [
                jnp.matmul(history, jnp.where(free, vector, 0), precision=_HIGHEST)
                for vector in vectors
            ]
        )

    def in_blocks(history, grad, free):
        # A history beyond the caches is read once instead of once for each row.
        def add(i, total):
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

    Nocedal and Wright (2006), algorithm 7.4: either of its loops solves a triangular system, which
    takes the same time to compile whatever the memory.

    Args:
        products: Of the gradient changes y and, in the last row, of g, with the steps s and then
            with the changes; newest first. Steps, changes and g are the scaled ones.
        usable: Whether to take a pair.
        scales: Of each pair: what the factors taken out of s, y and g multiply to, `s g / y`.
        identity: The inverse Hessian times the identity, if the newest pair is not usable.

    Returns:
        The coefficients of the steps, followed by those of the changes; that of g.
    """
    size = len(usable)
    ys, yy = products[:size, :size], products[:size, size:]
    gs, gy = products[size, :size], products[size, size:]
    newest = usable[0]
    identity = jnp.where(newest, scales[0] * ys[0, 0] / jnp.where(newest, yy[0, 0], 1), identity)

    both = usable[:, None] & usable[None, :]
    # Of the product of s_i with y_j, those where y_j is as new or newer.
    triangle = jnp.where(both, jnp.tril(ys.T), jnp.diag((~usable).astype(ys.dtype)))

    def solve(right, *, transpose):
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
    """Put the pair in the oldest one's place if its curvature is positive; or forget them all."""
    (s, of_step), (y, of_change) = scale(jnp.ravel(step)), scale(jnp.ravel(grad_change))
    s_y, y_y = jnp.vdot(s, y), jnp.vdot(y, y)
    keep = keep & (s_y > 0)
    inverse_curvature = jnp.ldexp(s_y / jnp.where(keep, y_y, 1), of_step - of_change)
    size = len(memory.rounding)
    slot = jnp.where(keep, memory.num_pairs % size, 2 * size)  # beyond the end: dropped
    rounding = jnp.finfo(step.dtype).eps * jnp.linalg.norm(s) * jnp.sqrt(y_y)
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
    """The factor to the minimum of the parabola through both values and the slope, kept modest."""
    curvature = increase - slope
    usable = finite & (curvature > 0)
    factor = jnp.where(usable, -slope / (2 * jnp.where(usable, curvature, 1)), _SHRINK[0])
    least = jnp.where(first & usable, _FIRST_SHRINK, _SHRINK[0])
    return jnp.clip(factor, least, _SHRINK[1])
