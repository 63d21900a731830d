"""The entry point, how a minimisation ends, and how it goes on."""

import functools
import itertools
import re
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import solvers
from advjax.solvers import Status
from advjax.types import Box
from tests.problems import rosenbrock

SOLVERS = {"ours": solvers.lbfgsb, "jaxopt": solvers.jaxopt_lbfgsb}
both_solvers = pytest.mark.parametrize("make_solver", SOLVERS.values(), ids=SOLVERS)


@functools.cache
def compiled_wall(make_solver):
    def fun(x):
        return jnp.sum(x - 0.5 * jnp.log(x))

    return jax.jit(lambda x0, box: solvers.minimize(fun, x0, box=box, solver=make_solver()))


def wall(make_solver, x0, lower, upper):
    """Minimise x - log(x)/2 of each of two coordinates: at 1/2; not finite from 0 downwards."""
    x0, lower, upper = (jnp.full(2, np.asarray(a), jnp.float32) for a in (x0, lower, upper))
    return compiled_wall(make_solver)(x0, Box(lower, upper))


@both_solvers
def test_where_the_projected_gradient_vanishes_it_has_converged(make_solver):
    result = wall(make_solver, [0.2, 0.9], 0.1, [1.0, 0.4])
    # jaxopt's does not see that rounding keeps it from the tolerance, and goes on to the budget.
    assert result.success or make_solver is solvers.jaxopt_lbfgsb
    assert result.error <= 1e-5
    np.testing.assert_allclose(result.x, [0.5, 0.4], atol=1e-5)
    np.testing.assert_allclose(result.grad, 1 - 0.5 / result.x, atol=1e-6)
    np.testing.assert_allclose(result.error, np.abs(result.grad[0]), atol=1e-7)


@both_solvers
def test_a_region_without_finite_values_is_walked_around(make_solver):
    result = wall(make_solver, [0.01, 0.9], -1.0, 1.0)
    assert result.success
    np.testing.assert_allclose(result.x, 0.5, atol=1e-4)


@both_solvers
@pytest.mark.parametrize(
    "fun",
    [lambda x: jnp.sum(jnp.log(x)), lambda x: jnp.sum(x + 0 * jnp.sqrt(x))],
    ids=["value", "gradient"],
)
def test_a_bound_without_finite_value_or_gradient_is_not_returned(make_solver, fun):
    x0 = jnp.array([0.1, 0.9])
    result = solvers.minimize(fun, x0, box=Box(), solver=make_solver(), max_evals=50)
    assert result.value <= fun(jnp.array([0.1, 0.9]))
    assert np.isfinite(result.value)
    assert np.isfinite(result.grad).all()


@both_solvers
def test_a_start_without_a_finite_value_is_told_and_returned(make_solver):
    result = wall(make_solver, [0.5, -2.0], -1.0, 1.0)
    assert (result.status, result.num_evals) == (Status.NONFINITE, 1)
    np.testing.assert_array_equal(result.x, [0.5, -1.0])


@both_solvers
@pytest.mark.parametrize(("lower", "upper"), [(0.5, 0.4), ([0.0, 1.0], [1.0, 0.0]), (np.nan, 1.0)])
def test_an_empty_box_is_told_and_nothing_evaluated(make_solver, lower, upper):
    result = wall(make_solver, [0.1, 2.0], lower, upper)
    assert (result.status, result.num_evals) == (Status.EMPTY_BOX, 0)
    np.testing.assert_array_equal(result.x, np.float32([0.1, 2.0]))


@both_solvers
def test_a_box_of_one_point_needs_one_evaluation(make_solver):
    result = wall(make_solver, [0.1, 2.0], 0.25, 0.25)
    assert (result.status, result.num_evals) == (Status.CONVERGED, 1)
    np.testing.assert_array_equal(result.x, [0.25, 0.25])


