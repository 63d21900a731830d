"""The penalty on layer norms: its gradient against the norms', and training with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from advjax import lipschitz, models
from advjax.training.lipschitz import lipschitz_penalty


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3), strides=2)(x))
        return nn.Dense(2)(jnp.ravel(x))


X = jnp.ones((5, 4, 1))


@functools.cache
def net():
    model = ConvNet()
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)
    return model, jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)


def log_product(params):
    conv, dense = (params["params"][name]["kernel"] for name in ("Conv_0", "Dense_0"))
    conv = lipschitz.conv_norm(conv, X.shape, strides=2).lower
    return jnp.log(conv) + jnp.log(lipschitz.dense_norm(dense).lower)


def test_the_penalty_adds_the_gradient_of_the_log_product_of_the_norms():
    model, params = net()
    transform = lipschitz_penalty(0.5, model.apply, X, num_steps=100)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(transform.update)(gradient, transform.init(params), params)
    value, expected = jax.jit(jax.value_and_grad(log_product))(params)
    assert state.log_product == pytest.approx(float(value), rel=1e-4)
    jax.tree.map(
        lambda u, e: np.testing.assert_allclose(u, 1 + 0.5 * e, atol=1e-3), updates, expected
    )


def test_the_vectors_that_are_carried_follow_the_weights():
    model, params = net()
    optimizer = optax.chain(lipschitz_penalty(1.0, model.apply, X), optax.sgd(0.1))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    state, start = optimizer.init(params), log_product(params)
    for _ in range(30):
        params, state = step(params, state)
    updated = step(params, state)[1]
    exact = log_product(params)
    assert exact < start - 0.2
    assert updated[0].log_product == pytest.approx(float(exact), abs=0.05)


def test_a_network_of_zeros_has_a_finite_update():
    model, params = net()
    zeros = jax.tree.map(jnp.zeros_like, params)
    transform = lipschitz_penalty(1.0, model.apply, X)
    updates, _ = jax.jit(transform.update)(zeros, transform.init(zeros), zeros)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


def test_options_and_missing_parameters_are_named():
    model, params = net()
    with pytest.raises(ValueError, match="weight"):
        lipschitz_penalty(-1.0, model.apply, X)
    with pytest.raises(ValueError, match="num_steps"):
        lipschitz_penalty(1.0, model.apply, X, num_steps=0)
    with pytest.raises(ValueError, match="apply"):
        lipschitz_penalty(1.0, lambda _, x: jnp.tanh(x), X).init(params)
    transform = lipschitz_penalty(1.0, models.Softmax(2).apply, X)
    params = {"params": {"logits": {"kernel": jnp.ones((20, 2)), "bias": jnp.zeros(2)}}}
    with pytest.raises(ValueError, match="params"):
        transform.update(params, transform.init(params))
