"""The solvers against SciPy, closed forms, and textbook formulas, all in float64."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax import data, losses, models, solvers, training
from advjax.solvers import Status
from advjax.solvers.lbfgsb import _LARGE, _direction, _inner_products, _remember
from advjax.types import Box
from tests.problems import (
    PROBLEMS,
    assert_in_box,
    coefficients,
    gold,
    quadratic,
    rosenbrock,
    scipy_minimum,
)

SOLVERS = {"ours": solvers.lbfgsb, "jaxopt": solvers.jaxopt_lbfgsb}
both_solvers = pytest.mark.parametrize("make_solver", SOLVERS.values(), ids=SOLVERS)
both_precisions = pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])


# The minima that SciPy finds


@both_precisions
@pytest.mark.parametrize("name", PROBLEMS)
def test_our_solver_reaches_the_minimum_that_scipy_finds(name, x64):
    problem = PROBLEMS[name]
    with jax.enable_x64(x64):
        result = problem.solve(max_evals=3000)
    assert_in_box(result.x, problem.lower, problem.upper)
    tolerance = 1e-9 if x64 else (1e-4 if "ill" in name else 1e-7)
    assert problem.true_value(result.x) == pytest.approx(gold(name), rel=tolerance, abs=1e-10)
    rounds = not x64 or "ill" in name
    assert result.success or (rounds and result.status == Status.STALLED)


def test_a_separable_quadratic_ends_at_its_clipped_centre():
    problem = PROBLEMS["distance"]
    with jax.enable_x64(True):
        x = np.asarray(problem.solve().x)
    centre = problem.data[1]
    np.testing.assert_allclose(x, np.clip(centre, 0, 1), atol=1e-5)
    np.testing.assert_array_equal(x == 0, centre < 0)
    np.testing.assert_array_equal(x == 1, centre > 1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 1)])
def test_x_may_have_any_shape(shape):
    centre = np.linspace(-0.5, 1.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    result = solvers.minimize(lambda x: jnp.sum((x - centre) ** 2), jnp.full(shape, 0.5), box=Box())
    np.testing.assert_allclose(result.x, np.clip(centre, 0, 1), atol=1e-6)
    assert result.grad.shape == shape


@both_precisions
def test_vmap_over_objectives_starts_and_boxes_gives_what_a_loop_gives(x64):
    rng = np.random.default_rng(0)
    stacked = [np.stack(a) for a in zip(*[coefficients(seed=k)[:2] for k in range(4)], strict=True)]
    args = *stacked, rng.uniform(size=(4, 30)), -rng.uniform(size=(4, 30)), rng.uniform(size=(4, 1))

    def solve(matrix, slope, x0, lower, upper):
        return solvers.minimize(lambda x: quadratic(x, matrix, slope, 0), x0, box=(lower, upper))

    with jax.enable_x64(x64):
        args = [jnp.asarray(a) for a in args]
        batch = jax.jit(jax.vmap(solve))(*args)
        one_by_one = [jax.jit(solve)(*(a[k] for a in args)) for k in range(4)]
    for k, alone in enumerate(one_by_one):
        np.testing.assert_allclose(batch.value[k], alone.value, rtol=1e-12 if x64 else 3e-7)
        np.testing.assert_allclose(batch.x[k], alone.x, atol=1e-6 if x64 else 1e-3)
        if x64:  # in float32 the order of the sums, which vmap changes, moves the last step
            assert (batch.status[k], batch.num_evals[k]) == (alone.status, alone.num_evals)


# The attack's objective on a trained network


class Attacks(NamedTuple):
    objective: Callable  # of x, image, target, and c
    images: np.ndarray
    targets: np.ndarray
    c: np.ndarray
    minima: list  # as SciPy finds them


@pytest.fixture(scope="module")
def attacks():
    """The paper's objective on a trained network, for four images and three values of c."""
    images, labels, _ = data.load("mnist", "train", source="embedded")
    model = models.MLP((40, 40, 10))
    params = training.fit(
        jax.random.key(1),
        model.apply,
        model.init(jax.random.key(0), images[0]),
        images,
        labels,
        epochs=10,
    ).params

    def objective(x, image, target, c):
        return c * losses.squared_l2(x - image) + losses.cross_entropy(
            model.apply(params, x), target
        )

    which, c = (a.ravel() for a in np.meshgrid(range(4), np.float32([0.03, 0.3, 3.0])))
    images, targets = images[which], (labels[which] + 1 + which) % 10
    with jax.enable_x64(True):
        value_and_grad = jax.jit(jax.value_and_grad(objective))
        minima = [
            scipy_minimum(lambda x, rest=rest: value_and_grad(x, *rest), rest[0])
            for rest in zip(images, targets, c, strict=True)
        ]
    return Attacks(objective, images, targets, c, minima)


