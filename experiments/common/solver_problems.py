"""Test problems for bounded and unbounded minimisers, as the literature defines them.

The names say where each comes from: "MGH" is More, Garbow and Hillstrom (1981), "HS" is Hock and
Schittkowski (1981), "torsion" and "obstacle" are of the MINPACK-2 collection (Averick et al.,
1992).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Problem(NamedTuple):
    """Minimise `objective(x, *data)` over `lower <= x <= upper`, from `x0`; all in float64."""

    objective: Callable[..., Float[Array, ""]]
    x0: np.ndarray
    data: tuple[Any, ...] = ()
    lower: Any = -np.inf
    upper: Any = np.inf

    @property
    def bounded(self) -> bool:
        """Whether any bound is finite."""
        return bool(np.any(np.isfinite(self.lower)) or np.any(np.isfinite(self.upper)))

    def fun(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        """The objective alone, in the precision of `x`."""
        return self.objective(x, *(jnp.asarray(array, x.dtype) for array in self.data))


def suite(*, large: bool = True) -> dict[str, Problem]:
    """All problems by name; without the large ones those of at most 200 variables."""
    problems = _unbounded() | _bounded() | _programs()
    return problems | _large() if large else problems


def box_qp(seed: int, n: int = 20, condition: float = 1e4) -> Problem:
    """A convex quadratic program in [0, 1], about half of its variables at a bound."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    matrix = q @ np.diag(np.geomspace(1, condition, n)) @ q.T
    centre = rng.uniform(-0.5, 1.5, n)
    return Problem(_quadratic, np.full(n, 0.5), (matrix, centre), 0.0, 1.0)


def separable(n: int = 1000, condition: float = 1e3) -> Problem:
    """A separable quadratic without bounds."""
    return Problem(
        lambda x, d: jnp.sum(d * (x - 1) ** 2), np.zeros(n), (np.geomspace(1, condition, n),)
    )


def _quadratic(x: Array, matrix: Array, centre: Array) -> Array:
    return 0.5 * (x - centre) @ matrix @ (x - centre)


def _squares(residuals: Callable[..., Array]) -> Callable[..., Float[Array, ""]]:
    """The sum of the squares of what a function returns."""

    @functools.wraps(residuals)
    def objective(x: Array, *data: Array) -> Array:
        return jnp.sum(residuals(x, *data) ** 2)

    return objective


# More, Garbow and Hillstrom, by their numbers


