"""Bounds that hold in a box or a ball only: against slopes found there, and global bounds."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax import lipschitz
from advjax.lipschitz.bound import _outputs, _region

WIDTHS = (6, 9, 8, 4)
METHODS = (None, lipschitz.eclipse)
ACTIVATIONS = {
    "sigmoid": jax.nn.sigmoid,
    "clip": lambda z: jnp.clip(z, -0.5, 1.0),
    "mixed": lambda z: jnp.minimum(jnp.arctan(z) + jax.scipy.special.erf(z - 1), 0.7),
}


def draw(seed):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(WIDTHS)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], rng


def net(kernels, activation, x):
    first, second, third = kernels
    x = activation(x @ first + 0.3)
    return activation(x @ second - 0.2) @ third


@functools.cache
def slopes_of(activation):
    """The norms of the net's Jacobians at points."""

    def slopes(kernels, points):
        fn = functools.partial(net, kernels, ACTIVATIONS[activation])
        return jnp.linalg.norm(jax.vmap(jax.jacobian(fn))(points), 2, (1, 2))

    return jax.jit(slopes)


def inside(rng, x, half, count=400):
    """Points of the box, half of them corners, which saturate most."""
    shares = rng.uniform(-1, 1, (count, len(x)))
    shares[::2] = np.sign(shares[::2])
    return x + half * shares


def around(rng, x, radius, count=400):
    steps = rng.normal(size=(count, len(x)))
    steps *= radius * rng.uniform(size=(count, 1)) ** 0.1 / np.linalg.norm(steps, axis=1)[:, None]
    return x + steps


@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), size=st.sampled_from([0.0, 0.01, 0.3, 3.0]))
def test_no_slope_in_the_box_or_ball_exceeds_its_bound_and_none_is_above_the_global(
    activation, seed, size
):
    kernels, rng = draw(seed)
    x = rng.normal(size=WIDTHS[0]).astype(np.float32)
    fn = functools.partial(net, kernels, ACTIVATIONS[activation])
    in_box = (x - np.float32(size), x + np.float32(size))
    regions = ({"box": in_box}, {"radius": 2 * size}, {"box": in_box, "radius": 2 * size})
    box, ball = inside(rng, x, size), around(rng, x, 2 * size)
    both = np.clip(ball, x - size, x + size)
    with jax.enable_x64(True):
        in_double = [kernel.astype(np.float64) for kernel in kernels]
        steepest = [
            float(slopes_of(activation)(in_double, np.asarray(points)).max())
            for points in (box, ball, both)
        ]
    for method in METHODS:
        everywhere = lipschitz.bound(fn, x, method=method).constant
        for found, region in zip(steepest, regions, strict=True):
            bound = lipschitz.bound(fn, x, method=method, **region).constant
            assert found <= bound
            assert bound <= everywhere * (1 + 1e-5)


def test_the_search_for_multipliers_has_local_slopes_too():
    kernels, rng = draw(1)
    x = rng.normal(size=WIDTHS[0]).astype(np.float32)
    fn = functools.partial(net, kernels, jax.nn.sigmoid)
    box = (x - 0.3, x + 0.3)
    found = [lipschitz.bound(fn, x, method=lipschitz.lipsdp, box=b).constant for b in (None, box)]
    steepest = slopes_of("sigmoid")(kernels, inside(rng, x, 0.3).astype(np.float32)).max()
    assert steepest <= found[1] < 0.95 * found[0]
    eclipse = lipschitz.bound(fn, x, method=lipschitz.eclipse, box=box).constant
    assert found[1] <= eclipse * (1 + 1e-6)


def test_no_difference_of_two_outputs_is_steeper_than_the_bound_of_the_pair():
    kernels, rng = draw(2)
    x = rng.normal(size=WIDTHS[0]).astype(np.float32)
    fn = functools.partial(net, kernels, jax.nn.sigmoid)
    anywhere, here = (
        lipschitz.pairwise(fn, x, method=lipschitz.eclipse, radius=r).constant for r in (None, 0.2)
    )
    jacobians = jax.vmap(jax.jacobian(fn))(around(rng, x, 0.2).astype(np.float32))
    steepest = jnp.linalg.norm(jacobians[:, :, None] - jacobians[:, None], axis=-1).max(0)
    assert np.all(steepest <= here * (1 + 1e-5))
    assert np.all(here <= anywhere)
    assert here.max() < 0.95 * anywhere.max()


