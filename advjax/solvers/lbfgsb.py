"""Projected L-BFGS for boxes, flat: one evaluation a step, the line search as state.

Each step moves along the quasi-Newton direction of the coordinates that are free at the current
point, projected back into the box (the two-metric projection of Bertsekas, 1982). The history is
masked to the free coordinates anew at every step, so it outlives changes of the active set, and
changes of the objective by its caller.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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

_HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would multiply in half precision
_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant (Nocedal and Wright, 2006, section 3.1)
_SHRINK = (0.1, 0.5)  # by how much a rejected step may be shortened
_GROWTH = 4.0  # of the step along a direction without positive curvature
_MAX_REJECTIONS = 15  # in a row; then the history is dropped, then the solver gives up
_MAX_IDLE = 5  # accepted steps in a row that gain no more than rounding


class _Memory(NamedTuple):
    """Pairs of steps and gradient changes, in a ring: the k-th ever is in slot k modulo memory."""

    history: Float[Array, "2*memory size"]
    """The steps, one a row, and below them the gradient changes."""
    rounding: Float[Array, " memory"]
    """Of each pair: what the inner product of the two must exceed to be more than rounding."""
    num_pairs: Int[Array, ""]
    """How many there were since the last were forgotten."""
    step_size: Float[Array, ""]
    rejections: Int[Array, ""]
    idle: Int[Array, ""]


def lbfgsb(*, memory: int = 4, tol: float = 1e-5, first_step: float = 1.0) -> Solver:
    """A limited-memory BFGS method for box constraints, made for `jax.vmap`.

    Args:
        memory: How many pairs of steps and gradient changes it remembers. The state holds
            `2 * memory` arrays of the size of `x`, and a step's time is mostly reading them.
        tol: It has converged where the length of the projected gradient,
            `||clip(x - grad) - x||_2`, is at most this.
        first_step: The step along minus the gradient, in multiples of it, that is tried while no
            pair tells the curvature: its inverse, where something is known of it.

    Returns:
        A `Solver`, one evaluation a step. A trial point whose value or gradient is not finite is
        rejected like any other bad step. It ends as `STALLED` where rounding hides any further
        decrease.

    Raises:
        ValueError: If `memory` is not a positive integer, `tol` is negative, or `first_step` is not
            positive.
    """
    memory = checks.positive_int("memory", memory)
    tol = checks.number("tol", tol, minimum=0)
    first_step = checks.number("first_step", first_step, minimum=0, exclusive=True)

    def init(value_and_grad: ValueAndGrad, x0: Float[Array, "*shape"], box: Box) -> SolverState:
        start = _Memory(
            history=jnp.zeros((2 * memory, x0.size), x0.dtype),
            rounding=jnp.zeros(memory, x0.dtype),
            num_pairs=jnp.int32(0),
            step_size=jnp.ones((), x0.dtype),
            rejections=jnp.int32(0),
            idle=jnp.int32(0),
        )
        return initial_state(value_and_grad, x0, box, start)

    def step(value_and_grad: ValueAndGrad, state: SolverState, box: Box) -> SolverState:
        old = state.memory
        idle = jnp.where(state.status == Status.RUNNING, old.idle, 0)
        unevaluated = jnp.isinf(state.value)

        # A step that is to be longer is projected anew; a shorter one goes less far along the
        # same segment, where the objective is as smooth as it is.
        direction = _direction(state.x, state.grad, old, box, first_step)

        def project(direction):
            reach = jnp.maximum(old.step_size, 1) * direction
            return jnp.clip(state.x + reach, box.lower, box.upper) - state.x

        segment = project(direction)
        descends = jnp.vdot(state.grad, segment) < 0
        segment = jnp.where(descends, segment, project(-first_step * state.grad))
        trial = state.x + jnp.minimum(old.step_size, 1) * segment
        trial = jnp.clip(trial, box.lower, box.upper)  # in spite of rounding
        (value, aux), grad = value_and_grad(trial)

        moved, change = trial - state.x, grad - state.grad
        slope = jnp.vdot(state.grad, moved)
        decrease = state.value - value
        rounding = jnp.where(unevaluated, 0, 4 * jnp.finfo(value.dtype).eps * jnp.abs(state.value))
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
        accepted = finite & (decrease >= -_SUFFICIENT_DECREASE * jnp.minimum(slope, 0) - rounding)

        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

        rejections = jnp.where(accepted, 0, old.rejections + 1)
        exhausted = rejections > _MAX_REJECTIONS
        pairs = _remember(old, moved, change, keep=accepted, forget=exhausted)
        gained = decrease > rounding
        idle = jnp.where(accepted, jnp.where(gained, 0, idle + 1), idle)
        x, grad = choose((trial, grad), (state.x, state.grad))
        error = jnp.where(unevaluated & ~accepted, jnp.inf, projected_gradient_norm(x, grad, box))

        stalled = (exhausted & (old.num_pairs == 0)) | (idle >= _MAX_IDLE)
        status = jnp.where(stalled, jnp.int32(Status.STALLED), jnp.int32(Status.RUNNING))
        status = jnp.where(error <= tol, Status.CONVERGED, status)
        status = jnp.where(unevaluated & ~finite, Status.NONFINITE, status)
        # Without positive curvature no pair tells the next step's length, so that it grows.
        one = jnp.ones_like(slope)
        curved = unevaluated | (jnp.vdot(moved, change) > 0)
        longer = jnp.where(curved, one, _GROWTH * old.step_size)
        shorter = old.step_size * _shrinkage(-decrease, slope, finite)
        return SolverState(
            x=x,
            value=jnp.where(accepted, value, state.value),
            grad=grad,
            aux=choose(aux, state.aux),
            error=error,
            status=status,
            num_evals=state.num_evals + 1,
            memory=pairs._replace(
                step_size=jnp.where(exhausted, one, jnp.where(accepted, longer, shorter)),
                rejections=jnp.where(exhausted, 0, rejections),
                idle=idle,
            ),
        )

    return Solver(init, step)


def _direction(
    x: Float[Array, "*shape"],
    grad: Float[Array, "*shape"],
    memory: _Memory,
    box: Box,
    first_step: float,
) -> Float[Array, "*shape"]:
    """Minus the inverse Hessian times the gradient, on the free coordinates; 0 on the others.

    The two-loop recursion with each pair cut to the free coordinates, and a pair whose curvature is
    not positive there left out. All its vectors are combinations of the gradient and the pairs, so
    that it runs on their coefficients once the inner products are known.
    """
    at_lower, at_upper = x <= box.lower, x >= box.upper
    free = ~((at_lower & (grad > 0)) | (at_upper & (grad < 0)))
    flat_grad, flat_free = jnp.ravel(grad), jnp.ravel(free)
    size = len(memory.rounding)
    # With one factor of each product cut to the free coordinates, the other may stay as it is. One
    # product of matrices instead takes XLA's CPU backend twice as long, for shapes like these.
    products = jnp.stack(
        [
            jnp.matmul(memory.history, jnp.where(flat_free, vector, 0), precision=_HIGHEST)
            for vector in (*memory.history[size:], flat_grad)
        ]
    )

    ages = jnp.arange(size)
    slots = (memory.num_pairs - 1 - ages) % size  # newest first
    rows = jnp.append(slots, size + slots)
    products = products[jnp.append(slots, size)][:, rows]
    usable = (ages < memory.num_pairs) & (jnp.diagonal(products[:size]) > memory.rounding[slots])
    of_pairs, of_grad = _two_loop_recursion(products, usable, first_step)

    weights = jnp.zeros(2 * size, x.dtype).at[rows].set(of_pairs)
    r = jnp.matmul(weights, memory.history, precision=_HIGHEST) + of_grad * flat_grad
    r = jnp.where(free, r.reshape(x.shape), 0)
    # A free coordinate on its bound that the recursion would push outwards cannot move.
    return jnp.where((at_lower & (r > 0)) | (at_upper & (r < 0)), 0, -r)


def _two_loop_recursion(
    products: Float[Array, "memory+1 2*memory"], usable: Bool[Array, " memory"], first_step: float
) -> tuple[Float[Array, " 2*memory"], Float[Array, ""]]:
    """The inverse Hessian times the gradient g, as coefficients of the pairs and of g.

    Nocedal and Wright (2006), algorithm 7.4, on scalars, which XLA fuses.

    Args:
        products: Of the gradient changes y and, in the last row, of g, with the steps s and then
            with the changes; newest first.
        usable: Whether to take a pair.
        first_step: The inverse Hessian while there is no pair, times the identity.

    Returns:
        The coefficients of the steps, followed by those of the changes; that of g.
    """
    size = len(usable)
    ys, yy = products[:size, :size], products[:size, size:]
    gs, gy = products[size, :size], products[size, size:]
    rhos = jnp.where(usable, 1 / jnp.where(usable, jnp.diagonal(ys), 1), 0)
    newest = usable[0]
    scale = jnp.where(newest, ys[0, 0] / jnp.where(newest, yy[0, 0], 1), first_step)

    alphas: list[Array] = []
    for i in range(size):
        q_s = gs[i] - sum(alphas[j] * ys[j, i] for j in range(i))
        alphas.append(rhos[i] * q_s)
    of_steps = alphas.copy()
    for i in reversed(range(size)):
        r_y = scale * (gy[i] - sum(alphas[j] * yy[j, i] for j in range(size)))
        r_y += sum(of_steps[j] * ys[i, j] for j in range(i + 1, size))
        of_steps[i] -= rhos[i] * r_y
    return jnp.stack([*of_steps, *(-scale * alpha for alpha in alphas)]), scale


def _remember(
    memory: _Memory,
    step: Float[Array, "*shape"],
    grad_change: Float[Array, "*shape"],
    *,
    keep: Bool[Array, ""],
    forget: Bool[Array, ""],
) -> _Memory:
    """Put the pair in the oldest one's place if its curvature is positive; or forget them all."""
    keep = keep & (jnp.vdot(step, grad_change) > 0)
    size = len(memory.rounding)
    slot = jnp.where(keep, memory.num_pairs % size, 2 * size)  # beyond the end: dropped
    s, y = jnp.ravel(step), jnp.ravel(grad_change)
    rounding = jnp.finfo(step.dtype).eps * jnp.linalg.norm(s) * jnp.linalg.norm(y)
    return memory._replace(
        history=memory.history.at[slot].set(s, mode="drop").at[size + slot].set(y, mode="drop"),
        rounding=memory.rounding.at[slot].set(rounding, mode="drop"),
        num_pairs=jnp.where(forget, 0, memory.num_pairs + keep),
    )


def _shrinkage(
    increase: Float[Array, ""], slope: Float[Array, ""], finite: Bool[Array, ""]
) -> Float[Array, ""]:
    """The factor to the minimum of the parabola through both values and the slope, kept modest."""
    curvature = increase - slope
    usable = finite & (curvature > 0)
    factor = jnp.where(usable, -slope / (2 * jnp.where(usable, curvature, 1)), _SHRINK[0])
    return jnp.clip(factor, *_SHRINK)
