"""Bad input: errors while tracing for what the types tell, a status for what the data tell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, losses, runner
from tests.attack_list import each_attack

Status = attacks.Status
X = jnp.array([[0.9, 0.2], [0.4, 0.1]])
KERNEL = jnp.array([[4.0, -4.0, 1.0], [0.0, 1.0, -1.0], [1.0, 1.0, 0.0], [0.5, 0.0, 2.0]])


def linear(x):
    """Three classes of a 2 x 2 image; X is of class 0."""
    return jnp.ravel(x) @ KERNEL


# What the types tell, told while tracing.


@each_attack
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((linear, (255 * X).astype(jnp.uint8), 1), TypeError, r"x: dtype uint8.*x / 255"),
        ((linear, X > 0, 1), TypeError, r"x: dtype bool.*float32"),
        ((linear, X, jnp.float32(1)), TypeError, r"target: dtype float32, expected an integer"),
        ((linear, X, jnp.array([1, 2])), ValueError, r"target: shape \(2,\).*jax.vmap"),
        (("net", X, 1), TypeError, r"logits_fn: str, expected a function"),
        ((lambda x: linear(x)[None], X, 1), ValueError, r"\(1, 3\).*model\(x\[None\]\)\[0\]"),
        ((lambda x: x @ X, X, 1), ValueError, r"shape \(2, 2\).*ONE example"),
        ((jnp.sum, X, 1), ValueError, r"shape \(\).*jnp.stack\(\[jnp.zeros_like"),
        ((lambda x: linear(x)[:1], X, 1), ValueError, r"shape \(1,\).*at least 2 .*jnp.stack"),
        ((linear, X, None), TypeError, "target: None, expected an integer class index"),
        ((lambda x: linear(x) > 0, X, 1), TypeError, r"dtype bool, expected floating logits"),
        ((lambda x: (linear(x), x), X, 1), TypeError, r"returns a tuple.*model\(x\)\[0\]"),
    ],
)
def test_arguments_of_the_wrong_type_or_shape_are_named(attack, arguments, error, message):
    logits_fn, x, target = arguments
    with pytest.raises(error, match=message):
        jax.jit(lambda: attack(logits_fn)(x, target))()


@each_attack
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": 1.0}, r"box: 1.0, expected a pair"),
        ({"box": (0, 1, 2)}, r"box: \(0, 1, 2\), expected a pair"),
        ({"box": (jnp.zeros(3), 1)}, r"box: lower bound of shape \(3,\) does not broadcast"),
        ({"max_evals": 0}, r"max_evals: 0, expected an integer"),
        ({"max_evals": 1.5}, r"max_evals: 1.5, expected an integer"),
        ({"confidence": -1}, r"confidence: -1, expected a finite number of at least 0"),
        ({"tol": 0}, r"tol: 0, expected a finite number above 0"),
        ({"tol": "small"}, r"tol: 'small', expected a finite number"),
    ],
)
def test_options_out_of_range_are_named(attack, options, message):
    with pytest.raises(ValueError, match=message):
        attack(linear, **options)(X, 1)


@each_attack
def test_an_unknown_option_is_named(attack):
    with pytest.raises(TypeError, match="max_iterations"):
        attack(linear, max_iterations=3)


def test_losses_and_penalties_that_are_not_scalar_are_named():
    with pytest.raises(ValueError, match=r"loss: returns shape \(3,\)"):
        attacks.lbfgs(linear, loss=lambda logits, target: logits)(X, 1)
    with pytest.raises(ValueError, match=r"penalty: returns shape \(2, 2\)"):
        attacks.lbfgs(linear, penalty=jnp.abs)(X, 1)


def test_untargeted_names_its_own_arguments():
    with pytest.raises(TypeError, match=r"label: dtype float32"):
        attacks.untargeted(attacks.lbfgs(linear))(X, jnp.float32(0))
    with pytest.raises(ValueError, match=r"k: 0, expected an integer"):
        attacks.untargeted(attacks.lbfgs(linear), k=0)


# What the data tell, told by the status.


def check_invariants(result, logits_fn, x, target, box):
    """What holds of every result, whatever went in."""
    x_adv, image = (np.asarray(a, np.float64) for a in (result.x_adv, x))
    lower, upper = (np.broadcast_to(np.asarray(b, np.float64), x.shape) for b in box)
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == x.dtype
    assert np.all(np.isfinite(x_adv))
    assert np.isfinite(result.distortion)
    assert np.isfinite(result.multiplier)
    assert int(result.status) in set(Status) - {Status.RUNNING}
    if np.all(lower <= upper):
        assert np.all((lower <= x_adv) & (x_adv <= upper))
    if np.all(np.isfinite(image)):
        distortion = np.sqrt(np.mean((x_adv - image) ** 2))
        np.testing.assert_allclose(result.distortion, distortion, rtol=1e-4, atol=1e-7)

    logits = np.asarray(logits_fn(result.x_adv), np.float64)
    if np.any(np.isnan(logits)):
        assert not result.success
    else:
        assert int(result.prediction) == np.argmax(logits)
        untried = (
            Status.NONFINITE,
            Status.INVALID_TARGET,
            Status.EMPTY_BOX,
            Status.OUTSIDE_BOX,
        )
        taken = int(result.prediction) == target and int(result.status) not in untried
        assert bool(result.success) == taken
    assert (result.status == Status.INVALID_TARGET) <= (not 0 <= target < len(logits))
    assert (result.status == Status.EMPTY_BOX) <= (not np.all(lower <= upper))


@functools.cache
def compiled(attack, logits_fn, **options):
    return jax.jit(lambda x, target, box: attack(logits_fn, box=box, **options)(x, target))


def run(attack, logits_fn, x, target, box=(0.0, 1.0), **options):
    bounds = tuple(jnp.broadcast_to(jnp.asarray(bound, x.dtype), x.shape) for bound in box)
    result = compiled(attack, logits_fn, **options)(x, target, bounds)
    check_invariants(result, logits_fn, x, target, box)
    return result


@each_attack
def test_an_image_outside_the_box_by_a_rounding_is_moved_into_it(attack):
    x = jnp.array([[1.0005, 0.2], [-0.0005, 0.1]])
    result = run(attack, linear, x, 1)
    assert bool(result.success)
    inside = run(attack, linear, jnp.clip(x, 0, 1), 1)
    np.testing.assert_allclose(result.distortion, inside.distortion, atol=1e-3)


@each_attack
@pytest.mark.parametrize("target", [-1, 3, 1000])
def test_a_target_that_is_no_class_fails(attack, target):
    result = run(attack, linear, X, target)
    assert int(result.status) == Status.INVALID_TARGET
    np.testing.assert_array_equal(result.x_adv, X)


@each_attack
def test_a_target_that_is_predicted_already_costs_nothing(attack):
    result = run(attack, linear, X, 0)
    assert bool(result.success)
    assert int(result.status) == Status.ALREADY_TARGET
    assert float(result.distortion) == 0
    assert int(result.num_evals) == 1
    np.testing.assert_array_equal(result.x_adv, X)


@each_attack
def test_a_confidence_asks_for_more_than_being_predicted(attack):
    margin = float(linear(X)[0] - jnp.sort(linear(X))[-2])
    result = run(attack, linear, X, 0, confidence=margin + 0.5)
    assert bool(result.success)
    assert float(result.distortion) > 0


@each_attack
def test_a_class_out_of_reach_is_not_found(attack):
    result = run(attack, lambda x: linear(x) - jnp.array([0.0, 100.0, 0.0]), X, 1)
    assert not bool(result.success)
    assert int(result.status) in (Status.NOT_FOUND, Status.BUDGET)
    # The candidate is the one whose margin came nearest: no corner of the box comes nearer.
    corners = jnp.stack(jnp.meshgrid(*[jnp.array([0.0, 1.0])] * 4), -1).reshape(-1, 2, 2)
    best = max(float(linear(c)[1] - jnp.delete(linear(c), 1).max()) for c in corners)
    found = linear(result.x_adv)
    assert float(found[1] - jnp.delete(found, 1).max()) >= best - 0.5


@each_attack
@pytest.mark.parametrize("target", [0, 2])
def test_a_constant_model_gives_its_one_class_alone(attack, target):
    result = run(attack, lambda x: jnp.zeros(3), X, target)
    assert bool(result.success) == (target == 0)
    assert int(result.status) == (
        Status.ALREADY_TARGET if target == 0 else Status.VANISHING_GRADIENT
    )
    np.testing.assert_array_equal(result.x_adv, X)


@each_attack
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_logits_that_are_not_finite_at_the_image_are_told(attack, bad):
    result = run(attack, lambda x: linear(x) * bad, X, 1)
    assert int(result.status) == Status.NONFINITE
    assert not bool(result.success)


@each_attack
def test_logits_that_are_nan_beyond_the_nearest_image_are_avoided(attack):
    distance = 2 * run(attack, linear, X, 2).distortion

    def fragile(x):
        return jnp.where(jnp.linalg.norm(x - X) > 1.05 * distance, jnp.nan, 1.0) * linear(x)

    result = run(attack, fragile, X, 2)
    assert bool(result.success)
    assert float(result.distortion) == pytest.approx(float(distance) / 2, rel=0.02)


@each_attack
def test_a_class_masked_by_minus_infinity_does_no_harm(attack):
    result = run(attack, lambda x: linear(x).at[1].set(-jnp.inf), X, 2)
    assert bool(result.success)


@each_attack
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_an_image_that_is_not_finite_is_told(attack, bad):
    result = run(attack, linear, X.at[0, 0].set(bad), 1)
    assert int(result.status) == Status.NONFINITE
    assert not bool(result.success)


@each_attack
@pytest.mark.parametrize("box", [(1.0, 0.0), (0.0, jnp.nan), (jnp.full((2, 2), 0.5), 0.4)])
def test_a_box_without_a_point_is_told(attack, box):
    result = run(attack, linear, X, 1, box=box)
    assert int(result.status) == Status.EMPTY_BOX
    assert not bool(result.success)
    np.testing.assert_array_equal(result.x_adv, X)


@each_attack
def test_a_box_of_one_point_leaves_nothing_to_find(attack):
    result = run(attack, linear, X, 1, box=(X, X))
    assert not bool(result.success)
    np.testing.assert_array_equal(result.x_adv, X)
    assert int(result.num_evals) <= 50


@each_attack
def test_a_box_of_one_point_of_the_target_class_is_taken(attack):
    point = jnp.array([[0.0, 1.0], [0.0, 0.0]])
    result = run(attack, linear, point, 1, box=(point, point))
    assert bool(result.success)


@each_attack
def test_an_infinite_box_is_no_box(attack):
    result = run(attack, linear, X, 1, box=(-jnp.inf, jnp.inf))
    gap, normal = linear(X)[0] - linear(X)[1], KERNEL[:, 0] - KERNEL[:, 1]
    nearest = float(gap / jnp.linalg.norm(normal)) / 2
    excess = 2e-3 if attack is attacks.minimum_norm else 2e-2  # cross-entropy sees all classes
    assert nearest * (1 - 1e-4) <= float(result.distortion) <= nearest * (1 + excess)


@each_attack
@pytest.mark.parametrize("max_evals", [1, 2, 5])
def test_a_budget_is_kept(attack, max_evals):
    result = run(attack, linear, X, 1, max_evals=max_evals)
    assert int(result.num_evals) <= max_evals
    assert int(result.status) == Status.BUDGET


@each_attack
def test_the_failure_of_one_lane_leaves_the_others_alone(attack):
    images = jnp.stack([X, X * jnp.nan, X, X])
    targets = jnp.array([1, 1, 7, 2])
    run = jax.jit(attack(linear))
    result = jax.vmap(run)(images, targets)
    np.testing.assert_array_equal(result.success, [True, False, False, True])
    for i in (0, 3):
        alone = run(X, targets[i])
        np.testing.assert_allclose(result.distortion[i], alone.distortion, rtol=1e-5)


def test_a_hinge_loss_that_vanishes_on_success_works_too():
    def carlini_wagner(logits, target):
        others = jnp.where(jnp.arange(logits.size) == target, -jnp.inf, logits)
        return jnp.maximum(jnp.max(others) - logits[target], -0.1)

    result = run(attacks.lbfgs, linear, X, 1, loss=carlini_wagner)
    plain = run(attacks.lbfgs, linear, X, 1, loss=losses.cross_entropy)
    assert bool(result.success)
    assert float(result.distortion) <= 1.05 * float(plain.distortion)


# Models and images that are not what an attack expects.

KEYS = jax.random.split(jax.random.key(7), 3)
WEIGHTS = jax.random.normal(KEYS[0], (20, 10))
IMAGE = jax.random.uniform(KEYS[1], (20,))
DEEP = jax.random.normal(KEYS[2], (20, 10)) * 8


def third(logits_fn):
    """The class of the third-largest logit of the image."""
    return int(jnp.argsort(logits_fn(IMAGE))[-3])


@each_attack
@pytest.mark.parametrize("low", [-1e9, -1e30, -1e4, -300.0])
def test_a_class_masked_by_a_low_logit_is_masked_as_by_minus_infinity(attack, low):
    def masked(x, value):
        return jnp.where(jnp.arange(10) < 5, x @ WEIGHTS, value)

    target = third(functools.partial(masked, value=-jnp.inf))
    expected = attack(functools.partial(masked, value=-jnp.inf))(IMAGE, target)
    result = attack(functools.partial(masked, value=jnp.float32(low)))(IMAGE, target)
    assert int(result.status) == Status.CONVERGED
    np.testing.assert_allclose(result.distortion, expected.distortion, rtol=1e-3)
    assert int(result.num_evals) <= int(expected.num_evals) + 5


@each_attack
@pytest.mark.parametrize("constant", [100.0, -100.0, 1e4, -1e4])
def test_a_constant_added_to_all_logits_changes_little(attack, constant):
    target = third(lambda x: x @ WEIGHTS)
    plain = attack(lambda x: x @ WEIGHTS)(IMAGE, target)
    result = attack(lambda x: x @ WEIGHTS + constant)(IMAGE, target)
    assert int(result.status) == Status.CONVERGED
    assert bool(result.success)
    # A logit of 1e4 is rounded to 1e-3 in float32, of a spread of about ten.
    np.testing.assert_allclose(result.distortion, plain.distortion, rtol=1e-2)
    np.testing.assert_allclose(result.multiplier, plain.multiplier, rtol=0.1)
    # How long the search takes among rounded margins depends on how they are rounded.
    rounded = abs(constant) > 1000
    assert int(result.num_evals) <= (250 if rounded else 2 * int(plain.num_evals) + 25)


@each_attack
def test_pixels_in_0_to_255_with_the_default_box_are_refused(attack):
    message = r"x: values in \[.*\], expected the box \[0, 1\]; scale it to \[0, 1\].*x / 255"
    with pytest.raises(ValueError, match=message):
        attack(linear)(255 * X, 1)
    with pytest.raises(ValueError, match=message):
        attacks.untargeted(attack(linear))(255 * X, 1)
    with pytest.raises(ValueError, match=r"xs: values in .*xs / 255"):
        runner.attack_images(attack(linear), np.asarray([X, 255 * X]), np.array([1, 1]))
    with pytest.raises(ValueError, match=r"x: values in \[-0\.8, 0\.8\], .*pass the box"):
        attack(linear)(2 * X - 1, 1)
    with pytest.raises(ValueError, match="x: values in"):
        attacks.fgsm(linear, epsilon=0.1)(255 * X, 1)


@each_attack
def test_a_traced_image_outside_the_box_ends_with_a_status_of_its_own(attack):
    result = jax.jit(jax.vmap(attack(linear)))(jnp.stack([X, 255 * X]), jnp.array([1, 1]))
    np.testing.assert_array_equal(result.success, [True, False])
    assert int(result.status[1]) == Status.OUTSIDE_BOX
    assert bool(jnp.all((result.x_adv >= 0) & (result.x_adv <= 1)))
    run(attack, linear, X + 0.5, 1)


@each_attack
@pytest.mark.parametrize(
    "model",
    [
        lambda x: jnp.round(x @ DEEP),
        lambda x: jax.lax.stop_gradient(x @ DEEP),
        lambda x: jax.nn.one_hot(jnp.argmax(x @ DEEP), 10) * 5,
        lambda x: (x @ DEEP).at[:].set(jnp.sign(x @ DEEP) * jnp.arange(10)),
    ],
    ids=["rounds", "stops gradients", "one-hot", "signs"],
)
def test_a_model_without_a_gradient_is_told_from_a_class_out_of_reach(attack, model):
    result = attack(model)(IMAGE, (int(jnp.argmax(model(IMAGE))) + 1) % 10)
    assert int(result.status) == Status.VANISHING_GRADIENT
    assert not bool(result.success)


@each_attack
def test_probabilities_in_place_of_logits_are_warned_about_and_never_converge(attack):
    def probabilities(x):
        return jax.nn.softmax(10 * (x @ DEEP))

    target = third(probabilities)
    with pytest.warns(UserWarning, match=r"logits_fn: .*sum to 1, expected logits.*softmax"):
        result = attack(probabilities)(IMAGE, target)
    # In float64 some gradient is left, which the search follows until its budget ends.
    left = {Status.BUDGET} if jax.config.jax_enable_x64 else set()
    assert int(result.status) in {Status.VANISHING_GRADIENT} | left
    with pytest.warns(UserWarning, match="sum to 1"):
        attacks.fgsm(lambda x: jax.nn.softmax(linear(x)), epsilon=0.1)(X, 1)
