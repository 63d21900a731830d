"""The fully connected models against NumPy, and parameters through a file."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from scipy import special

from advjax import models


def init(model, shape=(28, 28, 1)):
    """Parameters whose biases are not zero, so that a forgotten bias shows."""
    params = model.init(jax.random.key(0), jnp.zeros(shape))
    return jax.tree.map(lambda w: w + jax.random.normal(jax.random.key(1), w.shape) / 9, params)


def image(shape=(28, 28, 1)):
    return jax.random.uniform(jax.random.key(2), shape)


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
    hidden1 = special.expit(dense(params, "hidden1", np.ravel(image())))
    hidden2 = special.expit(dense(params, "hidden2", hidden1))
    expected = {
        "hidden1": hidden1,
        "hidden2": hidden2,
        "logits": dense(params, "logits", hidden2),
    }
    outputs = model.apply(params, image(), method="layers")
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(outputs[name], value, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(outputs["logits"], model.apply(params, image()))
    assert [len(value) for value in outputs.values()] == [100, 100, 10]


def test_widths_and_activation_are_options():
    model = models.MLP(features=(5, 3), activation=nn.relu)
    params = init(model, (4,))
    outputs = model.apply(params, image((4,)), method="layers")
    hidden1 = np.maximum(dense(params, "hidden1", image((4,))), 0)
    np.testing.assert_allclose(outputs["hidden1"], hidden1, rtol=1e-5, atol=1e-6)
    assert outputs["logits"].shape == (3,)


@pytest.mark.parametrize("model", [models.Softmax(), models.MLP()])
def test_a_model_takes_one_example_and_maps_over_a_batch(model):
    params = init(model)
    batch = image((3, 28, 28, 1))
    mapped = jax.vmap(model.apply, in_axes=(None, 0))(params, batch)
    one_by_one = jnp.stack([model.apply(params, x) for x in batch])
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [models.Softmax(), models.MLP()])
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
    with pytest.raises(ValueError, match=r"net\.safetensors is not a whole safetensors file"):
        models.load(path)
