"""The machine that every minimum-distortion attack is, and what it returns.

An attack solves a sequence of bounded problems, each a penalised form of the paper's problem (1).
Here that sequence is one flat machine: each step makes one evaluation of the model, and what other
implementations write as loops around a solver (the search over c, the updates of multipliers) are
transitions that change the objective between two steps. Under `jax.vmap` the whole attack then
costs the slowest image's evaluations once, where nested loops would cost the sum over every inner
loop of its slowest image.
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, losses, metrics
from advjax.attacks.start import Start
from advjax.solvers import Solver, SolverState
from advjax.solvers import Status as SolverStatus
from advjax.types import Box, LogitsFn

T = TypeVar("T")

_RESOLUTION = 2e-5  # of the spread of the clean logits: what float32 keeps apart in any batch


class Status(enum.IntEnum):
    """Where an attack stands, or why it ended."""

    RUNNING = 0
    CONVERGED = 1
    """The search has met its tolerance."""
    ALREADY_TARGET = 2
    """The model gives the image the target class as it is: the distortion is that of the box."""
    BUDGET = 3
    """The evaluations ran out; `success` tells whether the target was reached before."""
    STALLED = 4
    """The target was reached, but the search could get no nearer to its tolerance."""
    NOT_FOUND = 5
    """The search ended without reaching the target: a class that nothing in the box gets."""
    NONFINITE = 6
    """The image, or the model's logits or their gradient there, are not finite."""
    INVALID_TARGET = 7
    """The target is not a class of the model."""
    EMPTY_BOX = 8
    """A lower bound lies above its upper bound, or a bound is NaN: no image is allowed."""


class AttackResult(NamedTuple):
    """The outcome of an attack on one image.

    Attributes:
        x_adv: The adversarial image, in the box and finite. If none was found, the candidate whose
            margin came nearest.
        success: Whether the model gives `x_adv` the target class, recomputed from `x_adv`.
        distortion: The RMS of `x_adv - x` over the entries of `x`, the paper's measure.
        weight: The weight of the returned point: c for `lbfgs`, the sum of the multipliers for
            `minimum_norm`. 0 where `x_adv` is the image itself.
        prediction: The class of `x_adv`.
        status: A `Status`.
        num_evals: Evaluations of value and gradient of the model, line searches included.
    """

    x_adv: Float[Array, "*shape"]
    success: Bool[Array, ""]
    distortion: Float[Array, ""]
    weight: Float[Array, ""]
    prediction: Int[Array, ""]
    status: Int[Array, ""]
    num_evals: Int[Array, ""]


class Machine(NamedTuple):
    """An attack as pure functions on one image; `jax.vmap` and run them as you like.

    Attributes:
        init: `(x, target) -> state`, without an evaluation of the model but those of a `Start`.
        step: `state -> state`, one value_and_grad of the model. A step beyond the end leaves the
            result as it is, so that a batch may go on without those that are done.
        done: `state -> bool`.
        result: `state -> AttackResult`, one prediction of the model.
    """

    init: Callable[[Float[Array, "*shape"], Int[Array, ""]], Any]
    step: Callable[[Any], Any]
    done: Callable[[Any], Bool[Array, ""]]
    result: Callable[[Any], AttackResult]


class View(NamedTuple):
    """What a method sees of the machine after a step."""

    size: Float[Array, ""]
    """The method's measure of the perturbation, the solver's current point less the image."""
    size_grad: Float[Array, " pixels"]
    start_size: Float[Array, ""]
    """The measure at the point that the search starts from, 0 for the image."""
    shape: tuple[int, ...]
    """That of the image."""
    logits: Float[Array, " classes"]
    target: Int[Array, ""]
    margin: Float[Array, ""]
    """The target's logit less the largest other one."""
    goal: Float[Array, ""]
    """The margin that is asked for."""
    resolution: Float[Array, ""]
    """The smallest difference of logits that counts."""
    value: Float[Array, ""]
    """The objective there."""
    grad: Float[Array, " pixels"]
    error: Float[Array, ""]
    """The length of the projected gradient."""
    reached: Bool[Array, ""]
    """Whether this point is adversarial, by the margin that is asked for."""


class Verdict(NamedTuple):
    """What a method decides after a step."""

    params: Any
    """The parameters of the objective from now on."""
    ratio: Float[Array, ""]
    """By what they multiply the gradient of the objective's other part at this point; infinite to
    have it evaluated anew."""
    finished: Bool[Array, ""]
    exhausted: Bool[Array, ""]
    """Whether the search should end without having converged."""


