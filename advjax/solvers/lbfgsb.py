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

_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant (Nocedal and Wright, 2006, section 3.1)
_SHRINK = (0.1, 0.5)  # by how much a rejected step may be shortened
_GROWTH = 4.0  # of the step along a direction without positive curvature
_MAX_REJECTIONS = 15  # in a row; then the history is dropped, then the solver gives up
_MAX_IDLE = 5  # accepted steps in a row that gain no more than rounding


class _Memory(NamedTuple):
    """The newest pair stands first; pairs not yet filled are 0 and drop out of every sum."""

    steps: Float[Array, "memory *shape"]
    grad_changes: Float[Array, "memory *shape"]
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
        pairs = jnp.zeros((memory, *x0.shape), x0.dtype)
        start = _Memory(pairs, pairs, jnp.ones((), x0.dtype), jnp.int32(0), jnp.int32(0))
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
        remembers = jnp.any(old.steps[0] != 0)
        pairs = _remember(
            old,
            moved,
            change,
            keep=accepted,
            forget=exhausted,
        )
        gained = decrease > rounding
        idle = jnp.where(accepted, jnp.where(gained, 0, idle + 1), idle)
        x, grad = choose((trial, grad), (state.x, state.grad))
        error = jnp.where(unevaluated & ~accepted, jnp.inf, projected_gradient_norm(x, grad, box))

        status = jnp.select(
            [
                unevaluated & ~finite,
                error <= tol,
                (exhausted & ~remembers) | (idle >= _MAX_IDLE),
            ],
            [jnp.int32(Status.NONFINITE), jnp.int32(Status.CONVERGED), jnp.int32(Status.STALLED)],
            jnp.int32(Status.RUNNING),
        )
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
                step_size=jnp.select([exhausted, accepted], [one, longer], shorter),
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

    The two-loop recursion (Nocedal and Wright, algorithm 7.4) with each pair cut to the free
    coordinates, and a pair whose curvature is not positive there left out. All its vectors are
    combinations of the gradient and the pairs, so that it runs on their coefficients once the inner
    products are known: two passes over the history instead of six.
    """
    at_lower, at_upper = x <= box.lower, x >= box.upper
    free = ~((at_lower & (grad > 0)) | (at_upper & (grad < 0)))
    size = len(memory.steps)
    vectors = jnp.concatenate([memory.steps, memory.grad_changes, grad[None]])
    basis = jnp.where(free, vectors, 0).reshape(2 * size + 1, x.size)
    products = jnp.matmul(basis, basis.T, precision=jax.lax.Precision.HIGHEST)
    s, y, g = range(size), range(size, 2 * size), 2 * size

    scale = jnp.full((), first_step, x.dtype)
    q = jnp.zeros(2 * size + 1, x.dtype).at[g].set(1)
    rhos, alphas = [], []
    for i in range(size):  # newest first
        sy, yy = products[s[i], y[i]], products[y[i], y[i]]
        usable = sy > jnp.finfo(x.dtype).eps * jnp.sqrt(yy * products[s[i], s[i]])
        rho = jnp.where(usable, 1 / jnp.where(usable, sy, 1), 0)
        if i == 0:
            scale = jnp.where(usable, sy / jnp.where(usable, yy, 1), scale)
        alpha = rho * jnp.sum(products[s[i]] * q)
        q = q.at[y[i]].add(-alpha)
        rhos.append(rho)
        alphas.append(alpha)
    q = scale * q
    for i in reversed(range(size)):
        beta = rhos[i] * jnp.sum(products[y[i]] * q)
        q = q.at[s[i]].add(alphas[i] - beta)

    r = jnp.matmul(q, basis, precision=jax.lax.Precision.HIGHEST).reshape(x.shape)
    # A free coordinate on its bound that the recursion would push outwards cannot move.
    return jnp.where((at_lower & (r > 0)) | (at_upper & (r < 0)), 0, -r)


def _remember(
    memory: _Memory,
    step: Float[Array, "*shape"],
    grad_change: Float[Array, "*shape"],
    *,
    keep: Bool[Array, ""],
    forget: Bool[Array, ""],
) -> _Memory:
    """Put the newest pair first where its curvature is positive; forget all where asked to.

    Shifting instead of a ring pointer: under `vmap` a pointer of each lane would turn every read
    into a gather, and the write costs a pass over the whole history either way.
    """
    keep = keep & (jnp.vdot(step, grad_change) > 0)

    def push(new, old):
        shifted = jnp.concatenate([new[None], old[:-1]])
        return jnp.where(forget, 0, jnp.where(keep, shifted, old))

    return memory._replace(
        steps=push(step, memory.steps), grad_changes=push(grad_change, memory.grad_changes)
    )


def _shrinkage(
    increase: Float[Array, ""], slope: Float[Array, ""], finite: Bool[Array, ""]
) -> Float[Array, ""]:
    """The factor to the minimum of the parabola through both values and the slope, kept modest."""
    curvature = increase - slope
    usable = finite & (curvature > 0)
    factor = jnp.where(usable, -slope / (2 * jnp.where(usable, curvature, 1)), _SHRINK[0])
    return jnp.clip(factor, *_SHRINK)
