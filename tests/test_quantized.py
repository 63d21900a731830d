"""Adversarial images on a grid of pixel values, beside every image that the grid has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, runner, solvers
from advjax.attacks import Status

KEYS = jax.random.split(jax.random.key(0), 8)
PIXELS, CLASSES = 12, 4
KERNEL = 2 * jax.random.normal(KEYS[0], (PIXELS, CLASSES))
XS = jax.random.uniform(KEYS[1], (6, PIXELS))


def apply(kernel, x):
    """A smooth model whose logits do not depend on the unit of the pixels."""
    return jnp.sin(2 * x.ravel()) @ kernel


logits_fn = functools.partial(apply, KERNEL)
TARGETS = jnp.argsort(jax.vmap(logits_fn)(XS), axis=1)[:, -2]  # the second likeliest
X, TARGET = XS[0], TARGETS[0]


run = jax.jit(lambda attack, xs, targets: jax.vmap(attack)(xs, targets))
"""Compiled once for all attacks that differ in no more than arrays."""


def grid_values(levels, box=(0.0, 1.0), dtype=np.float32):
    """As NumPy computes them from the bytes of a file."""
    lower, upper = (np.asarray(bound, dtype) for bound in box)
    return lower + (upper - lower) * (np.arange(levels).astype(dtype) / dtype(levels - 1))


def assert_on_grid(images, levels, box=(0.0, 1.0)):
    assert np.all(np.isin(np.asarray(images), grid_values(levels, box)))


# How near it comes


def test_it_finds_what_an_exhaustive_search_finds():
    """Six pixels of four levels: 4,096 images."""

    def random_problem(key):
        keys = jax.random.split(key, 3)
        first, second = jax.random.normal(keys[0], (6, 8)), jax.random.normal(keys[1], (8, 4))
        return (1.5 * first, second), jax.random.uniform(keys[2], (6,))

    def model(params, x):
        return jnp.tanh((x - 0.5) @ params[0]) @ params[1]

    @jax.jit
    @jax.vmap
    def run(params, x, target):
        attack = attacks.minimum_norm(functools.partial(model, params))
        return attacks.quantized(attack, levels=4)(x, target)

    params, xs = jax.vmap(random_problem)(jax.random.split(KEYS[2], 25))
    labels = np.asarray(jax.vmap(model)(params, xs).argmax(1))
    every = np.stack(np.meshgrid(*[grid_values(4)] * 6), -1).reshape(-1, 6)
    of_every = jax.jit(jax.vmap(jax.vmap(model, (None, 0)), (0, None)))(params, every)
    classes = np.asarray(of_every.argmax(-1))
    distances = np.sqrt(np.mean((every - np.asarray(xs)[:, None]) ** 2, axis=-1))
    excesses, found, feasible = [], 0, 0
    for shift in (1, 2, 3):
        targets = (labels + shift) % 4
        result = run(params, xs, targets)
        assert_on_grid(result.x_adv, 4)
        best = np.min(np.where(classes == targets[:, None], distances, np.inf), axis=1)
        success = np.asarray(result.success)
        feasible += np.isfinite(best).sum()
        found += success.sum()
        excesses.extend(result.distortion[success] / best[success] - 1)
    print(f"found {found} of {feasible}, excess {np.mean(excesses):.3f}")
    assert found >= 0.95 * feasible > 60
    assert np.min(excesses) > -1e-5
    assert np.mean(excesses) < 0.15


SEARCH = attacks.minimum_norm(logits_fn)
QUANTIZED = attacks.quantized(SEARCH, levels=16)


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_more_levels_cost_less_distance(levels):
    continuous = run(SEARCH, XS, TARGETS)
    result = run(attacks.quantized(SEARCH, levels=levels), XS, TARGETS)
    assert_on_grid(result.x_adv, levels)
    assert bool(jnp.all(result.success))
    assert bool(jnp.all(jax.vmap(logits_fn)(result.x_adv).argmax(1) == TARGETS))
    further = result.num_evals - continuous.num_evals
    assert bool(jnp.all((further >= 1) & (further <= 40)))
    ratio = float(result.distortion.mean() / continuous.distortion.mean())
    assert ratio < {2: 15, 16: 1.5, 256: 1.05}[levels]
    rms = jnp.sqrt(jnp.mean((result.x_adv - XS) ** 2, axis=1))
    np.testing.assert_allclose(result.distortion, rms, rtol=1e-5)


def test_no_image_on_the_grid_is_nearer_than_the_image_itself_rounded():
    """An image of the target class off the grid costs the rounding and one evaluation."""
    label = int(jnp.argmax(logits_fn(X)))
    result = QUANTIZED(X, label)
    np.testing.assert_array_equal(result.x_adv, np.rint(15 * X) / np.float32(15))
    assert int(result.status) == Status.ALREADY_TARGET
    assert int(result.num_evals) == 2
    assert 0 < float(result.distortion) < 1 / 15 / 2


def test_an_image_that_rounding_takes_out_of_its_class_is_brought_back():
    kernel = jnp.array([[1.0, -1.0], [1.0, -1.0]])
    x = jnp.array([0.4, 0.55])  # of class 0 by a hair; rounded to two levels it is of class 1

    def model(x):
        return (x - jnp.array([0.4, 0.5])) @ kernel

    assert int(jnp.argmax(model(jnp.round(x - 0.1)))) == 1
    result = attacks.quantized(attacks.minimum_norm(model), levels=2)(x, 0)
    assert bool(result.success)
    assert_on_grid(result.x_adv, 2)


# The grid


def in_box(kernel, lower, width, x):
    return apply(kernel, (x - lower) / width)


def attack_in(lower, upper, levels):
    model = functools.partial(in_box, KERNEL, lower, jnp.asarray(upper - lower))
    return attacks.quantized(attacks.minimum_norm(model, box=(lower, upper)), levels=levels)


def assert_as_in_a_file(images, box, levels):
    """Compare with what a file holds, what it is loaded as, and what networks are fed."""
    images, width = np.asarray(images), box[1] - box[0]
    place = np.rint((images - box[0]) / width * (levels - 1))
    byte = (place * (255 // (levels - 1))).astype(np.uint8)
    loaded = byte / np.float32(255)
    expected = {(0, 1): loaded, (0, 255): byte.astype(np.float32), (-1, 1): 2 * loaded - 1}[box]
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(images, expected)


BOXES = [(0, 1), (0, 255), (-1, 1)]


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_pixels_are_bit_for_bit_those_of_a_scaled_file(levels):
    @jax.jit
    @jax.vmap
    def in_every_box(lower, upper):
        xs = lower + (upper - lower) * XS
        attack = attack_in(lower, upper, levels)
        return jax.vmap(attack)(xs, TARGETS)

    lowers, uppers = jnp.array(BOXES, jnp.float32).T
    result = in_every_box(lowers, uppers)
    assert bool(jnp.all(result.success))
    for box, images in zip(BOXES, result.x_adv, strict=True):
        assert_as_in_a_file(images, box, levels)


@pytest.mark.parametrize("box", BOXES)
def test_they_are_where_the_box_is_a_constant_and_in_the_runner(box):
    lower, upper = map(float, box)
    xs = np.asarray(lower + (upper - lower) * XS)
    attack = attack_in(lower, upper, 256)
    assert_as_in_a_file(attack(xs[0], TARGETS[0]).x_adv, box, 256)
    result = runner.attack_images(attack, xs, TARGETS, batch_size=4)
    assert np.all(result.success)
    assert_as_in_a_file(result.x_adv, box, 256)


def test_bounds_may_differ_from_channel_to_channel_and_pixel_to_pixel():
    lower = np.array([0.0, -0.5, 0.2], np.float32)
    upper = np.array([1.0, 0.5, 0.2], np.float32)  # the last channel is dead
    box = (lower, upper)
    xs = jnp.asarray(lower + (upper - lower) * np.asarray(XS).reshape(6, 2, 2, 3))
    targets = jnp.argsort(jax.vmap(logits_fn)(xs), axis=1)[:, -2]
    attack = attacks.quantized(attacks.minimum_norm(logits_fn, box=box), levels=16)
    result = run(attack, xs, targets)
    assert int(result.success.sum()) >= 4
    for channel in range(3):
        assert_on_grid(result.x_adv[..., channel], 16, (lower[channel], upper[channel]))
    np.testing.assert_array_equal(result.x_adv[..., 2], np.float32(0.2))


def test_a_box_of_one_point_leaves_nothing_to_find():
    result = attacks.quantized(attacks.minimum_norm(logits_fn, box=(X, X)))(X, TARGET)
    assert not bool(result.success)
    np.testing.assert_array_equal(result.x_adv, X)
    assert int(result.num_evals) <= 100


# Options and bad input


@pytest.mark.parametrize("levels", [1, 0, -3, 2.5, 16.0, "256", True, None, np.array([2, 3])])
def test_levels_are_an_integer_of_at_least_two(levels):
    with pytest.raises(ValueError, match=r"levels: .*, expected an integer of at least 2"):
        attacks.quantized(attacks.minimum_norm(logits_fn), levels=levels)


def test_an_integer_of_numpy_is_one():
    attack = attacks.quantized(attacks.minimum_norm(logits_fn), levels=np.int64(16))
    assert_on_grid(attack(X, TARGET).x_adv, 16)


def test_what_cannot_be_put_on_a_grid_is_refused():
    search = attacks.minimum_norm(logits_fn)
    with pytest.raises(TypeError, match=r"attack: function, expected an Attack"):
        attacks.quantized(lambda x, target: x)
    with pytest.raises(ValueError, match=r"untargeted\(quantized\(attack\)\)"):
        attacks.quantized(attacks.untargeted(search))
    with pytest.raises(ValueError, match=r"fgsm.*targeted=True"):
        attacks.quantized(attacks.fgsm(logits_fn, epsilon=0.1))
    with pytest.raises(ValueError, match=r"already.*levels="):
        attacks.quantized(attacks.quantized(search))
    with pytest.raises(ValueError, match=r"infinite bound.*box="):
        attacks.quantized(attacks.minimum_norm(logits_fn, box=(0, jnp.inf)))
    with pytest.raises(ValueError, match=r"max_evals: 0, expected an integer"):
        attacks.quantized(search, max_evals=0)
    with pytest.raises(TypeError, match=r"x: dtype uint8.*x / 255"):
        attacks.quantized(search)((255 * X).astype(jnp.uint8), 1)


@pytest.mark.parametrize("max_evals", [1, 5])
def test_a_budget_that_ends_leaves_the_best_image_on_the_grid(max_evals):
    before = run(SEARCH, XS, TARGETS)
    result = run(attacks.quantized(SEARCH, levels=4, max_evals=max_evals), XS, TARGETS)
    assert_on_grid(result.x_adv, 4)
    assert bool(jnp.all(result.num_evals <= before.num_evals + max_evals))
    assert set(np.asarray(result.status)) <= {Status.CONVERGED, Status.BUDGET}
    predicted = jax.vmap(logits_fn)(result.x_adv).argmax(1)
    np.testing.assert_array_equal(result.success, predicted == TARGETS)


def test_an_attack_that_ran_out_of_evaluations_is_finished_on_the_grid():
    result = attacks.quantized(attacks.minimum_norm(logits_fn, max_evals=2))(X, TARGET)
    assert bool(result.success)
    assert int(result.status) == Status.BUDGET
    assert_on_grid(result.x_adv, 256)


def test_a_class_out_of_reach_is_not_found():
    def model(x):
        return logits_fn(x).at[TARGET].add(-1000)

    result = attacks.quantized(attacks.minimum_norm(model), levels=4)(X, TARGET)
    assert not bool(result.success)
    assert int(result.status) in (Status.NOT_FOUND, Status.BUDGET)
    assert_on_grid(result.x_adv, 4)


def test_bad_data_are_told_by_the_status_and_end_at_once():
    xs = jnp.stack([X, X.at[0].set(jnp.nan), X, 255 * X, X, X])
    targets = jnp.array([TARGET, TARGET, 7, TARGET, -1, TARGET])
    result = run(QUANTIZED, xs, targets)
    assert result.status.tolist()[1:5] == [
        Status.NONFINITE,
        Status.INVALID_TARGET,
        Status.OUTSIDE_BOX,
        Status.INVALID_TARGET,
    ]
    np.testing.assert_array_equal(result.success, [True, *[False] * 4, True])
    assert int(result.num_evals[1:5].max()) <= 1
    assert_on_grid(result.x_adv, 16)
    alone = QUANTIZED(X, TARGET)
    np.testing.assert_array_equal(result.x_adv[0], alone.x_adv)


def test_traced_boxes_without_a_grid_are_told_by_the_status():
    @jax.jit
    def run(upper):
        return attacks.quantized(attacks.minimum_norm(logits_fn, box=(0.0, upper)))(X, TARGET)

    for upper in (jnp.inf, -1.0, jnp.nan):
        result = run(jnp.float32(upper))
        assert int(result.status) == Status.EMPTY_BOX
        assert not bool(result.success)
        assert bool(jnp.all(jnp.isfinite(result.x_adv)))


def test_logits_that_are_nan_are_told():
    attack = attacks.quantized(attacks.minimum_norm(lambda x: logits_fn(x) * jnp.nan))
    result = attack(X, TARGET)
    assert int(result.status) == Status.NONFINITE
    assert not bool(result.success)


@pytest.mark.parametrize("masked", [-jnp.inf, -1e9])
def test_a_masked_class_does_no_harm(masked):
    other = (int(TARGET) + 1) % CLASSES
    result = attacks.quantized(
        attacks.minimum_norm(lambda x: logits_fn(x).at[other].set(masked)), levels=16
    )(X, TARGET)
    assert bool(result.success)


def test_classes_that_tie_share_the_gradient():
    """The image's own class stands there three times, with slopes that differ a little."""

    def model(x):
        logits = logits_fn(x)
        label = logits[jnp.argmax(logits_fn(X))]
        others = [label + 0.3 * (x[i] - X[i]) for i in range(2)]
        return jnp.concatenate([logits, jnp.stack(others)])

    search = attacks.minimum_norm(model)
    result = attacks.quantized(search)(X, TARGET)
    assert bool(result.success)
    assert float(result.distortion) <= 1.03 * float(search(X, TARGET).distortion)


