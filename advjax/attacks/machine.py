"""The search of a minimum-distortion attack: a sequence of bounded problems as one flat machine.

An attack solves a sequence of sub-problems, each a penalised form of the paper's problem (1). Other
implementations write that as loops around a solver: over c, over multipliers, over iterations, over
a line search. Here each step makes one evaluation of the model, and what the loops would do are
transitions that change the objective between two steps. Under `jax.vmap` nested loops cost the
slowest image of every inner loop; this costs the evaluations of the slowest image once.

Read `Search.step` from top to bottom: evaluate, look, keep the best, decide, go on.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from advjax import checks, metrics
from advjax.attacks import precision
from advjax.attacks.attack import Attack
from advjax.attacks.ddn import Start
from advjax.attacks.result import AttackResult, Status, admission, first_that_holds, is_untried
from advjax.solvers import Solver, SolverState
from advjax.solvers import Status as SolverStatus
from advjax.solvers.base import ValueAndGrad
from advjax.types import Box, LogitsFn

T = TypeVar("T")

_OUT_OF_REACH = 1e3  # diameters of the box: a slope that needs as many leads nowhere


class View(NamedTuple):
    """What a formulation sees of the search after a step; all vectors are flat."""

    shape: tuple[int, ...]
    """That of the image."""
    target: Int[Array, ""]
    goal: Float[Array, ""]
    """The margin that is asked for."""
    resolution: Float[Array, ""]
    """The smallest difference of logits that counts."""
    logits: Float[Array, " classes"]
    size: Float[Array, ""]
    """The formulation's measure of the perturbation r at the solver's current point."""
    size_grad: Float[Array, " pixels"]
    loss: Float[Array, ""]
    """The rest of the objective there."""
    loss_grad: Float[Array, " pixels"]
    error: Float[Array, ""]
    """The length of the projected gradient of the objective."""
    start_size: Float[Array, ""]
    """The measure at the initial point of the search, 0 for the image itself."""

    @property
    def margin(self) -> Float[Array, ""]:
        """The target's logit less the largest other one."""
        return metrics.margin(self.logits, self.target)

    @property
    def reached(self) -> Bool[Array, ""]:
        """Whether this point is adversarial, by the margin that is asked for."""
        predicted = jnp.argmax(self.logits) == self.target
        return predicted & (self.margin >= self.goal)


class Verdict(NamedTuple):
    """What a formulation decides after a step."""

    params: Any
    """The parameters of the objective from now on."""
    factor: Float[Array, ""]
    """Factor by which the new parameters scale the gradient of the loss term; `inf` forces a
    re-evaluation."""
    finished: Bool[Array, ""]
    """Whether the search has converged."""
    exhausted: Bool[Array, ""]
    """Whether the search should end without having converged."""


