"""What is said of elementwise functions, against `jax.grad` on a grid in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax.lipschitz.jaxpr import elementwise, intervals
from advjax.lipschitz.jaxpr.values import Interval

ROWS = {
    **elementwise.TABLE,
    **{f"power {y}": elementwise.integer_power(y) for y in (-3, -2, -1, 0, 1, 2, 3, 4)},
    **{
        f"{name} {scalar}": function.row(scalar)
        for name, function in elementwise.PARAMETRIC.items()
        for scalar in (0.01, 0.5, 1.0, 3.0)
    },
    "leaky_relu -2.0": elementwise.PARAMETRIC["leaky_relu"].row(-2.0),
    "elu -2.0": elementwise.PARAMETRIC["elu"].row(-2.0),
}
POSITIVE = ("log", "sqrt", "rsqrt")


def grid_of(name):
    """Points of the domain, the kinks left out."""
    ends = (1e-3, 9.0) if name in POSITIVE else (-9.0, 9.0)
    if name == "log1p":
        ends = (-0.999, 9.0)
    points = np.linspace(*ends, 20_001) + 1e-7
    if name in ("power -1", "power -2", "power -3"):
        points = points[np.abs(points) > 0.05]
    return points


def values_and_slopes(name, points):
    with jax.enable_x64(True):
        fn = ROWS[name].fn
        return (
            np.asarray(fn(jnp.asarray(points))),
            np.asarray(jax.vmap(jax.grad(lambda x: jnp.asarray(fn(x), float)))(points)),
        )


@pytest.mark.parametrize("name", ROWS)
def test_the_slope_the_range_and_the_direction_are_those_of_the_function(name):
    row, points = ROWS[name], grid_of(name)
    values, slopes = values_and_slopes(name, points)
    steepest = np.abs(slopes).max()
    assert steepest <= row.slope * (1 + 1e-9)
    if np.isfinite(row.slope):
        assert row.slope <= steepest * (1 + 1e-3) + 1e-12
    assert row.low <= values.min()
    assert values.max() <= row.high
    steps = np.diff(values)
    if row.increasing:
        assert np.all(steps >= 0)
    if row.decreasing and not name.startswith("power"):
        assert np.all(steps <= 0)
    if row.even:
        mirrored, _ = values_and_slopes(name, -points)
        np.testing.assert_allclose(values, mirrored, rtol=1e-12)
        assert np.all(np.diff(values[points > 0]) >= 0)


@pytest.mark.parametrize("name", ROWS)
def test_slopes_and_values_on_intervals_hold_and_are_tight(name):
    row, points = ROWS[name], grid_of(name).astype(np.float32)
    rng = np.random.default_rng(0)
    for _ in range(20):
        low, high = np.sort(points[rng.integers(len(points), size=2)])
        if name.startswith("power -") and low < 0 < high:
            continue
        inside = np.linspace(low, high, 500, dtype=np.float64)
        inside = inside[(inside >= low) & (inside <= high) & (np.abs(inside) > 1e-6)]
        values, slopes = values_and_slopes(name, inside)
        interval = Interval(jnp.float32(low), jnp.float32(high))
        slope = float(intervals.slope_on(row, interval))
        assert np.abs(slopes).max() <= slope
        if row.slope_on is not None:
            assert slope <= np.abs(slopes).max() * 1.05 + 1e-3
        lower, upper = map(float, intervals._image(row, interval))
        assert lower <= values.min()
        assert values.max() <= upper


def test_no_fact_about_a_function_stands_in_two_places():
    assert not elementwise.TABLE.keys() & elementwise.PARAMETRIC.keys()