@both_solvers
def test_a_tolerance_beyond_rounding_ends_where_rounding_hides_any_decrease(make_solver):
    def fun(x):
        return 100.0 + jnp.sum(jnp.cosh(x - 0.3))

    result = solvers.minimize(fun, jnp.ones(5), solver=make_solver(), tol=0, max_evals=500)
    ended = (Status.STALLED, Status.SMALL_DECREASE)
    assert int(result.status) in ended or result.error == 0
    assert result.num_evals < 100
    np.testing.assert_allclose(result.x, 0.3, atol=0.02)


def test_a_kink_ends_as_stalled():
    result = solvers.minimize(lambda x: jnp.sum(jnp.abs(x - 0.3)), jnp.array([0.1, 0.9]))
    assert result.status == Status.STALLED
    np.testing.assert_allclose(result.x, 0.3, atol=1e-4)


@both_solvers
def test_one_evaluation_buys_the_value_of_the_start(make_solver):
    x0 = jnp.array([-3.0, 0.5])
    result = solvers.minimize(jnp.sum, x0, box=Box(), solver=make_solver(), max_evals=1)
    assert (result.status, result.num_evals) == (Status.BUDGET, 1)
    np.testing.assert_array_equal(result.x, [0, 0.5])
    assert result.value == 0.5


def test_a_small_gradient_at_a_large_x_is_not_rounded_away():
    result = solvers.minimize(
        lambda x: 1e-8 * jnp.sum((x - 2e4) ** 2), jnp.full(2, 1e4), box=(-np.inf, np.inf)
    )
    np.testing.assert_allclose(result.x, 2e4, rtol=1e-5)


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("objective", [lambda x: jnp.sum((x - 0.3) ** 2), rosenbrock])
def test_no_result_depends_on_the_scale_of_the_objective(objective, x64):
    box = (-np.inf, np.inf) if objective is rosenbrock else (-np.inf, 0.7)

    @jax.jit
    def solve(scale, x0):
        return solvers.minimize(lambda x: scale * objective(x), x0, box=box)

    with jax.enable_x64(x64):
        x0 = jnp.array([-0.5, 0.7, 2.0])
        plain = solve(1.0, x0)
        assert plain.status == Status.CONVERGED
        for exponent in (-20, -8, 12, 18, 20):
            result = solve(10.0**exponent, x0)
            assert result.status == plain.status
            assert abs(int(result.num_evals) - int(plain.num_evals)) <= (1 if x64 else 12)
            np.testing.assert_allclose(result.x, plain.x, atol=1e-9 if x64 else 1e-3)


def test_rejections_do_not_end_at_the_start():
    """A first step of the gradient's length is 1e20 times too long, and fifteen cuts too few."""

    def fun(x):
        return jnp.sum(jnp.expm1(jnp.abs(1e12 * (x - 0.3)) ** 2 / 1e24) ** 2) * 1e20

    for box in [(-jnp.inf, jnp.inf), (0.0, 1.0)]:
        result = solvers.minimize(fun, jnp.ones(3), box=box)
        np.testing.assert_allclose(result.x, 0.3, atol=2e-2)


@both_solvers
def test_it_goes_on_to_the_minimum_of_a_changed_objective(make_solver):
    weight = np.geomspace(1, 20, 12)
    first, second = np.random.default_rng(0).uniform(-0.5, 1.5, (2, 12))
    solver = make_solver()

    def value_and_grad(centre):
        def fun(x):
            return jnp.sum(weight * (x - centre) ** 2 + (x - centre) ** 4), ()

        return jax.value_and_grad(fun, has_aux=True)

    def replaced(state):
        (value, _), grad = value_and_grad(second)(state.x)
        return state._replace(value=value, grad=grad)

    with jax.enable_x64(True):
        step = jax.jit(lambda state, centre: solver.step(value_and_grad(centre), state, Box()))
        for resume, steps in itertools.product([solvers.reevaluate, replaced], [1, 2, 5, 300]):
            state = solver.init(value_and_grad(first), jnp.full(12, 0.5), Box())
            for _ in range(steps):
                if state.error <= 1e-7:
                    break
                state = step(state, first)
            assert steps < 300 or state.error <= 1e-7
            state = step(resume(state), second)
            assert state.evaluated
            while state.error > 1e-7:
                state = step(state, second)
            np.testing.assert_allclose(state.x, np.clip(second, 0, 1), atol=1e-6)