def rosenbrock(x: Float[Array, " n"]) -> Float[Array, ""]:
    """MGH 1, chained: each variable with the next."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


@_squares
def _extended_rosenbrock(x: Array) -> Array:
    return jnp.concatenate([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]])


@_squares
def _freudenstein_roth(x: Array) -> Array:
    a, b = x
    return jnp.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


@_squares
def _powell_badly_scaled(x: Array) -> Array:
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


@_squares
def _brown_badly_scaled(x: Array) -> Array:
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


@_squares
def _beale(x: Array) -> Array:
    return jnp.array([1.5, 2.25, 2.625], x.dtype) - x[0] * (1 - x[1] ** jnp.arange(1, 4))


@_squares
def _jennrich_sampson(x: Array) -> Array:
    i = jnp.arange(1, 11)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


@_squares
def _helical_valley(x: Array) -> Array:
    turn = jnp.arctan2(x[1], x[0]) / (2 * jnp.pi)
    turn = jnp.where((x[0] < 0) & (x[1] < 0), turn + 1, turn)  # from -1/4 to 3/4
    return jnp.stack([10 * (x[2] - 10 * turn), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


_BARD = "0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39"


@_squares
def _bard(x: Array, y: Array) -> Array:
    u = jnp.arange(1, 16)
    v = 16 - u
    return y - (x[0] + u / (v * x[1] + jnp.minimum(u, v) * x[2]))


_GAUSSIAN = (
    "0.0009 0.0044 0.0175 0.0540 0.1295 0.2420 0.3521 0.3989 "
    "0.3521 0.2420 0.1295 0.0540 0.0175 0.0044 0.0009"
)


@_squares
def _gaussian(x: Array, y: Array) -> Array:
    t = (8 - jnp.arange(1, 16)) / 2
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - y


_MEYER = "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872"


@_squares
def _meyer(x: Array, y: Array) -> Array:
    t = 45 + 5 * jnp.arange(1, 17)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - y


@_squares
def _gulf(x: Array) -> Array:
    t = jnp.arange(1, 100) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


@_squares
def _box_3d(x: Array) -> Array:
    t = jnp.arange(1, 11) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


@_squares
def _powell_singular(x: Array) -> Array:
    a, b, c, d = x[::4], x[1::4], x[2::4], x[3::4]
    return jnp.concatenate(
        [a + 10 * b, jnp.sqrt(5.0) * (c - d), (b - 2 * c) ** 2, jnp.sqrt(10.0) * (a - d) ** 2]
    )


def _wood(x: Array) -> Array:
    a, b, c, d = x
    return (
        100 * (b - a**2) ** 2
        + (1 - a) ** 2
        + 90 * (d - c**2) ** 2
        + (1 - c) ** 2
        + 10 * (b + d - 2) ** 2
        + (b - d) ** 2 / 10
    )


_KOWALIK = "0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246"


@_squares
def _kowalik_osborne(x: Array, y: Array) -> Array:
    u = 1 / jnp.array([0.25, 0.5, 1, 2, 4, 6, 8, 10, 12, 14, 16], x.dtype)
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


@_squares
def _brown_dennis(x: Array) -> Array:
    t = jnp.arange(1, 21) / 5
    return (x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


_OSBORNE_1 = (
    "0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658 0.628 "
    "0.603 0.580 0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431 0.424 0.420 "
    "0.414 0.411 0.406"
)


@_squares
def _osborne_1(x: Array, y: Array) -> Array:
    t = 10.0 * jnp.arange(33)
    return y - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


_OSBORNE_2 = (
    "1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655 0.616 "
    "0.606 0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558 0.533 0.495 "
    "0.500 0.423 0.395 0.375 0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672 "
    "0.708 0.633 0.668 0.645 0.632 0.591 0.559 0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581 "
    "0.428 0.292 0.162 0.098 0.054"
)


@_squares
def _osborne_2(x: Array, y: Array) -> Array:
    t = jnp.arange(65) / 10
    return y - (
        x[0] * jnp.exp(-t * x[4])
        + x[1] * jnp.exp(-((t - x[8]) ** 2) * x[5])
        + x[2] * jnp.exp(-((t - x[9]) ** 2) * x[6])
        + x[3] * jnp.exp(-((t - x[10]) ** 2) * x[7])
    )


@_squares
def _biggs(x: Array) -> Array:
    t = jnp.arange(1, 14) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


@_squares
def _watson(x: Array) -> Array:
    t = (jnp.arange(1, 30) / 29)[:, None]
    j = jnp.arange(len(x))[None]
    slope = jnp.sum(j[:, 1:] * x[None, 1:] * t ** (j[:, 1:] - 1), axis=1)
    value = jnp.sum(x[None] * t**j, axis=1)
    return jnp.append(slope - value**2 - 1, jnp.stack([x[0], x[1] - x[0] ** 2 - 1]))


@_squares
def _penalty_1(x: Array) -> Array:
    return jnp.append(jnp.sqrt(1e-5) * (x - 1), jnp.sum(x**2) - 0.25)


@_squares
def _penalty_2(x: Array) -> Array:
    n, e = len(x), jnp.exp(x / 10)
    i = jnp.arange(2, n + 1)
    y = jnp.exp(i / 10) + jnp.exp((i - 1) / 10)
    root = jnp.sqrt(1e-5)
    return jnp.concatenate(
        [
            x[:1] - 0.2,
            root * (e[1:] + e[:-1] - y),
            root * (e[1:] - jnp.exp(-0.1)),
            jnp.sum((n - jnp.arange(n)) * x**2)[None] - 1,
        ]
    )


@_squares
def _variably_dimensioned(x: Array) -> Array:
    total = jnp.sum(jnp.arange(1, len(x) + 1) * (x - 1))
    return jnp.append(x - 1, jnp.stack([total, total**2]))


@_squares
def _trigonometric(x: Array) -> Array:
    i = jnp.arange(1, len(x) + 1)
    return len(x) - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)


@_squares
def _brown_almost_linear(x: Array) -> Array:
    return jnp.append(x[:-1] + jnp.sum(x) - (len(x) + 1), jnp.prod(x) - 1)


@_squares
def _boundary_value(x: Array) -> Array:
    n = len(x)
    h = 1 / (n + 1)
    t = jnp.arange(1, n + 1) * h
    padded = jnp.pad(x, 1)
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2


@_squares
def _integral_equation(x: Array) -> Array:
    n = len(x)
    t = jnp.arange(1, n + 1) / (n + 1)
    cubes = (x + t + 1) ** 3
    below = (1 - t) * jnp.cumsum(t * cubes)
    above = t * (jnp.sum((1 - t) * cubes) - jnp.cumsum((1 - t) * cubes))
    return x + (below + above) / (2 * (n + 1))


@_squares
def _broyden_tridiagonal(x: Array) -> Array:
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


@_squares
def _broyden_banded(x: Array) -> Array:
    term = x * (1 + x)
    padded = jnp.pad(term, (5, 1))
    around = sum(padded[k : k + len(x)] for k in (*range(5), 6))
    return x * (2 + 5 * x**2) + 1 - around


@_squares
def _linear_full_rank(x: Array) -> Array:
    return jnp.append(x - 2 * jnp.sum(x) / (2 * len(x)), jnp.zeros(len(x))) - (
        2 * jnp.sum(x) / (2 * len(x)) * jnp.append(jnp.zeros(len(x)), jnp.ones(len(x))) + 1
    )


@_squares
def _linear_rank_one(x: Array) -> Array:
    return jnp.arange(1, 2 * len(x) + 1) * jnp.sum(jnp.arange(1, len(x) + 1) * x) - 1


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), float)


def _mgh() -> dict[str, Problem]:
    def at(*values: float) -> np.ndarray:
        return np.array(values, float)

    ten = np.arange(1, 11) / 11
    return {
        "1 Rosenbrock": Problem(_extended_rosenbrock, at(-1.2, 1)),
        "2 Freudenstein-Roth": Problem(_freudenstein_roth, at(0.5, -2)),
        "3 Powell badly scaled": Problem(_powell_badly_scaled, at(0, 1)),
        "4 Brown badly scaled": Problem(_brown_badly_scaled, at(1, 1)),
        "5 Beale": Problem(_beale, at(1, 1)),
        "6 Jennrich-Sampson": Problem(_jennrich_sampson, at(0.3, 0.4)),
        "7 helical valley": Problem(_helical_valley, at(-1, 0, 0)),
        "8 Bard": Problem(_bard, at(1, 1, 1), (_numbers(_BARD),)),
        "9 Gaussian": Problem(_gaussian, at(0.4, 1, 0), (_numbers(_GAUSSIAN),)),
        "10 Meyer": Problem(_meyer, at(0.02, 4000, 250), (_numbers(_MEYER),)),
        "11 Gulf": Problem(_gulf, at(5, 2.5, 0.15)),
        "12 Box 3D": Problem(_box_3d, at(0, 10, 20)),
        "13 Powell singular": Problem(_powell_singular, at(3, -1, 0, 1)),
        "14 Wood": Problem(_wood, at(-3, -1, -3, -1)),
        "15 Kowalik-Osborne": Problem(
            _kowalik_osborne, at(0.25, 0.39, 0.415, 0.39), (_numbers(_KOWALIK),)
        ),
        "16 Brown-Dennis": Problem(_brown_dennis, at(25, 5, -5, -1)),
        "17 Osborne 1": Problem(_osborne_1, at(0.5, 1.5, -1, 0.01, 0.02), (_numbers(_OSBORNE_1),)),
        "18 Biggs EXP6": Problem(_biggs, at(1, 2, 1, 1, 1, 1)),
        "19 Osborne 2": Problem(
            _osborne_2,
            at(1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5),
            (_numbers(_OSBORNE_2),),
        ),
        "20 Watson, n = 6": Problem(_watson, np.zeros(6)),
        "20 Watson, n = 9": Problem(_watson, np.zeros(9)),
        "21 extended Rosenbrock, n = 100": Problem(_extended_rosenbrock, np.tile(at(-1.2, 1), 50)),
        "22 extended Powell, n = 100": Problem(_powell_singular, np.tile(at(3, -1, 0, 1), 25)),
        "23 penalty I, n = 10": Problem(_penalty_1, np.arange(1.0, 11)),
        "23 penalty I, n = 50": Problem(_penalty_1, np.arange(1.0, 51)),
        "24 penalty II, n = 10": Problem(_penalty_2, np.full(10, 0.5)),
        "25 variably dimensioned": Problem(_variably_dimensioned, 1 - np.arange(1, 11) / 10),
        "26 trigonometric": Problem(_trigonometric, np.full(10, 0.1)),
        "27 Brown almost linear": Problem(_brown_almost_linear, np.full(10, 0.5)),
        "28 boundary value": Problem(_boundary_value, ten * (ten - 1)),
        "29 integral equation": Problem(_integral_equation, ten * (ten - 1)),
        "30 Broyden tridiagonal, n = 100": Problem(_broyden_tridiagonal, -np.ones(100)),
        "31 Broyden banded, n = 100": Problem(_broyden_banded, -np.ones(100)),
        "32 linear of full rank": Problem(_linear_full_rank, np.ones(10)),
        "33 linear of rank one": Problem(_linear_rank_one, np.ones(10)),
    }


def _unbounded() -> dict[str, Problem]:
    rng = np.random.default_rng(0)
    design = rng.normal(size=(60, 20))
    problems = {f"MGH {name}": problem for name, problem in _mgh().items()}
    return problems | {
        "chained Rosenbrock, n = 10": Problem(rosenbrock, np.zeros(10)),
        "chained Rosenbrock, n = 100": Problem(rosenbrock, np.tile([-1.2, 1.0], 50)),
        "Himmelblau": Problem(_himmelblau, np.zeros(2)),
        "log-sum-exp": Problem(_log_sum_exp, np.zeros(20), (design,)),
        "quadratic, condition 1e3": Problem(_quadratic, np.zeros(50), box_qp(1, 50, 1e3).data),
        "separable quadratic, n = 1000": separable(),
        "quartic": Problem(lambda x: jnp.sum((x - 0.5) ** 4 + x**2 / 10), np.full(20, 3.0)),
        "exponentials": Problem(
            lambda x: jnp.sum(jnp.exp(x) - jnp.arange(1, len(x) + 1) / len(x) * x), np.ones(50)
        ),
    }


@_squares
def _himmelblau(x: Array) -> Array:
    return jnp.stack([x[0] ** 2 + x[1] - 11, x[0] + x[1] ** 2 - 7])


def _log_sum_exp(x: Array, design: Array) -> Array:
    return jax.nn.logsumexp(design @ x) + 0.01 * jnp.sum(x**2)


# With bounds

# For some of More, Garbow and Hillstrom's, bounds in the manner of Gay (1984), which cut the
# unbounded minimum off or leave it just inside.
_BOUNDS: Mapping[str, tuple[Any, Any]] = {
    "1 Rosenbrock": ([-50, -50], [0.5, 100]),
    "2 Freudenstein-Roth": ([0, -30], [20, -0.9]),
    "3 Powell badly scaled": ([0, 1], [1, 9]),
    "4 Brown badly scaled": ([0, 3e-5], [1e6, 100]),
    "5 Beale": ([0.6, 0.5], [10, 100]),
    "6 Jennrich-Sampson": ([0.26, 0], [10, 20]),
    "7 helical valley": ([-100, -1, -1], [0.8, 1, 1]),
    "8 Bard": ([0.1, 0, 0], [50, 100, 2]),
    "9 Gaussian": ([0.398, 1, -0.5], [4.2, 2, 0.1]),
    "12 Box 3D": ([0, 5, 0], [2, 9.5, 20]),
    "13 Powell singular": ([0.1, -20, -1, -1], [100, 20, 1, 50]),
    "14 Wood": ([-100, -100, -100, -100], [0, 10, 100, 100]),
    "15 Kowalik-Osborne": ([0.001, 0.14, 0.001, 0.001], [10, 10, 0.12, 10]),
    "16 Brown-Dennis": ([-10, 0, -100, -20], [100, 15, 0, 0.2]),
    "18 Biggs EXP6": ([0, 0, 0, 1, 0, 0], [2, 8, 1, 7, 5, 5]),
    "20 Watson, n = 6": ([-1, 0, -1, -1, -1, 0], [0, 0.9, 1, 1, 0, 1]),
    "23 penalty I, n = 10": (0.0, [0.1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    "24 penalty II, n = 10": (-10.0, 0.45),
    "25 variably dimensioned": (0.0, [10, 20, 0.9, 40, 0.7, 10, 10, 10, 10, 0.6]),
    "26 trigonometric": (np.arange(10) / 100, 0.3),
    "27 Brown almost linear": (0.0, 0.9),
    "29 integral equation": (-0.2, -0.05),
    "30 Broyden tridiagonal, n = 100": (-1.0, -0.5),
    "31 Broyden banded, n = 100": (-100.0, -0.4),
}


def _bounded() -> dict[str, Problem]:
    unbounded = _mgh()
    problems = {
        f"MGH {name} in a box": unbounded[name]._replace(
            lower=np.broadcast_to(np.asarray(lower, float), unbounded[name].x0.shape),
            upper=np.broadcast_to(np.asarray(upper, float), unbounded[name].x0.shape),
        )
        for name, (lower, upper) in _BOUNDS.items()
    }

    def at(*values: float) -> np.ndarray:
        return np.array(values, float)

    inf, five = np.inf, np.arange(1, 6.0)
    return problems | {
        "HS 1": Problem(rosenbrock, at(-2, 1), lower=at(-inf, -1.5)),
        "HS 2": Problem(rosenbrock, at(-2, 1), lower=at(-inf, 1.5)),
        "HS 3": Problem(lambda x: x[1] + 1e-5 * (x[1] - x[0]) ** 2, at(10, 1), lower=at(-inf, 0)),
        "HS 4": Problem(lambda x: (x[0] + 1) ** 3 / 3 + x[1], at(1.125, 0.125), lower=at(1, 0)),
        "HS 5": Problem(
            lambda x: jnp.sin(x[0] + x[1]) + (x[0] - x[1]) ** 2 - 1.5 * x[0] + 2.5 * x[1] + 1,
            at(0, 0),
            lower=at(-1.5, -3),
            upper=at(4, 3),
        ),
        "HS 25": Problem(_hs25, at(100, 12.5, 3), lower=at(0.1, 0, 0), upper=at(100, 25.6, 5)),
        "HS 38": Problem(_wood, at(-3, -1, -3, -1), lower=-10.0, upper=10.0),
        "HS 45": Problem(lambda x: 2 - jnp.prod(x) / 120, np.full(5, 2.0), lower=0.0, upper=five),
        "HS 110": Problem(
            lambda x: jnp.sum(jnp.log(x - 2) ** 2 + jnp.log(10 - x) ** 2) - jnp.prod(x) ** 0.2,
            np.full(10, 9.0),
            lower=2.001,
            upper=9.999,
        ),
        "chained Rosenbrock in [-2, 0.5]": Problem(rosenbrock, np.full(50, -1.0), (), -2.0, 0.5),
        "chained Rosenbrock beyond its minimum": Problem(
            rosenbrock, np.full(50, 2.0), (), 1.0625, 3.0
        ),
        "Rosenbrock-25 of L-BFGS-B": Problem(
            _driver, np.full(25, 3.0), (), np.where(np.arange(25) % 2 == 0, 1.0, -100.0), 100.0
        ),
        "jammed quadratic": Problem(
            _quadratic,
            np.full(3, 0.5),
            (at(9, 10, -2, 10, 23, 1, -2, 1, 18).reshape(3, 3), at(0.75, -0.25, 0.25)),
            0.0,
            1.0,
        ),
    }


@_squares
def _hs25(x: Array) -> Array:
    i = jnp.arange(1, 100)
    u = 25 + (-50 * jnp.log(i / 100)) ** (2 / 3)
    return -i / 100 + jnp.exp(-(jnp.maximum(u - x[1], 0) ** x[2]) / x[0])


def _driver(x: Array) -> Array:
    """The problem of the sample driver of L-BFGS-B (Zhu et al., 1997)."""
    return (x[0] - 1) ** 2 + 4 * jnp.sum((x[1:] - x[:-1] ** 2) ** 2)


def _programs() -> dict[str, Problem]:
    """Quadratic programs, least squares and regressions with bounds."""
    rng = np.random.default_rng(1)
    design, response = rng.normal(size=(80, 40)), rng.normal(size=80)
    labels = np.sign(design @ rng.normal(size=40) + rng.normal(size=80))
    returns = rng.normal(size=(120, 60)) @ np.diag(np.geomspace(1, 30, 60))
    n = 60
    return {
        **{f"box QP {k}, condition 1e4": box_qp(k) for k in range(5)},
        **{f"box QP {k}, condition 1e6": box_qp(100 + k, condition=1e6) for k in range(3)},
        "box QP, n = 200": box_qp(7, 200, 1e3),
        "least squares, not negative": Problem(
            _least_squares, np.zeros(40), (design, response), 0.0
        ),
        "Hilbert, not negative": Problem(
            _least_squares,
            np.zeros(12),
            (1 / (np.arange(12)[:, None] + np.arange(12) + 1), np.cos(np.arange(12.0))),
            0.0,
        ),
        "logistic regression in a box": Problem(
            _logistic, np.zeros(40), (design, labels), -0.25, 0.25
        ),
        "logistic regression, not negative": Problem(
            _logistic, np.zeros(40), (design, labels), 0.0
        ),
        "portfolio with a soft budget": Problem(
            _portfolio,
            np.full(n, 1 / n),
            (returns.T @ returns / 120, rng.uniform(size=n)),
            0.0,
            0.2,
        ),
        "Poisson regression": Problem(
            _poisson, np.zeros(10), (rng.uniform(size=(50, 10)), rng.poisson(5, 50)), 0.0, 1.0
        ),
    }


def _least_squares(x: Array, design: Array, response: Array) -> Array:
    return 0.5 * jnp.sum((design @ x - response) ** 2)


def _logistic(x: Array, design: Array, labels: Array) -> Array:
    return jnp.sum(jax.nn.softplus(-labels * (design @ x))) + 1e-3 * jnp.sum(x**2)


def _portfolio(x: Array, covariance: Array, gain: Array) -> Array:
    return 0.5 * x @ covariance @ x - gain @ x + 1e4 * (jnp.sum(x) - 1) ** 2


def _poisson(x: Array, design: Array, counts: Array) -> Array:
    rate = design @ x
    return jnp.sum(jnp.exp(rate) - counts * rate)


def _large() -> dict[str, Problem]:
    problems = {
        "chained Rosenbrock, n = 1000": Problem(rosenbrock, np.tile([-1.2, 1.0], 500)),
        "separable box QP, n = 10000": Problem(
            lambda x, d: jnp.sum(d * (x - jnp.cos(jnp.arange(len(x)))) ** 2),
            np.full(10000, 0.5),
            (np.geomspace(1, 1e4, 10000),),
            0.0,
            1.0,
        ),
    }
    for side in (50, 100):
        points = np.arange(1, side + 1) / (side + 1)
        gap = np.minimum(
            np.minimum(points, 1 - points)[:, None], np.minimum(points, 1 - points)[None]
        ).ravel()
        hill = (np.sin(3.2 * points)[:, None] * np.sin(3.3 * points)[None]).ravel() ** 3
        problems |= {
            f"torsion, n = {side**2}": Problem(
                functools.partial(_membrane, force=5.0), np.zeros(side**2), (), -gap, gap
            ),
            f"obstacle, n = {side**2}": Problem(
                functools.partial(_membrane, force=1.0), np.maximum(hill, 0), (), hill, 2000.0
            ),
        }
    return problems


def _membrane(x: Array, force: float) -> Array:
    """The energy of a square membrane, 0 on its edge, by finite differences."""
    side = int(len(x) ** 0.5)
    grid = jnp.pad(x.reshape(side, side), 1)
    area = 1 / (side + 1) ** 2
    stretched = jnp.sum(jnp.diff(grid, axis=0) ** 2) + jnp.sum(jnp.diff(grid, axis=1) ** 2)
    return stretched / 2 - force * area * jnp.sum(x)
