"""The attacks on networks trained on MNIST, against SciPy and an exact quadratic program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import Box, attacks, losses, metrics, solvers
from experiments.common.peers import scipy_lbfgs
from tests.attack_list import each_attack
from tests.oracles import nearest_in_half_spaces, rms


@functools.cache
def attack_all(attack, victims, **options):
    """One attack on all images of one network."""
    run = jax.jit(jax.vmap(attack(victims.logits_fn, **options)))
    return run(victims.images, victims.targets)


@pytest.fixture(params=["fc10", "fc100"])
def victims(request):
    """Each of the two trained networks."""
    return request.getfixturevalue(request.param)


def gold(victims):
    """SciPy's L-BFGS-B in float64, c bisected 20 times on a log scale."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), victims.params)
        peer = scipy_lbfgs(functools.partial(victims.model.apply, params))
        images = np.asarray(victims.images, np.float64)
        return [peer(x, int(t)) for x, t in zip(images, victims.targets, strict=True)]


@pytest.fixture(scope="session")
def gold_distortions(fc10, fc100):
    """The mean distortion of SciPy's attack on each network."""
    golds = {net: gold(net) for net in (fc10, fc100)}
    assert all(result.success for results in golds.values() for result in results)
    return {net: np.mean([r.distortion for r in results]) for net, results in golds.items()}


@each_attack
def test_every_image_is_taken_for_its_target_in_float64_too(attack, victims):
    result = attack_all(attack, victims)
    assert bool(jnp.all(result.success))
    np.testing.assert_array_equal(result.status, attacks.Status.CONVERGED)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), victims.params)
        logits_fn = functools.partial(victims.model.apply, params)
        x_adv = jnp.asarray(np.asarray(result.x_adv), jnp.float64)
        np.testing.assert_array_equal(jax.vmap(logits_fn)(x_adv).argmax(1), victims.targets)
        for one, target in zip(x_adv, victims.targets, strict=True):
            assert int(logits_fn(one).argmax()) == int(target)


def test_lbfgs_is_as_near_as_scipy_in_a_fraction_of_its_evaluations(victims, gold_distortions):
    result = attack_all(attacks.lbfgs, victims)
    assert float(result.distortion.mean()) <= 1.003 * gold_distortions[victims]
    assert float(result.num_evals.mean()) <= 60


def test_minimum_norm_is_one_percent_nearer_than_the_penalised_objective(fc100, gold_distortions):
    """How much nearer depends on the network: 0.98 to 1.06 % on four that differ by their seeds."""
    result = attack_all(attacks.minimum_norm, fc100)
    assert float(result.distortion.mean()) <= 0.99 * gold_distortions[fc100]
    assert float(result.num_evals.mean()) <= 60


def test_minimum_norm_reaches_the_exact_optimum_of_a_linear_network(fc10):
    result = attack_all(attacks.minimum_norm, fc10)
    layer = fc10.params["params"]["logits"]
    exact = np.array(
        [
            rms(x, nearest_in_half_spaces(x, int(t), layer["kernel"], layer["bias"]))
            for x, t in zip(fc10.images, fc10.targets, strict=True)
        ]
    )
    found = np.asarray(result.distortion, np.float64)
    assert np.all(found >= exact * (1 - 1e-5)), "nothing is nearer than the optimum"
    assert found.mean() <= 1.0005 * exact.mean()
    assert np.all(found <= 1.002 * exact)
    assert float(result.num_evals.mean()) <= 60


def test_the_norm_of_the_paper_as_printed_works_too(victims, gold_distortions):
    result = attack_all(attacks.lbfgs, victims, penalty=losses.l2)
    assert bool(jnp.all(result.success))
    assert float(result.distortion.mean()) <= 1.01 * gold_distortions[victims]


def test_the_multiplier_of_lbfgs_is_the_c_that_its_point_minimises(fc100):
    x, target = fc100.images[0], fc100.targets[0]
    result = attacks.lbfgs(fc100.logits_fn, tol=1e-3)(x, target)

    def objective(x_adv):
        loss = losses.cross_entropy(fc100.logits_fn(x_adv), target)
        return result.multiplier * losses.squared_l2(x_adv - x) + loss

    best = solvers.minimize(objective, x, box=Box(), max_evals=500)
    np.testing.assert_allclose(objective(result.x_adv), best.value, rtol=1e-4)
    np.testing.assert_allclose(result.distortion, metrics.distortion(x, best.x), rtol=5e-3)


def test_the_multiplier_of_minimum_norm_tells_what_more_margin_costs(fc10):
    run = functools.partial(attacks.minimum_norm, fc10.logits_fn, tol=1e-4)
    x, target = fc10.images[1], fc10.targets[1]
    less, more = run(confidence=0.5)(x, target), run(confidence=0.6)(x, target)
    growth = x.size * (more.distortion**2 - less.distortion**2) / 2
    np.testing.assert_allclose(growth, 0.1 * (less.multiplier + more.multiplier) / 2, rtol=0.02)