@runtime_checkable
class Formulation(Protocol):
    """A penalised form of problem (1), `size(r) + loss(logits)`, and how its parameters change.

    A frozen dataclass of options, compared by value.
    """

    @property
    def first_step(self) -> float:
        """The solver's first step in multiples of the gradient: the inverse of the curvature."""

    def init(self, r: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct) -> Any:
        """Return the initial parameters, from shapes and dtypes."""

    def size(self, r: Float[Array, "*shape"]) -> Float[Array, ""]:
        """The measure of the perturbation, by which one candidate is nearer than another."""

    def loss(
        self, params: Any, logits: Float[Array, " classes"], target: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The rest of the objective."""

    def tolerance(self, params: Any) -> Float[Array, ""]:
        """How short the projected gradient of a solved sub-problem is, beside that of `size`."""

    def multiplier(self, params: Any, view: View) -> Float[Array, ""]:
        """The weight of the loss that the result reports."""

    def first(self, params: Any, view: View) -> Verdict:
        """Set the parameters by the evaluation of the clean image under the initial ones."""

    def solved(self, params: Any, view: View) -> Verdict:
        """Choose the next parameters after a sub-problem has been solved."""


class _Candidate(NamedTuple):
    """The best point so far: of two the one of the higher level, then of the higher merit."""

    x: Float[Array, "*shape"]
    level: Int[Array, ""]  # 2: the target by the margin asked for, 1: by any, 0: another class
    merit: Float[Array, ""]  # minus the size of the perturbation, or at level 0 the margin
    multiplier: Float[Array, ""]


class _State(NamedTuple):
    """The search between two steps; its vectors are flat but for `best.x`."""

    origin: Float[Array, " pixels"]
    start: Float[Array, " pixels"] | None  # None for the image itself
    target: Int[Array, ""]
    params: Any
    solver: SolverState
    best: _Candidate
    status: Int[Array, ""]
    vanishing: Bool[Array, ""]  # the gradient at the clean image
    spent: Int[Array, ""]  # evaluations in the current sub-problem
    goal: Float[Array, ""]
    resolution: Float[Array, ""]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Search:
    """The method of an attack that solves a sequence of penalised problems.

    Args:
        formulation: The objective and its transitions.
        solver: The bounded minimiser.
        confidence: The margin asked for; None for the model's own resolution.
        max_evals: The most evaluations of the model.
        max_evals_per_solve: After so many a sub-problem is cut short.
        start: What finds the initial point, once the image has been seen; None for the image.
    """

    formulation: Formulation
    solver: Solver
    confidence: float | None
    max_evals: int
    max_evals_per_solve: int = 50
    start: Start | None = None

    def init(self, attack: Attack, x: Float[Array, "*shape"], target: Int[Array, ""]) -> _State:
        """Return the state before the evaluation of the clean image."""
        target = checks.class_index("target", target)
        box, logits = _flat_box(attack, x), checks.logits(attack.logits_fn, x)
        status = admission(x, target, logits.shape[0], checks.box(attack.box, x))
        origin = _flatten(jnp.where(jnp.isfinite(x), x, 0))
        target = jnp.clip(target, 0, logits.shape[0] - 1)
        params = self.formulation.init(
            jax.ShapeDtypeStruct(x.shape, origin.dtype),
            jax.ShapeDtypeStruct(logits.shape, origin.dtype),
        )
        nearest = jnp.where(status == Status.EMPTY_BOX, origin, jnp.clip(origin, *box))
        start = None
        if self.start is not None:
            start = self.start.find(_on_flat(attack.logits_fn, x), origin, target, box)
        objective = self._value_and_grad(attack, params, origin, target, x)
        zero = jnp.zeros((), origin.dtype)
        return _State(
            origin=origin,
            start=start,
            target=target,
            params=params,
            solver=self.solver.init(objective, origin, box, self.formulation.first_step),
            best=_Candidate(_image(nearest, x), jnp.int32(0), zero - jnp.inf, zero),
            status=status,
            vanishing=jnp.bool_(False),
            spent=jnp.int32(0),
            goal=zero,
            resolution=zero,
        )

    def step(self, attack: Attack, state: _State) -> _State:
        """Evaluate, look, keep the best, decide, go on."""
        first = state.solver.num_evals == 0
        like = state.best.x
        box = _flat_box(attack, like)
        objective = self._value_and_grad(attack, state.params, state.origin, state.target, like)
        solver_state = self.solver.step(objective, state.solver, box)
        view = self._look(attack, state, solver_state, first)
        best = self._keep_best(state, solver_state, view, first)

        spent = state.spent + 1
        short = self.formulation.tolerance(state.params) * jnp.linalg.norm(view.size_grad)
        solved = ~first & (
            (view.error <= short)
            | (solver_state.status != SolverStatus.RUNNING)
            | (spent >= self.max_evals_per_solve)
        )
        changed = first | solved
        verdict = _where(
            first,
            self.formulation.first(state.params, view),
            self.formulation.solved(state.params, view),
        )
        leads_nowhere, is_zero = _vanishes(view, box)
        vanishing = jnp.where(first, leads_nowhere, state.vanishing)
        num_evals = solver_state.num_evals + self._num_evals_before
        status = first_that_holds(
            (first & (solver_state.status == SolverStatus.NONFINITE), Status.NONFINITE),
            (
                first & (view.reached | ((best.level > 0) & (self.confidence is None))),
                Status.ALREADY_TARGET,
            ),
            (first & is_zero, Status.VANISHING_GRADIENT),
            (changed & verdict.finished, Status.CONVERGED),
            (changed & verdict.exhausted & (best.level > 0), Status.STALLED),
            (changed & verdict.exhausted, Status.NOT_FOUND),
            (num_evals >= self.max_evals, Status.BUDGET),
        )
        running = state.status == Status.RUNNING
        return state._replace(
            params=_where(changed, verdict.params, state.params),
            solver=self._go_on(state, solver_state, view, verdict, first, changed),
            best=best,
            status=jnp.where(running, status, state.status),
            vanishing=vanishing,
            spent=jnp.where(changed, 0, spent),
            goal=view.goal,
            resolution=view.resolution,
        )

    def done(self, attack: Attack, state: _State) -> Bool[Array, ""]:
        """Whether the search has ended."""
        return state.status != Status.RUNNING

    def result(self, attack: Attack, state: _State) -> AttackResult:
        """Return the best candidate, with its prediction computed once more."""
        x_adv = state.best.x
        logits = attack.logits_fn(x_adv)
        prediction = jnp.argmax(logits).astype(jnp.int32)
        untried = is_untried(state.status)
        success = ~untried & (prediction == state.target) & jnp.all(~jnp.isnan(logits))
        settled = (state.status == Status.CONVERGED) | (state.status == Status.STALLED)
        status = jnp.where(settled & ~success, Status.NOT_FOUND, state.status)
        settled = settled | (status == Status.NOT_FOUND)
        return AttackResult(
            x_adv=x_adv,
            success=success,
            distortion=metrics.distortion(state.origin, _flatten(x_adv)),
            multiplier=state.best.multiplier,
            prediction=prediction,
            status=jnp.where(settled & state.vanishing, Status.VANISHING_GRADIENT, status),
            num_evals=state.solver.num_evals + jnp.where(untried, 0, self._num_evals_before),
        )

    @property
    def _num_evals_before(self) -> int:
        return 0 if self.start is None else self.start.num_evals

    def _size(
        self, flat: Float[Array, " pixels"], origin: Float[Array, " pixels"], shape: tuple[int, ...]
    ) -> Float[Array, ""]:
        return self.formulation.size((flat - origin).reshape(shape))

    def _value_and_grad(
        self,
        attack: Attack,
        params: Any,
        origin: Float[Array, " pixels"],
        target: Int[Array, ""],
        like: Float[Array, "*shape"],
    ) -> ValueAndGrad:
        """The objective of the current sub-problem, with the logits beside its value."""
        logits_fn = _on_flat(attack.logits_fn, like)

        def objective(
            flat: Float[Array, " pixels"],
        ) -> tuple[Float[Array, ""], Float[Array, " classes"]]:
            logits = logits_fn(flat).astype(origin.dtype)
            loss = self.formulation.loss(params, logits, target)
            return self._size(flat, origin, like.shape) + loss, logits

        return jax.value_and_grad(objective, has_aux=True)

    def _look(
        self, attack: Attack, state: _State, solver_state: SolverState, first: Bool[Array, ""]
    ) -> View:
        logits, like = solver_state.aux, state.best.x
        dtype = jax.eval_shape(attack.logits_fn, like).dtype
        resolution = jnp.where(
            first, precision.resolution(logits, state.target, dtype), state.resolution
        )
        goal = resolution if self.confidence is None else self.confidence
        size, size_grad = jax.value_and_grad(self._size)(solver_state.x, state.origin, like.shape)
        start_size = jnp.zeros_like(size)
        if state.start is not None:
            start_size = self._size(state.start, state.origin, like.shape)
        return View(
            shape=like.shape,
            target=state.target,
            goal=jnp.where(first, goal, state.goal),
            resolution=resolution,
            logits=logits,
            size=size,
            size_grad=size_grad,
            loss=solver_state.value - size,
            loss_grad=solver_state.grad - size_grad,
            error=solver_state.error,
            start_size=start_size,
        )

    def _keep_best(
        self, state: _State, solver_state: SolverState, view: View, first: Bool[Array, ""]
    ) -> _Candidate:
        old, x_adv = state.best, _image(solver_state.x, state.best.x)
        predicted = jnp.argmax(view.logits) == view.target
        # Of the image as the model saw it, which is rounded where it is in half precision.
        size = self._size(_flatten(x_adv), state.origin, x_adv.shape)
        new = _Candidate(
            x=x_adv,
            level=predicted.astype(jnp.int32) + view.reached,
            merit=jnp.where(predicted, -size, view.margin),
            multiplier=jnp.where(first, 0, self.formulation.multiplier(state.params, view)),
        )
        better = (new.level > old.level) | ((new.level == old.level) & (new.merit > old.merit))
        return _where((state.status == Status.RUNNING) & better, new, old)

    def _go_on(
        self,
        state: _State,
        solver_state: SolverState,
        view: View,
        verdict: Verdict,
        first: Bool[Array, ""],
        changed: Bool[Array, ""],
    ) -> SolverState:
        """The solver's state under the new parameters; known without an evaluation if linear."""
        running = state.status == Status.RUNNING
        x, known = solver_state.x, jnp.isfinite(verdict.factor)
        if state.start is not None:
            x = jnp.where(first & running, state.start, x)
            known = known & ~(first & running)
        value = view.size + self.formulation.loss(verdict.params, view.logits, view.target)
        grad = view.size_grad + verdict.factor * view.loss_grad
        return solver_state._replace(
            x=x,
            num_evals=jnp.where(running, solver_state.num_evals, state.solver.num_evals),
            value=jnp.where(changed, jnp.where(known, value, jnp.inf), solver_state.value),
            grad=jnp.where(changed, jnp.where(known, grad, 0), solver_state.grad),
            evaluated=jnp.where(changed, known, solver_state.evaluated),
        )


def _vanishes(view: View, box: Box) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
    """Whether the slope of the loss leads nowhere in the box, and whether it is zero."""
    slope = jnp.linalg.norm(view.loss_grad)
    widths = jnp.broadcast_to(jnp.subtract(box.upper, box.lower), view.loss_grad.shape)
    diameter = jnp.linalg.norm(widths)
    return jnp.abs(view.loss) > _OUT_OF_REACH * diameter * slope, slope == 0


def _on_flat(logits_fn: LogitsFn, like: Float[Array, "*shape"]) -> LogitsFn:
    return lambda flat: logits_fn(_image(flat, like))


def _flat_box(attack: Attack, like: Float[Array, "*shape"]) -> Box:
    return Box(*(_flatten(jnp.asarray(bound)) for bound in checks.box(attack.box, like)))


def _flatten(x: Float[Array, "*shape"]) -> Float[Array, " pixels"]:
    # Half-precision images are optimised in float32 and rounded before the model sees them.
    return jnp.ravel(x).astype(jnp.promote_types(x.dtype, jnp.float32))


def _image(flat: Float[Array, " pixels"], like: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return flat.reshape(like.shape).astype(like.dtype)


def _where(condition: Bool[Array, ""], new: T, old: T) -> T:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
