"""The metrics against NumPy."""

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
def test_margin_is_the_lead_over_the_best_other_class(label, shift):
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
def test_the_error_rate_asks_for_one_label_for_each_image(n, labels):
    with pytest.raises(ValueError, match=f"labels: .* for {n} images, expected one label for each"):
        metrics.error_rate(jnp.ravel, jnp.zeros((n, 2)), np.asarray(labels, np.int32))