def test_a_stall_is_forgotten_when_the_objective_changes():
    solver, weight = solvers.lbfgsb(), np.geomspace(1, 50, 5)

    def value_and_grad(x, scale, centre):
        def fun(x):
            return 100 + scale * jnp.sum(weight * jnp.cosh(x - centre)), ()

        return jax.value_and_grad(fun, has_aux=True)(x)

    @jax.jit
    def step(state, *args):
        return solver.step(lambda x: value_and_grad(x, *args), state, Box())

    state = solver.init(lambda x: value_and_grad(x, 1.0, 0.3), jnp.linspace(0, 1, 5), Box())
    while state.status == Status.RUNNING:
        state = step(state, 1.0, 0.3)
    assert state.status == Status.STALLED
    (value, _), grad = value_and_grad(state.x, 1e4, 0.6)
    state = step(state._replace(value=value, grad=grad), 1e4, 0.6)
    assert state.value == value  # its first trial was too long
    while state.status == Status.RUNNING:
        state = step(state, 1e4, 0.6)
    np.testing.assert_allclose(state.x, 0.6, atol=1e-3)


# The entry point


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": np.zeros(3, int)}, TypeError, "x0: dtype int.*convert it to float32"),
        ({"x0": np.zeros(3, np.uint8)}, TypeError, "x0: dtype uint8.*x0 / 255.0"),
        ({"fun": lambda x: x}, ValueError, r"fun: returns shape \(3,\).*sum or index it"),
        ({"fun": lambda x: (jnp.sum(x), x)}, ValueError, "fun: returns tuple.*scalar"),
        ({"x0": ()}, ValueError, r"x0: \(\), expected a pytree with at least one array"),
        ({"box": (np.zeros(2), 1.0)}, ValueError, r"box: lower bound of shape \(2,\).*\(3,\)"),
        ({"box": 1.0}, ValueError, r"box: 1.0, expected a pair \(lower, upper\)"),
        ({"box": [(-2, 2)] * 3}, ValueError, r"list of pairs.*box=\(jnp.array\(lower\), "),
        ({"box": [(-2, 2)] * 2, "x0": np.zeros(2)}, ValueError, "list of pairs"),
        ({"box": ({"a": 1}, None)}, ValueError, "box: lower bound of structure .*'a'"),
        ({"has_aux": True}, ValueError, r"expected \(value, aux\)"),
        ({"ftol": -1}, ValueError, "ftol: -1, expected a finite number of at least 0"),
        ({"tol": -1}, ValueError, "tol: -1, expected a finite number of at least 0"),
        ({"tol": float("nan")}, ValueError, "tol: nan, expected a finite number"),
        ({"max_evals": 0}, ValueError, "max_evals: 0, expected an integer of at least 1"),
        ({"max_evals": 1.5}, ValueError, "max_evals: 1.5, expected an integer"),
    ],
)
def test_a_wrong_argument_is_named_with_its_remedy(change, error, message):
    arguments = {"fun": jnp.sum, "x0": np.zeros(3, np.float32)} | change
    with pytest.raises(error, match=message):
        jax.jit(lambda: solvers.minimize(**arguments))()


def test_a_first_step_that_is_not_positive_is_refused():
    def value_and_grad(x):
        return (jnp.sum(x), ()), jnp.ones_like(x)

    with pytest.raises(ValueError, match="first_step: 0, expected a finite number above 0"):
        solvers.lbfgsb().init(value_and_grad, jnp.zeros(2), Box(), first_step=0)


@both_solvers
@pytest.mark.parametrize("memory", [0, 1.5])
def test_a_wrong_memory_is_refused_when_the_solver_is_made(make_solver, memory):
    with pytest.raises(ValueError, match=f"memory: {memory}, expected an integer of at least 1"):
        make_solver(memory=memory)