class Method(NamedTuple):
    """What tells one attack from another: an objective, and how it changes.

    Attributes:
        init: `(r, logits) -> params`, from the shapes and dtypes of both.
        size: `r -> scalar`, the part of the objective that measures the perturbation. A sub-problem
            is solved when its projected gradient is short beside the gradient of this.
        other: `(params, logits, target) -> scalar`, the rest of the objective.
        tolerance: `params -> scalar`, how short.
        weight: `(params, view) -> scalar`, what the result reports.
        first: `(params, view) -> Verdict`, after the evaluation of the clean image, under the
            objective of the initial parameters.
        solved: `(params, view) -> Verdict`, after each sub-problem.
        first_step: The solver's first step, in multiples of the objective's gradient: the inverse
            of the curvature to expect.
    """

    init: Callable[[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct], Any]
    size: Callable[[Float[Array, "*shape"]], Float[Array, ""]]
    other: Callable[[Any, Float[Array, " classes"], Int[Array, ""]], Float[Array, ""]]
    tolerance: Callable[[Any], Float[Array, ""]]
    weight: Callable[[Any, View], Float[Array, ""]]
    first: Callable[[Any, View], Verdict]
    solved: Callable[[Any, View], Verdict]
    first_step: float


class _Candidate(NamedTuple):
    """The best point so far; of two, the one of the higher level, then of the higher merit."""

    x: Float[Array, "*shape"]
    level: Int[Array, ""]  # 2: the target by the margin asked for, 1: by any, 0: another class
    merit: Float[Array, ""]  # minus the squared distance, or at level 0 the margin
    weight: Float[Array, ""]


class _State(NamedTuple):
    """All vectors of the search are flat, which suits the solver; `best.x` is like the image."""

    origin: Float[Array, " pixels"]
    start: Float[Array, " pixels"] | None  # None for the image itself
    target: Int[Array, ""]
    params: Any
    solver: SolverState
    best: _Candidate
    status: Int[Array, ""]
    spent: Int[Array, ""]  # evaluations in the current sub-problem
    goal: Float[Array, ""]
    resolution: Float[Array, ""]