def test_the_margin_asked_for_holds_on_the_grid():
    search = attacks.minimum_norm(logits_fn, confidence=0.5)
    result = attacks.quantized(search, levels=16)(X, TARGET)
    logits = logits_fn(result.x_adv)
    assert float(logits[TARGET] - jnp.delete(logits, TARGET).max()) >= 0.5


# Compositions


def assert_same(one, other):
    for field in ("success", "prediction", "status", "x_adv"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
    np.testing.assert_allclose(one.distortion, other.distortion, rtol=1e-5)


def test_vmap_gives_what_a_python_loop_gives():
    together = run(QUANTIZED, XS, TARGETS)
    loop = [QUANTIZED(x, target) for x, target in zip(XS, TARGETS, strict=True)]
    loop = jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop)
    assert_same(together, loop)
    np.testing.assert_array_equal(together.num_evals, loop.num_evals)


def test_the_steps_may_be_made_by_hand_and_one_too_many_changes_nothing():
    state, steps = QUANTIZED.init(X, TARGET), 0
    step = jax.jit(QUANTIZED.step)
    while not QUANTIZED.done(state):
        state, steps = step(state), steps + 1
    result = QUANTIZED.result(state)
    assert steps == int(result.num_evals)
    assert_same(result, QUANTIZED(X, TARGET))
    assert_same(QUANTIZED.result(step(state)), result)


