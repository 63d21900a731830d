"""Training against closed forms, SciPy, and the errors that the paper prints."""

import functools
import os
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from scipy import optimize, special

from advjax import losses, metrics, models, training

KEY = jax.random.key(0)


def small_problem(n=60, pixels=6, classes=3):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(n, pixels)).astype(np.float32)
    labels = (images @ rng.normal(size=(pixels, classes))).argmax(1).astype(np.int32)
    model = models.Softmax(classes)
    return model, model.init(KEY, images[0]), images, labels


def penalised_loss_and_gradient(params, images, labels, lam):
    """Softmax regression by hand: the value, and the gradient by kernel and bias."""
    kernel, bias = (np.asarray(params["params"]["logits"][k], float) for k in ("kernel", "bias"))
    log_p = special.log_softmax(images @ kernel + bias, axis=1)
    error = (np.exp(log_p) - np.eye(len(bias))[labels]) / len(labels)
    value = -log_p[np.arange(len(labels)), labels].mean() + lam / 2 * (kernel**2).sum()
    return value, images.T @ error + lam * kernel, error.sum(0)


def test_a_full_batch_gradient_step_is_the_one_computed_by_hand():
    model, params, images, labels = small_problem()
    value, kernel_gradient, bias_gradient = penalised_loss_and_gradient(params, images, labels, 0.1)
    result = training.fit(
        KEY,
        model.apply,
        params,
        images,
        labels,
        penalty=training.weight_decay(0.1),
        optimizer=optax.sgd(0.5),
        epochs=1,
        batch_size=len(images),
    )
    np.testing.assert_allclose(result.losses, [value], rtol=1e-5)
    before, after = params["params"]["logits"], result.params["params"]["logits"]
    step = jax.tree.map(lambda a, b: a - b, before, after)
    np.testing.assert_allclose(step["kernel"], 0.5 * kernel_gradient, atol=1e-6)
    np.testing.assert_allclose(step["bias"], 0.5 * bias_gradient, atol=1e-6)


def test_full_batch_lbfgs_converges_to_the_minimum_that_scipy_finds():
    model, params, images, labels = small_problem()

    def objective(flat):
        kernel, bias = flat[:18].reshape(6, 3), flat[18:]
        value, *gradient = penalised_loss_and_gradient(
            {"params": {"logits": {"kernel": kernel, "bias": bias}}}, images, labels, 0.01
        )
        return value, np.concatenate([np.ravel(g) for g in gradient])

    minimum = optimize.minimize(objective, np.zeros(21), jac=True, tol=1e-12).fun
    result = training.fit(
        KEY,
        model.apply,
        params,
        images,
        labels,
        penalty=training.weight_decay(0.01),
        optimizer=optax.lbfgs(),
        epochs=200,
        batch_size=len(images),
        tol=1e-6,
    )
    assert result.losses[-1] == pytest.approx(minimum, rel=1e-5)
    assert result.converged
    assert len(result.losses) < 200


def visits(n, batch_size, *, epochs=1, key=KEY):
    """How often each of n images was used: an image is a one-hot, and a step subtracts it."""
    result = training.fit(
        key,
        jnp.vdot,
        jnp.zeros(n),
        np.eye(n, dtype=np.float32),
        np.zeros(n),
        loss=lambda output, label: output,
        optimizer=optax.sgd(1.0),
        epochs=epochs,
        batch_size=batch_size,
        patience=epochs,
    )
    return -np.asarray(result.params) * min(batch_size, n)


def test_an_epoch_leaves_no_image_out_when_batches_do_not_divide_them():
    counts = visits(10, 4)
    assert sorted(counts) == [1] * 8 + [2] * 2


@pytest.mark.parametrize("batch_size", [5, 10, 256])
def test_an_epoch_uses_each_image_once_when_batches_divide_them_or_exceed_them(batch_size):
    np.testing.assert_allclose(visits(10, batch_size), np.ones(10), rtol=1e-6)


def test_each_epoch_has_its_own_order_and_the_key_fixes_them_all():
    two_epochs = visits(10, 4, epochs=2)
    assert two_epochs.sum() == pytest.approx(24)
    assert 3 in two_epochs  # filled up the last batch of one epoch, not of the other
    np.testing.assert_array_equal(visits(10, 4, epochs=2), two_epochs)
    assert (visits(10, 4, epochs=2, key=jax.random.key(1)) != two_epochs).any()


