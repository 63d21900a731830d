"""An adversarial image that a file of 8 bits holds, from one of real numbers.

Rounding the pixels of the nearest adversarial image moves it off the boundary to either side: half
of MNIST's images are lost, and nearly all of a convolutional network's. So a search on the grid
follows the search among real numbers. Its candidates are `nearest(x + scale * direction)`:

- The direction begins as the perturbation that was found, and becomes an average of it and of the
  gradients of the margin at the candidates. A gradient at one point says little about an image that
  is thousands of grid steps away; the average does.
- The scale follows the verdicts alone: larger after a candidate that is not adversarial, smaller
  after one that is, by a stride that shrinks when the verdict turns and grows when it does not.

Reference: Riedmiller and Braun (1993), for the strides (Rprop).
"""

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, losses, metrics
from advjax.attacks import precision
from advjax.attacks.attack import Attack, Method
from advjax.attacks.evaluation import Query, step_or_ask
from advjax.attacks.fgsm import GradientSign
from advjax.attacks.result import AttackResult, Status, admission, first_that_holds, is_untried
from advjax.attacks.untargeted import AnyOtherClass
from advjax.types import Box, LogitsFn

T = TypeVar("T")

_NEWEST = 0.05  # the weight of the newest gradient in the direction
_SOFTNESS = 0.005  # of the clean image's margin: classes as near as that share the gradient
_FIRST_STRIDE = 0.01  # of the scale
_LEAST_STRIDE, _LARGEST_STRIDE = 1e-3, 1.0
_SHRINKAGE, _GROWTH = 0.5, 1.3  # of the stride when the verdict turns, and when it does not
_GROWTH_UNTIL_REACHED = 2.0
_COARSE = 5.0  # roundings: a perturbation as long takes the weight and the strides as they are
_REACHED = 2  # the level of a candidate that has the target by the margin asked for
_ROUNDING = 1e-6  # of a squared distance
_TOLERANCE = 1e-3  # by how much the distance may exceed the continuous one


def quantized(attack: Attack, *, levels: int = 256, max_evals: int = 40) -> Attack:
    """Find an adversarial image on a grid of pixel values, as an image file of 8 bits has it.

    The grid has `levels` equally spaced values from bound to bound of the attack's box, for each
    pixel those of its own bounds: `lower + (upper - lower) * k / (levels - 1)` for the integers k,
    in the precision of the image (in float32 for half-precision images, and then rounded). For 256
    levels and the box (0, 1) that is `k / 255` bit for bit, as NumPy computes it from the bytes of
    a file; for (0, 255) it is `k`, and for (-1, 1) `2 * (k / 255) - 1`. `data.save_images` writes
    such images and `data.load_photographs` reads them.

    `attack` comes first. A search on the grid follows, from the image that it found, whether or not
    that is adversarial. Under `jax.vmap` the two share the evaluations of the model.

    Args:
        attack: An attack on a given class: `attacks.minimum_norm(logits_fn)`, or any other. If it
            has a `confidence`, images on the grid are asked for the same margin.
        levels: How many values a pixel can have, at least 2.
        max_evals: The most evaluations of the model's value and gradient on the grid, beside those
            of `attack`.

    Returns:
        An `Attack`: `(x, target) -> AttackResult`, where `target` is the class to reach and `x_adv`
        lies on the grid; `x` need not. The status is `CONVERGED` if the distance is within a
        thousandth of that of `attack`, or no image on the grid is nearer, and `BUDGET` if the
        evaluations on the grid ran out before; otherwise it is that of `attack`. `multiplier` is
        that of `attack`. For attacks on any other class: `untargeted(quantized(attack))`.

    Raises:
        TypeError: If `attack` is no `Attack`.
        ValueError: If `attack` leaves a class instead of reaching one, its box is known to be
            infinite, or `levels` or `max_evals` is out of its range.
    """
    if not isinstance(attack, Attack):
        raise TypeError(
            f"attack: {type(attack).__name__}, expected an Attack, as "
            "attacks.minimum_norm(logits_fn) returns."
        )
    if isinstance(attack.method, AnyOtherClass):
        raise ValueError(
            "attack: untargeted(...), expected an attack on a given class; put the grid inside: "
            "untargeted(quantized(attack))."
        )
    if isinstance(attack.method, GradientSign) and not attack.method.targeted:
        raise ValueError(
            "attack: fgsm(...) away from a class, expected an attack on a given class; pass "
            "targeted=True."
        )
    if isinstance(attack.method, OnGrid):
        raise ValueError("attack: quantized(...) already, expected another; pass it its levels=.")
    if isinstance(levels, bool) or not isinstance(levels, int | np.integer) or levels < 2:
        raise ValueError(f"levels: {levels!r}, expected an integer of at least 2.")
    _check_finite(attack.box)
    method = OnGrid(attack.method, int(levels), checks.positive_int("max_evals", max_evals))
    return dataclasses.replace(attack, method=method)


