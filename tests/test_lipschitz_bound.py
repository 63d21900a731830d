"""Bounds of whole functions: against known constants, slopes by search, and perturbations."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax import lipschitz, models
from advjax.lipschitz.jaxpr.rules import RULES

X = jax.random.normal(jax.random.key(0), (6, 5))
W = jax.random.normal(jax.random.key(1), (5, 4))
NORM = float(np.linalg.norm(np.asarray(W, np.float64), 2))


def constant(fn, *inputs):
    return float(lipschitz.bound(fn, *inputs).constant)


# Known constants


def average(x):
    return nn.avg_pool(x[..., None], (2, 2), strides=(2, 2))


def window_sum(x):
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3), (1, 1), "SAME")


def nested(x):
    return jax.checkpoint(jax.jit(jax.nn.relu))(2 * x)


def scanned(x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(w * h), None), x, jnp.array([2.0, 3.0]))[0]


def scanned_rows(x):
    return jax.lax.scan(lambda h, row: (h, 3 * row), 0.0, x)[1]


KNOWN = {
    "identity": (lambda x: x, 1),
    "constant": (lambda x: jnp.ones(3), 0),
    "scaled and shifted": (lambda x: 1 - 3 * x, 3),
    "scaled by rows": (lambda x: x * jnp.arange(5.0)[None, :], 4),
    "divided": (lambda x: x / 4, 1 / 4),
    "dense": (lambda x: x @ W, NORM),
    "dense from the left": (lambda x: W.T @ x.T, NORM),
    "dense and bias": (lambda x: x @ W + 1, NORM),
    "einsum": (lambda x: jnp.einsum("ab,bc->ca", x, W), NORM),
    "batched einsum": (
        lambda x: jnp.einsum("ab,abc->ac", x, jnp.stack([W, 2 * W, W, W, W, W])),
        2 * NORM,
    ),
    "residual": (lambda x: x + jnp.tanh(x), 2),
    "residual block": (lambda x: x + jax.nn.relu(x @ W) @ W.T, 1 + NORM**2),
    "difference": (lambda x: 2 * x - 3 * x, 5),
    "concatenation": (lambda x: jnp.concatenate([3 * x, 4 * x]), 5),
    "stack": (lambda x: jnp.stack([3 * x, 4 * x, jnp.zeros_like(x)]), 5),
    "two outputs": (lambda x: (3 * x, {"b": 4 * x}), 5),
    "sum": (jnp.sum, np.sqrt(30)),
    "mean over an axis": (lambda x: x.mean(0), 1 / np.sqrt(6)),
    "maximum": (jnp.max, 1),
    "broadcast": (lambda x: jnp.broadcast_to(x, (4, 6, 5)), 2),
    "outer sum": (lambda x: x[:, 0][:, None] + x[0][None, :], np.sqrt(5) + np.sqrt(6)),
    "sort": (lambda x: jnp.sort(x, axis=1), 1),
    "rows by index": (lambda x: x[jnp.array([0, 0, 0, 2, 2])], np.sqrt(3)),
    "slice and flip": (lambda x: x[::2, ::-1].T.reshape(-1), 1),
    "padding": (lambda x: jnp.pad(x, 2), 1),
    "clip": (lambda x: jnp.clip(x, -1, 1), 1),
    "maximum of two": (lambda x: jnp.maximum(3 * x, 4 * x), 5),
    "mask": (lambda x: jnp.where(jnp.arange(5)[None, :] < 2, x, 0), 1),
    "max-pooling": (lambda x: nn.max_pool(x[..., None], (2, 2), strides=(2, 2)), 1),
    "overlapping max-pooling": (lambda x: nn.max_pool(x[..., None], (3, 3), strides=(2, 2)), 2),
    "average pooling": (average, 1 / 2),
    "window sum": (window_sum, np.linalg.norm(np.eye(5) + np.eye(5, k=1) + np.eye(5, k=-1), 2)),
    "cumulative sum": (lambda x: jnp.cumsum(x, axis=0), np.linalg.norm(np.tri(6), 2)),
    "nested calls": (nested, 2),
    "scan": (scanned, 6),
    "scan over rows": (scanned_rows, 3),
    "a condition that is known": (
        lambda x: jax.lax.cond(jnp.sum(X) > 1e9, lambda x: 9 * x, lambda x: 2 * x, x),
        2,
    ),
    "a platform's own way": (
        lambda x: jax.lax.platform_dependent(
            x, cpu=lambda x: 5 * x - 3 * x, default=lambda x: 2 * x
        ),
        2,
    ),
    "softmax": (jax.nn.softmax, 1 / 2),
    "softmax over all": (lambda x: jax.nn.softmax(x, axis=(0, 1)), 1 / 2),
    "log-sum-exp": (lambda x: jax.nn.logsumexp(x, axis=0), 1),
    "log-sum-exp, keeping the axis": (lambda x: jax.nn.logsumexp(x, axis=0, keepdims=True), 1),
    "log-sum-exp by hand": (lambda x: jnp.log(jnp.sum(jnp.exp(x))), 1),
    "log-softmax": (jax.nn.log_softmax, np.sqrt(5)),
    "normalised": (lambda x: x / jnp.sqrt(4 + jnp.sum(x**2)), 1 / 2),
    "normalised rows": (lambda x: x / jnp.sqrt(4 + jnp.sum(x**2, 1, keepdims=True)), 1 / 2),
    "root mean square": (
        lambda x: x * jax.lax.rsqrt(0.25 + jnp.mean(jnp.square(x), 1, keepdims=True)),
        2,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_the_bound_is_the_known_constant(name):
    fn, known = KNOWN[name]
    assert known <= constant(fn, X) <= known * 1.001 + 1e-12


def test_the_bound_counts_all_inputs_together():
    assert constant(lambda x, y: jnp.concatenate([3 * x, 4 * y]), X, X) == pytest.approx(
        5, rel=1e-4
    )
    assert constant(lambda p: p["a"] @ W, {"a": X, "b": X}) == pytest.approx(NORM, rel=1e-3)


SLOPES = {
    **{
        fn.__name__: fn
        for fn in (
            *(jax.nn.relu, jax.nn.relu6, jax.nn.leaky_relu, jax.nn.elu, jax.nn.celu, jax.nn.selu),
            *(jax.nn.silu, jax.nn.gelu, jax.nn.mish, jax.nn.softplus, jax.nn.soft_sign),
            *(jax.nn.sigmoid, jax.nn.log_sigmoid, jax.nn.hard_sigmoid, jax.nn.hard_tanh),
        )
    },
    "exact gelu": functools.partial(jax.nn.gelu, approximate=False),
    "leaky relu with a steep slope": lambda x: jax.nn.leaky_relu(x, 3.0),
    "elu with a steep slope": lambda x: jax.nn.elu(x, 2.0),
    "silu by hand": lambda x: jax.nn.sigmoid(x) * x,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "erf": jax.scipy.special.erf,
    "arctan": jnp.arctan,
}
GRID = np.linspace(-8, 8, 40001)


@pytest.mark.parametrize("name", SLOPES)
def test_the_bound_of_an_activation_is_its_largest_slope(name):
    with jax.enable_x64(True):
        slopes = np.abs(jax.vmap(jax.grad(SLOPES[name]))(GRID))
    found = constant(SLOPES[name], X)
    assert slopes.max() * (1 - 1e-12) <= found <= slopes.max() * (1 + 1e-3)


# Local response normalisation


def local_response(x, alpha=2.0, beta=0.75, k=1.5):
    total = jax.lax.reduce_window(jnp.square(x), 0.0, jax.lax.add, (1, 5), (1, 1), "SAME")
    return x / (k + alpha * total) ** beta


@pytest.mark.parametrize("beta", [0.5, 0.75, 2.0])
def test_the_bound_of_local_response_normalisation_holds(beta):
    fn = functools.partial(local_response, beta=beta)
    found = constant(fn, jnp.zeros((1, 12)))
    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda v: fn(v[None])[0])))
    spread = (
        np.random.default_rng(0).normal(size=(4000, 12)) * np.geomspace(0.01, 30, 4000)[:, None]
    )
    steepest = np.linalg.norm(jacobian(spread.astype(np.float32)), 2, (1, 2)).max()
    assert steepest <= found <= 3 * steepest


def test_a_normalisation_whose_window_leaves_out_its_centre_is_refused():
    def fn(x):
        total = jax.lax.reduce_window(
            jnp.square(x), 0.0, jax.lax.add, (1, 2), (1, 1), ((0, 0), (2, -1))
        )
        return x / jnp.sqrt(1 + total)

    with pytest.raises(lipschitz.NotLipschitzError, match="square"):
        lipschitz.bound(fn, X)


def test_a_quotient_by_the_sum_along_another_axis_is_no_softmax():
    def fn(x):
        terms = jnp.exp(x)
        return terms / jnp.sum(terms, axis=0)[:, None]

    with pytest.raises(lipschitz.NotLipschitzError):
        lipschitz.bound(fn, jnp.ones((3, 3)))


# Models of every library, unchanged


def drawn(tree):
    """Arrays for shapes, without a program for each: matrices at random, vectors of 0.3."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        fan_in = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 1
        values = rng.normal(size=leaf.shape) / np.sqrt(fan_in) if leaf.ndim > 1 else 0.3
        return jnp.asarray(np.broadcast_to(values, leaf.shape), leaf.dtype)

    return jax.tree.map(draw, tree)


