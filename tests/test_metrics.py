"""The metrics against NumPy."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import metrics


def test_distortion_is_the_rms_of_the_difference():
    x, x_adv = np.random.default_rng(0).uniform(size=(2, 28, 28, 1)).astype(np.float32)
    expected = np.sqrt(np.mean((x_adv.astype(np.float64) - x) ** 2))
    np.testing.assert_allclose(metrics.distortion(x, x_adv), expected, rtol=1e-6)


def test_distortion_of_an_mnist_image_is_its_l2_distance_over_28():
    x = np.zeros((28, 28, 1), np.float32)
    x_adv = x.copy()
    x_adv[3, 4] = 0.7
    assert 28 * metrics.distortion(x, x_adv) == pytest.approx(0.7)


def test_the_gradient_of_the_distortion_at_no_distortion_is_zero():
    x = jnp.full((4, 4), 0.5)
    np.testing.assert_array_equal(jax.grad(metrics.distortion, argnums=1)(x, x), np.zeros((4, 4)))


def test_distortion_refuses_images_of_different_shapes():
    with pytest.raises(ValueError, match=r"x_adv: shape \(28, 28\), expected \(28, 28, 1\)"):
        metrics.distortion(jnp.zeros((28, 28, 1)), jnp.zeros((28, 28)))


def test_distortion_refuses_bytes_whose_difference_would_wrap_around():
    x = np.array([0, 255], np.uint8)
    with pytest.raises(TypeError, match=r"x: dtype uint8, .*scale 8-bit images"):
        metrics.distortion(x, x[::-1])


@pytest.mark.parametrize("shift", [-9, 0, 9])  # all negative, mixed, all positive
@pytest.mark.parametrize("label", range(4))
def test_margin_is_the_difference_to_the_largest_other_logit(label, shift):
    logits = np.random.default_rng(1).normal(shift, size=4).astype(np.float32)
    expected = logits[label] - np.delete(logits, label).max()
    np.testing.assert_allclose(metrics.margin(logits, label), expected, rtol=1e-6)


def test_margin_maps_over_traced_labels_and_its_sign_says_who_is_right():
    logits = np.random.default_rng(2).normal(size=(50, 5)).astype(np.float32)
    labels = np.arange(50) % 5
    margins = jax.jit(jax.vmap(metrics.margin))(logits, labels)
    np.testing.assert_array_equal(margins > 0, logits.argmax(1) == labels)


def test_the_gradient_of_the_margin_is_one_at_the_label_and_minus_one_at_its_rival():
    gradient = jax.grad(metrics.margin)(jnp.array([0.3, 2.0, 1.0, -4.0]), 2)
    np.testing.assert_array_equal(gradient, [0, -1, 1, 0])


def test_margin_of_a_batch_of_logits_points_to_vmap():
    with pytest.raises(ValueError, match=r"logits: shape \(4, 3\).*vmap"):
        metrics.margin(jnp.zeros((4, 3)), 1)


@pytest.mark.parametrize("batch_size", [1, 3, 11, 1000])
def test_the_error_rate_counts_every_image_whatever_the_batch_size(batch_size):
    images = np.random.default_rng(3).normal(size=(11, 2, 3)).astype(np.float32)
    labels = np.random.default_rng(4).integers(6, size=11)
    rate = metrics.error_rate(jnp.ravel, images, labels, batch_size=batch_size)
    assert rate == pytest.approx(np.mean(images.reshape(11, 6).argmax(1) != labels))
    assert isinstance(rate, float)


@pytest.mark.parametrize(("n", "labels"), [(3, np.zeros(2)), (3, np.zeros((3, 10))), (0, [])])
def test_the_error_rate_needs_one_label_per_image(n, labels):
    with pytest.raises(
        ValueError, match=f"labels: .* for {n} images, expected one label per image"
    ):
        metrics.error_rate(jnp.ravel, jnp.zeros((n, 2)), np.asarray(labels, np.int32))


# --- one compilation for a function and its shapes ---------------------------------------------


KEY = jax.random.key(0)


class Unhashable:
    """A callable with an equality of its own, and so without a hash."""

    __hash__ = None

    def __init__(self, logits_fn):
        self.logits_fn = logits_fn

    def __eq__(self, other):
        return True

    def __call__(self, x):
        return self.logits_fn(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A callable pytree."""

    kernel: jax.Array

    def __call__(self, x):
        return x @ self.kernel