def dots(attack):
    """The matrix products of one step of a batch, as compiled."""
    states = jax.vmap(attack.init)(XS, TARGETS)
    text = jax.jit(jax.vmap(attack.step)).lower(states).compile().as_text()
    return text.count(" dot(") + text.count("custom_call_target")


@pytest.mark.parametrize("make", [attacks.minimum_norm, attacks.lbfgs])
def test_lanes_on_either_side_share_one_evaluation_of_the_model(make):
    """A model of ten matrix products, which the search has not."""

    def deep(x):
        for key in jax.random.split(KEYS[3], 10):
            x = jnp.tanh(x @ jax.random.normal(key, (PIXELS, PIXELS)))
        return x @ KERNEL

    attack = make(deep)
    assert dots(attacks.quantized(attack)) == dots(attack) > 20


def test_any_class_but_the_label_is_sought_on_the_grid():
    attack = attacks.untargeted(QUANTIZED)
    labels = jax.vmap(logits_fn)(XS).argmax(1)
    result = run(attack, XS, labels)
    assert_on_grid(result.x_adv, 16)
    assert bool(jnp.all(result.success & (result.prediction != labels)))
    for i in range(2):
        each = [QUANTIZED(XS[i], target) for target in range(CLASSES) if target != labels[i]]
        nearest = min(float(one.distortion) for one in each if one.success)
        np.testing.assert_allclose(result.distortion[i], nearest, rtol=1e-5)


