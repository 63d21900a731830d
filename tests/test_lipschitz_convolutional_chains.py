"""Bounds of chains with convolutions: against slopes by search, and cyclic chains as matrices."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax import lipschitz, models
from advjax.lipschitz.linear import frequencies, lipsdp
from tests.oracles import conv_matrix, jacobians
from tests.test_lipschitz_chains import METHODS, in_float64, semidefinite

CHAINS = {
    "strides of an image, and dense layers": (
        [((6, 5, 2), (3, 3, 2, 4), {"strides": 2}), ((3, 3, 4), (2, 3, 4, 3), {"strides": (2, 1)})],
        [5, 3],
    ),
    "asymmetric padding": (
        [((5, 4, 1), (3, 2, 1, 3), {"padding": [(2, 0), (0, 3)]}), ((5, 6, 3), (2, 2, 3, 2), {})],
        [4],
    ),
    "groups, dilation and no padding": (
        [
            ((7, 7, 4), (2, 3, 2, 4), {"groups": 2, "dilation": (2, 1), "padding": "VALID"}),
            ((5, 5, 4), (3, 3, 1, 8), {"groups": 4}),
        ],
        [3],
    ),
    "a stride larger than the window, and one axis": (
        [((11, 2), (2, 2, 3), {"strides": 3}), ((4, 3), (3, 3, 4), {"strides": 2})],
        [6],
    ),
    "a window larger than the image": ([((3, 3, 2), (5, 5, 2, 3), {})], [4]),
    "nothing but convolutions": (
        [((5, 5, 2), (3, 3, 2, 3), {}), ((5, 5, 3), (2, 2, 3, 4), {"strides": 2})],
        [],
    ),
}


def draw(name, seed=0):
    """The layers of a chain, the slopes between them, and the layers as matrices."""
    rng = np.random.default_rng(seed)
    convolutions, dense = CHAINS[name]
    layers, matrices = [], []
    for shape, window, options in convolutions:
        kernel = rng.normal(size=window).astype(np.float32)
        layers.append(lipschitz.Conv(kernel, shape, **options))
        matrices.append(conv_matrix(kernel, shape, **options))
    for width in dense:
        kernel = rng.normal(size=(matrices[-1].shape[1], width)).astype(np.float32)
        layers.append(kernel)
        matrices.append(kernel.astype(np.float64))
    return layers, [1.0, 0.25, 0.5][: len(layers) - 1], matrices


@pytest.mark.parametrize("name", CHAINS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_each_method_bounds_every_jacobian_and_is_no_looser_than_the_one_before(name, seed):
    layers, slopes, matrices = draw(name, seed)
    total = jacobians(matrices, slopes, num=40, ones=0.2)
    units = layers[-1].kernel.shape[-1] if CHAINS[name][1] == [] else total.shape[1]
    pixels = total.reshape(len(total), -1, units, total.shape[2])
    norm = np.linalg.norm(total, 2, (1, 2)).max()
    outputs = np.linalg.norm(pixels, axis=3).max((0, 1))
    pairs = np.linalg.norm(pixels[:, :, None] - pixels[:, :, :, None], axis=4).max((0, 1))
    found = [method(layers, slopes) for method in METHODS]
    for bound in found:
        assert norm <= bound.constant
        assert np.all(outputs <= bound.outputs)
        assert np.all(pairs <= bound.pairs + 1e-30)
    for loose, tight in itertools.pairwise(found):
        for a, b in zip(tight, loose, strict=True):
            assert np.all(a <= b)


def cyclic_matrix(kernel, before, behind, offsets, groups=1):
    """The matrix of a cyclic convolution from one circle to another, from its definition."""
    *window, inputs, outputs = kernel.shape
    matrix = np.zeros((*before, inputs * groups, *behind, outputs))
    for position in itertools.product(*map(range, behind)):
        for tap in itertools.product(*map(range, window)):
            at = tuple(
                (o * (n // m) + offset[t]) % n
                for o, t, n, m, offset in zip(position, tap, before, behind, offsets, strict=True)
            )
            for group in range(groups):
                reads = slice(group * inputs, (group + 1) * inputs)
                makes = slice(group * outputs // groups, (group + 1) * outputs // groups)
                matrix[(*at, reads, *position, makes)] += kernel[(*tap, slice(None), makes)]
    return matrix.reshape(math.prod(before) * inputs * groups, -1)


def cyclic_matrices(layers):
    """The layers on the circles of `frequencies.grids`."""
    chain = lipsdp._chain(layers, [1.0] * (len(layers) - 1))
    found = []
    shape = ()
    circles = itertools.pairwise(frequencies.grids(chain))
    for layer, (before, behind) in zip(chain, circles, strict=True):
        matrix = np.asarray(layer.kernel, np.float64)
        if behind:
            offsets = [axis.offsets for axis in layer.axes]
            matrix = cyclic_matrix(matrix, before, behind, offsets, layer.groups)
        elif before:
            sizes = [range(size) for size in shape[:-1]]
            matrix = matrix.reshape(*shape, -1)
            matrix = cyclic_matrix(matrix, before, (1,) * len(before), sizes)
        found.append(matrix)
        shape = layer.output_shape
    return found


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("name", CHAINS)
def test_every_choice_of_multipliers_gives_the_bound_of_the_cyclic_chain(name, scale):
    layers, slopes, matrices = draw(name)
    chain = lipsdp._chain(layers, [1.0] * len(slopes))
    rng = np.random.default_rng(0)
    multipliers = [
        lipsdp._Multipliers(
            jnp.asarray(scale * rng.normal(size=layer.kernel.shape[-1]), jnp.float32),
            jnp.float32(scale * rng.normal()),
        )
        for layer in chain[:-1]
    ]
    found = lipsdp._certified(chain, multipliers).constant
    cyclic = cyclic_matrices(layers)
    pixels = [
        (np.tile(units, matrix.shape[1] // len(units)), fraction)
        for (units, fraction), matrix in zip(multipliers, cyclic, strict=False)
    ]
    exact = in_float64(cyclic, pixels)
    assert exact <= found <= 1.001 * exact
    total = jacobians(matrices, [1.0] * len(slopes), num=40, ones=0.2)
    assert np.linalg.norm(total, 2, (1, 2)).max() <= exact


def test_lipsdp_reaches_the_optimum_of_the_semidefinite_program_of_the_cyclic_chain():
    rng = np.random.default_rng(0)
    layers = [
        lipschitz.Conv(rng.normal(size=(2, 2, 3)).astype(np.float32), (11, 2), strides=3),
        lipschitz.Conv(rng.normal(size=(3, 3, 4)).astype(np.float32), (4, 3)),
    ]
    # One multiplier for each pixel: by symmetry those of a channel are the same.
    optimum = semidefinite(cyclic_matrices(layers), [1.0])
    found = lipschitz.lipsdp(layers, [1.0]).constant
    assert optimum * (1 - 1e-6) <= found <= 1.01 * optimum


def test_circles_fit_one_in_the_other():
    layers, *_ = draw("strides of an image, and dense layers")
    chain = lipsdp._chain(layers, [1.0] * 3)
    grids = frequencies.grids(chain)
    assert grids[3:] == [(), ()]
    for before, behind, layer in zip(grids, grids[1:3], chain, strict=False):
        for n, m, axis in zip(before, behind, layer.axes, strict=True):
            assert n == m * axis.stride
            assert m >= axis.circle


def test_slopes_of_channels_count_each():
    layers, _, _ = draw("strides of an image, and dense layers")
    first, second, *rest = layers
    alive = [
        lipschitz.Conv(first.kernel[..., :2], (6, 5, 2), strides=2),
        lipschitz.Conv(second.kernel[:, :, :2], (3, 3, 2), strides=(2, 1)),
        *rest,
    ]
    for method in METHODS[:2]:
        few = method(alive, [1.0, 1.0, 1.0]).constant
        dead = method(layers, [np.arange(4) < 2, 1.0, 1.0]).constant
        np.testing.assert_allclose(dead, few, rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_a_kernel_carries_over(scale):
    layers, slopes, _ = draw("strides of an image, and dense layers")
    first, *rest = layers
    scaled = [dataclasses.replace(first, kernel=first.kernel * scale), *rest]
    for method in METHODS:
        expected = method(layers, slopes).constant * scale
        np.testing.assert_allclose(method(scaled, slopes).constant, expected, rtol=2e-3)


def test_convolutions_with_kernels_of_zeros_or_nan_end_in_zero_or_infinity():
    layers, slopes, _ = draw("strides of an image, and dense layers")
    first, *rest = layers
    for method in METHODS:
        assert (
            method([dataclasses.replace(first, kernel=0 * first.kernel), *rest], slopes).constant
            <= 1e-20
        )
        lost = [dataclasses.replace(first, kernel=np.nan * first.kernel), *rest]
        assert np.isposinf(method(lost, slopes).constant)


def test_layers_that_do_not_follow_each_other_are_refused():
    layers, *_ = draw("asymmetric padding")
    for wrong in (layers[::-1], layers[:1] + layers[2:], [layers[1], layers[0]]):
        with pytest.raises(ValueError, match="layers"):
            lipschitz.eclipse(wrong, [1.0] * (len(wrong) - 1))


# Chains that are found in functions


def names(fn, x):
    return [
        layer.name.split("/")[-1] for layer in lipschitz.bound(fn, x, method=lipschitz.product)[1]
    ]


@functools.cache
def convnet():
    model = models.ConvNet(channels=(3, 4), features=(7, 5))
    x = jnp.zeros((8, 8, 1), jnp.float32)
    params = model.init(jax.random.key(0), x)
    return functools.partial(model.apply, params), params["params"], x


def layers_of_convnet():
    _, params, x = convnet()
    options = {"strides": 2, "padding": [(1, 1), (1, 1)]}
    return [
        lipschitz.Conv(params["conv1"]["kernel"], x.shape, **options),
        lipschitz.Conv(params["conv2"]["kernel"], (4, 4, 3), **options),
        params["hidden1"]["kernel"],
        params["logits"]["kernel"],
    ]


def test_a_convnet_is_one_chain():
    fn, _, x = convnet()
    assert names(fn, x) == ["dot_general (4 layers)"]
    for method in METHODS:
        found = lipschitz.bound(fn, x, method=method).constant
        expected = method(layers_of_convnet(), [1.0] * 3).constant
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    pairs = lipschitz.pairwise(fn, x, method=lipschitz.eclipse).constant
    expected = lipschitz.eclipse(layers_of_convnet(), [1.0] * 3).pairs
    np.testing.assert_allclose(pairs, expected, rtol=1e-5)


def test_a_batch_of_images_has_the_bound_of_one():
    fn, _, x = convnet()
    one = lipschitz.bound(fn, x, method=lipschitz.eclipse)
    batch = lipschitz.bound(jax.vmap(fn), jnp.stack([x] * 3), method=lipschitz.eclipse)
    assert [layer.name.split("/")[-1] for layer in batch.layers] == ["dot_general (4 layers)"]
    np.testing.assert_allclose(batch.constant, one.constant, rtol=1e-5)


def channels_first(x):
    """The ConvNet of torch's conventions: channels first, and so in the dense layer's inputs."""
    _, params, _ = convnet()
    x = x[None].transpose(0, 3, 1, 2)
    for name in ("conv1", "conv2"):
        kernel = params[name]["kernel"].transpose(3, 2, 0, 1)
        x = jax.nn.relu(jax.lax.conv(x, kernel, (2, 2), [(1, 1), (1, 1)]) + 0.1)
    hidden = params["hidden1"]["kernel"].reshape(2, 2, 4, -1)
    x = jax.nn.relu(x.reshape(-1) @ hidden.transpose(2, 0, 1, 3).reshape(16, -1))
    return x @ params["logits"]["kernel"]


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_an_image_s_entries_does_not_matter(method):
    fn, _, x = convnet()
    assert names(channels_first, x) == ["dot_general (4 layers)"]
    first, last = (lipschitz.bound(f, x, method=method).constant for f in (channels_first, fn))
    np.testing.assert_allclose(first, last, rtol=1e-3)


class Broken(nn.Module):
    """A convolution, something else, and another one."""

    between: object

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(3, (3, 3))(x))
        return nn.Conv(2, (3, 3))(self.between(x))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: nn.max_pool(x, (2, 2), (2, 2)),
        lambda x: x + jnp.sin(x),
        lambda x: x.transpose(1, 0, 2),
        lambda x: x.reshape(4, 16, 3),
        lambda x: nn.relu(nn.Dense(192)(x.ravel())).reshape(8, 8, 3),
    ],
    ids=["pool", "residual", "transposed", "reshaped", "dense"],
)
def test_chains_end_where_images_are_not_passed_on_as_they_are(between):
    x = jnp.ones((8, 8, 1))
    model = Broken(between)
    params = model.init(jax.random.key(0), x)
    fn = functools.partial(model.apply, params)
    assert "conv_general_dilated (2 layers)" not in names(fn, x)
    plain = lipschitz.bound(fn, x).constant
    assert lipschitz.bound(fn, x, method=lipschitz.eclipse).constant <= plain * (1 + 1e-5)


def test_a_transposed_convolution_is_not_taken_for_one_of_the_image():
    kernel = jnp.ones((3, 3, 2, 2))

    def fn(x):
        x = jax.lax.conv_transpose(x[None], kernel, (2, 2), "SAME")
        return jax.lax.conv_transpose(jax.nn.relu(x), kernel, (2, 2), "SAME")

    assert names(fn, jnp.ones((4, 4, 2))) == ["conv_general_dilated"] * 2


def test_a_local_bound_of_a_chain_with_convolutions_holds_and_is_no_larger():
    fn, _, x = convnet()
    x = jax.random.uniform(jax.random.key(1), x.shape)
    radius = 0.2
    anywhere = lipschitz.bound(fn, x, method=lipschitz.eclipse).constant
    near = lipschitz.bound(fn, x, method=lipschitz.eclipse, radius=radius).constant
    assert near <= anywhere * (1 + 1e-6)
    steps = jax.random.normal(jax.random.key(2), (100, *x.shape))
    steps *= radius / jnp.sqrt(jnp.sum(steps**2, (1, 2, 3), keepdims=True))
    moved = jax.vmap(fn)(x[None] + steps) - fn(x)[None]
    assert jnp.linalg.norm(moved, axis=1).max() <= near * radius
    slopes = jax.vmap(jax.jacobian(fn))(x[None] + steps).reshape(100, 5, -1)
    assert np.linalg.norm(np.asarray(slopes, np.float64), 2, (1, 2)).max() <= near