def linen(model, shape):
    x = drawn(jax.ShapeDtypeStruct(shape, jnp.float32))
    return functools.partial(
        model.apply, drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    ), x


def linen_mlp():
    return linen(models.MLP((12, 8, 4)), (5, 4, 1))


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.dense = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.avg_pool(nnx.relu(self.conv1(x)), (2, 2), strides=(2, 2))
        x = nnx.gelu(self.norm(self.conv2(x)))
        return self.dense(x.mean((-3, -2)))


def nnx_convnet():
    graph, state = nnx.split(nnx.eval_shape(lambda: ConvNet(nnx.Rngs(0))))
    model = nnx.merge(graph, drawn(state))
    return lambda x: model(x[None])[0], drawn(jax.ShapeDtypeStruct((10, 10, 1), jnp.float32))


def equinox_model():
    def build(key):
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(1, 4, 3, padding=1, groups=1, key=key),
                eqx.nn.Lambda(jax.nn.silu),
                eqx.nn.MaxPool2d(3, 2),
                eqx.nn.Lambda(jnp.ravel),
                eqx.nn.MLP(36, 4, 8, 1, activation=jax.nn.softplus, key=key),
            ]
        )

    model = drawn(eqx.filter_eval_shape(build, jax.random.key(0)))
    return model, drawn(jax.ShapeDtypeStruct((1, 8, 8), jnp.float32))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
        y = nn.Conv(x.shape[-1], (3, 3), feature_group_count=2)(y)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2)(x)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(4)(x.mean((0, 1)))