def test_other_values_of_the_same_shapes_do_not_compile_again():
    traces, counts = [], []

    @jax.jit
    def solve(centre, x0, box):
        def fun(x):
            traces.append(1)
            return jnp.sum((x - centre) ** 2)

        return solvers.minimize(fun, x0, box=box).x

    for k in range(3):
        bounds = Box(jnp.full(3, -k / 10), jnp.float32(1 + k))
        x = solve(jnp.full(3, k / 2), jnp.full(3, k / 4), bounds)
        np.testing.assert_allclose(x, k / 2, atol=1e-6)
        counts.append(len(traces))
    assert counts[0] == counts[-1]


class Bowl(eqx.Module):
    centre: jax.Array

    def __call__(self, x):
        return jnp.sum((x - self.centre) ** 2)


def bowl(centre, x):
    return jnp.sum((x - centre) ** 2)


CALLABLES = {
    "function": lambda centre: bowl_at_one,
    "partial": lambda centre: functools.partial(bowl, centre),
    "jax partial": lambda centre: jax.tree_util.Partial(bowl, centre),
    "equinox module": Bowl,
}


def bowl_at_one(x):
    return bowl(1.0, x)


@pytest.mark.parametrize("name", CALLABLES)
def test_a_second_call_without_jit_compiles_nothing(name, compilations):
    make, x0 = CALLABLES[name], jnp.zeros(4)
    centres = [jnp.full(4, 1.0), jnp.full(4, 1.0 if name == "function" else 0.5)]
    functions = [make(centre) for centre in centres]
    solvers.minimize(functions[0], x0, solver=solvers.lbfgsb(memory=2))
    assert compilations  # the counter counts
    compilations.clear()
    result = solvers.minimize(functions[1], x0, solver=solvers.lbfgsb(memory=2), tol=1e-7)
    assert not compilations
    np.testing.assert_allclose(result.x, centres[1], atol=1e-5)


def test_an_array_closed_over_may_change_without_a_new_compilation(compilations):
    data = {"centre": jnp.full(4, 1.0)}

    def distance(x):
        return bowl(data["centre"], x)

    solvers.minimize(distance, jnp.zeros(4))
    data["centre"] = jnp.full(4, -2.0)
    start = jnp.zeros(4)
    compilations.clear()
    result = solvers.minimize(distance, start)
    assert not compilations
    np.testing.assert_allclose(result.x, data["centre"], atol=1e-5)


def test_a_function_may_close_over_what_is_being_traced():
    def solve(centre):
        return solvers.minimize(lambda x: bowl(centre, x), jnp.zeros(2)).x

    centres = jnp.array([[0.1, 0.2], [0.3, 0.4]])
    np.testing.assert_allclose(jax.jit(solve)(centres[0]), centres[0], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(solve)(centres), centres, atol=1e-6)
    np.testing.assert_allclose(jax.jacfwd(solve)(centres[0]), np.eye(2), atol=1e-5)
    module = jax.jit(lambda centre: solvers.minimize(Bowl(centre), jnp.zeros(2)).x)
    np.testing.assert_allclose(module(centres[1]), centres[1], atol=1e-6)


def test_an_unhashable_callable_is_minimised():
    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return bowl(0.5, x)

    result = solvers.minimize(Unhashable(), jnp.zeros(2))
    np.testing.assert_allclose(result.x, 0.5, atol=1e-6)


def test_the_result_has_the_precision_of_x0():
    with jax.enable_x64(True):
        for dtype in (np.float32, np.float64):
            wide = np.linspace(0, 1, 3)
            result = solvers.minimize(
                lambda x, wide=wide: jnp.sum((x - jnp.asarray(wide)) ** 2),
                np.full(3, 0.5, dtype),
            )
            assert result.x.dtype == result.value.dtype == result.grad.dtype == dtype
            np.testing.assert_allclose(result.x, wide, atol=1e-5)


def test_half_precision_variables_are_optimised_in_float32():
    x0 = jnp.zeros(3, jnp.bfloat16)
    result = solvers.minimize(lambda x: jnp.sum((x.astype(jnp.float32) - 0.3) ** 2), x0)
    assert result.x.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(result.x, np.float32), 0.3, atol=2e-3)