class _Grid(NamedTuple):
    """Equally spaced values from bound to bound, for pixels along one axis."""

    box: Box
    top: int
    """The number of the upper bound; that of the lower one is 0."""

    @property
    def width(self) -> Float[Array, "..."]:
        """The range of each pixel."""
        return jnp.subtract(self.box.upper, self.box.lower)

    def nearest(self, x: Float[Array, " pixels"]) -> Float[Array, " pixels"]:
        """The nearest image on the grid."""
        place = (x - self.box.lower) / jnp.where(self.width > 0, self.width, 1) * self.top
        place = jnp.clip(jnp.round(place), 0, self.top).astype(jnp.int32)
        # Looked up, as no backend divides like NumPy: XLA multiplies by the rounded 1 / 255.
        fractions = np.arange(self.top + 1, dtype=x.dtype) / np.asarray(self.top, x.dtype)
        fraction = jnp.take(jnp.asarray(fractions), place, mode="clip")
        return jnp.clip(self.box.lower + self.width * fraction, *self.box)


class _Candidate(NamedTuple):
    """The best image so far: of two the one of the higher level, then of the higher merit."""

    x: Float[Array, "*shape"]  # on the grid
    level: Int[Array, ""]  # 2: the target by the margin asked for, 1: by any, 0: another class
    merit: Float[Array, ""]  # minus the squared distance, or at level 0 the margin


class _Walk(NamedTuple):
    """Where the next candidate is: `x + scale * direction`, rounded to the grid."""

    direction: Float[Array, " pixels"]
    scale: Float[Array, ""]
    stride: Float[Array, ""]  # relative, of the scale
    reached: Bool[Array, ""]  # whether the last candidate has the target, by the margin asked for
    ever: Bool[Array, ""]  # whether any had