def linen_resnet():
    return linen(ResNet(), (8, 8, 2))


def alexnet():
    net = models.AlexNet(
        channels=(8, 12, 12, 12, 8),
        features=(16, 16, 10),
        padding=0,
        normalize=models.local_response_norm,
    )
    return linen(net, (67, 67, 3))


MODELS = {f.__name__: f for f in (linen_mlp, nnx_convnet, equinox_model, linen_resnet, alexnet)}


@functools.cache
def subject(name):
    """A model, an example, its bound, and its differences under many perturbations."""
    fn, x = MODELS[name]()
    found = lipschitz.bound(fn, x)

    @jax.jit
    def quotient(key, scale):
        """How steep a random perturbation is, and ones that are turned to where it is steepest."""
        base = x + scale * jax.random.normal(key, x.shape)
        _, forward = jax.linearize(fn, base)
        transpose = jax.linear_transpose(forward, base)

        def step(direction, _):
            change = scale * direction / jnp.linalg.norm(direction)
            moved = fn(base + change) - fn(base)
            return transpose(forward(change))[0], jnp.linalg.norm(moved) / scale

        direction = jax.random.normal(jax.random.fold_in(key, 1), x.shape)
        return jax.lax.scan(step, direction, length=4)[1]

    return found, quotient


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n == "alexnet" else n for n in MODELS],
)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), scale=st.sampled_from([0.01, 0.3, 3.0, 30.0]))
def test_no_perturbation_exceeds_the_bound_of_a_model(name, seed, scale):
    found, quotient = subject(name)
    steepest = quotient(jax.random.key(seed), scale).max()
    assert steepest <= found.constant * (1 + 1e-4)


def kinds(found):
    return [layer.name.rsplit("/", 1)[-1] for layer in found.layers]


def test_the_breakdown_names_the_layers_of_a_model():
    found, _ = subject("linen_resnet")
    block = ["conv_general_dilated", "mul", "conv_general_dilated", "add"]
    mean = ["reduce_sum", "div"]
    assert kinds(found) == ["conv_general_dilated", *block, *block, *mean, "dot_general"]
    assert "Block_1/Conv_0" in found.layers[5].name
    assert "test_lipschitz_bound.py" in found.layers[4].source


@pytest.mark.slow
def test_the_breakdown_of_alexnet_lists_pools_and_normalisation():
    found, _ = subject("alexnet")
    assert kinds(found).count("conv_general_dilated") == 5
    assert kinds(found).count("normalise") == 2
    assert kinds(found).count("reduce_window_max") == 2, "the third has a single window"
    assert kinds(found).count("dot_general") == 3
    assert len(found.layers) == 12, "what leaves distances as they are is not listed"
    assert any("conv4" in layer.name for layer in found.layers)


