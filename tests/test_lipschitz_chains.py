"""Bounds of chains of dense layers: against the semidefinite program, and slopes by search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advjax import lipschitz
from advjax.lipschitz.linear import lipsdp
from tests.oracles import jacobians

METHODS = (lipschitz.product, lipschitz.eclipse, lipschitz.lipsdp)
WIDTHS = (7, 8, 6, 5)
SLOPES = (1.0, 0.25)


def draw(seed, widths=WIDTHS):
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(widths)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def bounds(seed):
    return [method(draw(seed), SLOPES) for method in METHODS]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_each_method_bounds_every_jacobian_and_is_no_looser_than_the_one_before(seed):
    total = jacobians(draw(seed), SLOPES, num=300)
    norms = np.linalg.norm(total, 2, (1, 2)).max()
    outputs = np.linalg.norm(total, axis=2).max(0)
    differences = total[:, :, None] - total[:, None]
    pairs = np.linalg.norm(differences, axis=3).max(0)
    found = bounds(seed)
    for bound in found:
        assert norms <= bound.constant
        assert np.all(outputs <= bound.outputs)
        assert np.all(pairs <= bound.pairs + 1e-30)
        assert np.all(bound.outputs <= bound.constant * (1 + 1e-5))
        assert np.all(bound.pairs <= np.sqrt(2) * bound.constant * (1 + 1e-5))
    for loose, tight in itertools.pairwise(found):
        for a, b in zip(tight, loose, strict=True):
            assert np.all(a <= b)


def test_without_activations_the_product_of_norms_is_that_of_the_definition():
    kernels = draw(0)
    norms = [np.linalg.norm(kernel.astype(np.float64), 2) for kernel in kernels]
    expected = np.prod(norms) / 4
    assert expected <= bounds(0)[0].constant <= expected * 1.01


def semidefinite(kernels, slopes):
    """LipSDP-Neuron as a cone program, by an interior-point solver."""
    clarabel = pytest.importorskip("clarabel")
    from scipy import sparse

    kernels = [np.asarray(kernel, np.float64).T for kernel in kernels]
    kernels = [w * s for w, s in zip(kernels, [*slopes, 1], strict=True)]
    sizes = [kernels[0].shape[1], *(len(w) for w in kernels[:-1])]
    starts = np.cumsum([0, *sizes])
    total = starts[-1]
    # rho |v|^2 >= |W_l z|^2 + the sum over units of lambda (y_k z_k - z_k^2)
    terms = [np.zeros((total, total))]
    terms[0][: sizes[0], : sizes[0]] = np.eye(sizes[0])
    for i, w in enumerate(kernels[:-1]):
        for k in range(len(w)):
            term = np.zeros((total, total))
            row = starts[i + 1] + k
            term[row, row] = 1
            term[row, starts[i] : starts[i + 1]] -= w[k] / 2
            term[starts[i] : starts[i + 1], row] -= w[k] / 2
            terms.append(term)
    last = np.zeros((total, total))
    last[starts[-2] :, starts[-2] :] = kernels[-1].T @ kernels[-1]

    upper = np.triu_indices(total)
    order = np.lexsort(upper)  # column by column
    rows, columns = upper[0][order], upper[1][order]
    weight = np.where(rows == columns, 1, np.sqrt(2))
    A = np.stack([-term[rows, columns] * weight for term in terms], axis=1)
    A = np.vstack([A, -np.eye(len(terms))])
    b = np.concatenate([-last[rows, columns] * weight, np.zeros(len(terms))])
    cost = np.zeros(len(terms))
    cost[0] = 1
    options = clarabel.DefaultSettings()
    options.verbose = False
    cones = [clarabel.PSDTriangleConeT(total), clarabel.NonnegativeConeT(len(terms))]
    nothing = sparse.csc_matrix((len(terms), len(terms)))
    solver = clarabel.DefaultSolver(nothing, cost, sparse.csc_matrix(A), b, cones, options)
    return np.sqrt(solver.solve().obj_val)


@pytest.mark.parametrize("seed", [0, 1])
def test_lipsdp_reaches_the_optimum_of_the_semidefinite_program(seed):
    optimum = semidefinite(draw(seed), SLOPES)
    found = bounds(seed)[-1].constant
    assert optimum * (1 - 1e-6) <= found <= 1.01 * optimum


def in_float64(kernels, multipliers):
    """The bound that the multipliers give, without a margin for rounding."""
    kernels = [np.asarray(kernel, np.float64) for kernel in kernels]
    S = np.eye(len(kernels[0]))
    for kernel, (logs, fraction) in zip(kernels, multipliers, strict=False):
        units = np.exp(np.asarray(logs, np.float64))
        B = kernel.T @ S
        largest = np.linalg.norm(units[:, None] * B, 2)
        D = 2 * np.sqrt(1 / (1 + np.exp(-float(fraction)))) / largest * units
        A = D[:, None] * B / 2
        S = np.linalg.inv(np.linalg.cholesky(np.eye(len(D)) - A @ A.T)).T / D[:, None]
    return np.linalg.norm(kernels[-1].T @ S, 2)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 3.0])
def test_every_choice_of_multipliers_is_certified(scale):
    kernels = [jnp.asarray(k) for k in draw(3)]
    rng = np.random.default_rng(0)
    multipliers = [
        lipsdp._Multipliers(
            jnp.asarray(scale * rng.normal(size=k.shape[1]), jnp.float32),
            jnp.float32(scale * rng.normal()),
        )
        for k in kernels[:-1]
    ]
    chain = tuple(map(lipschitz.Dense, kernels))
    found = lipsdp._certified(chain, multipliers).constant
    exact = in_float64(kernels, multipliers)
    assert np.linalg.norm(jacobians(kernels, (1.0, 1.0), num=300), 2, (1, 2)).max() <= exact
    assert exact <= found <= 1.01 * exact


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_a_kernel_carries_over(scale):
    first, *rest = draw(0)
    one = bounds(0)
    scaled = [method([first * np.float32(scale), *rest], SLOPES) for method in METHODS]
    for a, b in zip(one, scaled, strict=True):
        np.testing.assert_allclose(b.constant, a.constant * scale, rtol=2e-3)


def test_kernels_of_zeros_or_nan_end_in_zero_or_infinity():
    first, *rest = draw(0)
    for method in METHODS:
        assert method([0 * first, *rest], SLOPES).constant <= 1e-20
        assert np.isposinf(method([np.nan * first, *rest], SLOPES).constant)


def test_slopes_of_units_count_each():
    kernels = draw(0)
    dead = [np.arange(8) < 4, 0.25]
    alive = [kernels[0][:, :4], kernels[1][:4], kernels[2]]
    for method in METHODS[:2]:
        few = method(alive, SLOPES).constant
        np.testing.assert_allclose(method(kernels, dead).constant, few, rtol=1e-2)


def test_one_layer_has_its_norm():
    (kernel,) = draw(0, (7, 5))
    for method in METHODS:
        bound = method([kernel], [])
        sigma = np.linalg.norm(kernel.astype(np.float64), 2)
        assert sigma <= bound.constant <= 1.01 * sigma


@pytest.mark.parametrize(
    ("kernels", "slopes", "message"),
    [
        (draw(0)[::-1], SLOPES, "layers"),
        ([], (), "layers"),
        (draw(0), (1.0,), "slopes"),
        ([np.ones((2, 2), int)], (), "layers: dtype"),
    ],
)
def test_chains_that_do_not_fit_are_refused(kernels, slopes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lipschitz.product(kernels, slopes)


# Chains that are found in functions


def mlp(x):
    a, b, c = draw(0)
    x = jax.nn.relu(x @ a + 1)
    return jax.nn.sigmoid(x @ b - 1) @ c + 2


X = jnp.ones(7)


def test_a_chain_is_found_in_a_function():
    found = lipschitz.bound(mlp, X, method=lipschitz.eclipse)
    np.testing.assert_allclose(found.constant, bounds(0)[1].constant, rtol=1e-4)
    assert [layer.name for layer in found.layers] == ["dot_general (3 layers)"]


def test_the_product_of_a_chain_is_that_of_the_layers():
    found = lipschitz.bound(mlp, X, method=lipschitz.product)
    np.testing.assert_allclose(found.constant, lipschitz.bound(mlp, X).constant, rtol=1e-4)


def test_a_method_is_asked_once_for_each_chain_and_its_end_multiplies_on():
    calls = []

    def method(kernels, slopes):
        calls.append((len(kernels), slopes))
        return lipschitz.ChainBound(3.0, None, None)

    first = [2 * np.eye(7, dtype=np.float32)] * 2

    def fn(x):
        x = jnp.tanh(jax.nn.softplus(x @ first[0]) @ first[1] - 0.5)
        x = x + jnp.sin(x)  # ends the chain
        return jax.nn.softmax(mlp(x))

    found = lipschitz.bound(fn, X, method=method)
    assert calls == [(2, (1.0,)), (3, (1.0, 0.25))]
    assert found.constant == pytest.approx(3 * 2 * 3 / 2, rel=1e-4)


def test_products_along_different_axes_are_no_chain():
    kernel = np.ones((4, 4), np.float32)
    calls = []

    def method(kernels, slopes):
        calls.append(len(kernels))
        return lipschitz.product(kernels, slopes)

    lipschitz.bound(lambda x: kernel @ jax.nn.relu(x @ kernel), jnp.ones((4, 4)), method=method)
    assert not calls
    lipschitz.bound(lambda x: jax.nn.relu(x @ kernel) @ kernel, jnp.ones((4, 4)), method=method)
    lipschitz.bound(lambda x: kernel @ jax.nn.relu(kernel @ x), jnp.ones((4, 4)), method=method)
    assert calls == [2, 2]


def test_pairs_are_those_of_the_last_chain():
    pairs = lipschitz.pairwise(mlp, X, method=lipschitz.eclipse).constant
    np.testing.assert_allclose(pairs, bounds(0)[1].pairs, rtol=1e-4)
    scaled = lipschitz.pairwise(lambda x: mlp(2 * x), X, method=lipschitz.eclipse).constant
    np.testing.assert_allclose(scaled, 2 * pairs, rtol=1e-4)


def test_pairs_of_what_ends_in_no_dense_layer_are_as_steep_as_all():
    pairs = lipschitz.pairwise(jnp.tanh, X).constant
    np.testing.assert_allclose(pairs, np.sqrt(2) * (1 - np.eye(7)), rtol=1e-4)
    with pytest.raises(ValueError, match="one vector"):
        lipschitz.pairwise(lambda x: x[None], X)
