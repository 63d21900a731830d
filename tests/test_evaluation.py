"""A step and a query share one evaluation of the model, or are made side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax.attacks.evaluation import Query, step_or_ask

KERNEL = jax.random.normal(jax.random.key(0), (3, 4))
STATE, IMAGE = jnp.array([0.1, -0.4, 0.7]), jnp.array([1.0, 0.5, -0.2])
COTANGENT = jnp.array([0.0, 1.0, -1.0, 0.0])


def model(x):
    return jnp.sin(x) @ KERNEL


def descend(logits_fn, x):
    return x - 0.1 * jax.grad(lambda x: jax.nn.logsumexp(logits_fn(x)))(x)


def in_a_loop(logits_fn, x):
    return jax.lax.fori_loop(0, 2, lambda _, x: descend(logits_fn, x), x)


def in_a_condition(logits_fn, x):
    return jax.lax.cond(x[0] > 0, lambda x: descend(logits_fn, x), lambda x: x, x)


def twice(logits_fn, x):
    return descend(logits_fn, descend(logits_fn, x))


def with_a_prediction(logits_fn, x):
    return jnp.where(jnp.argmax(logits_fn(x)) == 0, 0, descend(logits_fn, x))


def side_by_side(logits_fn, x):
    return jax.vmap(lambda x: descend(logits_fn, x))(jnp.stack([x, 2 * x])).sum(0)


def never(logits_fn, x):
    return x + 1


each_step = pytest.mark.parametrize(
    "step", [descend, in_a_loop, in_a_condition, twice, with_a_prediction, side_by_side, never]
)


def answer(step, ask, state=STATE):
    query = Query(IMAGE, lambda logits: COTANGENT * logits)
    return step_or_ask(step, state, model, ask=ask, query=query)


@each_step
def test_the_state_is_stepped_unless_asked(step):
    state, _, _ = jax.jit(lambda ask: answer(step, ask))(False)
    np.testing.assert_allclose(state, step(model, STATE), rtol=1e-6)


@each_step
def test_the_query_is_answered_and_the_state_stays(step):
    state, logits, gradient = jax.jit(lambda ask: answer(step, ask))(True)
    np.testing.assert_array_equal(state, STATE)
    np.testing.assert_allclose(logits, model(IMAGE), rtol=1e-6)
    _, pullback = jax.vjp(model, IMAGE)
    np.testing.assert_allclose(gradient, pullback(COTANGENT * model(IMAGE))[0], rtol=1e-5)


@each_step
def test_lanes_take_turns(step):
    asks, states = jnp.array([True, False, True]), jnp.stack([STATE, STATE + 1, STATE - 1])
    together = jax.vmap(lambda ask, state: answer(step, ask, state))(asks, states)
    for i, ask in enumerate(asks):
        alone = answer(step, ask, states[i])
        np.testing.assert_allclose(together[0][i], alone[0], rtol=1e-5)
        if ask:
            np.testing.assert_allclose(together[1][i], alone[1], rtol=1e-5)
            np.testing.assert_allclose(together[2][i], alone[2], rtol=1e-5)


def sines(step):
    return str(jax.make_jaxpr(lambda ask: answer(step, ask))(False)).count(" sin ")


def test_a_plain_step_takes_one_evaluation_and_another_its_own_beside():
    assert sines(descend) == 1
    assert sines(never) == 1
    assert sines(twice) == 3


def test_without_jit_all_is_the_same():
    with jax.disable_jit():
        state, _, _ = answer(descend, jnp.bool_(False))
    np.testing.assert_allclose(state, descend(model, STATE), rtol=1e-6)