def test_later_epochs_do_not_compile_again():
    model, params, images, labels = small_problem()
    traces = []

    def apply(params, x):
        traces.append(1)
        return model.apply(params, x)

    counts = []
    for epochs in (1, 4):
        training.fit(KEY, apply, params, images, labels, epochs=epochs)
        counts.append(len(traces))
        traces.clear()
    assert counts[0] == counts[1]


def test_another_loss_makes_an_autoencoder_of_it():
    images = np.random.default_rng(0).uniform(size=(40, 3)).astype(np.float32)
    result = training.fit(
        KEY,
        jnp.multiply,
        jnp.zeros(3),
        images,
        images,
        loss=lambda output, image: losses.squared_l2(output - image),
        optimizer=optax.sgd(0.5),
        batch_size=20,
        tol=1e-3,
    )
    np.testing.assert_allclose(result.params, np.ones(3), atol=1e-3)


def test_training_ends_at_a_loss_that_is_not_finite_and_has_not_converged():
    model, params, images, labels = small_problem()
    diverging = optax.sgd(1e38)
    result = training.fit(KEY, model.apply, params, images, labels, optimizer=diverging)
    assert not np.isfinite(result.losses[-1])
    assert np.isfinite(result.losses[:-1]).all()
    assert not result.converged


def test_training_works_in_double_precision():
    with jax.enable_x64(True):
        model, params, images, labels = small_problem()
        params = jax.tree.map(lambda w: w.astype(jnp.float64), params)
        result = training.fit(
            KEY,
            model.apply,
            params,
            images.astype(np.float64),
            labels,
            penalty=training.weight_decay(1e-4),
        )
        assert {w.dtype for w in jax.tree.leaves(result.params)} == {jnp.dtype("float64")}
        assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"images": np.zeros((60, 6), np.uint8)}, TypeError, "images: .*uint8.*scale 8-bit"),
        ({"labels": np.zeros(60, np.float32)}, TypeError, "expected an integer class index"),
        ({"labels": np.zeros((60, 3), np.int32)}, ValueError, "expected one class index"),
        ({"labels": np.zeros(59, np.int32)}, ValueError, r"labels: shape \(59,\) for images of"),
        ({"epochs": 0}, ValueError, "epochs: 0, expected an integer"),
        ({"batch_size": 0}, ValueError, "batch_size: 0, expected an integer"),
        ({"patience": 0}, ValueError, "patience: 0, expected an integer"),
    ],
)
def test_bad_input_is_refused_with_its_name_and_a_remedy(changes, error, message):
    model, params, images, labels = small_problem()
    arguments = {"images": images, "labels": labels} | changes
    with pytest.raises(error, match=message):
        training.fit(KEY, model.apply, params, **arguments)


def test_progress_is_shown_on_request_alone(capsys):
    model, params, images, labels = small_problem()
    training.fit(KEY, model.apply, params, images, labels, epochs=2)
    assert capsys.readouterr().err == ""
    training.fit(KEY, model.apply, params, images, labels, epochs=2, progress=True)
    assert "loss=" in capsys.readouterr().err


def test_progress_without_tqdm_says_what_to_install(monkeypatch):
    model, params, images, labels = small_problem()
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"advjax\[experiments\]"):
        training.fit(KEY, model.apply, params, images, labels, progress=True)


# --- what is trained, and what is not ----------------------------------------------------------