def machine(
    method: Method,
    logits_fn: LogitsFn,
    *,
    box: Box | tuple,
    solver: Solver,
    confidence: float | None,
    max_evals: int,
    max_evals_per_solve: int = 50,
    start: Start | None = None,
) -> Machine:
    """The flat machine of one method.

    Args:
        method: The objective and its transitions.
        logits_fn: The model, of one example.
        box: `(lower, upper)`, each broadcast to the image.
        solver: The bounded minimiser.
        confidence: The margin asked for; None for the model's own resolution.
        max_evals: The most evaluations of the model.
        max_evals_per_solve: After so many a sub-problem is cut short.
        start: What finds the point to search from, once the image has been seen; None for that.
    """
    before = 0 if start is None else start.num_evals

    def bounds(like: Float[Array, "*shape"]) -> Box:
        return Box(*(_flatten(jnp.asarray(bound)) for bound in checks.box(box, like)))

    def size_of(
        flat: Float[Array, " pixels"], origin: Float[Array, " pixels"], like: Float[Array, "*shape"]
    ) -> Float[Array, ""]:
        return method.size((flat - origin).reshape(like.shape))

    def value_and_grad(
        params: Any,
        origin: Float[Array, " pixels"],
        target: Int[Array, ""],
        like: Float[Array, "*shape"],
    ):
        def objective(flat):
            logits = logits_fn(_image(flat, like)).astype(origin.dtype)
            return size_of(flat, origin, like) + method.other(params, logits, target), logits

        return jax.value_and_grad(objective, has_aux=True)

    def init(x: Float[Array, "*shape"], target: Int[Array, ""]) -> _State:
        allowed, logits = bounds(x), checks.logits(logits_fn, x)
        status = admission(x, target, logits.shape[0], allowed)
        origin = _flatten(jnp.where(jnp.isfinite(x), x, 0))
        target = jnp.clip(target, 0, logits.shape[0] - 1)
        zero = jnp.zeros((), origin.dtype)
        params = method.init(
            jax.ShapeDtypeStruct(x.shape, origin.dtype),
            jax.ShapeDtypeStruct(logits.shape, origin.dtype),
        )
        nearest = jnp.where(status == Status.EMPTY_BOX, origin, jnp.clip(origin, *allowed))
        return _State(
            origin=origin,
            start=None
            if start is None
            else start.find(lambda flat: logits_fn(_image(flat, x)), origin, target, allowed),
            target=target,
            params=params,
            solver=solver.init(
                value_and_grad(params, origin, target, x), origin, allowed, method.first_step
            ),
            best=_Candidate(_image(nearest, x), jnp.int32(0), zero - jnp.inf, zero),
            status=status,
            spent=jnp.int32(0),
            goal=zero,
            resolution=zero,
        )

    def step(state: _State) -> _State:
        first = state.solver.num_evals == 0
        running = state.status == Status.RUNNING
        solver_state = solver.step(
            value_and_grad(state.params, state.origin, state.target, state.best.x),
            state.solver,
            bounds(state.best.x),
        )
        view = look(state, solver_state, first)
        best = _better(state.best, candidate(state, solver_state, view, first), running)

        spent = state.spent + 1
        short = method.tolerance(state.params) * jnp.linalg.norm(view.size_grad)
        solved = ~first & (
            (view.error <= short)
            | (solver_state.status != SolverStatus.RUNNING)
            | (spent >= max_evals_per_solve)
        )
        changed = first | solved
        verdict = _where(first, method.first(state.params, view), method.solved(state.params, view))
        status = jnp.select(
            [
                first & (solver_state.status == SolverStatus.NONFINITE),
                first & (view.reached | ((best.level > 0) & (confidence is None))),
                changed & verdict.finished,
                changed & verdict.exhausted,
                solver_state.num_evals + before >= max_evals,
            ],
            [
                jnp.int32(Status.NONFINITE),
                jnp.int32(Status.ALREADY_TARGET),
                jnp.int32(Status.CONVERGED),
                jnp.where(best.level > 0, Status.STALLED, Status.NOT_FOUND).astype(jnp.int32),
                jnp.int32(Status.BUDGET),
            ],
            jnp.int32(Status.RUNNING),
        )
        # The objective at the same point under the new parameters.
        x, known = _onward(state, solver_state, verdict, first & running)
        value = view.size + method.other(verdict.params, view.logits, state.target)
        grad = view.size_grad + verdict.ratio * (view.grad - view.size_grad)
        return state._replace(
            params=_where(changed, verdict.params, state.params),
            solver=solver_state._replace(
                x=x,
                num_evals=jnp.where(running, solver_state.num_evals, state.solver.num_evals),
                value=jnp.where(changed, jnp.where(known, value, jnp.inf), solver_state.value),
                grad=jnp.where(changed, jnp.where(known, grad, 0), solver_state.grad),
                evaluated=jnp.where(changed, known, solver_state.evaluated),
            ),
            best=best,
            status=jnp.where(running, status, state.status),
            spent=jnp.where(changed, 0, spent),
            goal=view.goal,
            resolution=view.resolution,
        )

    def look(state: _State, solver_state: SolverState, first: Bool[Array, ""]) -> View:
        logits, like = solver_state.aux, state.best.x
        dtype = jax.eval_shape(logits_fn, like).dtype
        resolution = jnp.where(first, _resolution(logits, dtype), state.resolution)
        goal = jnp.where(first, resolution if confidence is None else confidence, state.goal)
        margin = metrics.margin(logits, state.target)
        size, size_grad = jax.value_and_grad(size_of)(solver_state.x, state.origin, like)
        return View(
            size=size,
            size_grad=size_grad,
            start_size=jnp.zeros_like(size)
            if state.start is None
            else size_of(state.start, state.origin, like),
            shape=like.shape,
            logits=logits,
            target=state.target,
            margin=margin,
            goal=goal,
            resolution=resolution,
            value=solver_state.value,
            grad=solver_state.grad,
            error=solver_state.error,
            reached=(jnp.argmax(logits) == state.target) & (margin >= goal),
        )

    def candidate(
        state: _State, solver_state: SolverState, view: View, first: Bool[Array, ""]
    ) -> _Candidate:
        x_adv = _image(solver_state.x, state.best.x)
        predicted = jnp.argmax(view.logits) == view.target
        distance = losses.squared_l2(_flatten(x_adv) - state.origin)
        return _Candidate(
            x=x_adv,
            level=predicted.astype(jnp.int32) + view.reached,
            merit=jnp.where(predicted, -distance, view.margin),
            weight=jnp.where(first, 0, method.weight(state.params, view)),
        )

    def done(state: _State) -> Bool[Array, ""]:
        return state.status != Status.RUNNING

    def result(state: _State) -> AttackResult:
        x_adv = state.best.x
        logits = logits_fn(x_adv)
        prediction = jnp.argmax(logits).astype(jnp.int32)
        untried = jnp.isin(
            state.status,
            jnp.array([Status.NONFINITE, Status.INVALID_TARGET, Status.EMPTY_BOX]),
        )
        success = ~untried & (prediction == state.target) & jnp.all(~jnp.isnan(logits))
        ended_well = (state.status == Status.CONVERGED) | (state.status == Status.STALLED)
        return AttackResult(
            x_adv=x_adv,
            success=success,
            distortion=metrics.distortion(state.origin, _flatten(x_adv)),
            weight=state.best.weight,
            prediction=prediction,
            status=jnp.where(ended_well & ~success, Status.NOT_FOUND, state.status),
            num_evals=state.solver.num_evals + jnp.where(untried, 0, before),
        )

    return Machine(init, step, done, result)


