"""The guarded jaxopt against SciPy, and the defects of jaxopt for which the guards are there."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import solvers
from advjax.solvers import Status
from advjax.types import Box
from tests.problems import PROBLEMS, assert_in_box, gold

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
    import jaxopt

MENDED = "jaxopt no longer has this defect: the guard can go"


@pytest.mark.parametrize(
    "name",
    [
        "quadratic with fixed variables",
        "Rosenbrock-10 bounded above",
        "log-sum-exp",
    ],
)
def test_guarded_jaxopt_reaches_the_minimum_that_scipy_finds(name):
    problem = PROBLEMS[name]
    with jax.enable_x64(True):
        result = problem.solve(solver=solvers.jaxopt_lbfgsb())
    assert result.success
    assert_in_box(result.x, problem.lower, problem.upper)
    assert result.value == pytest.approx(gold(name), rel=1e-9, abs=1e-9)


def test_its_value_is_that_of_the_point_it_returns():
    problem = PROBLEMS["quadratic with fixed variables"]
    with jax.enable_x64(True):
        result = problem.solve(solver=solvers.jaxopt_lbfgsb(slack=1e-3))
    assert result.value == pytest.approx(problem.true_value(result.x), rel=1e-12)


def test_a_negative_slack_is_refused():
    with pytest.raises(ValueError, match="slack: -1, expected a finite number of at least 0"):
        solvers.jaxopt_lbfgsb(slack=-1)


def run_raw(fun, x0, steps, **options):
    """The points and values of jaxopt's own L-BFGS-B in [0, 1]."""
    method = jaxopt.LBFGSB(fun=fun, **options)
    bounds = jnp.zeros_like(x0), jnp.ones_like(x0)

    def step(carry, _):
        carry = method.update(*carry, bounds)
        return tuple(carry), (carry.params, carry.state.value)

    @jax.jit
    def run():
        return jax.lax.scan(step, (x0, method.init_state(x0, bounds)), length=steps)[1]

    points, values = run()
    return np.asarray(points), np.asarray([fun(x0), *values])


# A dead pixel at its bound: the gradient there is no more than a rounding error


def dead_pixel(x):
    return jnp.sum(jnp.array([1.0, 4.5]) * (x[:2] - jnp.array([1.0, 0.7])) ** 2) + 1e-30 * x[2]


DEAD_PIXEL_START = np.array([0.0, 0.1, 0.0], np.float32)


def test_jaxopt_leaves_the_box_and_misses_the_minimum_over_a_dead_pixel():
    points, values = run_raw(dead_pixel, jnp.asarray(DEAD_PIXEL_START), steps=30)
    assert points.max() > 1.1 or points.min() < -0.1, MENDED
    assert values[-1] > 0.1, MENDED


def test_guarded_jaxopt_finds_the_minimum_beside_a_dead_pixel():
    solver = solvers.jaxopt_lbfgsb()
    result = solvers.minimize(dead_pixel, DEAD_PIXEL_START, box=Box(), solver=solver)
    assert_in_box(result.x, 0, 1)
    np.testing.assert_allclose(result.x, [1, 0.7, 0], atol=1e-5)
    assert result.num_evals < 30


# A memory that has wrapped


@jax.jit
def model_step(pairs, num_updates):
    """Jaxopt's whole step from 0, without bounds, with the gradient change of the newest pair."""
    method = jaxopt.LBFGSB(fun=lambda x: jnp.sum(x**2), history_size=len(pairs), stepsize=1.0)
    bounds = jnp.full(3, -jnp.inf), jnp.full(3, jnp.inf)
    hessian = np.diag([1.0, 2.0, 5.0])
    state = method.init_state(jnp.zeros(3), bounds)._replace(
        s_history=jnp.stack(pairs),
        y_history=jnp.stack(pairs) @ hessian,
        grad=NEWEST @ hessian,
        num_updates=num_updates,
        theta=jnp.float32(3),
    )
    return method.update(jnp.zeros(3), state, bounds).params


OLD, NEWEST = np.array([[1, 0, 1], [0, 1, 1]], np.float32)


def test_jaxopt_forgets_the_newest_curvature_once_its_memory_has_wrapped():
    # The model's Hessian takes each step to its change of gradient, the newest pair's exactly.
    np.testing.assert_allclose(model_step([OLD, NEWEST], num_updates=2), -NEWEST, atol=1e-6)
    assert np.abs(model_step([NEWEST, OLD], num_updates=3) + NEWEST).max() > 0.3, MENDED


def test_guarded_jaxopt_keeps_its_memory_from_the_oldest_to_the_newest():
    problem = PROBLEMS["distance"]

    def value_and_grad(x):
        return (problem.fun(x), ()), jax.grad(problem.fun)(x)

    solver, box = solvers.jaxopt_lbfgsb(memory=3), Box(-9.0, 9.0)
    step = jax.jit(lambda state: solver.step(value_and_grad, state, box))
    state = solver.init(value_and_grad, jnp.asarray(problem.x0, jnp.float32), box)
    points = []
    for count in range(9):
        state = step(state)
        points.append(np.asarray(state.x))
        kept = min(count, 3)
        np.testing.assert_allclose(
            state.memory.s_history[:kept], np.diff(points, axis=0)[count - kept :], atol=1e-6
        )


# A steep objective


def steep(x):
    return 5e3 * jnp.sum((x - 1e-3) ** 2)


def test_jaxopt_climbs_where_its_backtracking_fails():
    _, values = run_raw(steep, jnp.array([5e-4]), steps=3, linesearch="backtracking")
    assert values[-1] > 4 * values[0], MENDED


def test_guarded_jaxopt_descends_a_steep_objective():
    start = np.array([5e-4], np.float32)
    result = solvers.minimize(steep, start, box=Box(), solver=solvers.jaxopt_lbfgsb())
    # The nearest float32 to the minimum has a gradient of about the tolerance.
    assert result.status in (Status.CONVERGED, Status.STALLED)
    np.testing.assert_allclose(result.x, 1e-3, atol=1e-6)