class _State(NamedTuple):
    """The attack among real numbers, and the search on the grid after it."""

    attack: Any
    x: Float[Array, "*shape"]
    target: Int[Array, ""]
    best: _Candidate
    walk: _Walk
    distance: Float[Array, ""]  # that of the attack
    least: Float[Array, ""]  # the squared distance of the nearest image on the grid
    goal: Float[Array, ""]  # the margin asked for
    softness: Float[Array, ""]  # of the margin
    num_evals: Int[Array, ""]  # on the grid
    status: Int[Array, ""]  # of the search on the grid


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OnGrid:
    """The method of `quantized`.

    Args:
        method: That of the attack among real numbers.
        levels: The number of values of a pixel.
        max_evals: The most evaluations on the grid.
    """

    method: Method
    levels: int = dataclasses.field(metadata={"static": True})
    max_evals: int = dataclasses.field(metadata={"static": True})

    def init(self, attack: Attack, x: Float[Array, "*shape"], target: Int[Array, ""]) -> _State:
        """Begin the attack, and predict the clean image, whose margin is the unit of margins."""
        target = checks.class_index("target", target)
        classes = checks.logits(attack.logits_fn, x).shape[0]
        begun, raw = self.method.init(attack, x, target), attack.logits_fn(x)
        status = first_that_holds(
            (_is_infinite(attack.box), Status.EMPTY_BOX),
            (jnp.any(jnp.isnan(raw)), Status.NONFINITE),
            (jnp.bool_(True), admission(x, target, classes, checks.box(attack.box, x))),
        )
        x = jnp.where(jnp.isfinite(x), x, 0)
        flat = _flatten(x)
        logits, index = raw.astype(flat.dtype), jnp.clip(target, 0, classes - 1)
        goal = getattr(self.method, "confidence", None)
        if goal is None:
            goal = precision.resolution(logits, index, raw.dtype)
        margin = jnp.abs(metrics.margin(logits, index))
        usable = jnp.isfinite(margin) & (margin > 0)
        zero, no = jnp.zeros((), flat.dtype), jnp.bool_(False)
        rounded = jnp.where(status == Status.EMPTY_BOX, x, self._round(attack, x, flat))
        return _State(
            attack=begun,
            x=x,
            target=target,
            best=_Candidate(rounded, jnp.int32(0), zero - jnp.inf),
            walk=_Walk(jnp.zeros_like(flat), zero + 1, zero + _FIRST_STRIDE, no, no),
            distance=zero,
            least=losses.squared_l2(_flatten(rounded) - flat),
            goal=jnp.asarray(goal, flat.dtype),
            softness=_SOFTNESS * jnp.where(usable, margin, 1),
            num_evals=jnp.int32(0),
            status=status,
        )

    def step(self, attack: Attack, state: _State) -> _State:
        """Step the attack or, once it has ended, evaluate a candidate on the grid."""
        ended = self.method.done(attack, state.attack)
        new = self._set_out(attack, state)
        x = _flatten(new.x)
        candidate = self._round(attack, new.x, x + new.walk.scale * new.walk.direction)

        def step(logits_fn: LogitsFn, inner: Any) -> Any:
            return self.method.step(dataclasses.replace(attack, logits_fn=logits_fn), inner)

        stepped, logits, gradient = step_or_ask(
            step,
            state.attack,
            attack.logits_fn,
            ask=ended,
            query=Query(candidate, lambda logits: _slope(logits, new.target, new.softness)),
        )
        margin = metrics.margin(logits, new.target).astype(x.dtype)
        reached = (margin > 0) & (margin >= new.goal)  # false where it is NaN
        best = _better(_candidate(new, candidate, margin, reached), new.best)
        walk = self._turn(attack, new, reached, _flatten(gradient))
        new = new._replace(best=best, walk=walk, num_evals=new.num_evals + 1)
        new = new._replace(status=self._status(new))
        searching = ended & (state.status == Status.RUNNING)
        return _where(searching, new, state)._replace(attack=stepped)

    def done(self, attack: Attack, state: _State) -> Bool[Array, ""]:
        """Whether both searches have ended."""
        return self.method.done(attack, state.attack) & (state.status != Status.RUNNING)

    def result(self, attack: Attack, state: _State) -> AttackResult:
        """Return the best candidate, with its prediction computed once more."""
        before = self.method.result(attack, state.attack)
        x_adv = state.best.x
        logits = attack.logits_fn(x_adv)
        prediction = jnp.argmax(logits).astype(jnp.int32)
        untried = is_untried(before.status) | is_untried(state.status)
        success = ~untried & (prediction == state.target) & jnp.all(~jnp.isnan(logits))
        nearest = success & _is_nearest(state)
        met = (before.status == Status.CONVERGED) | (before.status == Status.ALREADY_TARGET)
        status = first_that_holds(
            (is_untried(before.status), before.status),
            (is_untried(state.status) | (state.status == Status.RUNNING), state.status),
            (nearest & (before.status == Status.ALREADY_TARGET), before.status),
            (nearest, Status.CONVERGED),
            (met, state.status),
            (success & (before.status == Status.NOT_FOUND), Status.STALLED),
            (jnp.bool_(True), before.status),
        )
        return AttackResult(
            x_adv=x_adv,
            success=success,
            distortion=metrics.distortion(_flatten(state.x), _flatten(x_adv)),
            multiplier=before.multiplier,
            prediction=prediction,
            status=status,
            num_evals=before.num_evals + state.num_evals,
        )

    def _set_out(self, attack: Attack, state: _State) -> _State:
        """Before the first candidate: in the direction of the image that the attack has found."""
        # The prediction in the result is of no interest here, and XLA leaves it out.
        found = self.method.result(attack, state.attack).x_adv
        r = _flatten(found) - _flatten(state.x)
        first = state.num_evals == 0
        direction = jnp.where(first, r, state.walk.direction)
        return state._replace(
            walk=state.walk._replace(direction=direction),
            distance=jnp.where(first, losses.l2(r), state.distance),
        )

    def _turn(
        self,
        attack: Attack,
        state: _State,
        reached: Bool[Array, ""],
        gradient: Float[Array, " pixels"],
    ) -> _Walk:
        """Average the direction, and change the scale by the verdict."""
        grid, old = self._grid(attack, state.x), state.walk
        width = jnp.broadcast_to(grid.width, gradient.shape)
        step = jnp.max(width, initial=0) / grid.top
        length = _positive(jnp.where(state.distance > 0, state.distance, step))
        rounding = losses.l2(width) / (grid.top * 12**0.5)
        coarseness = jnp.minimum(1, _COARSE * rounding / length)

        slope = losses.l2(gradient)
        usable = jnp.isfinite(slope) & (slope > 0)
        pull = jnp.where(usable, gradient, 0) * (length / jnp.where(usable, slope, 1))
        weight = jnp.where(usable, _NEWEST * coarseness, 0)
        direction = (1 - weight) * old.direction + weight * pull
        direction = direction * (length / _positive(losses.l2(direction)))

        ever = old.ever | reached
        factor = jnp.where(ever, _GROWTH, _GROWTH_UNTIL_REACHED)
        factor = jnp.where(reached == old.reached, factor, _SHRINKAGE)
        stride = jnp.where(state.num_evals == 0, _FIRST_STRIDE * coarseness, old.stride * factor)
        stride = jnp.clip(stride, _LEAST_STRIDE * coarseness, _LARGEST_STRIDE)
        scale = jnp.where(reached, old.scale / (1 + stride), old.scale * (1 + stride))
        return _Walk(direction, scale, stride, reached, ever)

    def _status(self, state: _State) -> Int[Array, ""]:
        """Whether no more is to be gained, or the evaluations have run out."""
        found = state.best.level == _REACHED
        distance = jnp.sqrt(jnp.maximum(-state.best.merit, 0))
        near = distance <= (1 + _TOLERANCE) * state.distance
        return first_that_holds(
            (found & (near | _is_nearest(state)), Status.CONVERGED),
            (state.num_evals >= self.max_evals, Status.BUDGET),
        )

    def _round(
        self, attack: Attack, like: Float[Array, "*shape"], flat: Float[Array, " pixels"]
    ) -> Float[Array, "*shape"]:
        """The nearest image on the grid."""
        return self._grid(attack, like).nearest(flat).reshape(like.shape).astype(like.dtype)

    def _grid(self, attack: Attack, like: Float[Array, "*shape"]) -> _Grid:
        bounds = (_flatten(jnp.asarray(bound)) for bound in checks.box(attack.box, like))
        return _Grid(Box(*bounds), self.levels - 1)