def run(
    make_machine: Callable[[LogitsFn, Box], Machine],
    logits_fn: LogitsFn,
    x: Float[Array, "*shape"],
    target: Int[Array, ""] | int,
    box: Box | tuple,
) -> AttackResult:
    """Check the arguments, make them constants to autodiff, and run a machine to its end."""
    x = checks.floating("x", x)
    target = checks.class_index("target", target)
    checks.logits(logits_fn, x)
    logits_fn, x, bounds = constant(logits_fn, x, checks.box(box, x))
    attack = make_machine(logits_fn, bounds)
    end = jax.lax.while_loop(lambda s: ~attack.done(s), attack.step, attack.init(x, target))
    return attack.result(end)


def admission(
    x: Float[Array, "*shape"], label: Int[Array, ""], classes: int, box: Box
) -> Int[Array, ""]:
    """`RUNNING`, or the `Status` of data that no attack can begin with."""
    lower, upper = map(jnp.asarray, box)
    return jnp.select(
        [
            ~jnp.all((lower <= upper) & (lower < jnp.inf) & (upper > -jnp.inf)),
            ~jnp.all(jnp.isfinite(x)),
            (label < 0) | (label >= classes),
        ],
        [
            jnp.int32(Status.EMPTY_BOX),
            jnp.int32(Status.NONFINITE),
            jnp.int32(Status.INVALID_TARGET),
        ],
        jnp.int32(Status.RUNNING),
    )


def constant(
    logits_fn: LogitsFn, x: Float[Array, "*shape"], box: Box
) -> tuple[LogitsFn, Float[Array, "*shape"], Box]:
    """The same arguments without gradients: `jax.grad` of a loss around an attack sees through it.

    What `logits_fn` closes over (parameters under differentiation) is hoisted out of it, since a
    `while_loop` has no reverse mode.
    """
    converted, closed_over = jax.closure_convert(logits_fn, x)
    closed_over, x, box = jax.lax.stop_gradient((closed_over, x, box))
    return lambda example: converted(example, *closed_over), x, box


def _resolution(logits: Float[Array, " classes"], dtype: Any) -> Float[Array, ""]:
    """The smallest difference of logits that counts, from those of the clean image."""
    share = max(_RESOLUTION, 4 * float(jnp.finfo(dtype).eps))
    finite = jnp.isfinite(logits)  # a masked class may stand at minus infinity
    spread = jnp.max(logits, initial=-jnp.inf, where=finite) - jnp.min(
        logits, initial=jnp.inf, where=finite
    )
    return share * jnp.maximum(spread, 0)


def _flatten(x: Float[Array, "*shape"]) -> Float[Array, " pixels"]:
    # Half-precision images are optimised in float32 and rounded before the model sees them.
    return jnp.ravel(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _image(flat: Float[Array, " pixels"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return flat.reshape(like.shape).astype(like.dtype)


def _onward(
    state: _State, solver_state: SolverState, verdict: Verdict, at_image: Bool[Array, ""]
) -> tuple[Float[Array, " pixels"], Bool[Array, ""]]:
    """Where the search goes on, and whether the gradient there is known."""
    known = jnp.isfinite(verdict.ratio)
    if state.start is None:
        return solver_state.x, known
    return jnp.where(at_image, state.start, solver_state.x), known & ~at_image


def _better(old: _Candidate, new: _Candidate, running: Bool[Array, ""]) -> _Candidate:
    higher = (new.level > old.level) | ((new.level == old.level) & (new.merit > old.merit))
    return _where(running & higher, new, old)


def _where(condition: Bool[Array, ""], new: T, old: T) -> T:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