def test_units_that_stay_off_in_the_box_are_out_of_the_network():
    first, second, _ = draw(3)[0]
    alive = np.arange(WIDTHS[1]) % 2 == 0
    bias = np.where(alive, 0, -100).astype(np.float32)

    def fn(x):
        return jax.nn.relu(x @ first + bias) @ second

    x = np.zeros(WIDTHS[0], np.float32)
    found = lipschitz.bound(fn, x, method=lipschitz.product, box=(-1.0, 1.0)).constant
    few = lipschitz.product([first[:, alive], second[alive]], [1.0]).constant
    assert found == pytest.approx(float(few), rel=1e-3)
    assert lipschitz.bound(fn, x, method=lipschitz.product).constant > 1.05 * found
    off = lipschitz.bound(lambda x: jax.nn.relu(x - 2), x, box=(-1.0, 1.0)).constant
    assert off == 0


def test_a_box_of_everything_gives_the_global_bound():
    kernels, _ = draw(4)
    fn = functools.partial(net, kernels, jax.nn.sigmoid)
    x = jnp.zeros(WIDTHS[0])
    for method in METHODS:
        everywhere = lipschitz.bound(fn, x, method=method).constant
        unbounded = lipschitz.bound(fn, x, method=method, box=(-jnp.inf, jnp.inf)).constant
        assert unbounded == pytest.approx(float(everywhere), rel=1e-5)


def test_vmap_over_images_gives_what_a_loop_gives():
    kernels, rng = draw(5)
    fn = functools.partial(net, kernels, jax.nn.sigmoid)
    xs = jnp.asarray(rng.normal(size=(3, WIDTHS[0])), jnp.float32)

    def constant(x):
        return lipschitz.bound(fn, x, method=lipschitz.product, radius=0.3).constant

    np.testing.assert_allclose(jax.vmap(constant)(xs), [constant(x) for x in xs], rtol=1e-4)


# What the entries of intermediate results are between

KERNEL = np.random.default_rng(0).normal(size=(3, 3, 2, 3)).astype(np.float32)
MATRIX = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)


def convolved(x):
    return nn.max_pool(
        jax.lax.conv_general_dilated(
            x[None],
            KERNEL.astype(x.dtype),
            (2, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0],
        (2, 2),
    )


FUNCTIONS = {
    "dense": lambda x: x[0, :, 0] @ MATRIX - 1,
    "dense from the left": lambda x: MATRIX.T @ x[1],
    "convolution and pool": convolved,
    "average": lambda x: x.mean((0, 1)),
    "elementwise": lambda x: jnp.tanh(2 * x) - jax.nn.sigmoid(-x) / 3 + jnp.arcsinh(x),
    "two branches": lambda x: jnp.concatenate([1 - x, jnp.pad(x, ((0, 0), (0, 0), (1, 2)))], 2),
    "moved about": lambda x: jnp.where(jnp.arange(2) > 0, x, -x)[::-1, :, jnp.array([1, 0, 1])].T,
    "largest": lambda x: jnp.maximum(x.max(0), jnp.clip(x, -0.125, 0.25).min(0)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("half", [0.0, 0.5])
def test_results_lie_in_their_intervals_rounding_included(name, half):
    fn, rng = FUNCTIONS[name], np.random.default_rng(2)
    x = rng.normal(size=(4, 5, 2)).astype(np.float32)
    (signal,) = _outputs(_region(fn, (x,), (x - half, x + half), None), None)
    lower, upper = (np.asarray(end, np.float64) for end in signal.interval)
    points = x.astype(np.float64) + half * rng.uniform(-1, 1, (300, *x.shape))
    with jax.enable_x64(True):
        results = np.asarray(jax.vmap(fn)(points))
    assert np.all(lower <= results)
    assert np.all(results <= upper)
    if half == 0:
        assert np.max(upper - lower) < 1e-3


def test_long_sums_that_cancel_are_in_their_interval():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5000, 20)).astype(np.float32)
    x = rng.normal(size=5000).astype(np.float32)
    (signal,) = _outputs(_region(lambda x: x @ kernel, (x,), (x, x), None), None)
    exact = x.astype(np.float64) @ kernel.astype(np.float64)
    assert np.all((signal.interval.lower <= exact) & (exact <= signal.interval.upper))


def test_what_is_not_known_stays_unknown():
    x = jnp.ones(4)
    (signal,) = _outputs(_region(lambda x: jnp.sort(x) + x, (x,), (0.0, 1.0), None), None)
    assert signal.interval is None
    found = lipschitz.bound(lambda x: jax.nn.sigmoid(10 + jnp.sort(x)), x, box=(0.0, 1.0)).constant
    assert found == pytest.approx(1 / 4, rel=1e-5)


# Errors


def test_a_box_or_radius_that_cannot_be_is_refused():
    x = jnp.ones(3)
    with pytest.raises(ValueError, match="box"):
        lipschitz.bound(jnp.tanh, x, box=1.0)
    with pytest.raises(TypeError, match="radius"):
        lipschitz.bound(jnp.tanh, jax.ShapeDtypeStruct((3,), jnp.float32), radius=0.1)
