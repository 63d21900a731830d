"""The models against NumPy and SciPy, and parameters through a file."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import linen as nn
from scipy import signal, special

from advjax import models, training


def init(model, shape=(28, 28, 1)):
    """Parameters whose biases are not zero, so that a forgotten bias shows."""
    rng = np.random.default_rng(0)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))
    return jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) / 9, w.dtype), like)


def image(shape=(28, 28, 1)):
    return jnp.asarray(np.random.default_rng(1).uniform(size=shape), jnp.float32)


def layers(model, params, x):
    """The outputs by name, in their order; and `apply` gives the same logits."""
    names = []

    @jax.jit
    def run(params, x):
        outputs = model.apply(params, x, method="layers")
        names.extend(outputs)  # jit sorts them
        return outputs, model.apply(params, x)

    outputs, logits = run(params, x)
    np.testing.assert_array_equal(outputs["logits"], logits)
    return {name: outputs[name] for name in names}


def dense(params, name, x):
    return x @ np.asarray(params["params"][name]["kernel"]) + params["params"][name]["bias"]


def test_softmax_is_one_affine_map_of_the_flattened_image():
    model = models.Softmax()
    params = init(model)
    expected = dense(params, "logits", np.ravel(image()))
    np.testing.assert_allclose(model.apply(params, image()), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (10,)


def test_the_default_mlp_is_the_papers_sigmoid_network_with_two_hidden_layers_of_100():
    model = models.MLP()
    params = init(model)
    z1 = dense(params, "hidden1", np.ravel(image()))
    z2 = dense(params, "hidden2", special.expit(z1))
    expected = {
        "hidden1_preactivation": z1,
        "hidden1": special.expit(z1),
        "hidden2_preactivation": z2,
        "hidden2": special.expit(z2),
        "logits": dense(params, "logits", special.expit(z2)),
    }
    outputs = layers(model, params, image())
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5)
    assert [len(value) for value in outputs.values()] == [100, 100, 100, 100, 10]


def test_widths_and_activation_are_options():
    model = models.MLP(features=(5, 3), activation=nn.relu)
    params = init(model, (4,))
    outputs = layers(model, params, image((4,)))
    hidden1 = np.maximum(dense(params, "hidden1", image((4,))), 0)
    np.testing.assert_allclose(outputs["hidden1"], hidden1, rtol=1e-5, atol=1e-6)
    assert outputs["logits"].shape == (3,)


def convolved(params, name, x):
    """A 4 x 4 convolution with stride 2 and a border of one zero, one channel at a time."""
    kernel, bias = (np.asarray(params["params"][name][k]) for k in ("kernel", "bias"))
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    channels = [
        sum(
            signal.correlate2d(padded[:, :, i], kernel[:, :, i, o], mode="valid")[::2, ::2]
            for i in range(x.shape[2])
        )
        for o in range(len(bias))
    ]
    return np.stack(channels, axis=2) + bias


def test_the_convolutional_network_halves_the_image_twice_and_ends_in_an_mlp():
    model = models.ConvNet()
    params = init(model)
    conv1 = np.maximum(convolved(params, "conv1", np.asarray(image())), 0)
    conv2 = np.maximum(convolved(params, "conv2", conv1), 0)
    z = dense(params, "hidden1", np.ravel(conv2))
    expected = {
        "conv1": conv1,
        "conv2": conv2,
        "hidden1_preactivation": z,
        "hidden1": np.maximum(z, 0),
        "logits": dense(params, "logits", np.maximum(z, 0)),
    }
    outputs = layers(model, params, image())
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-3, atol=1e-4)
    shapes = [value.shape for value in outputs.values()]
    assert shapes == [(14, 14, 16), (7, 7, 32), (100,), (100,), (10,)]


def test_channels_widths_and_activation_of_the_convolutional_network_are_options():
    model = models.ConvNet(channels=(2,), features=(3,), activation=jnp.tanh)
    params = init(model, (6, 5, 3))
    outputs = layers(model, params, image((6, 5, 3)))
    conv1 = np.tanh(convolved(params, "conv1", np.asarray(image((6, 5, 3)))))
    np.testing.assert_allclose(outputs["conv1"], conv1, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        outputs["logits"], dense(params, "logits", np.ravel(conv1)), rtol=1e-4, atol=1e-5
    )


def test_the_autoencoder_decodes_and_classifies_one_code():
    model = models.AutoencoderClassifier(code=7, classes=3)
    params = init(model, (4, 5, 1))
    z = dense(params, "encoder", np.ravel(image((4, 5, 1))))
    decoded = special.expit(dense(params, "decoder", special.expit(z)))
    expected = {
        "code_preactivation": z,
        "code": special.expit(z),
        "reconstruction": decoded.reshape(4, 5, 1),
        "logits": dense(params, "logits", special.expit(z)),
    }
    outputs = layers(model, params, image((4, 5, 1)))
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5)


def test_the_default_autoencoder_is_the_papers_with_a_code_of_400():
    params = jax.eval_shape(models.AutoencoderClassifier().init, jax.random.key(0), image())
    kernels = {name: layer["kernel"].shape for name, layer in params["params"].items()}
    assert kernels == {"encoder": (784, 400), "decoder": (400, 784), "logits": (400, 10)}


def alexnet_shapes(model, size):
    x = jax.ShapeDtypeStruct((size, size, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    outputs = jax.eval_shape(lambda p, x: model.apply(p, x, method="layers"), params, x)
    kernels = {name: layer["kernel"].shape for name, layer in params["params"].items()}
    return kernels, {name: value.shape for name, value in outputs.items()}


def test_alexnet_has_the_shapes_that_torchvision_gives_it():
    kernels, outputs = alexnet_shapes(models.AlexNet(), 224)
    assert kernels == {
        "conv1": (11, 11, 3, 64),
        "conv2": (5, 5, 64, 192),
        "conv3": (3, 3, 192, 384),
        "conv4": (3, 3, 384, 256),
        "conv5": (3, 3, 256, 256),
        "hidden1": (9216, 4096),
        "hidden2": (4096, 4096),
        "logits": (4096, 1000),
    }
    assert "norm1" not in outputs
    assert outputs["conv1"] == (55, 55, 64)
    assert outputs["pool5"] == (6, 6, 256)


def test_alexnet_has_the_shapes_of_the_papers_table_5_by_option():
    model = models.AlexNet(
        channels=(96, 256, 384, 384, 256), padding=0, normalize=models.local_response_norm
    )
    kernels, outputs = alexnet_shapes(model, 227)
    printed = {
        "conv1": (11, 11, 3, 96),
        "conv2": (5, 5, 96, 256),
        "conv3": (3, 3, 256, 384),
        "conv4": (3, 3, 384, 384),
        "conv5": (3, 3, 384, 256),
        "hidden1": (9216, 4096),
        "hidden2": (4096, 4096),
        "logits": (4096, 1000),
    }
    assert kernels == printed
    assert outputs == {
        "conv1": (55, 55, 96),
        "norm1": (55, 55, 96),
        "pool1": (27, 27, 96),
        "conv2": (27, 27, 256),
        "norm2": (27, 27, 256),
        "pool2": (13, 13, 256),
        "conv3": (13, 13, 384),
        "conv4": (13, 13, 384),
        "conv5": (13, 13, 256),
        "pool5": (6, 6, 256),
        "hidden1_preactivation": (4096,),
        "hidden1": (4096,),
        "hidden2_preactivation": (4096,),
        "hidden2": (4096,),
        "logits": (1000,),
    }


def test_local_response_normalisation_divides_by_the_neighbouring_channels():
    x = np.asarray(image((2, 3, 7))) * 40
    normalised = models.local_response_norm(x, size=3, k=1.5, alpha=0.1, beta=0.6)
    for c in range(7):
        squares = np.sum(x[..., max(0, c - 1) : c + 2] ** 2, axis=-1)
        expected = x[..., c] / (1.5 + 0.1 * squares) ** 0.6
        np.testing.assert_allclose(normalised[..., c], expected, rtol=1e-5)


def test_sparsity_is_the_relative_entropy_of_how_often_features_are_active_in_the_batch():
    codes = np.random.default_rng(0).uniform(size=(6, 4)).astype(np.float32)
    fraction = codes.mean(0, dtype=float)
    expected = np.sum(special.rel_entr(0.1, fraction) + special.rel_entr(0.9, 1 - fraction))
    sparsity = functools.partial(training.sparsity, target=0.1)
    each = jax.vmap(sparsity, axis_name="batch")(codes)
    np.testing.assert_allclose(each, np.full(6, expected), rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_sparsity_of_features_that_are_never_or_always_active_is_finite(fraction):
    codes = jnp.full((2, 3), fraction)
    value, gradient = jax.value_and_grad(
        lambda codes: jnp.mean(jax.vmap(training.sparsity, axis_name="batch")(codes))
    )(codes)
    nearest = abs(fraction - np.finfo(codes.dtype).eps)  # to a fraction without a finite entropy
    expected = np.sum(special.rel_entr([0.05, 0.95], [nearest, 1 - nearest]))
    assert float(value) == pytest.approx(3 * expected, rel=1e-3)
    assert value > 0.1
    assert jnp.isfinite(gradient).all()


def test_a_loss_with_sparsity_trains_features_to_be_active_on_that_fraction():
    images = np.random.default_rng(0).uniform(size=(40, 3)).astype(np.float32)
    result = training.fit(
        jax.random.key(0),
        lambda bias, image: jax.nn.sigmoid(image + bias),
        jnp.zeros(3),
        images,
        images,
        loss=lambda code, _: training.sparsity(code, target=0.2),
        optimizer=optax.adam(0.3),
        epochs=60,
        batch_size=40,
        patience=60,
    )
    fraction = special.expit(images + np.asarray(result.params)).mean(0)
    np.testing.assert_allclose(fraction, np.full(3, 0.2), atol=0.01)


def test_a_target_that_is_not_a_fraction_is_refused():
    with pytest.raises(ValueError, match="target: 5, expected a number above 0"):
        training.sparsity(jnp.ones(3), target=5)


MODELS = [models.Softmax(), models.MLP(), models.ConvNet(), models.AutoencoderClassifier()]


@pytest.mark.parametrize("model", MODELS)
def test_a_model_takes_one_example_and_maps_over_a_batch(model):
    params = init(model)
    batch = image((3, 28, 28, 1))
    mapped = jax.jit(jax.vmap(model.apply, in_axes=(None, 0)))(params, batch)
    one_by_one = jnp.stack([jax.jit(model.apply)(params, x) for x in batch])
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_model_computes_in_double_precision_when_asked_to(model):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: w.astype(jnp.float64), init(model))
        assert model.apply(params, image().astype(jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int32, jnp.bool_])
def test_parameters_come_back_from_a_file_bit_for_bit(tmp_path, dtype):
    params = {
        "params": {
            "b": {"kernel": jnp.arange(6).reshape(2, 3).T.astype(dtype)},  # not contiguous
            "a": {"scale": jnp.ones((), dtype), "none": jnp.zeros((0, 2), dtype)},
        }
    }
    models.save(tmp_path / "net.safetensors", params)
    loaded = models.load(tmp_path / "net.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {w.dtype for w in jax.tree.leaves(loaded)} == {jnp.dtype(dtype)}


def test_double_precision_parameters_come_back_too(tmp_path):
    with jax.enable_x64(True):
        models.save(tmp_path / "net.safetensors", {"w": jnp.full(2, 1 / 3, jnp.float64)})
        w = models.load(tmp_path / "net.safetensors")["w"]
        np.testing.assert_array_equal(w, np.full(2, 1 / 3))


def test_a_loaded_network_computes_the_same_logits(tmp_path):
    model = models.MLP()
    params = init(model)
    models.save(tmp_path / "net.safetensors", params)
    loaded = models.load(str(tmp_path / "net.safetensors"))
    np.testing.assert_array_equal(model.apply(loaded, image()), model.apply(params, image()))


def test_the_file_opens_in_other_frameworks_with_its_metadata(tmp_path):
    path = tmp_path / "net.safetensors"
    params = init(models.Softmax())
    models.save(path, params, metadata={"lambda": "1e-4"})
    arrays = safetensors.numpy.load_file(path)
    assert set(arrays) == {"params/logits/kernel", "params/logits/bias"}
    np.testing.assert_array_equal(
        arrays["params/logits/kernel"], params["params"]["logits"]["kernel"]
    )
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"lambda": "1e-4"}


def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    models.save(path, {"w": jnp.ones(3)})

    def disk_full(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        models.save(path, {"w": jnp.zeros(3)})
    np.testing.assert_array_equal(models.load(path)["w"], np.ones(3))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("params", "where"),
    [
        ({"mlp/linear": jnp.ones(1)}, r"\['mlp/linear'\]"),
        ({"layers": [jnp.ones(1)]}, r"\['layers'\]\[0\]"),
        ({0: jnp.ones(1)}, r"\[0\]"),
        (jnp.ones(1), "the root"),
    ],
)
def test_parameters_that_would_not_come_back_the_same_are_refused(tmp_path, params, where):
    with pytest.raises(ValueError, match=f"params: an array at {where}, expected nested dicts"):
        models.save(tmp_path / "net.safetensors", params)
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        models.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-3], lambda data: b"", lambda data: b"x" * 99]
)
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "net.safetensors"
    models.save(path, {"w": jnp.ones(3)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"net\.safetensors is not a complete safetensors file"):
        models.load(path)