@both_precisions
def test_attacks_on_a_trained_network_reach_the_minima_that_scipy_finds(attacks, x64):
    def solve(image, target, c):
        return solvers.minimize(lambda x: attacks.objective(x, image, target, c), image, box=Box())

    with jax.enable_x64(x64):
        images = attacks.images.astype(jnp.zeros(()).dtype)
        result = jax.jit(jax.vmap(solve))(images, attacks.targets, attacks.c)
    assert_in_box(result.x, 0, 1)
    np.testing.assert_allclose(result.value, attacks.minima, rtol=1e-8 if x64 else 1e-6)
    assert max(result.num_evals) < 100


# The direction


def textbook_direction(x, grad, pairs, first_step):
    """Minus the dense inverse BFGS matrix of the free coordinates times the gradient.

    Nocedal and Wright, equations 6.17 and 7.20; the box is [0, 1], and pairs run from the oldest to
    the newest.
    """
    free = ~(((x <= 0) & (grad > 0)) | ((x >= 1) & (grad < 0)))
    eye = np.eye(free.sum())
    inverse = first_step * eye
    pairs = [(s[free], y[free]) for s, y in pairs]
    if pairs and pairs[-1][0] @ pairs[-1][1] > 0:
        s, y = pairs[-1]
        inverse = eye * (s @ y) / (y @ y)
    for s, y in pairs:
        if s @ y > 0:
            v = eye - np.outer(y, s) / (s @ y)
            inverse = v.T @ inverse @ v + np.outer(s, s) / (s @ y)
    direction = np.zeros_like(x)
    direction[free] = -inverse @ grad[free]
    outwards = ((x <= 0) & (direction < 0)) | ((x >= 1) & (direction > 0))
    return np.where(outwards, 0, direction)


def random_corner(rng, n):
    """A point, a third of it on either bound of [0, 1], and a gradient."""
    return rng.choice([0.0, 1.0, 0.25], n), rng.normal(size=n)


@pytest.mark.parametrize("memory", [1, 2, 5])
def test_the_direction_is_the_textbooks_at_every_fill_of_the_memory(memory):
    n, rng = 12, np.random.default_rng(memory)
    matrix = coefficients(n)[0]
    direction = jax.jit(_direction)
    with jax.enable_x64(True):
        history = solvers.lbfgsb(memory=memory).init(no_objective, jnp.zeros(n), Box(), 0.5).memory
        pairs = []
        for _ in range(3 * memory + 1):
            for _ in range(5):
                x, grad = random_corner(rng, n)
                expected = textbook_direction(x, grad, pairs[-memory:], 0.5)
                np.testing.assert_allclose(
                    direction(x, grad, history, Box()), expected, rtol=1e-9, atol=1e-12
                )
            pairs.append((step := rng.normal(size=n), matrix @ step))
            history = _remember(history, *pairs[-1], keep=True, forget=False)


@pytest.mark.parametrize("n", [30, _LARGE + 37])
def test_inner_products_are_those_over_the_free_coordinates_however_many(n):
    rng = np.random.default_rng(0)
    history, grad, free = rng.normal(size=(6, n)), rng.normal(size=n), rng.uniform(size=n) < 0.7
    with jax.enable_x64(True):
        found = jax.jit(_inner_products)(history, grad, free)
    expected = np.stack([*history[3:], grad])[:, free] @ history[:, free].T
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def no_objective(x):
    return (jnp.sum(x), ()), x


@pytest.mark.parametrize("curvature", [-1.0, 0.0])
def test_a_step_without_positive_curvature_is_not_remembered(curvature):
    history = solvers.lbfgsb().init(no_objective, jnp.zeros(3), Box()).memory
    step = jnp.array([1.0, 2.0, 3.0])
    after = _remember(history, step, curvature * step, keep=True, forget=False)
    assert not after.history.any()
    assert after.num_pairs == 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-12, 12))
