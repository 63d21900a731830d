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
_GROWTH = 4.0  # of the step along a direction without positive curvature
_MAX_REJECTIONS = 15  # in a row; then the history is dropped, then the solver gives up
_MAX_IDLE = 5  # accepted steps in a row that gain no more than rounding


class _Memory(NamedTuple):
    """Pairs of steps and gradient changes, in a ring: the k-th ever is in slot k modulo memory."""

    history: Float[Array, "2*memory size"]
    """The steps, one a row, and below them the gradient changes."""
    exponents: Int[Array, " memory"]
    """Each row is scaled by a power of two to a largest entry about 1, so that no inner product of
    steep or flat objectives overflows or vanishes. Of each pair: the exponent of the step's factor
    less that of the change's."""
    rounding: Float[Array, " memory"]
    """Of each pair: what the inner product of the two must exceed to be more than rounding."""
    num_pairs: Int[Array, ""]
    """How many there were since the last were forgotten."""
    first_step: Float[Array, ""] | None
    """The inverse curvature that the caller expects; None if it does not know."""
    step_size: Float[Array, ""]
    rejections: Int[Array, ""]
    idle: Int[Array, ""]


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
            first_step=_checked(first_step, x0.dtype),
            step_size=jnp.ones((), x0.dtype),
            rejections=jnp.int32(0),
            idle=jnp.int32(0),
        )
        return initial_state(value_and_grad, x0, box, start)

    def step(value_and_grad: ValueAndGrad, state: SolverState, box: Box) -> SolverState:
        old = state.memory
        idle = jnp.where(state.status == Status.RUNNING, old.idle, 0)
        known = state.evaluated
        state = state._replace(grad=jnp.where(known, state.grad, 0))  # so that the trial is x

        # A step that is to be longer is projected anew; a shorter one goes less far along the
        # same segment, where the objective is as smooth as it is.
        direction = _direction(state.x, state.grad, old, box)

        def project(direction):
            reach = jnp.maximum(old.step_size, 1) * direction
            return jnp.clip(state.x + reach, box.lower, box.upper) - state.x

        segment = project(direction)
        descends = jnp.vdot(state.grad, segment) < 0
        segment = jnp.where(descends, segment, project(_steepest(state.x, state.grad, old, box)))
        trial = state.x + jnp.minimum(old.step_size, 1) * segment
        trial = jnp.clip(trial, box.lower, box.upper)  # in spite of rounding
        (value, aux), grad = value_and_grad(trial)

        moved, change = trial - state.x, grad - state.grad
        slope = jnp.vdot(state.grad, moved)
        decrease = state.value - value
        rounding = jnp.where(known, 4 * jnp.finfo(value.dtype).eps * jnp.abs(state.value), 0)
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
        sufficient = decrease >= -_SUFFICIENT_DECREASE * jnp.minimum(slope, 0) - rounding
        accepted = finite & (sufficient | ~known)

        def choose(new, old):
            return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)

        rejections = jnp.where(accepted, 0, old.rejections + 1)
        exhausted = rejections > _MAX_REJECTIONS
        pairs = _remember(old, moved, change, keep=accepted & known, forget=exhausted)
        gained = (decrease > rounding) | ~known
        idle = jnp.where(accepted, jnp.where(gained, 0, idle + 1), idle)
        x, grad = choose((trial, grad), (state.x, state.grad))
        evaluated = known | accepted
        error = jnp.where(evaluated, projected_gradient_norm(x, grad, box), jnp.inf)

        status = jnp.select(
            [~evaluated, (exhausted & (old.num_pairs == 0)) | (idle >= _MAX_IDLE)],
            [jnp.int32(Status.NONFINITE), jnp.int32(Status.STALLED)],
            jnp.int32(Status.RUNNING),
        )
        # Without positive curvature no pair tells the next step's length, so that it grows.
        one = jnp.ones_like(slope)
        curved = ~known | (jnp.vdot(moved, change) > 0)
        longer = jnp.where(curved, one, _GROWTH * old.step_size)
        shorter = old.step_size * _shrinkage(-decrease, slope, finite)
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
    """The first step: as long as the caller says, or of length 1 on the free coordinates."""
    scaled, exponent = scale(jnp.where(_free(x, grad, box), grad, 0))
    return -_first_step(memory, scaled, exponent) * scaled


