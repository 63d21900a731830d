"""The paper's problem (1) itself, solved by an augmented Lagrangian."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from advjax import checks, losses
from advjax.attacks.base import AttackResult, Machine, Method, Verdict, View, machine, run
from advjax.attacks.start import Start
from advjax.solvers import Solver, lbfgsb
from advjax.types import Box, LogitsFn

_FIRST_PENALTY = 10.0  # times 1 / ||grad margin||^2: the curvature it adds beside the norm's 1
_PENALTY_GROWTH = 5.0
_PENALTY_LIMIT = 1e6  # times the first one; a target out of reach at this is out of reach
_EXPECTED_FALL = 0.25  # of the violation by an update of the multipliers, or the penalty grows
_TOLERANCE_FALL = 0.3  # of the inner tolerance by each update
_FIRST_TOLERANCE, _FIRST_ROUGH_TOLERANCE = 0.1, 0.3
_GAP = 1e-4  # of the squared distance: the duality gap at which the search ends


class _Multipliers(NamedTuple):
    multipliers: Float[Array, " classes"]  # 0 for the target itself
    penalty: Float[Array, ""]
    penalty_limit: Float[Array, ""]
    violation: Float[Array, ""]
    tolerance: Float[Array, ""]
    goal: Float[Array, ""]  # the margin in the constraints: a little over the one asked for


def minimum_norm(
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    target: Int[Array, ""] | int,
    *,
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    solver: Solver = lbfgsb(),  # noqa: B008
    confidence: float | None = None,
    tol: float = 1e-2,
    max_evals: int = 500,
    start: Start | None = None,
    rough: bool = False,
) -> AttackResult:
    """Find the nearest image, in L2, that the model gives the target class: problem (1).

    Minimises `||r||^2 / 2` subject to `z_j(x + r) - z_t(x + r) + margin <= 0` for every class j
    other than the target t and to `x + r` in the box. Each class has its own multiplier; all the
    constraints together cost one vector-Jacobian product, however many classes there are. The
    first penalty is set by the margin's gradient at `x`, so that the defaults suit any scale of
    logits and of pixels.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example like `x`. Any pure function will
            do: `lambda x: model.apply(params, x)`.
        x: The image, of any shape, floating. It may lie outside the box; `r` counts from it
            nevertheless.
        target: The class to reach.
        box: `(lower, upper)`, each broadcast to `x`; [0, 1] by default.
        solver: The bounded minimiser of the sub-problems.
        confidence: The margin by which the target's logit must lead. By default a fifty-thousandth
            of the spread of the clean image's logits, which survives another batch size or
            precision.
        tol: The sub-problems' final tolerance: the projected gradient's length beside that of `r`.
            The distance exceeds the optimum by the order of its square: 1e-2 means 1e-4.
        max_evals: The most evaluations of the model's value and gradient, with those of `start`.
        start: Where to begin: `attacks.decoupled()` finds nearer images of large networks, which
            have many local minima. By default the image itself, which on small ones is as good.
        rough: Whether to cut the sub-problems short, after 12 evaluations instead of 50. It takes
            half as many evaluations for convolutional nets, and twice as many for some others.

    Returns:
        An `AttackResult`; its `weight` is the sum of the multipliers, by how much `||r||^2 / 2`
        grows with the margin asked for. Nothing that the data do raises (`status` tells), and the
        image is never left out of the box, nor NaN. `jax.grad` takes the result for a constant.

    Raises:
        TypeError: If `x` is not floating, `target` not an integer, or `logits_fn` no function.
        ValueError: If `logits_fn` does not return `(classes,)`, a bound does not broadcast to `x`,
            or an option is out of its range.

    Source: Szegedy et al. (2013), section 4.1; Nocedal and Wright (2006), section 17.4, for the
    augmented Lagrangian with a box.
    """
    return run(
        lambda logits_fn, box: minimum_norm_machine(
            logits_fn,
            box=box,
            solver=solver,
            confidence=confidence,
            tol=tol,
            max_evals=max_evals,
            start=start,
            rough=rough,
        ),
        logits_fn,
        x,
        target,
        box,
    )


def minimum_norm_machine(
    logits_fn: LogitsFn,
    *,
    box: Box | tuple = Box(),  # noqa: B008
    solver: Solver = lbfgsb(),  # noqa: B008
    confidence: float | None = None,
    tol: float = 1e-2,
    max_evals: int = 500,
    start: Start | None = None,
    rough: bool = False,
) -> Machine:
    """The machine behind `minimum_norm`, for whoever runs the steps; the same options."""
    confidence = None if confidence is None else checks.number("confidence", confidence, minimum=0)
    tol = checks.number("tol", tol, minimum=0, exclusive=True)
    max_evals = checks.positive_int("max_evals", max_evals)
    if start is not None and max_evals < start.num_evals + 2:
        raise ValueError(
            f"max_evals: {max_evals}, expected at least {start.num_evals + 2}: those of the start, "
            "of the image and of one step."
        )

    def init(r: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct) -> _Multipliers:
        def number(value: float):
            return jnp.full((), value, r.dtype)

        return _Multipliers(
            multipliers=jnp.zeros(logits.shape, r.dtype),
            penalty=number(1),
            penalty_limit=number(jnp.inf),
            violation=number(jnp.inf),
            tolerance=number(max(tol, _FIRST_ROUGH_TOLERANCE if rough else _FIRST_TOLERANCE)),
            goal=number(confidence or 0),
        )

    def other(params: _Multipliers, logits, target):
        return losses.squared_l2(_estimates(params, logits, target)) / (2 * params.penalty)

    def first(params: _Multipliers, view: View) -> Verdict:
        """Scale the penalty by the gradient just seen, linear in it while the multipliers are 0.

        By the mean slope on the way to the start, where that is known.
        """
        excess = view.value - view.size  # half the squared violation
        square = losses.squared_l2(view.grad - view.size_grad)
        lead = jnp.max(_constraints(params, view.logits, view.target))
        far = (view.start_size > 0) & (lead > 0)
        rise = jnp.where(far, 2 * view.start_size, 2 * excess)
        run = jnp.where(far, lead**2, square)
        usable = run > 0
        penalty = jnp.where(usable, _FIRST_PENALTY * rise / jnp.where(usable, run, 1), 1)
        params = params._replace(
            penalty=penalty,
            penalty_limit=_PENALTY_LIMIT * penalty,
            goal=view.goal + view.resolution,
        )
        return Verdict(
            params=params,
            ratio=penalty,
            finished=jnp.bool_(False),
            exhausted=~usable,
        )

    def solved(params: _Multipliers, view: View) -> Verdict:
        """Take the estimates for multipliers, and raise the penalty where they came too slowly."""
        estimates = _estimates(params, view.logits, view.target)
        # How far each constraint is from holding together with its multiplier: 0 at the solution.
        violation = jnp.max(jnp.abs(estimates - params.multipliers)) / params.penalty
        slow = violation > _EXPECTED_FALL * params.violation
        penalty = jnp.where(slow, _PENALTY_GROWTH * params.penalty, params.penalty)

        # In the convex case these two bound by how much the half square exceeds the least one.
        square = 2 * view.size
        slack = jnp.abs(_constraints(params, view.logits, view.target))
        gap = jnp.sum(jnp.where(estimates > 0, estimates * slack, 0))
        finished = (
            view.reached
            & (gap <= jnp.maximum(_GAP * square, view.resolution * jnp.sum(estimates)))
            & (view.error <= tol * jnp.sqrt(square))
        )
        params = params._replace(
            multipliers=estimates,
            penalty=penalty,
            violation=violation,
            tolerance=jnp.maximum(_TOLERANCE_FALL * params.tolerance, tol),
        )
        return Verdict(
            params=params,
            ratio=jnp.full_like(penalty, jnp.inf),
            finished=finished,
            exhausted=penalty > params.penalty_limit,
        )

    method = Method(
        init=init,
        size=_half_square,
        other=other,
        tolerance=lambda params: params.tolerance,
        weight=lambda params, view: jnp.sum(_estimates(params, view.logits, view.target)),
        first=first,
        solved=solved,
        first_step=1 / (1 + _FIRST_PENALTY),
    )
    return machine(
        method,
        logits_fn,
        box=box,
        solver=solver,
        confidence=confidence,
        max_evals=max_evals,
        max_evals_per_solve=12 if rough else 50,
        start=start,
    )


def _half_square(r: Float[Array, "*shape"]) -> Float[Array, ""]:
    return losses.squared_l2(r) / 2


def _constraints(
    params: _Multipliers, logits: Float[Array, " classes"], target: Int[Array, ""]
) -> Float[Array, " classes"]:
    """What must not be positive: each class's lead over the target, and the margin on top."""
    others = jnp.arange(len(logits)) != target
    return jnp.where(others, logits - logits[target] + params.goal, -jnp.inf)


def _estimates(
    params: _Multipliers, logits: Float[Array, " classes"], target: Int[Array, ""]
) -> Float[Array, " classes"]:
    """The first-order estimates of the multipliers; 0 for the target and for classes far below."""
    constraints = _constraints(params, logits, target)
    return jnp.maximum(params.multipliers + params.penalty * constraints, 0)