def test_a_step_descends_inside_the_box_whatever_the_memory_holds(seed, exponent):
    n, rng = 6, np.random.default_rng(seed)
    x, grad = (a.astype(np.float32) for a in random_corner(rng, n))
    grad *= np.float32(10.0**exponent)
    steps, changes = 10.0 ** rng.uniform(-15, 15, (2, 3, 1)) * rng.normal(size=(2, 3, n))
    history = np.concatenate([steps, changes]).astype(np.float32)
    state = step_on_a_slope()(x, grad, history, rng.integers(0, 9))
    assert np.all((state.x >= 0) & (state.x <= 1))
    stationary = ((x == 0) & (grad >= 0)) | ((x == 1) & (grad <= 0))
    moved = np.asarray(state.x, np.float64) - x
    assert moved @ grad < 0 or stationary.all() or abs(moved).max() == 0
    assert not moved[stationary].any()


@functools.cache
def step_on_a_slope():
    """One step on `grad @ x`, with any memory."""
    solver = solvers.lbfgsb(memory=3)

    @jax.jit
    def step(x, grad, history, num_pairs):
        def value_and_grad(x):
            return (grad @ x, ()), grad

        state = solver.init(value_and_grad, x, Box())
        memory = state.memory._replace(history=history, num_pairs=num_pairs)
        state = state._replace(
            x=x, value=grad @ x, grad=grad, evaluated=jnp.bool_(True), memory=memory
        )
        return solver.step(value_and_grad, state, Box())

    return step


# Safety


@functools.cache
def fenced_solve(name):
    """Minimise x'Ax/2 - b'x, which is NaN where c'x > 1, within 60 evaluations."""

    def solve(matrix, slope, fence, x0, box):
        def fun(x):
            return jnp.where(fence @ x > 1, jnp.nan, quadratic(x, matrix, slope, 0.0))

        return solvers.minimize(fun, x0, box=box, solver=SOLVERS[name](), max_evals=60)

    return jax.jit(solve)


@pytest.mark.parametrize("name", SOLVERS)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    convex=st.booleans(),
    fenced=st.booleans(),
    log_width=st.floats(-4, 1),
    exponent=st.integers(-6, 6),
)
def test_no_result_leaves_the_box_or_is_nan_or_above_the_start(
    *, name, seed, convex, fenced, log_width, exponent
):
    n, rng = 5, np.random.default_rng(seed)
    matrix = rng.normal(size=(n, n))
    matrix = (matrix @ matrix.T if convex else matrix + matrix.T) * 10.0**exponent
    slope = rng.normal(size=n) * 10.0**exponent
    fence = rng.normal(size=n) * fenced
    lower = rng.normal(size=n)
    upper = lower + 10.0**log_width * rng.choice([0.0, 1.0, np.inf], n, p=[0.2, 0.7, 0.1])
    x0 = lower + rng.normal(size=n)
    matrix, slope, fence, x0, lower, upper = (
        a.astype(np.float32) for a in (matrix, slope, fence, x0, lower, upper)
    )
    result = fenced_solve(name)(matrix, slope, fence, x0, Box(lower, upper))
    assert_in_box(result.x, lower, upper)
    assert np.isfinite(result.x).all()
    assert np.isfinite(result.grad).all()
    start = np.clip(x0, lower, upper)
    if result.status == Status.NONFINITE:
        np.testing.assert_array_equal(result.x, start)
        assert np.isinf(result.value)
    else:
        before = quadratic(start.astype(float), matrix, slope, 0.0)
        scale = np.abs(matrix).sum() * np.square(result.x, dtype=float).max() + np.abs(slope).sum()
        assert result.value <= before + 1e-4 * scale
        assert fence @ np.asarray(result.x) <= 1 + 1e-4
        assert result.status != Status.RUNNING


@both_solvers
def test_nothing_outside_the_box_is_evaluated_and_every_evaluation_is_counted(make_solver):
    evaluated = []

    def value_and_grad(x):
        jax.debug.callback(lambda x: evaluated.append(np.asarray(x)), x)
        return (rosenbrock(x), ()), jax.grad(rosenbrock)(x)

    solver, box = make_solver(), Box(-2.0, 0.5)
    step = jax.jit(lambda state: solver.step(value_and_grad, state, box))
    state = solver.init(value_and_grad, jnp.full(4, -1.0), box)
    steps = 0
    while state.error > 1e-3:
        state = step(state)
        steps += 1
        jax.effects_barrier()
        assert len(evaluated) == state.num_evals
    assert_in_box(evaluated, -2, 0.5)
    assert state.status == Status.RUNNING
    assert make_solver is not solvers.lbfgsb or steps == state.num_evals