def test_the_gains_along_a_chain_multiply_to_the_bound():
    found, _ = subject("linen_mlp")
    product = np.prod([layer.gain for layer in found.layers])
    np.testing.assert_allclose(found.constant, product, rtol=1e-4)
    np.testing.assert_allclose(found.constant, found.layers[-1].constant, rtol=1e-4)


# Transformations


def test_the_bound_of_a_network_under_training_has_a_gradient():
    model, x = models.MLP((6, 3)), jnp.ones((2, 2))
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), x))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return jnp.log(lipschitz.bound(functools.partial(model.apply, params), x).constant)

    value, gradient = loss(params)
    kernels = {name: np.asarray(layer["kernel"]) for name, layer in params["params"].items()}
    product = np.prod([np.linalg.norm(kernel, 2) for kernel in kernels.values()])
    assert value == pytest.approx(np.log(product / 4), rel=1e-3)
    for layer, kernel in kernels.items():  # log |W| grows by 1 when W grows by a factor e
        inner = np.vdot(gradient["params"][layer]["kernel"], kernel)
        assert inner == pytest.approx(1, rel=1e-2)
        np.testing.assert_array_equal(gradient["params"][layer]["bias"], 0)


def test_a_bound_passes_through_jit():
    found = jax.jit(lambda w: lipschitz.bound(lambda x: jnp.tanh(x @ w), X))(W)
    assert found.constant == pytest.approx(NORM, rel=1e-3)
    assert [layer.name for layer in found.layers] == ["dot_general"]


def test_a_bound_beyond_its_dtype_is_infinite_as_are_the_gains_from_there():
    kernel = 1e10 * jnp.eye(3)

    def deep(x):
        for _ in range(40):
            x = jnp.tanh(x @ kernel)
        return x

    bound = lipschitz.bound(deep, jnp.zeros(3))
    gains = [float(layer.gain) for layer in bound.layers]
    assert bound.constant == np.inf
    assert gains[:3] == pytest.approx([1e10] * 3, rel=1e-4)
    assert gains[-1] == np.inf
    assert not np.isnan(gains).any()


def test_a_network_of_nan_has_no_finite_bound():
    assert not np.isfinite(constant(lambda x: x @ (W * np.nan), X))


# What has no bound


@pytest.mark.parametrize(
    ("fn", "primitive"),
    [
        (lambda x: x * x, "mul"),
        (lambda x: 1 / (2 + x), "div|integer_pow"),
        (lambda x: 2 * jnp.exp(x), "exp"),
        (lambda x: jnp.where(x > 0, x, 1 - x), "select_n|gt"),
        (lambda x: x.T @ x, "dot_general"),
        (lambda x: 2 * jnp.round(x), "round"),
        (lambda x: x.astype(int), "convert_element_type"),
        (lambda x: jnp.linalg.svd(x)[0], "svd"),
        (lambda x: jax.lax.while_loop(lambda v: v.sum() > 1, lambda v: v / 2, x), "while"),
    ],
)
def test_an_operation_without_a_bound_is_named_with_its_line_and_the_remedy(fn, primitive):
    with pytest.raises(lipschitz.NotLipschitzError, match=primitive) as error:
        lipschitz.bound(fn, X)
    assert "test_lipschitz_bound.py" in str(error.value)
    assert "register_rule" in str(error.value)


def test_an_operation_without_a_bound_does_no_harm_where_the_output_does_not_need_it():
    def fn(x):
        _ = jnp.exp(x)
        return 2 * x

    assert constant(fn, X) == pytest.approx(2, rel=1e-4)


def test_integer_inputs_are_refused():
    with pytest.raises(TypeError, match="example_inputs"):
        lipschitz.bound(lambda x: x * 1.0, jnp.arange(3))


def test_a_registered_rule_is_used(monkeypatch):
    monkeypatch.delitem(RULES, "round", raising=False)  # and takes it out again afterwards
    lipschitz.register_rule("round", lambda op: 7 * op.inputs[0].constant)
    assert constant(jnp.round, X) == pytest.approx(7, rel=1e-4)


def test_a_registered_function_is_not_looked_into():
    @jax.jit
    def squash_for_this_test(x):
        return x / (1 + x**2)

    with pytest.raises(lipschitz.NotLipschitzError):
        lipschitz.bound(squash_for_this_test, X)
    lipschitz.register_rule(squash_for_this_test, lambda op: op.inputs[0].constant)
    found = lipschitz.bound(lambda x: squash_for_this_test(3 * x), X)
    assert found.constant == pytest.approx(3, rel=1e-4)