def _candidate(
    state: _State, x: Float[Array, "*shape"], margin: Float[Array, ""], reached: Bool[Array, ""]
) -> _Candidate:
    """An image on the grid, judged by the margin of its logits."""
    predicted = margin > 0
    square = losses.squared_l2(_flatten(x) - _flatten(state.x))
    return _Candidate(
        x=x,
        level=predicted.astype(jnp.int32) + reached,
        merit=jnp.where(predicted, -square, margin),
    )


def _is_nearest(state: _State) -> Bool[Array, ""]:
    """Whether the best candidate is as near as any image on the grid."""
    near = -state.best.merit <= state.least * (1 + _ROUNDING)
    return (state.best.level > 0) & near


def _better(new: _Candidate, old: _Candidate) -> _Candidate:
    better = (new.level > old.level) | ((new.level == old.level) & (new.merit > old.merit))
    return _where(better, new, old)


def _slope(
    logits: Float[Array, " classes"], target: Int[Array, ""], softness: Float[Array, ""]
) -> Float[Array, " classes"]:
    """The gradient of the target's margin by the logits, shared by classes of nearly one logit."""
    others = jnp.arange(len(logits)) != target
    lead = (logits - logits[target]).astype(softness.dtype)
    weights = jax.nn.softmax(jnp.where(others, lead, -jnp.inf) / softness)
    return (~others - weights).astype(logits.dtype)


def _check_finite(box: Box) -> None:
    for bound in box:
        if not isinstance(bound, jax.core.Tracer) and np.any(np.isinf(np.asarray(bound, float))):
            raise ValueError(
                "attack: its box has an infinite bound, expected finite ones, between which the "
                "levels lie; pass the attack the range of its pixels as box=."
            )


def _is_infinite(box: Box) -> Bool[Array, ""]:
    return jnp.any(jnp.isinf(box.lower)) | jnp.any(jnp.isinf(box.upper))


def _positive(length: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(length > 0, length, 1)


def _flatten(x: Float[Array, "*shape"]) -> Float[Array, " pixels"]:
    # Half-precision images are searched in float32 and rounded before the model sees them.
    return jnp.ravel(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _where(condition: Bool[Array, ""], new: T, old: T) -> T:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
