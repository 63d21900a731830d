"""Table 5 in its quick form, and the paper's formula against matrices."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from advjax import lipschitz, models
from experiments import paper, table5


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("results")
        table5.main(quick=True, out=folder)
        return json.loads((folder / "table5.json").read_text())


def linear(row):
    return [layer for layer in row["layers"] if "lanczos" in layer]


def test_every_reading_of_a_layer_is_on_its_side_of_the_norm(content):
    mlp, alexnet = content["runs"][0]["rows"]
    assert [len(linear(mlp)), len(linear(alexnet))] == [3, len(paper.TABLE5)]
    for layer in linear(mlp) + linear(alexnet):
        lowest = max(layer["lanczos"], layer["power"])
        assert lowest <= layer["bound"] <= 1.05 * lowest
        assert min(layer["seconds"].values()) > 0
    for layer in linear(mlp):  # dense layers have no stride, and their singular values are exact
        assert layer["unscaled"] == pytest.approx(layer["lanczos"], rel=1e-4)


def test_the_product_bounds_the_slopes_and_has_the_pools_and_normalisations_in_it(content):
    _, alexnet = rows = content["runs"][0]["rows"]
    for row in rows:
        product = np.prod([layer["bound"] for layer in row["layers"]])
        assert row["bound"] == pytest.approx(product, rel=1e-4)
        tighter = row["tighter"].values()
        assert 0 < row["steepest"] < min(tighter)
        assert max(tighter) <= row["bound"]
    names = [layer["layer"] for layer in alexnet["layers"]]
    assert names.count("normalisation") == names.count("max-pooling") == 2


def test_the_table_has_the_papers_numbers_beside_ours(content):
    description = table5.describe(content)
    lines = [line for line in description.splitlines() if line.startswith(("| conv", "| hidden"))]
    for printed in paper.TABLE5.values():
        assert any(f" {printed.bound:g} |" in line for line in lines) or printed.bound == 4
    assert "7.93e+05" in description
    assert "multiply to 7.9e+05" in description


def test_three_of_the_papers_steps_do_not_hold(content):
    product, stride, pooling, weights = table5.claims(content)
    assert product.verdict == "holds"
    assert [stride.verdict, pooling.verdict] == 2 * ["does not hold"]
    assert "2 times as far" in pooling.ours
    assert weights.verdict == "cannot be tested here"


def cyclic_matrix(kernel, size, stride):
    """A cyclic strided convolution along two axes, from its definition."""
    *window, inputs, outputs = kernel.shape
    steps = range(size // stride)
    matrix = np.zeros((size, size, inputs, len(steps), len(steps), outputs))
    for i, j in itertools.product(steps, steps):
        for a, b in np.ndindex(*window):
            matrix[(stride * i + a) % size, (stride * j + b) % size, :, i, j] += kernel[a, b]
    return matrix.reshape(size * size * inputs, -1)


@pytest.mark.parametrize(("size", "stride"), [(6, 1), (5, 1), (6, 2), (9, 3), (8, 4)])
def test_the_formula_is_the_norm_of_the_cyclic_convolution_with_one_over_the_stride(size, stride):
    kernel = np.random.default_rng(0).normal(size=(3, 4, 2, 3))
    layer = lipschitz.Conv(kernel, (size, size, 2), strides=stride)
    norm = np.linalg.norm(cyclic_matrix(kernel, size, stride), 2)
    assert table5.unscaled_norm(layer) / stride == pytest.approx(norm, rel=1e-5)


def test_the_formula_of_a_dense_layer_is_its_norm():
    kernel = np.random.default_rng(0).normal(size=(7, 5))
    norm = np.linalg.norm(kernel, 2)
    assert table5.unscaled_norm(lipschitz.Dense(kernel)) == pytest.approx(norm, rel=1e-5)


def test_a_file_of_torchvisions_is_bounded_too(tmp_path, monkeypatch):
    small = functools.partial(models.AlexNet, channels=(2, 3, 3, 3, 2), features=(4, 4, 3))
    monkeypatch.setattr(table5.models, "AlexNet", small)
    shapes = {
        **{"features.0": (2, 3, 11, 11), "features.3": (3, 2, 5, 5), "features.6": (3, 3, 3, 3)},
        **{"features.8": (3, 3, 3, 3), "features.10": (2, 3, 3, 3)},
        **{"classifier.1": (4, 72), "classifier.4": (4, 4), "classifier.6": (3, 4)},
    }
    weights = {
        f"{name}.{kind}": np.full(shape if kind == "weight" else shape[:1], 0.5, np.float32)
        for name, shape in shapes.items()
        for kind in ("weight", "bias")
    }
    path = tmp_path / "alexnet.safetensors"
    safetensors.numpy.save_file(weights, path)
    _, (name, logits_fn, noise) = table5._alexnets(jax.random.key(0), path, quick=False)
    assert name == table5.GIVEN
    assert jax.eval_shape(logits_fn, noise[0]).shape == (3,)
    assert all(jnp.all(leaf == 0.5) for leaf in jax.tree.leaves(logits_fn.args[0]))