def test_the_snippets_of_the_documentation_run():
    page = (Path(__file__).parents[1] / "docs" / "minimize.md").read_text(encoding="utf-8")
    namespace: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "docs/minimize.md", "exec"), namespace)
    assert namespace["result"].success
    assert namespace["many"].success.all()


# Variables, bounds and further arguments


def test_variables_may_be_a_pytree_with_bounds_like_it():
    def fun(p):
        return jnp.sum((p["a"] - 2) ** 2) + jnp.sum((p["b"][0] + 3) ** 4), p["a"]

    x0 = {"a": jnp.zeros((2, 2)), "b": [jnp.ones(3)]}
    box = ({"a": None, "b": [-1.0]}, {"a": np.array([1.0, 5.0]), "b": [None]})
    result = solvers.minimize(fun, x0, box=box, has_aux=True)
    assert result.success
    np.testing.assert_allclose(result.x["a"], [[1, 2], [1, 2]], atol=1e-5)
    np.testing.assert_array_equal(result.x["b"][0], -1)
    np.testing.assert_array_equal(result.aux, result.x["a"])
    np.testing.assert_allclose(result.grad["b"][0], 4 * 2**3, rtol=1e-5)


def test_without_a_box_there_are_no_bounds():
    result = solvers.minimize(rosenbrock, jnp.array([-30.0, 40.0]))
    np.testing.assert_allclose(result.x, 1, atol=1e-3)
    one_sided = solvers.minimize(lambda x: jnp.sum((x + 3) ** 2), jnp.zeros(2), box=(-1, None))
    np.testing.assert_array_equal(one_sided.x, -1)


def test_the_evaluations_are_those_of_the_iterations_and_of_what_was_rejected():
    result = solvers.minimize(rosenbrock, jnp.array([-1.2, 1.0]))
    assert 20 < int(result.num_iterations) < int(result.num_evals) < 80


def test_the_relative_decrease_has_a_status_of_its_own():
    def fun(x):
        return 1 + jnp.sum(jnp.linspace(1, 1e4, 50) * x**2)

    with jax.enable_x64(True):
        loose = solvers.minimize(fun, jnp.ones(50), ftol=1e-3)
        tight = solvers.minimize(fun, jnp.ones(50), ftol=1e-12, tol=0)
    assert (loose.status, tight.status) == (Status.SMALL_DECREASE, Status.SMALL_DECREASE)
    assert loose.success
    assert 1e-12 < float(loose.value) - 1 < 1e-1
    assert float(tight.value) - 1 < 1e-10
    assert loose.num_evals < tight.num_evals


def test_the_budget_suffices_for_a_long_valley():
    with jax.enable_x64(True):
        result = solvers.minimize(rosenbrock, jnp.tile(jnp.array([-1.2, 1.0]), 100))
    assert result.success
    np.testing.assert_allclose(result.x, 1, atol=1e-4)


def test_float32_solves_a_separable_quadratic():
    weight = jnp.geomspace(1, 1e3, 1000)
    result = solvers.minimize(lambda x: jnp.sum(weight * (x - 1) ** 2), jnp.zeros(1000))
    excess = np.sum(np.asarray(weight, float) * (np.asarray(result.x, float) - 1) ** 2)
    assert excess <= 1e-6 * float(jnp.sum(weight))


# Derivatives of the solution


MATRIX = np.array([[9.0, 10, -2], [10, 23, 1], [-2, 1, 18]])
CENTRE = np.array([0.75, -0.25, 0.25])


def quadratic_program(centre, lower):
    """Its second variable ends at its lower bound."""

    def fun(x, centre):
        return 0.5 * (x - centre) @ jnp.asarray(MATRIX) @ (x - centre)

    return solvers.minimize(fun, jnp.full(3, 0.5), box=(lower, 1.0), args=(centre,))


