"""The paper's attack: a penalised objective in the box, with a search over the penalty's c."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, losses
from advjax.attacks.attack import Attack
from advjax.attacks.machine import Search, Verdict, View
from advjax.solvers import Solver, lbfgsb
from advjax.types import Box, LogitsFn

_FIRST_FRACTION = 0.5  # of the c at which a linear loss and the penalty would balance
_EXPANSION = 1.5  # the first factor of c while there is no bracket; the factor grows by as much
_RANGE = 28  # of ln c on either side of its first value; no target is reached beyond
_INSIDE = 0.05  # of the bracket: the distance that interpolation keeps from its ends

Loss = Callable[[Float[Array, " classes"], Int[Array, ""]], Float[Array, ""]]
"""`(logits, target) -> scalar`, small where the target is predicted."""
Penalty = Callable[[Float[Array, "*shape"]], Float[Array, ""]]
"""`r -> scalar`, the paper's |r|."""


def lbfgs(
    logits_fn: LogitsFn,
    *,
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    loss: Loss = losses.cross_entropy,
    penalty: Penalty = losses.squared_l2,
    solver: Solver = lbfgsb(),  # noqa: B008
    confidence: float | None = None,
    tol: float = 1e-2,
    rtol: float = 1e-3,
    max_evals: int = 500,
) -> Attack:
    """Attack as the paper does: minimise `c |r| + loss(x + r, target)` in the box; search for c.

    The paper asks for the "minimum c" with `f(x + r) = target`. As c weighs the *size* of r, the
    LARGEST successful c gives the smallest r, and this is the c that is searched for, on a log
    scale. The first c follows from the loss gradient at `x`, so that the scale of logits and pixels
    does not matter. c is then multiplied until one value reaches the target and another misses it,
    and interpolated by the margin between these two. Each sub-problem starts from the solution of
    the last one; a change of c costs no evaluation. Of all adversarial points seen, the nearest by
    `penalty` is returned.

    It is a little farther away than the nearest adversarial image (`minimum_norm`), 1 to 3 % on
    MNIST, as the loss depends on classes that do not matter.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example, any pure function, such as
            `lambda x: model.apply(params, x)`.
        box: `(lower, upper)`, each broadcast to the image; [0, 1] by default.
        loss: `(logits, target) -> scalar`, small where the target is predicted.
        penalty: `r -> scalar`, the paper's |r|: `losses.squared_l2` as later work reads it,
            `losses.l2` as printed, or `losses.l1`.
        solver: The bounded minimiser of the sub-problems.
        confidence: The margin by which the target's logit must exceed the others. By default 2e-5
            of the spread of the clean image's logits, enough for another batch size or precision.
        tol: The tolerance of the sub-problems: the length of the projected gradient, relative to
            that of the penalty's gradient.
        rtol: The search ends when the margin exceeds `confidence` by at most this fraction of the
            clean image's margin, or the bracket holds the penalty to this relative accuracy.
        max_evals: Largest number of evaluations of the model's value and gradient.

    Returns:
        An `Attack`: `(x, target) -> AttackResult`, where `target` is the class to reach. The
        `multiplier` of a result is the c with which the returned point was found.

    Raises:
        TypeError: If `logits_fn` is not callable.
        ValueError: If `box` is not a pair, or an option is out of its range; when the attack is
            called, if `loss` or `penalty` does not return a scalar.

    Reference: Szegedy et al. (2013), section 4.1.
    """
    method = Search(
        formulation=PenalizedLoss(
            loss_fn=loss,
            penalty=penalty,
            tol=checks.number("tol", tol, minimum=0, exclusive=True),
            rtol=checks.number("rtol", rtol, minimum=0, exclusive=True),
        ),
        solver=solver,
        confidence=(
            None if confidence is None else checks.number("confidence", confidence, minimum=0)
        ),
        max_evals=checks.positive_int("max_evals", max_evals),
    )
    return Attack(logits_fn, Box(*checks.pair("box", box)), method)


