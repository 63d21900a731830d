"""The paper's attack: a penalised objective in the box, with a search over the penalty's c."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from advjax import checks, losses
from advjax.attacks.base import AttackResult, Machine, Method, Verdict, View, machine, run
from advjax.solvers import Solver, lbfgsb
from advjax.types import Box, LogitsFn

_FIRST_SHARE = 0.5  # of the c at which a linear loss and the penalty would balance
_EXPANSION = 1.5  # of c while there is no bracket, multiplied by itself each time
_RANGE = 28  # of ln c on either side of its first value; what is out of reach there stays so
_INSIDE = 0.05  # of the bracket that interpolation keeps away from its ends


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


def lbfgs(
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    target: Int[Array, ""] | int,
    *,
    box: Box | tuple = Box(),  # noqa: B008 an immutable default
    loss: Callable[[Float[Array, " classes"], Int[Array, ""]], Float[Array, ""]] = (
        losses.cross_entropy
    ),
    penalty: Callable[[Float[Array, "*shape"]], Float[Array, ""]] = losses.squared_l2,
    solver: Solver = lbfgsb(),  # noqa: B008
    confidence: float | None = None,
    tol: float = 1e-2,
    rtol: float = 1e-3,
    max_evals: int = 500,
) -> AttackResult:
    """The paper's attack: minimise `c |r| + loss(x + r, target)` in the box, and search over c.

    The paper asks for the "minimum c" with `f(x + r) = target`. As c weighs the *size* of r, it is
    the LARGEST successful c that gives the smallest r, and the search is for that one: on a log
    scale, from a first guess that the loss's gradient at `x` sets (so that any scale of model and
    pixels will do), expanding until one c reaches the target and another misses it, then by
    interpolating the margin between them. Every sub-problem starts at the last one's solution; a
    change of c costs no evaluation. Of all points seen the nearest adversarial one is returned.

    The answer is a little farther than the nearest adversarial image (`minimum_norm`), by the
    loss's interest in classes that do not matter: 1 to 3 % on MNIST.

    Args:
        logits_fn: The model: logits `(classes,)` of ONE example like `x`. Any pure function will
            do: `lambda x: model.apply(params, x)`.
        x: The image, of any shape, floating. It may lie outside the box; `r` counts from it
            nevertheless.
        target: The class to reach.
        box: `(lower, upper)`, each broadcast to `x`; [0, 1] by default.
        loss: `(logits, target) -> scalar`, small where the target is predicted.
        penalty: `r -> scalar`, the paper's |r|: `losses.squared_l2` as later work reads it, or
            `losses.l2` as printed.
        solver: The bounded minimiser of the sub-problems.
        confidence: The margin by which the target's logit must lead. By default a fifty-thousandth
            of the spread of the clean image's logits, which survives another batch size or
            precision.
        tol: The sub-problems' tolerance: the projected gradient's length beside that of the
            penalty's gradient.
        rtol: The search ends where the margin exceeds the one asked for by no more than this part
            of the clean image's, or the penalty brackets the best one this closely.
        max_evals: The most evaluations of the model's value and gradient.

    Returns:
        An `AttackResult`; its `weight` is the c under which the returned point was found. Nothing
        that the data do raises (`status` tells), and the image is never left out of the box, nor
        NaN. `jax.grad` takes the result for a constant.

    Raises:
        TypeError: If `x` is not floating, `target` not an integer, or `logits_fn` no function.
        ValueError: If `logits_fn` does not return `(classes,)`, a bound does not broadcast to `x`,
            `loss` or `penalty` does not return a scalar, or an option is out of its range.

    Source: Szegedy et al. (2013), section 4.1.
    """
    return run(
        lambda logits_fn, box: lbfgs_machine(
            logits_fn,
            box=box,
            loss=loss,
            penalty=penalty,
            solver=solver,
            confidence=confidence,
            tol=tol,
            rtol=rtol,
            max_evals=max_evals,
        ),
        logits_fn,
        x,
        target,
        box,
    )


def lbfgs_machine(
    logits_fn: LogitsFn,
    *,
    box: Box | tuple = Box(),  # noqa: B008
    loss: Callable[[Float[Array, " classes"], Int[Array, ""]], Float[Array, ""]] = (
        losses.cross_entropy
    ),
    penalty: Callable[[Float[Array, "*shape"]], Float[Array, ""]] = losses.squared_l2,
    solver: Solver = lbfgsb(),  # noqa: B008
    confidence: float | None = None,
    tol: float = 1e-2,
    rtol: float = 1e-3,
    max_evals: int = 500,
) -> Machine:
    """The machine behind `lbfgs`, for whoever runs the steps; the same options."""
    confidence = None if confidence is None else checks.number("confidence", confidence, minimum=0)
    tol = checks.number("tol", tol, minimum=0, exclusive=True)
    rtol = checks.number("rtol", rtol, minimum=0, exclusive=True)
    max_evals = checks.positive_int("max_evals", max_evals)

    def init(r: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct) -> _Search:
        checks.scalar("loss", loss, logits, jax.ShapeDtypeStruct((), jnp.int32))
        checks.scalar("penalty", penalty, r)

        def number(value: float):
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

    def other(search: _Search, logits, target):
        # Divided by c, which moves no minimiser and keeps the penalty's curvature the same for
        # every c: the scale that the solver starts from.
        return loss(logits, target) / jnp.exp(search.log_c)

    def change_c(search: _Search, log_c: Float[Array, ""], **verdict) -> Verdict:
        return Verdict(
            params=search._replace(log_c=log_c), ratio=jnp.exp(search.log_c - log_c), **verdict
        )

    def first(search: _Search, view: View) -> Verdict:
        """Guess c where the penalty of the r that a linear loss needs balances the loss."""
        clean_loss = jnp.abs(loss(view.logits, view.target))
        slope = view.grad - view.size_grad  # of the loss, as c is 1
        square = losses.squared_l2(slope)
        needed = penalty(
            (slope * clean_loss / jnp.where(square > 0, square, 1)).reshape(view.shape)
        )
        usable = (square > 0) & (needed > 0)
        guess = jnp.where(usable, _FIRST_SHARE * clean_loss / jnp.where(usable, needed, 1), 1)
        log_c = jnp.log(guess)
        search = search._replace(first_log_c=log_c, clean_margin=view.margin)
        return change_c(search, log_c, finished=jnp.bool_(False), exhausted=~usable)

    def solved(search: _Search, view: View) -> Verdict:
        """Narrow the bracket by this c, and choose the next by the margins at its ends."""
        side = jnp.where(view.reached, 1, -1)
        slack = rtol * jnp.abs(search.clean_margin - view.goal)

        def at(end, new, old):
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
        share = jnp.where(both > 0, above / jnp.where(both > 0, both, 1), 0.5)
        inside = search.reached + jnp.clip(share, _INSIDE, 1 - _INSIDE) * (
            search.missed - search.reached
        )
        outside = search.log_c + side * search.expansion
        log_c = jnp.where(bracketed, inside, outside)

        width = search.missed - search.reached
        finished = jnp.where(
            bracketed,
            (search.reached_size - search.missed_size <= rtol * search.reached_size)
            | (width <= rtol * rtol),
            False,
        ) | (hit & (view.margin - view.goal <= slack))
        search = search._replace(
            last_side=side,
            reached_margin=aim + above,
            missed_margin=aim - below,
            expansion=at(bracketed, search.expansion, search.expansion + math.log(_EXPANSION)),
        )
        return change_c(
            search,
            log_c,
            finished=finished,
            exhausted=jnp.abs(log_c - search.first_log_c) > _RANGE,
        )

    method = Method(
        init=init,
        size=penalty,
        other=other,
        tolerance=lambda search: jnp.full_like(search.log_c, tol),
        weight=lambda search, view: jnp.exp(search.log_c),
        first=first,
        solved=solved,
        first_step=1.0,
    )
    return machine(
        method, logits_fn, box=box, solver=solver, confidence=confidence, max_evals=max_evals
    )
