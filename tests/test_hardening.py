"""What holds of every network, box, precision and size, and under the switches for debugging."""

import functools
import warnings
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, solvers
from tests.attack_list import each_attack
from tests.test_attacks_failures import Status, X, check_invariants, linear

# Random networks in random boxes.


class Net(NamedTuple):
    """The parameters of two layers, and where they have no value."""

    hidden: np.ndarray
    logits: np.ndarray
    horizon: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def apply(activation, net, x):
    """Logits of one example; NaN with NaN for a gradient where its mean is beyond the horizon."""
    logits = activation(jnp.ravel(x) @ net.hidden) @ net.logits
    return logits * jnp.where(jnp.mean(x) > net.horizon, jnp.nan, 1).astype(x.dtype)


@functools.cache
def compiled(attack, activation, max_evals):
    @jax.jit
    def run(net, x, target, box):
        model = functools.partial(apply, activation, net)
        return attack(model, box=box, max_evals=max_evals)(x, target)

    return run


@each_attack
@pytest.mark.parametrize(
    ("dtype", "shape", "width", "activation", "max_evals"),
    [
        (jnp.bfloat16, (3, 2), 6, jnp.tanh, 40),
        (jnp.float16, (5,), 6, jax.nn.relu, 40),
        (jnp.float32, (), 1, jnp.tanh, 40),
        (jnp.float32, (3, 2), 6, jax.nn.relu, 2),
        (jnp.float32, (2, 3, 1), 1, jax.nn.relu, 40),
        (jnp.float64, (1,), 6, jnp.tanh, 40),
    ],
)
@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    scale=st.floats(0.01, 100),
    horizon=st.sampled_from([-1.0, 0.5, 0.6, np.inf]),
    target=st.integers(-1, 3),
    low=st.floats(-2, 1, width=16, allow_subnormal=False),
    extent=st.floats(-0.125, 3, width=16, allow_subnormal=False),
    fixed=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_every_result_keeps_the_invariants(
    attack, dtype, shape, width, activation, max_evals,
    seed, scale, horizon, target, low, extent, fixed,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.5, 1.5, shape)
    net = Net(
        hidden=rng.normal(size=(x.size, width)),
        logits=scale * rng.normal(size=(width, 3)),
        horizon=np.float64(horizon),
    )
    upper = np.where(rng.uniform(size=shape) < fixed, low, low + extent)
    with jax.enable_x64(dtype == jnp.float64):
        net, x, box = jax.tree.map(
            lambda array: jnp.asarray(array, dtype), (net, x, (np.full(shape, low), upper))
        )
        result = compiled(attack, activation, max_evals)(net, x, target, box)
        check_invariants(result, functools.partial(apply, activation, net), x, target, box)
        assert int(result.num_evals) <= max_evals


@each_attack
def test_a_million_pixels_are_attacked_like_any_other_number(attack):
    """Two classes with a plane between them, to which the box leaves the way free."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.uniform(keys[0], (1000, 1000), minval=0.25, maxval=0.75)
    normal = jax.random.normal(keys[1], (x.size,))

    def logits_fn(x):
        return jnp.stack([1 + normal @ (x - 0.5).ravel(), jnp.zeros(())])

    label = jnp.argmax(logits_fn(x))
    result = jax.jit(attack(logits_fn))(x, 1 - label)
    check_invariants(result, jax.jit(logits_fn), x, int(1 - label), (0.0, 1.0))
    assert bool(result.success)
    nearest = jnp.abs(logits_fn(x)[0]) / jnp.linalg.norm(normal) / 1000
    assert float(result.distortion) == pytest.approx(float(nearest), rel=5e-3)


# The switches for debugging.


def test_rank_promotion_and_warnings_are_errors_in_these_tests():
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion"):
        jnp.zeros(2) + jnp.zeros((2, 2))
    with pytest.raises(UserWarning, match="unheard"):
        warnings.warn("unheard", stacklevel=1)


@each_attack
def test_debug_nans_finds_none_in_an_attack_on_digits(attack, fc10):
    with jax.debug_nans(True):
        run = attack(fc10.logits_fn)
        results = jax.jit(jax.vmap(run))(fc10.images[:5], fc10.targets[:5])
        untargeted = attacks.untargeted(attack(fc10.logits_fn), k=1)(fc10.images[0], 0)
    assert bool(jnp.all(results.success))
    assert bool(untargeted.success)


def test_debug_nans_finds_none_in_minimize():
    with jax.debug_nans(True):
        result = solvers.minimize(lambda x: jnp.sum((x - 2) ** 4), jnp.zeros(3), box=(0, 1))
    np.testing.assert_array_equal(result.x, 1)


@each_attack
def test_debug_nans_names_the_operation_that_gave_the_model_s_nan(attack):
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match=r"nan.* in log"):
        attack(lambda x: jnp.log(linear(x) - 100))(X, 1)


@each_attack
def test_failure_is_data_under_debug_nans_too(attack):
    """Inside `jit` a NaN of the model ends in the status, and leaves no other trace."""
    with jax.debug_nans(True):
        result = jax.jit(lambda: attack(lambda x: jnp.log(linear(x) - 100))(X, 1))()
    assert int(result.status) == Status.NONFINITE
