"""Pools of adversarial examples, training with them, and networks that run from a layer on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from advjax import attacks, models, training
from advjax.training import Layer, Pool

KEY = jax.random.key(0)
MODEL = models.MLP((5, 4, 3))
BELOW = {"hidden1": ("hidden1",), "hidden2": ("hidden1", "hidden2")}


def data(n=40, pixels=6):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(n, pixels)).astype(np.float32)
    return images, ((images - 0.5) @ rng.normal(size=(pixels, 3))).argmax(1).astype(np.int32)


@functools.cache
def trained():
    images, labels = data()
    options = {"optimizer": optax.adam(0.05), "epochs": 60, "batch_size": 10, "patience": 60}
    params = MODEL.init(KEY, images[0])
    return training.fit(KEY, MODEL.apply, params, images, labels, **options).params


def layer(name):
    return Layer(
        lambda params, x: MODEL.apply(params, x, method="layers")[name],
        functools.partial(MODEL.apply, after=name),
    )


IMAGE = Layer(lambda params, x: x, MODEL.apply)
LAYERS = (IMAGE, layer("hidden1"), layer("hidden2"))


def clean_pool(size=20):
    images, labels = data()
    return Pool(jnp.asarray(images[:size]), jnp.asarray(labels[:size]), jnp.zeros(size))


def mark(key, logits_fn, x, label):
    """In place of an attack: an example that is told apart at sight."""
    return jnp.full_like(x, 10) + label


# --- networks from a layer on ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["hidden1", "hidden2"])
def test_a_network_from_a_layer_on_gives_that_layers_output_the_same_logits(name):
    params, x = trained(), data()[0][0]
    outputs = MODEL.apply(params, x, method="layers")
    above = MODEL.apply(params, outputs[name], after=name, method="layers")
    assert above.keys() == {
        other for other in outputs if other.partition("_")[0] not in BELOW[name]
    }
    for other, value in above.items():
        np.testing.assert_allclose(value, outputs[other], rtol=1e-6)
    np.testing.assert_array_equal(MODEL.apply(params, outputs[name], after=name), above["logits"])


def test_a_network_from_a_layer_on_depends_on_no_parameter_below():
    params = trained()
    gradient = jax.grad(lambda p: jnp.sum(MODEL.apply(p, jnp.ones(4), after="hidden2") ** 2))(
        params
    )["params"]
    assert not np.any(gradient["hidden2"]["kernel"])
    assert np.all(gradient["logits"]["kernel"] != 0)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="after: 'hidden3', expected one of hidden1, hidden2"):
        MODEL.apply(trained(), jnp.ones(4), after="hidden3")


# --- one pool --------------------------------------------------------------------------------


def test_an_adversarial_example_is_taken_for_another_class_and_stays_in_the_box():
    logits_fn = functools.partial(MODEL.apply, trained())
    images, _ = data()
    labels = jax.vmap(logits_fn)(images).argmax(1)
    keys = jax.random.split(KEY, len(images))
    moved = jax.vmap(training.adversarial, in_axes=(0, None, 0, 0))(keys, logits_fn, images, labels)
    predictions = jax.vmap(logits_fn)(moved).argmax(1)
    assert np.all(predictions != labels)
    assert set(np.asarray(predictions - labels) % 3) == {1, 2}, "any other class may be it"
    assert np.all((moved >= 0) & (moved <= 1))


@pytest.mark.parametrize(("epsilon", "moves"), [(0.05, False), (0.2, True)])
def test_an_example_stays_as_it_is_where_the_attack_fails(epsilon, moves):
    step = functools.partial(attacks.fgsm, epsilon=epsilon, targeted=True)
    x = jnp.array([0.6, 0.4])
    moved = training.adversarial(KEY, lambda x: 2 * x, x, jnp.int32(0), attack=step)
    np.testing.assert_allclose(moved, [0.4, 0.6] if moves else x, rtol=1e-6)


def test_as_many_of_a_pool_are_replaced_as_come_in_and_no_others():
    pool, (images, labels) = clean_pool(), data()
    new = training.refresh(
        KEY, pool, MODEL.apply, images[:7], labels[:7], distort=mark, batch_size=3
    )
    replaced = np.flatnonzero(np.all(new.examples == 10 + new.labels[:, None], axis=1))
    assert len(replaced) == 7
    kept = np.setdiff1d(np.arange(20), replaced)
    for field, old in zip(new, pool, strict=True):
        np.testing.assert_array_equal(field[kept], old[kept])
    assert sorted(new.labels[replaced]) == sorted(labels[:7])
    rms = np.sqrt(np.mean((images[:7] - 10 - labels[:7, None]) ** 2, axis=1))
    np.testing.assert_allclose(np.sort(new.distortion[replaced]), np.sort(rms), rtol=1e-5)


def test_which_are_replaced_is_chance_and_in_time_all_are():
    images, labels = data()
    renew = jax.jit(
        lambda key, pool: training.refresh(
            key, pool, jnp.ravel, images[:4], labels[:4], distort=mark, batch_size=4
        )
    )
    pool, replaced = clean_pool(), []
    for key in jax.random.split(KEY, 60):
        pool = renew(key, pool)
        replaced.append(np.count_nonzero(pool.distortion))
    assert replaced[0] == 4
    assert 4 < replaced[1] < 20
    assert replaced[-1] == 20


def test_a_pool_is_refreshed_under_jit_by_parameters_that_are_arguments():
    images, labels = data()
    traces = []

    @jax.jit
    def renew(key, params, pool):
        traces.append(1)
        logits_fn = functools.partial(MODEL.apply, params)
        return training.refresh(key, pool, logits_fn, images[:8], labels[:8])

    params = trained()
    pool = renew(KEY, params, clean_pool())
    again = renew(KEY, jax.tree.map(lambda w: 1.1 * w, params), pool)
    assert len(traces) == 1
    assert np.count_nonzero(pool.distortion) <= 8
    assert np.any(again.examples != pool.examples)


# --- pools in training -----------------------------------------------------------------------


def test_the_pools_lose_what_their_examples_lose_in_the_layers_above():
    images, labels = data()
    params = trained()
    for place in LAYERS:
        pools = training.adversarial_pools(
            images, labels, [place], weight=0.3, size=1, count=1, batch_size=4
        )
        state = pools.init(params)
        np.testing.assert_allclose(state[0].examples[0], place.below(params, images[0]), rtol=1e-6)
        expected = -jax.nn.log_softmax(MODEL.apply(params, images[0]))[labels[0]]
        value = pools.loss(KEY, params, state)
        np.testing.assert_allclose(value, 0.3 * expected, rtol=1e-5)


def test_pools_take_turns_and_train_the_layers_above_alone():
    images, labels = data()
    params = trained()
    pools = training.adversarial_pools(images, labels, LAYERS, size=40, count=8)
    state = pools.init(params)
    grad = jax.jit(jax.grad(lambda params, key: pools.loss(key, params, state)))
    touched = [
        tuple(bool(jnp.any(layer["kernel"])) for layer in grad(params, key)["params"].values())
        for key in jax.random.split(KEY, 60)
    ]
    from_each_place = [(True, True, True), (False, True, True), (False, False, True)]
    assert set(touched) == set(from_each_place)
    assert min(touched.count(place) for place in from_each_place) >= 8


def test_an_update_replaces_a_part_of_every_pool_by_distorted_outputs_of_the_current_network():
    images, labels = data()

    def distort(key, logits_fn, x, label):
        return x + 10 + logits_fn(x)[0]

    pools = training.adversarial_pools(images, labels, LAYERS, size=20, count=6, distort=distort)
    now = trained()
    state = pools.update(KEY, now, pools.init(MODEL.init(KEY, images[0])))
    for place, pool in zip(LAYERS, state, strict=True):
        outputs = jax.vmap(functools.partial(place.below, now))(images)
        logits = jax.vmap(functools.partial(place.above, now))(outputs)
        possible = outputs + 10 + logits[:, :1]
        (fresh,) = np.nonzero(pool.distortion)
        assert len(fresh) == 6
        for example, label in zip(pool.examples[fresh], pool.labels[fresh], strict=True):
            nearest = np.argmin(np.abs(possible - example[None]).sum(1))
            np.testing.assert_allclose(example, possible[nearest], rtol=1e-5)
            assert label == labels[nearest]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": np.zeros((40, 6), np.uint8)}, TypeError, "images: .*uint8"),
        (
            {"labels": np.zeros(39, np.int32)},
            ValueError,
            r"images: shape \(40, 6\), and labels.*\(39,\)",
        ),
        ({"layers": []}, ValueError, "layers: none, expected at least one"),
        ({"weight": -1.0}, ValueError, "weight: -1.0, expected a finite number of at least 0"),
        ({"size": 41}, ValueError, "expected at least size=41 images"),
        ({"size": 0}, ValueError, "size: 0, expected an integer"),
        ({"count": 0}, ValueError, "count: 0, expected an integer"),
        ({"count": 41}, ValueError, "count: 41, expected at most size=40"),
        ({"batch_size": 0}, ValueError, "batch_size: 0, expected an integer"),
    ],
)
def test_pools_that_cannot_be_are_refused_by_name(changes, error, message):
    images, labels = data()
    given = {"images": images, "labels": labels, "layers": LAYERS, "size": 40, "count": 4}
    with pytest.raises(error, match=message):
        training.adversarial_pools(**given | changes)


@pytest.mark.parametrize(("examples", "labels"), [((21, 6), 21), ((5, 6), 4), ((5, 7), 5)], ids=str)
def test_examples_that_do_not_fit_the_pool_are_refused(examples, labels):
    with pytest.raises(ValueError, match=r"examples: shape .* for a pool of shape \(20, 6\)"):
        training.refresh(
            KEY,
            clean_pool(),
            MODEL.apply,
            np.zeros(examples, np.float32),
            np.zeros(labels, np.int32),
        )


# --- what they ask of `fit` ------------------------------------------------------------------


def fit(apply=MODEL.apply, **options):
    images, labels = data()
    options = {"epochs": 3, "batch_size": 10} | options
    return training.fit(KEY, apply, MODEL.init(KEY, images[0]), images, labels, **options)


def test_an_auxiliary_loss_is_added_with_its_state_of_the_epoch():
    lambdas = [0.3, 0.2, 0.1]

    def update(key, params, state):
        return state[1:]

    def loss(key, params, state):
        return training.weight_decay(state[0])(params)

    auxiliary = training.AuxiliaryLoss(lambda params: jnp.array([9.0, *lambdas]), update, loss)
    result = fit(auxiliary=auxiliary)
    np.testing.assert_allclose(result.auxiliary, lambdas[-1:])

    first = fit(penalty=training.weight_decay(lambdas[0]), epochs=1, optimizer=optax.adam(1e-2))
    same = fit(auxiliary=auxiliary, epochs=1, optimizer=optax.adam(1e-2))
    np.testing.assert_allclose(same.losses, first.losses, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        same.params,
        first.params,
    )
    assert first.auxiliary is None


def test_an_auxiliary_loss_leaves_the_order_of_the_images_as_it_is():
    nothing = training.AuxiliaryLoss(
        lambda params: (), lambda key, params, state: (), lambda key, params, state: jnp.zeros(())
    )
    with_it, without = fit(auxiliary=nothing).params, fit().params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), with_it, without)


def draw(apply, n, **options):
    """Trains on one-hot images with the output as the loss, by steps of the gradient itself."""
    return training.fit(
        KEY,
        apply,
        jnp.zeros(n),
        np.eye(n, dtype=np.float32),
        np.zeros(n),
        loss=lambda output, label: output,
        optimizer=optax.sgd(1.0),
        stochastic=True,
        **options,
    )


@pytest.mark.parametrize("batch_size", [1, 10])
def test_a_stochastic_network_gets_a_new_key_for_each_image_and_for_each_step(batch_size):
    result = draw(
        lambda params, x, key: jnp.vdot(params, x) * jax.random.uniform(key),
        10,
        batch_size=batch_size,
        epochs=1,
    )
    drawn = -batch_size * result.params
    assert np.all((drawn > 0) & (drawn < 1))
    assert len(np.unique(drawn)) == 10


def test_a_stochastic_network_gets_a_new_key_in_each_epoch():
    result = draw(
        lambda params, x, key: 0 * jnp.vdot(params, x) + jax.random.uniform(key),
        1,
        epochs=10,
        patience=10,
    )
    assert len(np.unique(result.losses)) == 10
