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
_EXPANSION = 1.5  # of c while there is no bracket, multiplied by itself each time
_RANGE = 28  # of ln c on either side of its first value; what is out of reach there stays so
_INSIDE = 0.05  # of the bracket that interpolation keeps away from its ends

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
    """Attack as the paper does: minimise `c |r| + loss(x + r, target)` in the box, and search c.

    The paper asks for the "minimum c" with `f(x + r) = target`. As c weighs the *size* of r, it is
    the LARGEST successful c that gives the smallest r, and the search is for that one: on a log
    scale, from a first guess that the loss's gradient at `x` sets (so that any scale of model and
    pixels will do), expanding until one c reaches the target and another misses it, then by
    interpolating the margin between them. Every sub-problem starts at the last one's solution; a
    change of c costs no evaluation. Of all points seen the nearest adversarial one is returned,
    nearest by `penalty`.

    The answer is a little farther than the nearest adversarial image (`minimum_norm`), as the loss
    responds to classes that do not matter: 1 to 3 % on MNIST.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example. Any pure function will do:
            `lambda x: model.apply(params, x)`.
        box: `(lower, upper)`, each broadcast to the image; [0, 1] by default.
        loss: `(logits, target) -> scalar`, small where the target is predicted.
        penalty: `r -> scalar`, the paper's |r|: `losses.squared_l2` as later work reads it,
            `losses.l2` as printed, or `losses.l1`.
        solver: The bounded minimiser of the sub-problems.
        confidence: The margin by which the target's logit must exceed the others. By default a
            fifty-thousandth of the spread of the clean image's logits, which survives another batch
            size or precision.
        tol: The sub-problems' tolerance: the projected gradient's length beside that of the
            penalty's gradient.
        rtol: The search ends where the margin exceeds the one asked for by no more than this
            fraction of the clean image's, or the penalty brackets the best one this closely.
        max_evals: The most evaluations of the model's value and gradient.

    Returns:
        An `Attack`: `(x, target) -> AttackResult`, where `target` is the class to reach. The
        `multiplier` of a result is the c under which the returned point was found.

    Raises:
        TypeError: If `logits_fn` is no function.
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
    """The bracket of ln c: the largest that reached the target, the smallest that missed it."""

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

    first_step: ClassVar[float] = 1.0  # the penalty's curvature, whatever c is

    def init(self, r: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct) -> _Search:
        """Return a search over c that begins at 1 and has no bracket."""
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
        # Divided by c, which moves no minimiser and keeps the penalty's curvature the same for
        # every c: the scale that the solver starts from.
        return self.loss_fn(logits, target) / jnp.exp(search.log_c)

    def tolerance(self, search: _Search) -> Float[Array, ""]:
        """The same for all sub-problems."""
        return jnp.full_like(search.log_c, self.tol)

    def multiplier(self, search: _Search, view: View) -> Float[Array, ""]:
        """The current c."""
        return jnp.exp(search.log_c)

    def first(self, search: _Search, view: View) -> Verdict:
        """Guess c where the penalty of the r that a linear loss needs balances the loss."""
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
        """Narrow the bracket by this c, and choose the next by the margins at its ends."""
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

        # False position with the Illinois rule: an end that stays twice counts half.
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
    """Go on with another c, by which the loss and its gradient are scaled."""
    return Verdict(
        params=search._replace(log_c=log_c), factor=jnp.exp(search.log_c - log_c), **verdict
    )