@pytest.mark.parametrize(
    "attack",
    [
        attacks.lbfgs(logits_fn),
        attacks.minimum_norm(logits_fn, start=attacks.decoupled(num_steps=5)),
        attacks.fgsm(logits_fn, epsilon=0.2, targeted=True),
        attacks.minimum_norm(logits_fn, solver=solvers.jaxopt_lbfgsb(memory=4)),
    ],
    ids=["lbfgs", "start", "fgsm", "jaxopt"],
)
def test_any_attack_on_a_given_class_will_do(attack):
    result = run(attacks.quantized(attack, levels=16), XS, TARGETS)
    assert_on_grid(result.x_adv, 16)
    assert bool(jnp.all(result.success))


def test_the_runner_refills_its_lanes_and_resumes(tmp_path):
    xs = np.asarray(jax.random.uniform(KEYS[4], (20, PIXELS)))
    targets = np.asarray(jnp.argsort(jax.vmap(logits_fn)(xs), axis=1)[:, -2])
    expected = run(QUANTIZED, xs, targets)
    assert_same(runner.attack_images(QUANTIZED, xs, targets, batch_size=3), expected)
    first = runner.attack_images(QUANTIZED, xs, targets, batch_size=5, directory=tmp_path)
    assert_same(first, expected)
    pieces = sorted(path for path in tmp_path.rglob("*") if path.suffix == ".npz")
    pieces[-1].unlink()  # as if the run had been killed before
    again = runner.attack_images(QUANTIZED, xs, targets, batch_size=4, directory=tmp_path)
    assert_same(again, expected)
    other = attacks.quantized(SEARCH, levels=4)
    with pytest.raises(ValueError, match="directory"):
        runner.attack_images(other, xs, targets, directory=tmp_path)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_images_lie_on_the_grid_as_their_type_rounds_it(dtype):
    model = functools.partial(apply, KERNEL.astype(dtype))
    x = X.astype(dtype)
    result = attacks.quantized(attacks.minimum_norm(model))(x, TARGET)
    assert result.x_adv.dtype == dtype
    values = jnp.asarray(grid_values(256)).astype(dtype)
    assert bool(jnp.all(jnp.isin(result.x_adv, values)))
    assert bool(result.success)
    assert int(jnp.argmax(model(result.x_adv))) == TARGET


