"""The attacks under jax's transformations, and around models of every library."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from advjax import losses, models
from tests.attack_list import each_attack

SHAPE, CLASSES = (4, 5, 1), 4
KEYS = jax.random.split(jax.random.key(0), 4)
IMAGES = jax.random.uniform(KEYS[0], (6, *SHAPE))
MODEL = models.MLP((12, CLASSES), activation=jnp.tanh)


def parameters(key):
    """A small network that is sure enough of itself to need an attack."""
    params = MODEL.init(key, IMAGES[0])
    return jax.tree.map(lambda leaf: 3 * leaf, params)


PARAMS = parameters(KEYS[1])
TARGETS = (jax.vmap(functools.partial(MODEL.apply, PARAMS))(IMAGES).argmax(1) + 1) % CLASSES


def assert_same(one, other, rtol=1e-3):
    np.testing.assert_array_equal(one.success, other.success)
    np.testing.assert_array_equal(one.prediction, other.prediction)
    np.testing.assert_allclose(one.distortion, other.distortion, rtol=rtol, atol=1e-6)


@each_attack
def test_vmap_gives_what_a_python_loop_gives(attack):
    run = jax.jit(attack(functools.partial(MODEL.apply, PARAMS)))
    together = jax.vmap(run)(IMAGES, TARGETS)
    loop = [run(x, target) for x, target in zip(IMAGES, TARGETS, strict=True)]
    assert_same(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop))
    assert bool(jnp.all(together.success))


@each_attack
def test_vmap_over_parameters_attacks_each_network(attack):
    nets = [parameters(key) for key in jax.random.split(KEYS[2], 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nets)

    @jax.jit
    def run(params, x, target):
        return attack(functools.partial(MODEL.apply, params))(x, target)

    together = jax.vmap(jax.vmap(run, in_axes=(None, 0, 0)), in_axes=(0, None, None))(
        stacked, IMAGES, TARGETS
    )
    for i, params in enumerate(nets):
        alone = jax.vmap(run, in_axes=(None, 0, 0))(params, IMAGES, TARGETS)
        # Other matrix products round otherwise, and may lead a few to another local minimum nearby.
        one = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_same(one, alone, rtol=0.05)
        assert float(jnp.median(jnp.abs(one.distortion - alone.distortion))) < 1e-4


@each_attack
def test_vmap_over_targets_and_boxes(attack):
    logits_fn = functools.partial(MODEL.apply, PARAMS)

    def run(target, lower, upper):
        return attack(logits_fn, box=(lower, upper))(IMAGES[0], target)

    lowers, uppers = jnp.array([0.0, -1.0, -0.2]), jnp.array([1.0, 2.0, 1.1])
    result = jax.vmap(run)(jnp.full(3, TARGETS[0]), lowers, uppers)
    bounds = (lowers[:, None], uppers[:, None])
    flat = result.x_adv.reshape(3, -1)
    assert bool(jnp.all((bounds[0] <= flat) & (flat <= bounds[1])))
    assert float(result.distortion[1]) <= float(result.distortion[0]) * 1.001, "a wider box"


@each_attack
def test_new_parameters_of_the_same_shape_do_not_recompile(attack):
    traced = []

    @jax.jit
    def run(params, x, target):
        traced.append(1)
        return attack(functools.partial(MODEL.apply, params))(x, target)

    for key in KEYS[2:]:
        run(parameters(key), IMAGES[0], TARGETS[0])
    assert len(traced) == 1


@each_attack
def test_the_attack_is_a_constant_to_the_gradient_of_a_training_loss(attack):
    def adversarial_loss(params, x_adv):
        return losses.cross_entropy(MODEL.apply(params, x_adv), TARGETS[0])

    def training_loss(params):
        result = attack(functools.partial(MODEL.apply, params))(IMAGES[0], TARGETS[0])
        return adversarial_loss(params, result.x_adv)

    x_adv = attack(functools.partial(MODEL.apply, PARAMS))(IMAGES[0], TARGETS[0]).x_adv
    expected = jax.grad(adversarial_loss)(PARAMS, x_adv)
    gradient = jax.jit(jax.grad(training_loss))(PARAMS)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    batched = jax.vmap(jax.grad(training_loss))(jax.tree.map(lambda leaf: leaf[None], PARAMS))
    for one, other in zip(jax.tree.leaves(batched), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one[0], other, rtol=1e-3, atol=1e-5)


@each_attack
def test_the_distortion_has_no_gradient_by_the_image(attack):
    def distortion(x):
        return attack(functools.partial(MODEL.apply, PARAMS))(x, TARGETS[0]).distortion

    np.testing.assert_array_equal(jax.grad(distortion)(IMAGES[0]), 0)


@each_attack
def test_a_linen_an_nnx_and_an_equinox_model_are_all_attacked_alike(attack):
    kernel = 3 * jax.random.normal(KEYS[3], (20, CLASSES)) / 4
    linen = nn.Dense(CLASSES, use_bias=False)
    flax_nnx = nnx.Linear(20, CLASSES, use_bias=False, param_dtype=kernel.dtype, rngs=nnx.Rngs(0))
    flax_nnx.kernel[...] = kernel
    equinox = eqx.nn.Linear(20, CLASSES, use_bias=False, key=KEYS[3])
    equinox = eqx.tree_at(lambda layer: layer.weight, equinox, kernel.T)
    fns = [
        lambda x: linen.apply({"params": {"kernel": kernel}}, x.ravel()),
        lambda x: flax_nnx(x.ravel()),
        lambda x: equinox(x.ravel()),
    ]
    results = [jax.jit(attack(fn))(IMAGES[0], TARGETS[0]) for fn in fns]
    assert bool(results[0].success)
    for other in results[1:]:
        assert_same(results[0], other)


@each_attack
def test_an_nnx_model_may_be_an_argument_of_nnx_jit(attack):
    model = nnx.Linear(20, CLASSES, rngs=nnx.Rngs(1))

    @nnx.jit
    def run(model, x, target):
        return attack(lambda x: model(x.ravel()))(x, target)

    assert bool(run(model, IMAGES[0], TARGETS[0]).success)


@each_attack
def test_float64_is_float64_throughout(attack):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), PARAMS)
        x = jnp.asarray(np.asarray(IMAGES[0]), jnp.float64)
        result = attack(functools.partial(MODEL.apply, params))(x, int(TARGETS[0]))
        assert (
            result.x_adv.dtype == result.distortion.dtype == result.multiplier.dtype == jnp.float64
        )
        assert bool(result.success)


@each_attack
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_images_get_half_precision_answers(attack, dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    x = IMAGES[0].astype(dtype)
    logits_fn = functools.partial(MODEL.apply, params)
    assert logits_fn(x).dtype == dtype
    result = attack(logits_fn)(x, TARGETS[0])
    full = attack(functools.partial(MODEL.apply, PARAMS))(IMAGES[0], TARGETS[0])
    assert result.x_adv.dtype == dtype
    assert bool(result.success)
    assert int(logits_fn(result.x_adv).argmax()) == int(TARGETS[0])
    np.testing.assert_allclose(result.distortion, full.distortion, rtol=0.2)


@each_attack
def test_an_attack_steps_with_one_evaluation_each(attack):
    evaluated = []

    def logits_fn(x):
        jax.debug.callback(lambda: evaluated.append(1))
        return MODEL.apply(PARAMS, x)

    run = attack(logits_fn)
    state = run.init(IMAGES[0], TARGETS[0])
    step = jax.jit(run.step)
    steps = 0
    while not run.done(state):
        state = step(state)
        steps += 1
    jax.effects_barrier()
    assert len(evaluated) == steps
    assert int(run.result(state).num_evals) == steps
    assert bool(run.result(state).success)