class Normalized(nn.Module):
    """Batch normalization, dropout and a dense layer."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, axis_name="batch")(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="logits")(x)


def normalized(mean=0.01):
    _, _, images, labels = small_problem()
    model = Normalized()
    variables = model.init(KEY, images[0], train=False)
    variables["batch_stats"] = jax.tree.map(lambda s: s + mean, variables["batch_stats"])
    return model, variables, images, labels


def assert_trees_equal(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.parametrize("optimizer", [None, optax.adamw(0.1, weight_decay=0.1), optax.lbfgs()])
def test_the_running_statistics_of_batch_normalization_are_not_trained(optimizer):
    model, variables, images, labels = normalized()
    result = training.fit(
        KEY,
        functools.partial(model.apply, train=False),
        variables,
        images,
        labels,
        optimizer=optimizer,
        epochs=3,
    )
    assert_trees_equal(result.params["batch_stats"], variables["batch_stats"])
    moved = jax.tree.map(lambda a, b: np.any(a != b), result.params["params"], variables["params"])
    assert all(jax.tree.leaves(moved))
    assert result.losses[-1] < result.losses[0]


def test_a_collection_that_is_not_trained_changes_nothing_else():
    model, params, images, labels = small_problem()
    cached = params | {"cache": {"index": jnp.arange(3), "table": jnp.ones((2, 2))}}
    options = {"epochs": 3, "penalty": training.weight_decay((0.1,))}
    expected = training.fit(KEY, model.apply, params, images, labels, **options)
    result = training.fit(KEY, model.apply, cached, images, labels, **options)
    assert_trees_equal(result.params, expected.params | {"cache": cached["cache"]})
    np.testing.assert_array_equal(result.losses, expected.losses)


def test_integers_and_keys_among_parameters_stay_as_they_are():
    images = np.eye(4, dtype=np.float32)
    params = {"w": jnp.zeros(4), "places": jnp.arange(4)[::-1], "key": jax.random.key(7)}
    result = training.fit(
        KEY,
        lambda params, x: jnp.vdot(params["w"][params["places"]], x),
        params,
        images,
        np.arange(4.0),
        loss=lambda output, label: (output - label) ** 2,
        optimizer=optax.sgd(0.5),
        epochs=50,
    )
    np.testing.assert_allclose(result.params["w"], [3, 2, 1, 0], atol=1e-3)
    assert_trees_equal(result.params["places"], params["places"])
    assert result.params["key"] == params["key"]


def test_of_an_nnx_module_its_params_are_trained_and_its_statistics_are_not():
    _, _, images, labels = small_problem()
    rngs = nnx.Rngs(0)
    norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
    graph, state = nnx.split(nnx.Sequential(norm, nnx.Linear(6, 3, rngs=rngs)))
    before = jax.tree.leaves(nnx.filter_state(state, nnx.BatchStat))
    result = training.fit(
        KEY, lambda state, x: nnx.merge(graph, state)(x[None])[0], state, images, labels
    )
    after = jax.tree.leaves(nnx.filter_state(result.params, nnx.BatchStat))
    assert_trees_equal(after, before)
    assert len(before) == 2
    assert result.losses[-1] < result.losses[0]


def test_of_an_equinox_module_the_floating_arrays_are_trained():
    _, _, images, labels = small_problem()
    network = eqx.nn.MLP(6, 3, 5, 1, key=KEY)
    params, static = eqx.partition(network, eqx.is_inexact_array)
    result = training.fit(
        KEY, lambda params, x: eqx.combine(params, static)(x), params, images, labels
    )
    assert result.losses[-1] < result.losses[0]


def test_an_equinox_module_with_functions_among_its_leaves_is_told_how_to_split():
    network = eqx.nn.MLP(6, 3, 5, 1, key=KEY)
    _, _, images, labels = small_problem()
    with pytest.raises(TypeError, match=r"params: custom_jvp at .activation.*eqx.partition"):
        training.fit(KEY, lambda params, x: params(x), network, images, labels)


def test_variables_without_anything_to_train_are_refused():
    model, params, images, labels = small_problem()
    with pytest.raises(ValueError, match="params: no leaf to train"):
        training.fit(KEY, model.apply, {"params": {}, "cache": params}, images, labels)


def train_normalized(key=KEY, **options):
    model, variables, images, labels = normalized()

    def apply(variables, x, key):
        return model.apply(variables, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"])

    options = {"epochs": 1, "batch_size": len(images)} | options
    return training.fit(
        key, apply, variables, images, labels, stochastic=True, mutable=True, **options
    )


def test_running_statistics_are_updated_by_those_of_the_batch_on_request():
    _, variables, images, _ = normalized()
    result = train_normalized()
    old, new = (v["batch_stats"]["BatchNorm_0"] for v in (variables, result.params))
    np.testing.assert_allclose(new["mean"], (old["mean"] + images.mean(0)) / 2, rtol=1e-5)
    np.testing.assert_allclose(new["var"], (old["var"] + images.var(0)) / 2, rtol=1e-5)


def test_dropout_trains_by_keys_and_the_model_is_deterministic_after_it():
    model, variables, images, labels = normalized()
    result, again = (train_normalized(epochs=120, batch_size=20) for _ in range(2))
    assert_trees_equal(result.params, again.params)
    untrained, trained = (
        functools.partial(model.apply, v, train=False) for v in (variables, result.params)
    )
    errors = [metrics.error_rate(logits_fn, images, labels) for logits_fn in (untrained, trained)]
    assert errors[1] < errors[0] / 2
    np.testing.assert_array_equal(trained(images[0]), trained(images[0]))


def test_two_keys_drop_different_units():
    # One batch of all images: without dropout the order of the images would change roundings alone.
    one, other = (train_normalized(jax.random.key(seed)).losses for seed in (1, 2))
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        ({"params": {}}, ValueError, r"updates of \['params'\], expected .*\['batch_stats'\]"),
        ({"intermediates": {}}, ValueError, r"updates of \['intermediates'\]"),
        (jnp.zeros(()), ValueError, "updates of .*, expected collections among"),
        (None, TypeError, "apply: returns a .*, expected a pair"),
    ],
)
def test_updates_of_anything_but_collections_that_are_not_trained_are_refused(
    updates, error, message
):
    model, variables, images, labels = normalized()

    def apply(variables, x):
        logits = model.apply(variables, x, train=False)
        return logits if updates is None else (logits, updates)

    with pytest.raises(error, match=message):
        training.fit(KEY, apply, variables, images, labels, mutable=True)


def test_pools_of_a_model_with_running_statistics_leave_them_alone():
    model, variables, images, labels = normalized()
    evaluate = functools.partial(model.apply, train=False)
    pools = training.adversarial_pools(
        images, labels, [training.Layer(lambda params, x: x, evaluate)], size=20, count=5
    )
    result = training.fit(
        KEY, evaluate, variables, images, labels, auxiliary=pools, epochs=2, batch_size=20
    )
    assert_trees_equal(result.params["batch_stats"], variables["batch_stats"])
    assert np.any(result.auxiliary[0].distortion > 0)


def test_layer_norms_of_a_model_with_running_statistics_are_penalised_with_these_held_fixed():
    model, variables, images, labels = normalized()
    evaluate = functools.partial(model.apply, train=False)
    statistics = {"batch_stats": variables["batch_stats"]}

    def train(weight):
        penalty = training.lipschitz_penalty(
            weight, lambda params, x: evaluate({**params, **statistics}, x), images[0]
        )
        optimizer = optax.chain(penalty, optax.sgd(0.1))
        params = training.fit(KEY, evaluate, variables, images, labels, optimizer=optimizer)
        return np.linalg.norm(params.params["params"]["logits"]["kernel"], 2)

    assert train(0.1) < 0.9 * train(0.0)


def kernels_and_biases():
    model = models.MLP((5, 4, 3))
    params = model.init(KEY, jnp.zeros(6))
    return jax.tree.map(lambda w: w + 1, params)


def test_weight_decay_is_half_lambda_times_the_squared_weights_layer_by_layer():
    params = kernels_and_biases()
    lambdas = {"hidden1": 1e-1, "hidden2": 1e-2, "logits": 1e-3}
    expected = sum(
        lam / 2 * np.sum(np.asarray(params["params"][name]["kernel"], float) ** 2)
        for name, lam in lambdas.items()
    )
    penalty = training.weight_decay(tuple(lambdas.values()))
    np.testing.assert_allclose(penalty(params), expected, rtol=1e-6)


def test_weight_decay_pulls_kernels_to_zero_by_lambda_and_leaves_biases_alone():
    params = kernels_and_biases()
    gradient = jax.grad(training.weight_decay(0.1))(params)["params"]
    for name, layer in params["params"].items():
        np.testing.assert_allclose(gradient[name]["kernel"], 0.1 * layer["kernel"], rtol=1e-6)
        np.testing.assert_array_equal(gradient[name]["bias"], np.zeros_like(layer["bias"]))


def test_weight_decay_names_the_kernels_when_the_lambdas_do_not_match_them():
    message = r"lambdas: shape \(2,\) for 3 kernels .*'params/hidden2/kernel'"
    with pytest.raises(ValueError, match=message):
        training.weight_decay((1e-4, 1e-4))(kernels_and_biases())


def test_weight_decay_of_no_kernels_at_all_is_refused():
    with pytest.raises(ValueError, match="0 kernels"):
        training.weight_decay(1e-4)({"bias": jnp.zeros(3)})


full_mnist = pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ, reason="needs the whole of MNIST"
)


@full_mnist
def test_softmax_regression_reaches_the_errors_that_the_paper_prints_for_fc10(fc10):
    assert fc10.train_error == pytest.approx(0.067, abs=0.002)
    assert fc10.test_error == pytest.approx(0.074, abs=0.002)


@full_mnist
def test_the_sigmoid_network_fits_the_training_set_and_generalises_as_the_papers_does(fc100):
    assert fc100.train_error <= 0.001
    assert fc100.test_error <= 0.018