def test_a_model_with_half_precision_layers_takes_float32_images():
    def model(x):
        return apply(KERNEL.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).astype(jnp.float32)

    result = run(attacks.quantized(attacks.minimum_norm(model)), XS, TARGETS)
    assert_on_grid(result.x_adv, 256)
    predicted = [int(jax.jit(model)(x).argmax()) for x in result.x_adv]
    np.testing.assert_array_equal(result.success, predicted == np.asarray(TARGETS))
    assert int(result.success.sum()) >= 5


def test_float64_is_float64_throughout():
    with jax.enable_x64(True):
        x = np.asarray(X, np.float64)
        model = functools.partial(apply, np.asarray(KERNEL, np.float64))
        result = attacks.quantized(attacks.minimum_norm(model))(x, int(TARGET))
        assert result.x_adv.dtype == result.distortion.dtype == jnp.float64
        k = np.rint(255 * np.asarray(result.x_adv))
        np.testing.assert_array_equal(result.x_adv, k / 255)
        assert bool(result.success)


def test_it_is_a_constant_to_the_gradient():
    def loss(kernel):
        attack = attacks.quantized(
            attacks.minimum_norm(functools.partial(apply, kernel)), levels=16
        )
        return jnp.sum(apply(kernel, attack(X, TARGET).x_adv))

    x_adv = QUANTIZED(X, TARGET).x_adv
    expected = jax.grad(lambda kernel: jnp.sum(apply(kernel, x_adv)))(KERNEL)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(KERNEL), expected, rtol=1e-4)


# Trained networks


@pytest.mark.slow
def test_every_digit_stays_adversarial_at_hardly_any_distance(fc100):
    search = attacks.minimum_norm(fc100.logits_fn)
    before = jax.jit(jax.vmap(search))(fc100.images, fc100.targets)
    result = jax.jit(jax.vmap(attacks.quantized(search)))(fc100.images, fc100.targets)
    assert_on_grid(result.x_adv, 256)
    predict = jax.jit(lambda x: fc100.logits_fn(x).argmax())
    reread = np.rint(255 * np.asarray(result.x_adv)).astype(np.uint8) / np.float32(255)
    np.testing.assert_array_equal([int(predict(x)) for x in reread], fc100.targets)
    assert float(result.distortion.mean()) <= 1.002 * float(before.distortion.mean())
    assert int((result.num_evals - before.num_evals).max()) <= 40
