"""Bounded problems whose minima SciPy finds, for every solver."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from advjax import solvers


class Problem(NamedTuple):
    """`objective(x, *data)` in a box, all in float64 until a test asks for less."""

    objective: Callable
    data: tuple
    x0: np.ndarray
    lower: object
    upper: object

    def fun(self, x):
        return self.objective(x, *(np.asarray(array, x.dtype) for array in self.data))

    def solve(self, **options):
        x0, box = jnp.asarray(self.x0), (jnp.asarray(self.lower), jnp.asarray(self.upper))
        return jax.jit(lambda: solvers.minimize(self.fun, x0, box=box, **options))()

    def true_value(self, x):
        """The objective at `x` in float64, whatever the precision that found it."""
        with jax.enable_x64(True):
            return float(self.fun(jnp.asarray(np.asarray(x, np.float64))))


def scipy_minimum(value_and_grad, x0, lower=0.0, upper=1.0):
    """The lowest value that SciPy's L-BFGS-B finds, when called in float64."""
    return optimize.minimize(
        lambda x: [np.ravel(a) for a in value_and_grad(x.reshape(x0.shape))],
        np.ravel(np.asarray(x0, np.float64)),
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(lower, upper),
        options={"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9},
    ).fun


def distance(x, weight, centre):
    return jnp.sum(weight * (x - centre) ** 2)


def quartic(x, centre):
    return jnp.sum((x - centre) ** 4 + x**2)


def quadratic(x, matrix, slope, centre):
    return 0.5 * (x - centre) @ matrix @ (x - centre) - slope @ (x - centre)


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def log_sum_exp(x, design):
    return jax.nn.logsumexp(design @ x) + 0.01 * jnp.sum(x**2)


def logistic(x, design):
    return jnp.sum(jax.nn.softplus(design @ x))


def coefficients(n=30, condition=100.0, seed=0, centre=0.0):
    """A matrix with eigenvalues from 1 to `condition`, a slope, and a centre, for `quadratic`."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return q @ np.diag(np.geomspace(1, condition, n)) @ q.T, rng.normal(size=n) * 10, centre


def problems():
    rng = np.random.default_rng(0)
    weight, centre = rng.uniform(0.5, 20, 40), rng.uniform(-1, 2, 40)
    design = rng.normal(size=(60, 20))
    third, inf = np.arange(30) % 3 == 0, np.inf
    at = functools.partial(np.full, fill_value=0.0)
    return {
        "distance": Problem(distance, (weight, centre), at(40), 0.0, 1.0),
        "quartic": Problem(quartic, (centre,), at(40), -0.25, 0.25),
        "quadratic": Problem(quadratic, coefficients(), at(30), -0.5, 0.5),
        "quadratic in a box far from 0": Problem(
            quadratic, coefficients(centre=20.0), at(30), 19.5, 20.5
        ),
        "quadratic with fixed variables": Problem(
            quadratic,
            coefficients(seed=2),
            at(30),
            np.where(third, 0.25, -0.5),
            np.where(third, 0.25, 0.5),
        ),
        "quadratic bounded on either side": Problem(
            quadratic,
            coefficients(seed=3),
            at(30),
            np.where(third, 0.125, -inf),
            np.where(third, inf, 0.25),
        ),
        "ill-conditioned quadratic": Problem(
            quadratic, coefficients(condition=1e4), at(30), -0.5, 0.5
        ),
        "Rosenbrock-50": Problem(rosenbrock, (), at(50) - 1, -2.0, 0.5),
        "Rosenbrock-50 beyond its minimum": Problem(rosenbrock, (), at(50) + 2, 1.0625, 3.0),
        "Rosenbrock-10 bounded above": Problem(rosenbrock, (), at(10) - 1, -inf, 0.25),
        "Rosenbrock-10 without bounds": Problem(rosenbrock, (), at(10) - 1, -inf, inf),
        "log-sum-exp": Problem(log_sum_exp, (design,), at(20), -1.0, 2.0),
        "logistic regression, not negative": Problem(logistic, (design,), at(20), 0.0, inf),
    }


PROBLEMS = problems()


@functools.cache
def gold(name):
    """The lowest value of a problem that SciPy finds in float64."""
    problem = PROBLEMS[name]
    with jax.enable_x64(True):
        value_and_grad = jax.jit(jax.value_and_grad(problem.fun))
        return scipy_minimum(value_and_grad, problem.x0, problem.lower, problem.upper)


def assert_in_box(x, lower, upper):
    x = np.asarray(x)
    assert (x >= np.asarray(lower, x.dtype)).all()
    assert (x <= np.asarray(upper, x.dtype)).all()