def linear(kernel, x):
    return x @ kernel


def by_keyword(x, *, kernel):
    return x @ kernel


KINDS = {
    "a partial": lambda kernel: functools.partial(linear, kernel),
    "a partial of keywords": lambda kernel: functools.partial(by_keyword, kernel=kernel),
    "a Partial": lambda kernel: jax.tree_util.Partial(linear, kernel),
    "a callable pytree": Linear,
    "an Equinox module": lambda kernel: eqx.nn.Lambda(functools.partial(linear, kernel)),
    "an Equinox layer": lambda kernel: eqx.tree_at(
        lambda layer: layer.weight, eqx.nn.Linear(6, 4, use_bias=False, key=KEY), kernel.T
    ),
    "a closure": lambda kernel: lambda x: linear(kernel, x),
    "an unhashable callable": lambda kernel: Unhashable(functools.partial(linear, kernel)),
}
PYTREES = (*list(KINDS)[:4], "an Equinox layer")


def error_problem():
    rng = np.random.default_rng(5)
    kernels = jnp.asarray(rng.normal(size=(2, 6, 4)), jnp.float32)
    images = jnp.asarray(rng.normal(size=(30, 6)), jnp.float32)
    labels = rng.integers(4, size=30)
    expected = [np.mean((images @ k).argmax(1) != labels) for k in kernels]
    assert expected[0] != expected[1]
    return kernels, images, labels, expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_error_rate_of_a_function_compiles_nothing(kind, compilations):
    kernels, images, labels, expected = error_problem()
    logits_fn = KINDS[kind](kernels[0])
    assert metrics.error_rate(logits_fn, images, labels) == pytest.approx(expected[0])
    assert compilations
    compilations.clear()
    assert metrics.error_rate(logits_fn, images, labels) == pytest.approx(expected[0])
    assert not compilations


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_rate_of_another_model_of_the_same_shapes_is_its_own(kind, compilations):
    kernels, images, labels, expected = error_problem()
    models = [KINDS[kind](kernel) for kernel in kernels]
    metrics.error_rate(models[0], images, labels)
    compilations.clear()
    assert metrics.error_rate(models[1], images, labels) == pytest.approx(expected[1])
    if kind in PYTREES:
        assert not compilations


def test_the_error_rate_of_a_closure_is_that_of_the_parameters_as_they_are_now(compilations):
    kernels, images, labels, expected = error_problem()
    params = {"kernel": kernels[0]}

    def logits_fn(x):
        return x @ params["kernel"]

    metrics.error_rate(logits_fn, images, labels)
    compilations.clear()
    params["kernel"] = kernels[1]
    assert metrics.error_rate(logits_fn, images, labels) == pytest.approx(expected[1])
    assert not compilations


def test_the_error_rates_of_partials_of_equal_numbers_of_two_types_are_their_own():
    kernels, images, labels, expected = error_problem()

    def choose(number, x):
        return x @ kernels[int(isinstance(number, float))]

    rates = [
        metrics.error_rate(functools.partial(choose, number), images, labels) for number in (1, 1.0)
    ]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_predictions_refuse_a_batch_model_by_name():
    with pytest.raises(ValueError, match=r"logits_fn: returns shape \(1, 4\)"):
        metrics.predictions(lambda x: x[None], jnp.zeros((3, 4)))


def test_predictions_of_no_images_are_refused():
    with pytest.raises(ValueError, match=r"images: .*expected at least one image"):
        metrics.predictions(lambda x: x, jnp.zeros((0, 4)))
