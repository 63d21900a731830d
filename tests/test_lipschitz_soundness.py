"""Bounds that must not be below the truth, and errors that say what is wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import lipschitz
from advjax.lipschitz.jaxpr import rules

V = jnp.array([0.3, 0.1, 0.2, -0.4])
METHODS = (None, lipschitz.product, lipschitz.eclipse)


def constant(fn, *inputs, **options):
    return float(lipschitz.bound(fn, *inputs, **options).constant)


# Results that are not continuous


def as_numbers(fn):
    return lambda x: jnp.asarray(fn(x), jnp.float32)


@pytest.mark.parametrize(
    "fn",
    {
        "argsort": jnp.argsort,
        "payload": lambda x: jax.lax.sort_key_val(x, jnp.arange(4.0))[1],
        "payload that moves": lambda x: jax.lax.sort_key_val(x, x[::-1])[1],
        "second key": lambda x: jax.lax.sort((jnp.round(x), x), num_keys=2)[1],
        "indices": lambda x: jax.lax.top_k(x, 2)[1],
        "argmax": jnp.argmax,
        "comparison": lambda x: x > 0,
        "two comparisons": lambda x: (x > 0) & (x < 1),
        "integers": lambda x: x.astype(int),
        "unsigned": lambda x: x.astype(jnp.uint8) + 1,
        "rounded": jnp.round,
        "floor": jnp.floor,
        "ceil": jnp.ceil,
        "sign": jnp.sign,
        "remainder": lambda x: x % 1,
        "eight bits": lambda x: x.astype(jnp.float8_e4m3fn),
        "few bits": lambda x: jax.lax.reduce_precision(x, 8, 2),
        "one-hot": lambda x: jax.nn.one_hot(jnp.argmax(x), 4),
        "bits": lambda x: jax.lax.bitcast_convert_type(x, jnp.int32),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_result_that_jumps_has_no_bound(fn):
    with pytest.raises(lipschitz.NotLipschitzError):
        constant(as_numbers(fn[1]), V)


def test_results_beside_one_that_jumps_keep_their_bounds():
    keys = jnp.array([3, 1, 2, 0])
    assert constant(lambda x: jnp.sort(2 * x), V) == pytest.approx(2, rel=1e-5)
    assert constant(lambda x: jax.lax.sort_key_val(2 * x, x)[0], V) == pytest.approx(2, rel=1e-5)
    assert constant(lambda x: jax.lax.sort_key_val(keys, 2 * x)[1], V) == pytest.approx(2, rel=1e-5)
    assert constant(lambda x: jax.lax.top_k(3 * x, 2)[0], V) == pytest.approx(3, rel=1e-5)


# Regions


def saturated(x):
    hidden = jnp.maximum(x @ jnp.eye(2) + jnp.array([-2.0, 10.0]), 0)
    return jnp.maximum(hidden @ jnp.array([[-100.0], [1.0]]), 0) @ jnp.ones((1, 1))


@pytest.mark.parametrize("method", METHODS)
def test_the_ball_around_an_example_outside_the_box_reaches_into_the_box(method):
    found = constant(saturated, jnp.array([5.0, 0.5]), radius=4.5, box=(0, 1), method=method)
    assert found >= 1


def test_an_example_below_the_box_is_projected_too():
    fn = lambda x: jnp.maximum(1 - 2 * x, 0)  # noqa: E731  # flat from 1/2 on
    assert constant(fn, jnp.array([-9.0]), radius=9.2, box=(0.0, 2.0)) >= 2
    assert constant(fn, jnp.array([9.0]), radius=0.1, box=(1.0, 2.0)) == 0


@pytest.mark.parametrize(
    "region",
    [
        {"radius": -0.5},
        {"radius": np.float32(-0.5)},
        {"radius": jnp.nan},
        {"box": (1, 0)},
        {"box": (0, jnp.array([1, 1, 1, -1.0]))},
        {"box": (jnp.nan, 1)},
        {"box": (0, 1), "radius": -1.0},
    ],
)
def test_a_region_that_is_none_is_refused(region):
    for of in (lipschitz.bound, lipschitz.pairwise):
        with pytest.raises(ValueError, match=r"radius|box"):
            of(jnp.tanh, V, **region)


def test_what_is_known_while_a_function_is_traced_raises_then():
    with pytest.raises(ValueError, match="radius"):
        jax.jit(lambda x: lipschitz.bound(jnp.tanh, x, radius=-1.0).constant)(V)
    with pytest.raises(ValueError, match="box"):
        jax.jit(lambda x: lipschitz.bound(jnp.tanh, x, box=(1, 0)).constant)(V)
    for fn in (jnp.square, jnp.exp, lambda x: x * x, lambda x: 1 / x):
        with pytest.raises(lipschitz.NotLipschitzError, match="box"):
            jax.jit(lambda x, fn=fn: lipschitz.bound(fn, x).constant)(V)


def test_a_traced_region_that_is_none_has_an_infinite_bound():
    @jax.jit
    def found(radius, lower):
        return [
            lipschitz.bound(jnp.tanh, V, radius=radius).constant,
            lipschitz.bound(lambda x: jax.nn.relu(x - 9), V, box=(lower, 1)).constant,
            lipschitz.pairwise(jnp.tanh, V, box=(lower, 1), radius=radius).constant.max(),
        ]

    assert np.all(np.isfinite(found(0.5, 0.0)))
    assert np.all(np.isposinf(found(-0.5, 2.0)))
    assert np.all(np.isposinf(found(jnp.nan, jnp.nan)))


# Precision


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("traced", [False, True])
def test_a_bound_of_half_precision_is_computed_in_float32(dtype, traced):
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.normal(size=s) / 10, dtype) for s in ((300, 200), (200, 40))]
    scale = jnp.asarray(1.056, dtype)
    exact = [np.asarray(k, np.float64) for k in kernels]

    def found(kernels, scale, method=None):
        def fn(x):
            hidden = jax.nn.relu(x.astype(dtype) @ kernels[0]) * scale
            return (hidden / scale * scale) @ kernels[1]

        return lipschitz.bound(fn, jnp.ones(300), method=method).constant

    run = jax.jit(found, static_argnums=2) if traced else found
    truth = np.linalg.norm(exact[0], 2) * float(scale) * np.linalg.norm(exact[1], 2)
    bound = run(kernels, scale, None)
    assert bound.dtype == jnp.float32
    assert truth <= bound <= 1.001 * truth
    assert run(kernels, scale, lipschitz.eclipse) <= 1.001 * truth


def test_constants_of_half_precision_are_computed_in_float32():
    rows = jnp.ones((300, 2), jnp.bfloat16)
    fns = {
        "factor": (lambda s, x: x * s, 1.0546875),
        "quotient": (lambda s, x: x / s, 1 / 1.0546875),
        "sum": (lambda s, x: s * x + s * x, 2 * 1.0546875),
        "joint": (lambda s, x: jnp.concatenate([s * x, s * x]), np.sqrt(2) * 1.0546875),
        "sums of rows": (lambda s, x: x @ rows, np.sqrt(600)),
    }
    x = jnp.ones(300, jnp.bfloat16)
    for fn, truth in fns.values():
        found = jax.jit(lambda s, fn=fn: lipschitz.bound(functools.partial(fn, s), x).constant)
        assert truth <= found(jnp.bfloat16(1.056)) <= truth * 1.001


def test_pairs_of_half_precision_are_not_rounded_down():
    pairs = lipschitz.pairwise(lambda x: x @ jnp.eye(3, dtype=x.dtype), jnp.ones(3, jnp.bfloat16))
    assert pairs.constant[0, 1] >= np.sqrt(2)
    joint = lipschitz.pairwise(jnp.tanh, jnp.ones(3, jnp.bfloat16)).constant
    assert joint[0, 1] >= np.sqrt(2)


def test_a_box_of_half_precision_is_not_rounded_inwards():
    def fn(x):
        return jax.nn.relu(x.astype(jnp.bfloat16) - jnp.bfloat16(1.0))

    assert constant(fn, jnp.zeros(1), box=(0.0, 1.001)) >= 1


def test_factors_that_underflow_together_do_not_vanish():
    def found(fn):
        return jax.jit(lambda s: lipschitz.bound(functools.partial(fn, s), V).constant)

    assert found(lambda s, x: x * s * s / s / s)(1e-30) == pytest.approx(1, rel=1e-4)
    assert found(lambda s, x: x * s * s / s / s)(1e30) == pytest.approx(1, rel=1e-4)
    assert found(lambda s, x: (x * s * s + x * s * s) / s / s)(1e-30) == pytest.approx(2, rel=1e-4)
    assert found(lambda s, x: jnp.stack([x * s * s, x]) / s)(1e-30) == pytest.approx(1e30, rel=1e-4)
    assert found(lambda s, x: x * s * s * s)(1e-30) > 0


@pytest.mark.filterwarnings("error")
def test_a_bound_beyond_float32_is_infinite_without_a_warning():
    found = lipschitz.bound(lambda x: x * np.float32(1e30) * np.float32(1e30), V)
    assert np.isposinf(found.constant)
    assert np.isposinf(found.layers[-1].gain)
    pairs = lipschitz.pairwise(lambda x: jnp.tanh(x * np.float32(1e30) * np.float32(1e30)), V)
    assert np.isposinf(pairs.constant[0, 1])


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_underflow_together_do_not_vanish(method):
    kernel = 1e-20 * jnp.eye(4)

    def fn(x):
        for _ in range(3):
            x = jax.nn.relu(x @ kernel)
        return (x @ kernel) * 1e30 * 1e30

    assert constant(fn, V, method=method) >= 1e-20


@pytest.mark.parametrize("scale", [1e-20, 1e20, 1e-36, 1e36])
def test_norms_of_any_scale_have_two_bounds_and_gradients(scale):
    kernel = jax.random.normal(jax.random.key(0), (5, 4))
    lower, upper = lipschitz.dense_norm(kernel * scale)
    one = lipschitz.dense_norm(kernel)
    assert lower == pytest.approx(float(one.lower) * scale, rel=1e-5)
    assert upper == pytest.approx(float(one.upper) * scale, rel=1e-5)
    for side in ("lower", "upper"):
        slope = jax.grad(lambda k, side=side: getattr(lipschitz.dense_norm(k), side))
        np.testing.assert_allclose(slope(kernel * scale), slope(kernel), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_estimates_from_below_have_any_scale(scale):
    kernel = scale * jax.random.normal(jax.random.key(0), (5, 4))
    for of in (lipschitz.lanczos, lipschitz.power_iteration):
        found = of(lambda x: x @ kernel, jnp.ones(5), key=jax.random.key(1)).value
        assert found == pytest.approx(float(lipschitz.dense_norm(kernel).upper), rel=1e-3)


def test_subnormal_kernels_have_a_norm():
    assert lipschitz.dense_norm(np.full((2, 3), 1e-40, np.float32)).upper > 2.4e-40


# Loops


@pytest.mark.parametrize("last", [2, 3])
def test_rows_of_a_loop_that_see_the_carry_on_the_way_are_not_independent(last):
    """Each row adds the one before, but for the last, after which the carry is constant."""

    def fn(x):
        def step(carry, row):
            entry, index = row
            kept = [lambda entry: entry, lambda entry: jnp.zeros(())]
            return jax.lax.cond(index == last, *kept[::-1], entry), carry + entry

        return jax.lax.scan(step, jnp.zeros(()), (x, np.arange(4)))[1]

    exact = np.linalg.norm(np.asarray(jax.jacobian(fn)(V), np.float64), 2)
    assert exact <= constant(fn, V)


def test_rows_whose_carry_never_depends_on_the_input_are_independent():
    def fn(x):
        return jax.lax.scan(lambda c, row: (2 * c, c * row), 1.0, x)[1]

    assert constant(fn, V) == pytest.approx(8, rel=1e-5)


@pytest.mark.parametrize("region", [{"box": (0, 1)}, {"box": (0, 1), "radius": 0.3}])
def test_rows_of_a_loop_know_where_they_are(region):
    def squares(x):
        carry, rows = jax.lax.scan(lambda c, row: (c + row / 4, row * row), 0.0, x)
        return jnp.append(rows, carry) ** 2

    points = np.random.default_rng(0).uniform(0, 1, (500, 4))
    if "radius" in region:
        points = np.clip(V, 0, 1) + 0.15 * (2 * points - 1)
        points = np.clip(points, 0, 1)
    with jax.enable_x64(True):
        slopes = np.linalg.norm(jax.vmap(jax.jacobian(squares))(points), 2, (1, 2))
    assert slopes.max() <= constant(squares, V, **region) <= 9


def test_a_loop_before_an_operation_without_a_bound_is_no_error_of_ours():
    def fn(x):
        _, rows = jax.lax.scan(lambda c, row: (row, c), jnp.zeros(()), x)
        return rows * rows

    with pytest.raises(lipschitz.NotLipschitzError, match="box"):
        constant(fn, V)


# Rules of one's own


@jax.jit
def norm(x):
    return jnp.sqrt(jnp.sum(x**2))


def another_norm():
    @jax.jit
    def norm(x):
        return 100 * jnp.sqrt(jnp.sum(x**2)) ** 2

    return norm


def scaled_by(factor):
    @jax.jit
    def scale(x):
        return jnp.sin(factor * x) ** 2

    return scale


@pytest.fixture(autouse=True)
def _no_rules(monkeypatch):
    monkeypatch.setattr(rules, "FUNCTION_RULES", {})


def unit_rule(op):
    return op.inputs[0].constant


def test_a_rule_belongs_to_the_function_and_not_to_its_name():
    lipschitz.register_rule(norm, unit_rule)
    assert constant(lambda x: norm(3 * x), V) == pytest.approx(3, rel=1e-5)
    other = another_norm()
    with pytest.raises(lipschitz.NotLipschitzError):
        constant(lambda x: other(3 * x), V)


def test_a_rule_belongs_to_one_closure():
    lipschitz.register_rule(scaled_by(1.0), unit_rule)
    steep = scaled_by(100.0)
    assert constant(scaled_by(1.0), V) == pytest.approx(1, rel=1e-5)
    assert constant(steep, V) >= 100


def test_a_rule_does_not_hold_for_the_gradient_of_its_function():
    @jax.jit
    def bump(x):
        return jnp.sum(jnp.sin(10 * x))

    lipschitz.register_rule(bump, lambda op: 20 * op.inputs[0].constant)
    assert constant(bump, V) == pytest.approx(20, rel=1e-5)
    assert constant(jax.grad(bump), V) >= 100


def test_a_rule_holds_under_vmap_over_all_arguments():
    lipschitz.register_rule(norm, unit_rule)
    assert constant(jax.vmap(norm), jnp.ones((3, 4))) == pytest.approx(1, rel=1e-5)


def test_a_rule_of_a_sum_does_not_hold_where_one_term_is_shared():
    @jax.jit
    def total(x, y):
        return x + y

    lipschitz.register_rule(total, lambda op: sum(s.constant for s in op.inputs))

    def shared(x, y):
        return jax.vmap(total, (0, None))(x, y)

    assert constant(total, V, V) == pytest.approx(2, rel=1e-5)
    assert constant(shared, jnp.ones((9, 4)), V) >= 3


def test_a_function_with_its_own_derivative_has_its_rule():
    @jax.custom_jvp
    def squash(x):
        return x / (1 + x**2)

    squash.defjvp(lambda primals, tangents: (squash(*primals), tangents[0]))
    lipschitz.register_rule(squash, unit_rule)
    assert constant(lambda x: squash(3 * x), V) == pytest.approx(3, rel=1e-5)


def test_a_lambda_has_no_rule():
    with pytest.raises(TypeError, match="lambda"):
        lipschitz.register_rule(jax.jit(lambda x: x**2), unit_rule)
    with pytest.raises(TypeError, match="operation"):
        lipschitz.register_rule(3, unit_rule)


# What is no error of the user's


def with_print(x):
    jax.debug.print("{}", x.sum())
    return 2 * x


def with_indices(x):
    index = (x * 10).astype(jnp.int32) // 3
    del index
    return x[jnp.arange(4) // 2 + 1]


HARMLESS = {
    "print": (with_print, 2),
    "print of constants": (lambda x: (jax.debug.print("{}", 1), 2 * x)[1], 2),
    "index arithmetic": (with_indices, np.sqrt(2)),
    "complex factor": (lambda x: jnp.real((3 + 4j) * x), 5),
    "complex matrix": (lambda x: x @ (jnp.eye(4) * (3 + 4j)), 5),
    "complex parts": (lambda x: jnp.abs(jax.lax.complex(3 * x, 4 * x)), 5),
    "transform": (lambda x: jnp.abs(jnp.fft.fft(x)), 2),
    "there and back": (lambda x: jnp.fft.irfft(jnp.fft.rfft(x), 4), np.sqrt(2)),
    "orthonormal": (lambda x: jnp.fft.fft2(x.reshape(2, 2), norm="ortho"), 1),
    "empty window": (
        lambda x: jax.lax.conv(x.reshape(1, 1, 4, 1), jnp.ones((0, 1, 1, 1)), (1, 1), "VALID"),
        0,
    ),
    "empty image": (
        lambda x: jax.lax.conv(x.reshape(1, 1, 4)[:, :, :0], jnp.ones((2, 1, 1)), (1,), "SAME"),
        0,
    ),
    "empty layer": (lambda x: x[:0] @ jnp.ones((0, 4)), 0),
    "no output": (lambda x: x @ jnp.ones((4, 0)), 0),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_no_harm_is_bounded(name, capfd):
    fn, truth = HARMLESS[name]
    assert truth <= constant(fn, V) <= truth * 1.001


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: jnp.interp(x, jnp.arange(3.0), jnp.arange(3.0)),
        lambda x: x[(x > 0).astype(jnp.uint32) + 1],
        lambda x: jnp.arange(4.0)[jnp.argmax(x) * jnp.uint32(2)],
        lambda x: jnp.tanh(1j * x),
        lambda x: jnp.abs(jnp.sin(1j * x)),
        lambda x: jax.nn.softmax(1j * x),
        lambda x: jax.lax.conv(jnp.ones((1, 1, 4)), x.reshape(1, 1, 4), (1,), "SAME"),
    ],
)
def test_what_cannot_be_bounded_is_named_with_its_line(fn):
    with pytest.raises(lipschitz.NotLipschitzError, match=r"test_lipschitz_soundness\.py"):
        constant(fn, V)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_layer_ends_a_chain(method):
    def fn(x):
        x = jax.nn.relu(x @ jnp.ones((4, 0))) @ jnp.ones((0, 3))
        return jax.nn.relu(x + 1) @ jnp.ones((3, 2))

    assert constant(fn, V, method=method) == 0
    assert constant(fn, V, method=method, box=(0, 1)) == 0


@pytest.mark.parametrize("operation", ["copy", "optimization_barrier", "rev", "split", "sort"])
def test_what_happens_to_entries_on_the_way_does_not_break_a_local_bound(operation):
    moves = {
        "copy": jnp.copy,
        "optimization_barrier": jax.lax.optimization_barrier,
        "rev": lambda x: x[::-1],
        "split": lambda x: jnp.concatenate(jnp.split(x, 2)[::-1]),
        "sort": jnp.sort,
    }
    found = constant(lambda x: jnp.tanh(moves[operation](2 * x)), V, box=(0, 1), radius=0.5)
    assert 0.9 <= found <= 2.001 * np.sqrt(2)


# Products


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x * x,
        jnp.square,
        lambda x: x**3,
        lambda x: 2 * jnp.exp(x),
        lambda x: jnp.outer(x, x) @ x,
        lambda x: x / (2 + jnp.sum(x)),
    ],
)
def test_the_remedy_for_a_product_is_a_region_which_helps(fn):
    with pytest.raises(lipschitz.NotLipschitzError) as error:
        constant(fn, V)
    assert "box" in str(error.value)
    assert 'register_rule("' not in str(error.value)
    points = np.random.default_rng(0).uniform(0, 1, (500, 4))
    points[:100] = np.round(points[:100])
    with jax.enable_x64(True):
        slopes = np.linalg.norm(jax.vmap(jax.jacobian(fn))(points).reshape(500, -1, 4), 2, (1, 2))
    assert slopes.max() <= constant(fn, V, box=(0, 1)) <= 4 * slopes.max()


@pytest.mark.parametrize("fn", [jnp.exp, jnp.log, lambda x: x * x, lambda x: 1 / x, jnp.sqrt])
def test_a_traced_region_of_a_product_gives_what_a_known_one_gives(fn):
    found = jax.jit(lambda lower: lipschitz.bound(fn, V, box=(lower, 2)).constant)
    assert found(0.5) == pytest.approx(constant(fn, V, box=(0.5, 2)), rel=1e-5)
    assert np.isposinf(
        jax.jit(lambda x: lipschitz.bound(fn, V, box=(x, jnp.inf)).constant)(-jnp.inf)
    )


def test_the_remedy_for_a_product_is_bounded_factors_which_help():
    assert 2 <= constant(lambda x: jnp.tanh(x) * jnp.tanh(x), V) <= 2.001
    assert constant(lambda x: jnp.clip(x, -3, 3) ** 2, V) == pytest.approx(6, rel=1e-4)
    assert constant(lambda x: jnp.sin(x) / (2 + jnp.cos(x)), V) <= 2.001
    gated = constant(lambda x: jax.nn.softmax(x) * jax.nn.sigmoid(x), V)
    assert gated <= 0.751