def test_a_quadratic_program_that_jams_on_a_straight_line_is_solved():
    with jax.enable_x64(True):
        result = quadratic_program(CENTRE, 0.0)
    free = [0, 2]
    exact = np.zeros(3)
    right = (MATRIX @ CENTRE)[free]
    exact[free] = np.linalg.solve(MATRIX[np.ix_(free, free)], right)
    np.testing.assert_allclose(result.x, exact, atol=1e-7)
    assert result.success
    assert result.num_evals < 30


@pytest.mark.parametrize("derivative", [jax.jacrev, jax.jacfwd])
def test_the_derivative_of_the_solution_is_that_of_the_free_variables(derivative):
    """In closed form: with A free and B bound, H_AA dx_A = H_A dc - H_AB dl."""
    free, bound = [0, 2], [1]
    by_centre, by_bound = np.zeros((3, 3)), np.zeros(3)
    by_centre[free] = np.linalg.solve(MATRIX[np.ix_(free, free)], MATRIX[free])
    by_bound[bound] = 1
    by_bound[free] = np.linalg.solve(MATRIX[np.ix_(free, free)], -MATRIX[free, bound])
    with jax.enable_x64(True):
        found = derivative(lambda c, low: quadratic_program(c, low).x, argnums=(0, 1))(
            jnp.asarray(CENTRE), 0.0
        )
        value = derivative(lambda c: quadratic_program(c, 0.0).value)(jnp.asarray(CENTRE))
        x = np.asarray(quadratic_program(CENTRE, 0.0).x)
    np.testing.assert_allclose(found[0], by_centre, atol=1e-9)
    np.testing.assert_allclose(found[1], by_bound, atol=1e-9)
    np.testing.assert_allclose(value, -MATRIX @ (x - CENTRE), atol=1e-6)  # the envelope theorem


def test_the_derivative_is_that_of_finite_differences_beyond_quadratics():
    def solution(weight):
        def fun(x):
            return jnp.sum(jnp.cosh(x - weight)) + weight[0] * jnp.prod(x)

        return solvers.minimize(fun, jnp.full(3, 0.5), box=(None, 0.6), tol=1e-12, ftol=0).x

    with jax.enable_x64(True):
        weight, step = jnp.array([0.3, 1.2, 0.4]), 1e-4
        found = jax.jacrev(solution)(weight)
        differences = [
            (solution(weight + step * e) - solution(weight - step * e)) / (2 * step)
            for e in jnp.eye(3)
        ]
    np.testing.assert_allclose(found, jnp.stack(differences, axis=1), atol=1e-5)
    assert not found[1].any()  # at its bound


# Many problems


def test_many_problems_are_solved_as_vmap_solves_them():
    centres = jnp.asarray(np.random.default_rng(0).uniform(-1, 2, (50, 4)))
    lower = jnp.zeros((50, 4)).at[7].set(2.0)  # above the upper bound

    def fun(x, centre):
        return jnp.sum(jnp.arange(1.0, 5) ** 3 * (x - centre) ** 2) + jnp.sum(x**4)

    def one(centre, lower):
        return solvers.minimize(fun, jnp.full(4, 0.5), box=(lower, 1.0), args=(centre,))

    many = solvers.minimize_many(
        fun, jnp.full((50, 4), 0.5), box=(lower, 1.0), args=(centres,), batch_size=9
    )
    expected = jax.jit(jax.vmap(one))(centres, lower)
    np.testing.assert_array_equal(many.status == Status.EMPTY_BOX, np.arange(50) == 7)
    np.testing.assert_allclose(many.x, expected.x, atol=1e-4)
    np.testing.assert_allclose(many.value, expected.value, rtol=1e-5)
    assert int(many.num_evals[7]) == 0


def test_many_problems_need_a_leading_axis_each():
    with pytest.raises(ValueError, match=r"args: an array of shape \(3,\).*leading axis of 2"):
        solvers.minimize_many(bowl, jnp.zeros((2, 3)), args=(jnp.zeros(3),))
    with pytest.raises(ValueError, match=r"x0s: .*leading axis"):
        solvers.minimize_many(lambda x: x["a"], {"a": jnp.zeros(2), "b": jnp.zeros(3)})
