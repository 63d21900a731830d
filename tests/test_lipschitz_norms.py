"""Norms of linear layers against the singular values of their matrices, in float64."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import lipschitz
from advjax.lipschitz.linear import layers
from advjax.lipschitz.linear.norms import upper_norm
from advjax.lipschitz.linear.spectral_norm import norm_bound
from tests.oracles import conv_matrix


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def truth(matrix):
    return np.linalg.norm(np.asarray(matrix, np.float64), 2, (-2, -1))


class Conv(NamedTuple):
    kernel: np.ndarray
    shape: tuple
    options: dict

    def matrix(self):
        return conv_matrix(self.kernel, self.shape, **self.options)

    def upper(self):
        """The upper bound alone, compiled once for all kernels of a shape."""
        return upper_norm(lipschitz.Conv(self.kernel, self.shape, **self.options))


CONVOLUTIONS = {
    "same": Conv(normal(3, 3, 2, 3), (6, 5, 2), {}),
    "valid": Conv(normal(3, 3, 2, 3), (6, 5, 2), {"padding": "VALID"}),
    "strided": Conv(normal(3, 3, 2, 3), (7, 8, 2), {"strides": 2}),
    "strides that differ": Conv(
        normal(5, 4, 2, 3), (11, 9, 2), {"strides": (4, 3), "padding": "VALID"}
    ),
    "stride beyond the window": Conv(normal(2, 2, 2, 3), (9, 10, 2), {"strides": 3}),
    "dilated": Conv(normal(3, 2, 2, 3), (7, 9, 2), {"dilation": (2, 3)}),
    "dilated and strided": Conv(normal(3, 2, 2, 3), (9, 8, 2), {"dilation": 2, "strides": (3, 2)}),
    "grouped": Conv(normal(3, 3, 2, 6), (6, 5, 4), {"groups": 2}),
    "depthwise": Conv(normal(3, 3, 1, 8), (6, 5, 4), {"groups": 4}),
    "even window": Conv(normal(2, 4, 2, 3), (6, 7, 2), {}),
    "asymmetric padding": Conv(normal(3, 3, 2, 3), (6, 5, 2), {"padding": ((0, 3), (4, 1))}),
    "window larger than the image": Conv(normal(7, 9, 2, 3), (4, 5, 2), {}),
    "padding larger than the image": Conv(normal(7, 7, 2, 3), (4, 3, 2), {"padding": 2 * [(6, 8)]}),
    "a difference, whose cyclic norm is too small": Conv(
        np.float32([1, -1]).reshape(1, 2, 1, 1), (1, 3, 1), {"padding": ((0, 0), (1, 0))}
    ),
    "one axis": Conv(normal(5, 3, 4), (20, 3), {"strides": 2}),
    "zero": Conv(np.zeros((3, 3, 2, 3), np.float32), (6, 5, 2), {}),
}

ORTHOGONAL = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 30)))[0]
DENSE = {
    "tall": normal(40, 30),
    "wide": normal(30, 40),
    "one row": normal(1, 40),
    "close top singular values": (ORTHOGONAL * np.linspace(1, 1 - 1e-4, 30)).astype(np.float32),
    "orthogonal": ORTHOGONAL.astype(np.float32),
    "rank one": normal(40, 1) * normal(1, 30, seed=1),
    "zero": np.zeros((40, 30), np.float32),
    "tiny": normal(40, 30) * np.float32(1e-12),
    "huge": normal(40, 30) * np.float32(1e12),
    "entries from 1e-12 to 1e12": normal(40, 30) * np.geomspace(1e-12, 1e12, 30, dtype=np.float32),
    "positive": abs(normal(40, 30)),
}


SLOW = (
    *("valid", "strided", "stride beyond the window", "dilated", "grouped", "even window"),
    *("asymmetric padding", "window larger than the image"),
)


# Certified bounds


@pytest.mark.parametrize("name", DENSE)
def test_the_norm_of_a_dense_layer_lies_between_its_bounds(name):
    kernel = DENSE[name]
    lower, upper = map(float, lipschitz.dense_norm(kernel))
    sigma = truth(kernel)
    assert sigma * (1 - 1e-3) <= lower <= sigma * (1 + 1e-6)
    assert sigma <= upper <= 1.02 * sigma


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONVOLUTIONS]
)
def test_the_upper_bound_of_a_convolution_holds_and_is_tight(name):
    case = CONVOLUTIONS[name]
    sigma = truth(case.matrix())
    assert sigma <= case.upper() <= 1.02 * sigma


@pytest.mark.parametrize(
    "name", ["dilated and strided", pytest.param("depthwise", marks=pytest.mark.slow)]
)
def test_the_lower_bound_of_a_convolution_is_just_below_its_norm(name):
    kernel, shape, options = case = CONVOLUTIONS[name]
    lower, upper = lipschitz.conv_norm(kernel, shape, **options)
    sigma = truth(case.matrix())
    assert sigma * (1 - 1e-3) <= lower <= sigma * (1 + 1e-6)
    assert lower <= upper


@pytest.mark.parametrize(
    "name",
    [
        "dilated and strided",
        "padding larger than the image",
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_the_bound_over_frequencies_holds_on_the_smallest_images(name):
    kernel, shape, options = case = CONVOLUTIONS[name]
    layer = lipschitz.Conv(kernel, shape, **options)
    many = np.stack([kernel, *(normal(*kernel.shape, seed=seed) for seed in range(1, 10))])

    def bound(kernel):
        return layers._frequency_bound(dataclasses.replace(layer, kernel=kernel))

    upper = jax.jit(lambda kernels: jax.lax.map(bound, kernels))(many)
    assert np.all(upper >= truth(case._replace(kernel=many).matrix()))


def test_the_bound_over_frequencies_is_tight_on_larger_images():
    kernel = normal(3, 3, 2, 3)
    layer = lipschitz.Conv(kernel, (20, 20, 2), strides=(1, 2))
    sigma = truth(conv_matrix(kernel, (20, 20, 2), strides=(1, 2)))
    assert sigma <= jax.jit(layers._frequency_bound)(layer) <= 1.02 * sigma


@pytest.mark.parametrize("shape", [(3, 2), (300, 5)])
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_no_rounding_brings_the_bound_below_the_norm(shape, dtype):
    matrices = normal(200, *shape).astype(dtype)
    if dtype == np.complex64:
        matrices += 1j * normal(200, *shape, seed=1)
    sigma = np.linalg.norm(matrices.astype(np.complex128), 2, (1, 2))
    upper = jax.jit(jax.vmap(norm_bound))(matrices)
    assert np.all(upper >= sigma)
    assert np.all(upper <= 1.005 * sigma)


def test_bounds_are_tight_in_float64():
    with jax.enable_x64(True):
        kernel = np.asarray(DENSE["tall"], np.float64)
        lower, upper = map(np.asarray, lipschitz.dense_norm(kernel))
    assert lower.dtype == np.float64
    assert lower == pytest.approx(truth(kernel), rel=1e-12)
    assert truth(kernel) <= upper <= truth(kernel) * (1 + 1e-4)


def test_a_power_of_two_scales_the_bounds_exactly():
    case, kernel = CONVOLUTIONS["same"], DENSE["tall"]
    for scale in np.float32([2.0**-40, 2.0**40]):
        assert case._replace(kernel=case.kernel * scale).upper() == case.upper() * scale
        for one, scaled in zip(*map(lipschitz.dense_norm, (kernel, kernel * scale)), strict=True):
            assert scaled == one * scale


def test_vmap_over_kernels_gives_what_a_loop_gives():
    kernels = normal(3, 40, 30)
    together = jax.jit(jax.vmap(lambda kernel: lipschitz.dense_norm(kernel).upper))(kernels)
    for k, kernel in enumerate(kernels):
        np.testing.assert_allclose(together[k], lipschitz.dense_norm(kernel).upper, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_has_no_finite_bound(bad):
    assert np.isposinf(lipschitz.dense_norm(np.where(DENSE["tall"] > 3, bad, DENSE["tall"])).upper)


# Gradients


jacobian = jax.jit(jax.jacrev(lipschitz.dense_norm))


def test_the_gradient_of_both_bounds_is_that_of_the_norm():
    kernel = DENSE["tall"]
    left, _, right = np.linalg.svd(kernel)
    expected = np.outer(left[:, 0], right[0])
    lower, upper = jacobian(kernel)
    np.testing.assert_allclose(lower, expected, atol=1e-4)
    np.testing.assert_allclose(upper, expected, atol=1e-3)


def test_the_gradient_of_a_convolution_is_that_of_its_norm():
    kernel, shape, options = CONVOLUTIONS["strided"]
    direction = normal(*kernel.shape, seed=1)
    upper = jax.jit(lambda k: lipschitz.conv_norm(k, shape, **options).upper)
    norm, slope = jax.jvp(upper, (kernel,), (direction,))
    step = 1e-4
    ahead, behind = (
        truth(conv_matrix(kernel + sign * step * direction.astype(float), shape, **options))
        for sign in (1, -1)
    )
    assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-2)
    assert norm >= (ahead + behind) / 2 * (1 - 1e-6)


def test_the_gradient_at_a_kernel_of_zeros_is_zero():
    for gradient in jacobian(DENSE["zero"]):
        np.testing.assert_array_equal(gradient, 0)


# Estimates from below

ESTIMATES = {"lanczos": lipschitz.lanczos, "power iteration": lipschitz.power_iteration}
run = jax.jit(
    lambda kernel, key, method, **options: method(
        lambda x: jnp.matmul(x, kernel, precision="highest"), kernel[:, 0], key=key, **options
    ),
    static_argnames=("method", "num_steps", "num_starts", "tol"),
)


@pytest.mark.parametrize("method", ESTIMATES.values(), ids=ESTIMATES)
@pytest.mark.parametrize("name", [name for name in DENSE if DENSE[name].shape == (40, 30)])
def test_estimates_come_from_below(name, method):
    estimate = run(DENSE[name], jax.random.key(0), method)
    sigma = truth(DENSE[name])
    assert sigma * (1 - 1e-3) <= estimate.value <= sigma * (1 + 1e-6)
    assert estimate.residual <= 1e-3


def test_the_probable_bound_of_lanczos_holds_for_every_operator_and_start():
    keys = jax.random.split(jax.random.key(0), 50)
    for name in ("tall", "close top singular values", "rank one", "tiny"):
        kernel = DENSE[name]
        few = functools.partial(run, kernel, method=lipschitz.lanczos, num_steps=12)
        estimate = jax.vmap(few)(keys)
        assert np.all(estimate.upper >= truth(kernel))
        assert np.all(estimate.upper <= 2 * truth(kernel))


def test_lanczos_beats_power_iteration_for_the_same_products():
    kernel, key = DENSE["close top singular values"], jax.random.key(0)
    lanczos = run(kernel, key, lipschitz.lanczos)
    power = run(kernel, key, lipschitz.power_iteration, num_steps=30, tol=0)
    assert lanczos.num_steps == power.num_steps == 30
    error = np.abs(truth(kernel) - np.array([lanczos.value, power.value]))
    assert error[0] < error[1] / 10


def test_power_iteration_stops_at_its_tolerance():
    estimate = run(DENSE["rank one"], jax.random.key(0), lipschitz.power_iteration)
    assert estimate.num_steps < 5
    assert estimate.residual <= 1e-4


def test_estimates_take_any_linear_function_and_two_steps_tell_no_upper_bound():
    def difference(x):
        return 3 * (x[1:] - x[:-1])

    like = jax.ShapeDtypeStruct((8, 2), jnp.float32)
    two_steps = functools.partial(lipschitz.lanczos, difference, like, num_steps=2)
    estimate = jax.jit(lambda key: two_steps(key=key))(jax.random.key(0))
    norm = 3 * truth(np.diff(np.eye(8), axis=0))
    assert norm / 2 < estimate.value <= norm * (1 + 1e-6)
    assert np.isposinf(estimate.upper)
    assert estimate.num_steps == 2


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lipschitz.dense_norm(np.zeros(3, np.float32)), "kernel: shape"),
        (lambda: lipschitz.dense_norm(np.zeros((3, 3), int)), "kernel: dtype int"),
        (lambda: lipschitz.conv_norm(np.zeros((3, 3, 2, 4)), (8, 8)), "input_shape"),
        (lambda: lipschitz.conv_norm(np.zeros((3, 3, 2, 4)), (8, 8, 3)), "kernel: shape"),
        (lambda: lipschitz.conv_norm(np.zeros((3, 3, 2, 3)), (8, 8, 4), groups=2), "kernel: shape"),
        (lambda: lipschitz.conv_norm(np.zeros((3, 3, 2, 4)), (8, 8, 2), padding="same"), "padding"),
        (lambda: lipschitz.conv_norm(np.zeros((3, 3, 2, 4)), (8, 8, 2), strides=0), "strides"),
        (lambda: run(DENSE["tall"].astype(int), jax.random.key(0), lipschitz.lanczos), "like"),
        (lambda: run(DENSE["tall"], jax.random.key(0), lipschitz.lanczos, num_steps=0), "num_step"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
