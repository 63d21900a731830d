"""Searches that start elsewhere than from the image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, runner
from tests.oracles import nearest_in_half_spaces, rms

START = attacks.decoupled(num_steps=20)


def linear(seed=0, n=12, classes=4):
    weights_key, x_key = jax.random.split(jax.random.key(seed))
    kernel = jax.random.normal(weights_key, (n, classes))
    x = jax.random.uniform(x_key, (n,), minval=0.2, maxval=0.8)
    return lambda x: x @ kernel, x, kernel


def test_the_walk_ends_in_the_box_at_an_adversarial_image():
    logits_fn, x, _ = linear()
    for target in range(4):
        found = START.find(logits_fn, x, jnp.int32(target), (0.0, 1.0))
        assert jnp.all((found >= 0) & (found <= 1))
        assert jnp.argmax(logits_fn(found)) == target


def test_where_there_is_one_minimum_every_start_leads_there():
    logits_fn, x, kernel = linear(1)
    label = int(jnp.argmax(logits_fn(x)))
    for target in {0, 1, 2, 3} - {label}:
        nearest = nearest_in_half_spaces(x, target, kernel, jnp.zeros(4))
        found = attacks.minimum_norm(logits_fn, start=START)(x, target)
        assert found.success
        assert found.distortion == pytest.approx(rms(nearest, x), rel=2e-3)


def test_the_evaluations_of_the_start_are_counted():
    logits_fn, x, _ = linear()
    evaluations = 0

    def counted(x):
        def count():
            nonlocal evaluations
            evaluations += 1

        jax.debug.callback(count)
        return logits_fn(x)

    target = (int(jnp.argmax(logits_fn(x))) + 1) % 4
    found = attacks.minimum_norm(counted, start=START)(x, target)
    jax.effects_barrier()
    # One prediction more for the result, and one of the clean image, for the check of its logits.
    assert evaluations == found.num_evals + 2
    short = attacks.minimum_norm(logits_fn, start=START, max_evals=25)(x, target)
    assert short.num_evals <= 25


def test_an_image_of_the_target_class_stays_as_it_is():
    logits_fn, x, _ = linear()
    target = int(jnp.argmax(logits_fn(x)))
    found = attacks.minimum_norm(logits_fn, start=START)(x, target)
    assert found.distortion == 0
    assert found.status == attacks.Status.ALREADY_TARGET


def test_a_batch_and_the_runner_give_what_a_loop_gives():
    logits_fn, _, _ = linear()
    xs = jax.random.uniform(jax.random.key(7), (5, 12))
    targets = jnp.arange(5) % 4
    attack = attacks.minimum_norm(logits_fn, start=START)
    loop = [attack(x, t) for x, t in zip(xs, targets, strict=True)]
    batch = jax.vmap(attack)(xs, targets)
    run = runner.attack_images(attack, xs, targets, batch_size=2)
    for i, one in enumerate(loop):
        np.testing.assert_allclose(batch.distortion[i], one.distortion, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(run.distortion[i], one.distortion, rtol=1e-3, atol=1e-6)


def test_images_and_models_that_are_not_finite_leave_an_image_in_the_box():
    logits_fn, x, _ = linear()
    for fn, image in ((logits_fn, x.at[0].set(jnp.nan)), (lambda x: logits_fn(x) / 0, x)):
        found = attacks.minimum_norm(fn, start=START)(image, 1)
        assert not found.success
        assert jnp.all((found.x_adv >= 0) & (found.x_adv <= 1))


def test_two_starts_of_as_many_steps_are_the_same_to_a_compiled_program():
    one, other = (jax.tree.flatten(attacks.decoupled(num_steps=7)) for _ in range(2))
    assert one == other


def test_options_are_checked():
    logits_fn, x, _ = linear()
    for wrong in (0, 1.5):
        with pytest.raises((TypeError, ValueError), match="num_steps"):
            attacks.decoupled(num_steps=wrong)
    with pytest.raises(ValueError, match="max_evals"):
        attacks.minimum_norm(logits_fn, start=START, max_evals=21)(x, 1)