class _Search(NamedTuple):
    """The bracket of ln c: the largest that reached the target and the smallest that missed it."""

    log_c: Float[Array, ""]
    first_log_c: Float[Array, ""]
    reached: Float[Array, ""]
    missed: Float[Array, ""]
    reached_margin: Float[Array, ""]
    missed_margin: Float[Array, ""]
    reached_size: Float[Array, ""]
    missed_size: Float[Array, ""]
    clean_margin: Float[Array, ""]
    last_side: Int[Array, ""]  # 1: the last sub-problem reached the target, -1: it missed
    expansion: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class PenalizedLoss:
    """The paper's `c |r| + loss`, and the search for the largest c that reaches the target.

    Args:
        loss_fn: `(logits, target) -> scalar`.
        penalty: `r -> scalar`.
        tol: The tolerance of the sub-problems.
        rtol: The relative tolerance of the search over c.
    """

    loss_fn: Loss
    penalty: Penalty
    tol: float
    rtol: float

    first_step: ClassVar[float] = 1.0  # the penalty's inverse curvature, which c does not change

    def init(self, r: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct) -> _Search:
        """Return a search over c that starts at 1 and has no bracket."""
        target = jax.ShapeDtypeStruct((), jnp.int32)
        checks.scalar("loss", jax.eval_shape(self.loss_fn, logits, target))
        checks.scalar("penalty", jax.eval_shape(self.penalty, r))

        def number(value: float) -> Float[Array, ""]:
            return jnp.full((), value, r.dtype)

        return _Search(
            log_c=number(0),
            first_log_c=number(0),
            reached=number(-jnp.inf),
            missed=number(jnp.inf),
            reached_margin=number(0),
            missed_margin=number(0),
            reached_size=number(jnp.inf),
            missed_size=number(0),
            clean_margin=number(0),
            last_side=jnp.int32(0),
            expansion=number(math.log(_EXPANSION)),
        )

    def size(self, r: Float[Array, "*shape"]) -> Float[Array, ""]:
        """The penalty."""
        return self.penalty(r)

    def loss(
        self, search: _Search, logits: Float[Array, " classes"], target: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The loss, divided by c."""
        # The objective divided by c has the same minimiser, and a penalty of the same curvature for
        # every c, so that the solver's pairs and step sizes keep their scale.
        return self.loss_fn(logits, target) / jnp.exp(search.log_c)

    def tolerance(self, search: _Search) -> Float[Array, ""]:
        """The same for all sub-problems."""
        return jnp.full_like(search.log_c, self.tol)

    def multiplier(self, search: _Search, view: View) -> Float[Array, ""]:
        """The current c."""
        return jnp.exp(search.log_c)

    def first(self, search: _Search, view: View) -> Verdict:
        """Guess c: where loss and penalty would balance if the loss were linear."""
        clean_loss = jnp.abs(self.loss_fn(view.logits, view.target))
        slope = view.loss_grad  # as c is 1
        square = losses.squared_l2(slope)
        needed = self.penalty(
            (slope * clean_loss / jnp.where(square > 0, square, 1)).reshape(view.shape)
        )
        usable = (square > 0) & (needed > 0)
        guess = jnp.where(usable, _FIRST_FRACTION * clean_loss / jnp.where(usable, needed, 1), 1)
        log_c = jnp.log(guess)
        search = search._replace(first_log_c=log_c, clean_margin=view.margin)
        return _change_c(search, log_c, finished=jnp.bool_(False), exhausted=~usable)

    def solved(self, search: _Search, view: View) -> Verdict:
        """Narrow the bracket by this c, and interpolate the next one by the margins at its ends."""
        side = jnp.where(view.reached, 1, -1)
        slack = self.rtol * jnp.abs(search.clean_margin - view.goal)

        def at(end: Bool[Array, ""], new: ArrayLike, old: ArrayLike) -> Float[Array, ""]:
            return jnp.where(end, new, old)

        hit, miss = view.reached, ~view.reached
        search = search._replace(
            reached=at(hit, search.log_c, search.reached),
            missed=at(miss, search.log_c, search.missed),
            reached_margin=at(hit, view.margin, search.reached_margin),
            missed_margin=at(miss, view.margin, search.missed_margin),
            reached_size=at(hit, view.size, search.reached_size),
            missed_size=at(miss, view.size, search.missed_size),
        )
        bracketed = jnp.isfinite(search.reached) & jnp.isfinite(search.missed)

        # False position with the Illinois rule: the margin of an end that stays twice is halved, so
        # that it does not stay for ever.
        aim = view.goal + slack / 2
        again = bracketed & (side == search.last_side)
        above = jnp.maximum(search.reached_margin - aim, 0) * at(again & miss, 0.5, 1)
        below = jnp.maximum(aim - search.missed_margin, 0) * at(again & hit, 0.5, 1)
        both = above + below
        fraction = jnp.where(both > 0, above / jnp.where(both > 0, both, 1), 0.5)
        inside = search.reached + jnp.clip(fraction, _INSIDE, 1 - _INSIDE) * (
            search.missed - search.reached
        )
        outside = search.log_c + side * search.expansion
        log_c = jnp.where(bracketed, inside, outside)

        width = search.missed - search.reached
        finished = jnp.where(
            bracketed,
            (search.reached_size - search.missed_size <= self.rtol * search.reached_size)
            | (width <= self.rtol * self.rtol),
            False,
        ) | (hit & (view.margin - view.goal <= slack))
        search = search._replace(
            last_side=side,
            reached_margin=aim + above,
            missed_margin=aim - below,
            expansion=at(bracketed, search.expansion, search.expansion + math.log(_EXPANSION)),
        )
        return _change_c(
            search,
            log_c,
            finished=finished,
            exhausted=jnp.abs(log_c - search.first_log_c) > _RANGE,
        )


def _change_c(search: _Search, log_c: Float[Array, ""], **verdict: Bool[Array, ""]) -> Verdict:
    """Continue with another c, which scales the loss term and its gradient."""
    return Verdict(
        params=search._replace(log_c=log_c), factor=jnp.exp(search.log_c - log_c), **verdict
    )
