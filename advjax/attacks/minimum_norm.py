"""The paper's problem (1) itself, solved by an augmented Lagrangian."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from advjax import checks, losses
from advjax.attacks.attack import Attack
from advjax.attacks.ddn import Start
from advjax.attacks.machine import Search, Verdict, View
from advjax.solvers import Solver, lbfgsb
from advjax.types import Box, LogitsFn

_FIRST_PENALTY = 10.0  # times 1 / ||grad margin||^2: the curvature it adds beside the norm's 1
_PENALTY_GROWTH = 5.0
_PENALTY_LIMIT = 1e6  # times the first one; a target out of reach at this is out of reach
_EXPECTED_FALL = 0.25  # of the violation by an update of the multipliers, or the penalty grows
_TOLERANCE_FALL = 0.3  # of the inner tolerance by each update
_FIRST_TOLERANCE, _FIRST_ROUGH_TOLERANCE = 0.1, 0.3
_GAP = 1e-4  # of the squared distance: the duality gap at which the search ends


def minimum_norm(
    logits_fn: LogitsFn,
    *,
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    solver: Solver = lbfgsb(),  # noqa: B008
    confidence: float | None = None,
    tol: float = 1e-2,
    max_evals: int = 500,
    start: Start | None = None,
    rough: bool = False,
) -> Attack:
    """Find the nearest image, in L2, that the model gives the target class: problem (1).

    Minimises `||r||^2 / 2` subject to `z_j(x + r) - z_t(x + r) + margin <= 0` for every class j
    other than the target t and to `x + r` in the box. Each class has its own multiplier; all the
    constraints together cost one vector-Jacobian product, however many classes there are. The
    first penalty is set by the margin's gradient at `x`, so that the defaults suit any scale of
    logits and of pixels.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example. Any pure function will do:
            `lambda x: model.apply(params, x)`.
        box: `(lower, upper)`, each broadcast to the image; [0, 1] by default.
        solver: The bounded minimiser of the sub-problems.
        confidence: The margin by which the target's logit must exceed the others. By default a
            fifty-thousandth of the spread of the clean image's logits, which survives another batch
            size or precision.
        tol: The sub-problems' final tolerance: the projected gradient's length beside that of `r`.
            The distance exceeds the optimum by the order of its square: 1e-2 means 1e-4.
        max_evals: The most evaluations of the model's value and gradient, those of `start`
            included.
        start: How to find the initial point of the search: `attacks.decoupled()` finds nearer
            images of large networks, which have many local minima. By default the image itself.
        rough: Whether to end the sub-problems early, after 12 evaluations instead of 50. It halves
            the evaluations for convolutional networks, and doubles them for some others.

    Returns:
        An `Attack`: `(x, target) -> AttackResult`, where `target` is the class to reach. The
        `multiplier` of a result is the sum of the multipliers: by how much `||r||^2 / 2` grows with
        the margin asked for.

    Raises:
        TypeError: If `logits_fn` is no function.
        ValueError: If `box` is not a pair, or an option is out of its range.

    Reference: Szegedy et al. (2013), section 4.1; Nocedal and Wright (2006), section 17.4, for the
    augmented Lagrangian with a box.
    """
    max_evals = checks.positive_int("max_evals", max_evals)
    if start is not None and max_evals < start.num_evals + 2:
        raise ValueError(
            f"max_evals: {max_evals}, expected at least {start.num_evals + 2}: those of the start, "
            "of the image and of one step; raise max_evals or shorten the start."
        )
    method = Search(
        formulation=AugmentedLagrangian(
            goal=0.0 if confidence is None else checks.number("confidence", confidence, minimum=0),
            tol=checks.number("tol", tol, minimum=0, exclusive=True),
            first_tol=_FIRST_ROUGH_TOLERANCE if rough else _FIRST_TOLERANCE,
        ),
        solver=solver,
        confidence=None if confidence is None else float(confidence),
        max_evals=max_evals,
        max_evals_per_solve=12 if rough else 50,
        start=start,
    )
    return Attack(logits_fn, Box(*checks.pair("box", box)), method)


class _Multipliers(NamedTuple):
    multipliers: Float[Array, " classes"]  # 0 for the target itself
    penalty: Float[Array, ""]
    penalty_limit: Float[Array, ""]
    violation: Float[Array, ""]
    tolerance: Float[Array, ""]
    goal: Float[Array, ""]  # the margin in the constraints: a little over the one asked for


@dataclasses.dataclass(frozen=True)
class AugmentedLagrangian:
    """The augmented Lagrangian of problem (1), with a multiplier for each class.

    Args:
        goal: The margin asked for, as far as it is known before the clean image is seen.
        tol: The final tolerance of the sub-problems.
        first_tol: The tolerance of the first one.
    """

    goal: float
    tol: float
    first_tol: float

    first_step: ClassVar[float] = 1 / (1 + _FIRST_PENALTY)

    def init(self, r: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct) -> _Multipliers:
        """Return multipliers of 0 and a penalty of 1."""

        def number(value: float) -> Float[Array, ""]:
            return jnp.full((), value, r.dtype)

        return _Multipliers(
            multipliers=jnp.zeros(logits.shape, r.dtype),
            penalty=number(1),
            penalty_limit=number(jnp.inf),
            violation=number(jnp.inf),
            tolerance=number(max(self.tol, self.first_tol)),
            goal=number(self.goal),
        )

    def size(self, r: Float[Array, "*shape"]) -> Float[Array, ""]:
        """Half the squared length."""
        return losses.squared_l2(r) / 2

    def loss(
        self, params: _Multipliers, logits: Float[Array, " classes"], target: Int[Array, ""]
    ) -> Float[Array, ""]:
        """What multipliers and penalty charge for the violation of the constraints."""
        return losses.squared_l2(_estimates(params, logits, target)) / (2 * params.penalty)

    def tolerance(self, params: _Multipliers) -> Float[Array, ""]:
        """That of the current sub-problem."""
        return params.tolerance

    def multiplier(self, params: _Multipliers, view: View) -> Float[Array, ""]:
        """The sum of the multipliers."""
        return jnp.sum(_estimates(params, view.logits, view.target))

    def first(self, params: _Multipliers, view: View) -> Verdict:
        """Scale the penalty by the gradient just seen, linear in it while the multipliers are 0.

        By the mean slope on the way to the initial point, where that is known.
        """
        square = losses.squared_l2(view.loss_grad)
        violation = jnp.max(_constraints(params, view.logits, view.target))
        far = (view.start_size > 0) & (violation > 0)
        rise = jnp.where(far, 2 * view.start_size, 2 * view.loss)
        run = jnp.where(far, violation**2, square)
        usable = run > 0
        penalty = jnp.where(usable, _FIRST_PENALTY * rise / jnp.where(usable, run, 1), 1)
        params = params._replace(
            penalty=penalty,
            penalty_limit=_PENALTY_LIMIT * penalty,
            goal=view.goal + view.resolution,
        )
        return Verdict(params=params, factor=penalty, finished=jnp.bool_(False), exhausted=~usable)

    def solved(self, params: _Multipliers, view: View) -> Verdict:
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
        # The gradient is no more precise than the rounding of the logits lets it be.
        total = jnp.sum(estimates)
        steepness = jnp.linalg.norm(view.loss_grad) / jnp.where(total > 0, total, 1)
        noise = params.penalty * view.resolution * steepness / 4
        finished = (
            view.reached
            & (gap <= jnp.maximum(_GAP * square, view.resolution * total))
            & (view.error <= jnp.maximum(self.tol * jnp.sqrt(square), noise))
        )
        params = params._replace(
            multipliers=estimates,
            penalty=penalty,
            violation=violation,
            tolerance=jnp.maximum(_TOLERANCE_FALL * params.tolerance, self.tol),
        )
        return Verdict(
            params=params,
            factor=jnp.full_like(penalty, jnp.inf),
            finished=finished,
            exhausted=penalty > params.penalty_limit,
        )


def _constraints(
    params: _Multipliers, logits: Float[Array, " classes"], target: Int[Array, ""]
) -> Float[Array, " classes"]:
    """What must not be positive: each class's logit less the target's, plus the goal."""
    others = jnp.arange(len(logits)) != target
    return jnp.where(others, logits - logits[target] + params.goal, -jnp.inf)


def _estimates(
    params: _Multipliers, logits: Float[Array, " classes"], target: Int[Array, ""]
) -> Float[Array, " classes"]:
    """The first-order estimates of the multipliers; 0 for the target and for classes far below."""
    constraints = _constraints(params, logits, target)
    return jnp.maximum(params.multipliers + params.penalty * constraints, 0)