def _first_step(
    memory: _Memory, scaled_grad: Float[Array, "*shape"], exponent: Int[Array, ""]
) -> Float[Array, ""]:
    """By what to multiply the scaled gradient of the free coordinates while there is no pair."""
    if memory.first_step is not None:
        return jnp.ldexp(memory.first_step, exponent)
    length = jnp.linalg.norm(jnp.ravel(scaled_grad))
    return 1 / jnp.where(length > 0, length, 1)


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
    scales = jnp.ldexp(jnp.ones(size, x.dtype), memory.exponents[slots] + exponent)
    first_step = _first_step(memory, scaled_grad, exponent)
    of_pairs, of_grad = _two_loop_recursion(products, usable, scales, first_step)

    weights = jnp.zeros(2 * size, x.dtype).at[rows].set(of_pairs)
    r = jnp.matmul(weights, memory.history, precision=_HIGHEST) + of_grad * flat_grad
    r = jnp.where(free, r.reshape(x.shape), 0)
    # A free coordinate on its bound that the recursion would push outwards cannot move.
    outwards = ((x <= box.lower) & (r > 0)) | ((x >= box.upper) & (r < 0))
    return jnp.where(outwards, 0, -r)


def _two_loop_recursion(
    products: Float[Array, "memory+1 2*memory"],
    usable: Bool[Array, " memory"],
    scales: Float[Array, " memory"],
    first_step: Float[Array, ""],
) -> tuple[Float[Array, " 2*memory"], Float[Array, ""]]:
    """The inverse Hessian times the gradient g, as coefficients of the pairs and of g.

    Nocedal and Wright (2006), algorithm 7.4, on scalars, which XLA fuses.

    Args:
        products: Of the gradient changes y and, in the last row, of g, with the steps s and then
            with the changes; newest first. Steps, changes and g are the scaled ones.
        usable: Whether to take a pair.
        scales: Of each pair: what the factors taken out of s, y and g multiply to, `s g / y`.
        first_step: The inverse Hessian while there is no pair, times the identity.

    Returns:
        The coefficients of the steps, followed by those of the changes; that of g.
    """
    size = len(usable)
    ys, yy = products[:size, :size], products[:size, size:]
    gs, gy = products[size, :size], products[size, size:]
    rhos = jnp.where(usable, 1 / jnp.where(usable, jnp.diagonal(ys), 1), 0)
    newest = usable[0]
    identity = jnp.where(newest, scales[0] * ys[0, 0] / jnp.where(newest, yy[0, 0], 1), first_step)

    alphas: list[Array] = []
    for i in range(size):
        q_s = gs[i] - sum(alphas[j] * ys[j, i] for j in range(i))
        alphas.append(rhos[i] * q_s)
    of_steps = [scales[i] * alphas[i] for i in range(size)]
    for i in reversed(range(size)):
        r_y = identity * (gy[i] - sum(alphas[j] * yy[j, i] for j in range(size)))
        r_y += sum(of_steps[j] * ys[i, j] for j in range(i + 1, size))
        of_steps[i] -= rhos[i] * r_y
    return jnp.stack([*of_steps, *(-identity * alpha for alpha in alphas)]), identity


def _remember(
    memory: _Memory,
    step: Float[Array, "*shape"],
    grad_change: Float[Array, "*shape"],
    *,
    keep: Bool[Array, ""],
    forget: Bool[Array, ""],
) -> _Memory:
    """Put the pair in the oldest one's place if its curvature is positive; or forget them all."""
    (s, of_step), (y, of_change) = scale(jnp.ravel(step)), scale(jnp.ravel(grad_change))
    keep = keep & (jnp.vdot(s, y) > 0)
    size = len(memory.rounding)
    slot = jnp.where(keep, memory.num_pairs % size, 2 * size)  # beyond the end: dropped
    rounding = jnp.finfo(step.dtype).eps * jnp.linalg.norm(s) * jnp.linalg.norm(y)
    return memory._replace(
        history=memory.history.at[slot].set(s, mode="drop").at[size + slot].set(y, mode="drop"),
        exponents=memory.exponents.at[slot].set(of_step - of_change, mode="drop"),
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
