"""The losses against SciPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from advjax import losses


def test_cross_entropy_is_the_negative_log_softmax_of_the_target():
    logits = np.random.default_rng(0).normal(size=7).astype(np.float32)
    for target in range(7):
        expected = -special.log_softmax(logits.astype(np.float64))[target]
        np.testing.assert_allclose(losses.cross_entropy(logits, target), expected, rtol=1e-5)


def test_the_gradient_of_cross_entropy_is_the_softmax_less_the_one_hot_target():
    logits = np.random.default_rng(1).normal(size=5).astype(np.float32)
    gradient = jax.grad(losses.cross_entropy)(logits, 3)
    np.testing.assert_allclose(gradient, special.softmax(logits) - np.eye(5)[3], atol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    value, gradient = jax.value_and_grad(losses.cross_entropy)(jnp.array([1e30, -1e30, 0.0]), 1)
    assert value == pytest.approx(2e30)
    assert np.isfinite(gradient).all()


def test_cross_entropy_maps_over_a_batch_with_traced_targets():
    logits = np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32)
    targets = np.array([2, 0, 1, 2])
    batch = jax.jit(jax.vmap(losses.cross_entropy))(logits, targets)
    one_by_one = [losses.cross_entropy(z, t) for z, t in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(batch, one_by_one, rtol=1e-6)


def test_cross_entropy_of_a_batch_of_logits_points_to_vmap():
    with pytest.raises(ValueError, match=r"logits: shape \(4, 3\).*vmap"):
        losses.cross_entropy(jnp.zeros((4, 3)), 1)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (1.0, TypeError, "expected an integer class index"),
        (np.array([0, 1, 0]), ValueError, "expected one class index"),
    ],
)
def test_a_target_that_is_not_one_integer_class_is_refused(target, error, message):
    with pytest.raises(error, match=f"target: .*{message}"):
        losses.cross_entropy(jnp.zeros(3), target)


@pytest.mark.parametrize("shape", [(), (5,), (3, 2, 4)])
def test_the_l2_losses_are_those_of_the_flattened_perturbation(shape):
    r = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    length = np.linalg.norm(np.ravel(r).astype(np.float64))
    np.testing.assert_allclose(losses.l2(r), length, rtol=1e-6)
    np.testing.assert_allclose(losses.squared_l2(r), length**2, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(losses.l2)(r), r / length, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(losses.squared_l2)(r), 2 * r, rtol=1e-6)


def test_the_gradient_of_the_l2_length_is_zero_where_every_attack_starts():
    value, gradient = jax.value_and_grad(losses.l2)(jnp.zeros((2, 3, 1)))
    assert value == 0
    np.testing.assert_array_equal(gradient, np.zeros((2, 3, 1)))


@pytest.mark.parametrize("shape", [(), (5,), (3, 2, 4)])
@pytest.mark.parametrize(("loss", "order"), [(losses.l1, 1), (losses.linf, np.inf)])
def test_the_l1_and_linf_losses_are_the_norms_of_the_flattened_perturbation(shape, loss, order):
    r = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    expected = np.linalg.norm(np.ravel(r).astype(np.float64), order)
    np.testing.assert_allclose(loss(r), expected, rtol=1e-6)


def test_the_gradient_of_l1_is_the_sign_of_each_entry():
    r = jnp.array([[0.5, -2.0], [0.0, 1e-30]])
    np.testing.assert_array_equal(jax.grad(losses.l1)(r), [[1, -1], [0, 1]])


def test_the_gradient_of_linf_is_the_sign_of_the_largest_entry_divided_among_equal_ones():
    np.testing.assert_array_equal(jax.grad(losses.linf)(jnp.array([0.5, -2.0, 1.0])), [0, -1, 0])
    gradient = jax.grad(losses.linf)(jnp.array([2.0, -2.0, 1.0]))
    np.testing.assert_array_equal(gradient, [0.5, -0.5, 0])


@pytest.mark.parametrize("loss", [losses.l1, losses.linf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradients_of_l1_and_linf_are_zero_where_every_attack_starts(loss, dtype):
    value, gradient = jax.value_and_grad(loss)(jnp.zeros((2, 3, 1), dtype))
    assert value == 0
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, np.zeros((2, 3, 1)))


def test_the_losses_keep_double_precision():
    with jax.enable_x64(True):
        r = jnp.array([3.0, 4.0 + 1e-12])
        assert losses.l2(r) == np.linalg.norm(r)
        assert losses.l1(r) == 7 + 1e-12
        assert losses.linf(-r) == 4 + 1e-12
        assert losses.squared_l2(r).dtype == losses.cross_entropy(r, 0).dtype == jnp.float64