@each_attack
@pytest.mark.parametrize("confidence", [0.0, 0.01, 3.0])
def test_confidence_is_the_margin_of_the_target(attack, confidence, fc100):
    run = jax.vmap(attack(fc100.logits_fn, confidence=confidence))
    result = run(fc100.images[:10], fc100.targets[:10])
    margins = jax.vmap(metrics.margin)(jax.vmap(fc100.logits_fn)(result.x_adv), fc100.targets[:10])
    assert bool(jnp.all(result.success))
    assert float(margins.min()) >= confidence - 1e-5
    assert float(margins.max()) <= confidence + 0.1


@each_attack
def test_scaling_the_pixels_scales_the_answer(attack, fc100):
    images, targets = fc100.images[:20], fc100.targets[:20]
    plain = jax.vmap(attack(fc100.logits_fn))(images, targets)
    scaled = attack(lambda x: fc100.logits_fn(x / 255), box=(0, 255))
    result = jax.vmap(scaled)(255 * images, targets)
    assert bool(jnp.all(result.success))
    # The median, as rounding may lead a few images to another local minimum.
    assert float(jnp.median(result.distortion / plain.distortion)) == pytest.approx(255, rel=1e-3)
    assert float(result.num_evals.mean()) <= 1.2 * float(plain.num_evals.mean())


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scaling_the_logits_leaves_the_nearest_image_as_it_is(scale, fc100):
    images, targets = fc100.images[:20], fc100.targets[:20]
    plain = jax.vmap(attacks.minimum_norm(fc100.logits_fn))(images, targets)
    scaled = attacks.minimum_norm(lambda x: scale * fc100.logits_fn(x))
    result = jax.vmap(scaled)(images, targets)
    assert bool(jnp.all(result.success))
    assert float(jnp.median(result.distortion / plain.distortion)) == pytest.approx(1, rel=1e-3)
    assert float(result.num_evals.mean()) <= 1.2 * float(plain.num_evals.mean())


def test_a_thousand_classes_take_about_as_many_evaluations(fc100):
    """A thousand random classes on the net's last hidden layer; the target is the fifth."""

    def hidden(x):
        return fc100.model.apply(fc100.params, x, method="layers")["hidden2"]

    head = 2 * jax.random.normal(jax.random.key(0), (100, 1000))
    origin = hidden(jnp.zeros_like(fc100.images[0]))

    def thousand(x):
        return (hidden(x) - origin) @ head

    images = fc100.images[:20]
    targets = jnp.argsort(jax.vmap(thousand)(images), axis=1)[:, -5]
    result = jax.vmap(attacks.minimum_norm(thousand))(images, targets)
    penalised = jax.vmap(attacks.lbfgs(thousand))(images, targets)
    assert bool(jnp.all(result.success))
    assert float(result.num_evals.mean()) <= 100
    assert float(result.distortion.mean()) <= 0.95 * float(penalised.distortion.mean())


@each_attack
def test_another_solver_may_be_passed(attack, fc100):
    run = functools.partial(attack, fc100.logits_fn)
    images, targets = fc100.images[:3], fc100.targets[:3]
    plain = jax.vmap(run())(images, targets)
    other = jax.vmap(run(solver=solvers.jaxopt_lbfgsb()))(images, targets)
    assert bool(jnp.all(other.success))
    np.testing.assert_allclose(other.distortion, plain.distortion, rtol=0.02)


@each_attack
def test_untargeted_is_the_nearest_of_all_targets(attack, fc10):
    x = fc10.images[0]
    label = jnp.argmax(fc10.logits_fn(x))
    result = attacks.untargeted(attack(fc10.logits_fn))(x, label)
    every = jax.vmap(lambda t: attack(fc10.logits_fn)(x, t))(jnp.arange(10))
    others = np.delete(np.asarray(every.distortion), int(label))
    np.testing.assert_allclose(result.distortion, others.min(), rtol=1e-4)
    assert int(result.num_evals) >= 9 * int(every.num_evals.min())
    assert int(result.prediction) != int(label)
    one = attacks.untargeted(attack(fc10.logits_fn), k=1)(x, label)
    second = int(jnp.argsort(fc10.logits_fn(x))[-2])
    np.testing.assert_allclose(one.distortion, every.distortion[second], rtol=1e-4)


def test_untargeted_leaves_alone_what_the_network_gets_wrong_already(fc10):
    x = fc10.images[0]
    wrong = (jnp.argmax(fc10.logits_fn(x)) + 1) % 10
    result = attacks.untargeted(attacks.lbfgs(fc10.logits_fn), k=3)(x, wrong)
    assert float(result.distortion) == 0
    assert bool(result.success)
