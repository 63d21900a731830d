"""The fast gradient sign method against its formula in NumPy, and what bad input gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from advjax import attacks, losses
from advjax.attacks import Status, fgsm

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(6, 4)).astype(np.float32)
IMAGES = RNG.uniform(0.3, 0.7, size=(20, 3, 2, 1)).astype(np.float32)
X = jnp.asarray(IMAGES[0])
EPSILON = 0.05
modes = pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])


def linear(x):
    """Four classes of a 3 x 2 image."""
    return jnp.ravel(x - 0.5) @ KERNEL.astype(x.dtype)


@functools.partial(jax.jit, static_argnames="targeted")
def attack(x, label, epsilon=EPSILON, box=(0.0, 1.0), *, targeted=False):
    """The attack on `linear`, compiled once for what many tests share."""
    return fgsm(linear, epsilon=epsilon, box=box, targeted=targeted)(x, label)


def formula(x, label, epsilon, *, targeted):
    """The step in float64: the gradient of the cross-entropy is the kernel times p - onehot."""
    kernel = KERNEL.astype(np.float64)
    p = special.softmax(np.ravel(x - 0.5) @ kernel)
    gradient = (kernel @ (p - np.eye(4)[label])).reshape(x.shape)
    return x + (-epsilon if targeted else epsilon) * np.sign(gradient)


@modes
def test_every_pixel_moves_by_epsilon_as_the_formula_says(targeted):
    labels = (jax.vmap(linear)(IMAGES).argmax(1) + targeted) % 4
    results = jax.vmap(functools.partial(attack, targeted=targeted))(IMAGES, labels)
    expected = [
        formula(x, label, EPSILON, targeted=targeted)
        for x, label in zip(IMAGES, labels, strict=True)
    ]
    np.testing.assert_allclose(results.x_adv, expected, atol=1e-6)
    np.testing.assert_allclose(results.distortion, EPSILON, rtol=1e-5)
    np.testing.assert_allclose(results.multiplier, EPSILON)
    np.testing.assert_array_equal(results.num_evals, 1)
    reached = (results.prediction == labels) == targeted
    np.testing.assert_array_equal(results.success, reached)
    np.testing.assert_array_equal(
        results.status, np.where(reached, Status.CONVERGED, Status.NOT_FOUND)
    )
    np.testing.assert_array_equal(results.prediction, jax.vmap(linear)(results.x_adv).argmax(1))
    assert 0 < reached.sum() < len(IMAGES), "some images are misled, some are not"


def test_the_step_ends_at_the_box():
    lower, upper = X - 0.01, X + 0.02
    result = attack(X, 0, box=(lower, upper))
    np.testing.assert_array_equal((result.x_adv == lower) | (result.x_adv == upper), True)
    assert float(result.distortion) < EPSILON


def test_an_image_outside_the_box_is_told_and_moved_into_it():
    result = attack(X + 2, 0)
    assert int(result.status) == Status.OUTSIDE_BOX
    assert not bool(result.success)
    np.testing.assert_array_equal(result.x_adv, 1)
    rms = np.sqrt(np.mean((X + 1) ** 2))
    np.testing.assert_allclose(result.distortion, rms, rtol=1e-5)


@modes
def test_the_step_is_that_of_float64_where_the_softmax_is_saturated(targeted):
    def sure(x):
        return 1e4 * linear(x)

    label = int(jnp.argmin(linear(X)) if targeted else jnp.argmax(linear(X)))
    assert float(jax.nn.softmax(sure(X)).max()) == 1, "it is saturated"
    run = jax.jit(fgsm(sure, epsilon=EPSILON, targeted=targeted))
    result = run(X, label)
    logits = np.asarray(linear(X))
    # The strongest other class, or the winner that has to yield to the target.
    other = int(np.argmax(np.where(np.arange(4) == label, -np.inf, logits)))
    sign = np.sign(KERNEL[:, other] - KERNEL[:, label]).reshape(X.shape)
    np.testing.assert_allclose(
        result.x_adv, X + (-EPSILON if targeted else EPSILON) * sign, atol=1e-6
    )


def test_the_step_is_taken_on_images_that_are_wrong_already():
    wrong = int(jnp.argmin(linear(X)))
    result = attack(X, wrong)
    assert bool(result.success)
    np.testing.assert_allclose(result.distortion, EPSILON, rtol=1e-5)


@modes
def test_no_epsilon_is_no_step_and_success_is_what_the_image_says(targeted):
    right = int(jnp.argmax(linear(X)))
    for label in (right, (right + 1) % 4):
        result = attack(X, label, 0.0, targeted=targeted)
        np.testing.assert_array_equal(result.x_adv, X)
        assert bool(result.success) == ((label == right) == targeted)


def test_a_model_without_a_gradient_gives_no_step():
    result = fgsm(lambda x: jnp.zeros(3), epsilon=EPSILON)(X, 0)
    np.testing.assert_array_equal(result.x_adv, X)
    assert int(result.status) == Status.NOT_FOUND


def test_epsilon_may_be_mapped_over():
    epsilons = jnp.array([0.0, 0.01, 0.1])
    results = jax.vmap(functools.partial(attack, X, 0))(epsilons)
    np.testing.assert_allclose(results.distortion, epsilons, rtol=1e-5)


def test_a_training_loss_sees_through_the_attack():
    def loss(kernel, x_adv=None):
        def logits_fn(x):
            return jnp.tanh(jnp.ravel(x) @ kernel)

        if x_adv is None:
            x_adv = fgsm(logits_fn, epsilon=EPSILON)(X, 1).x_adv
        return losses.cross_entropy(logits_fn(x_adv), 1), x_adv

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    through, x_adv = gradient(KERNEL)
    assert not np.any(np.asarray(x_adv == X))
    np.testing.assert_allclose(through, gradient(KERNEL, x_adv)[0], rtol=1e-5)


def test_the_attack_itself_has_no_gradient():
    gradient = jax.grad(lambda x: attack(x, 1).distortion)(X)
    np.testing.assert_array_equal(gradient, 0)
    gradient = jax.grad(lambda x: attack(x, 1).x_adv.sum())(X)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_images_stay_so_and_in_their_box(dtype):
    x = X.astype(dtype)
    result = attack(x, 0, box=(x - 0.03, x + 0.03))
    assert result.x_adv.dtype == dtype
    assert result.distortion.dtype == jnp.float32
    assert bool(jnp.all((x - 0.03 <= result.x_adv) & (result.x_adv <= x + 0.03)))


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        x = jnp.asarray(IMAGES[0], jnp.float64)
        result = attack(x, 0)
        assert result.x_adv.dtype == result.distortion.dtype == jnp.float64
        expected = formula(np.asarray(x), 0, EPSILON, targeted=False)
        np.testing.assert_allclose(result.x_adv, expected, rtol=1e-15)


def test_the_linear_network_reads_hardly_a_digit_after_a_step_of_a_quarter(fc10):
    """The published figure is 99.9 % at 0.25, for a softmax on MNIST."""
    labels = jax.vmap(fc10.logits_fn)(fc10.images).argmax(1)
    epsilons = jnp.array([0.0, 0.05, 0.25])

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, None, 0))
    @functools.partial(jax.vmap, in_axes=(0, 0, None))
    def misled(x, label, epsilon):
        return fgsm(fc10.logits_fn, epsilon=epsilon)(x, label).success

    error = misled(fc10.images, labels, epsilons).mean(1)
    assert float(error[0]) == 0
    assert 0 < float(error[1]) < 1
    assert float(error[2]) == 1


# Bad input


@pytest.mark.parametrize(
    ("change", "status", "num_evals"),
    [
        ({"label": 4}, Status.INVALID_TARGET, 0),
        ({"label": -1}, Status.INVALID_TARGET, 0),
        ({"x": X.at[0, 0, 0].set(jnp.nan)}, Status.NONFINITE, 0),
        ({"x": X.at[0, 0, 0].set(-jnp.inf)}, Status.NONFINITE, 0),
        ({"box": (0.6, 0.4)}, Status.EMPTY_BOX, 0),
        ({"box": (0.0, jnp.nan)}, Status.EMPTY_BOX, 0),
        ({"box": (jnp.inf, jnp.inf)}, Status.EMPTY_BOX, 0),
        ({"epsilon": jnp.nan * jnp.ones(())}, Status.NONFINITE, 1),
        ({"logits_fn": lambda x: linear(x).at[2].set(jnp.nan)}, Status.NONFINITE, 1),
        ({"logits_fn": lambda x: linear(x) / 0.0}, Status.NONFINITE, 1),
        (
            {"logits_fn": lambda x: jnp.sqrt(jnp.ravel(x - X)) @ KERNEL},
            Status.NONFINITE,
            1,
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_data_is_told_by_the_status_and_nothing_is_moved(change, status, num_evals):
    arguments = {"logits_fn": linear, "x": X, "label": 1, "epsilon": EPSILON, "box": (0, 1)}
    arguments |= change
    x, label = arguments.pop("x"), arguments.pop("label")
    result = jax.jit(lambda: fgsm(**arguments)(x, label))()
    assert int(result.status) == status
    assert not bool(result.success)
    assert int(result.num_evals) == num_evals
    assert float(result.multiplier) == 0
    assert bool(jnp.all(jnp.isfinite(result.x_adv)))
    if "x" not in change:
        np.testing.assert_array_equal(result.x_adv, X)
        assert float(result.distortion) == 0


def test_a_class_masked_by_minus_infinity_does_no_harm():
    label = int(jnp.argmax(linear(X)))
    masked = (label + 1) % 4
    result = fgsm(lambda x: linear(x).at[masked].set(-jnp.inf), epsilon=0.5)(X, label)
    assert bool(result.success)


def test_a_model_that_is_nan_after_the_step_is_not_misled():
    def fragile(x):
        return jnp.where(jnp.all(x == X), 1.0, jnp.nan) * linear(x)

    result = fgsm(fragile, epsilon=EPSILON)(X, int(jnp.argmax(linear(X))))
    assert not bool(result.success)
    assert int(result.status) == Status.NOT_FOUND


def test_the_failure_of_one_lane_leaves_the_others_alone():
    images = jnp.stack([X, X * jnp.nan, X])
    labels = jnp.array([0, 0, 9])
    together = jax.vmap(attack)(images, labels)
    alone = attack(X, 0)
    np.testing.assert_array_equal(together.x_adv[0], alone.x_adv)
    np.testing.assert_array_equal(
        together.status, [alone.status, Status.NONFINITE, Status.INVALID_TARGET]
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": (255 * X).astype(jnp.uint8)}, TypeError, r"x: dtype uint8.*x / 255"),
        ({"label": 1.0}, TypeError, r"label: dtype float32, expected an integer"),
        ({"label": jnp.array([1, 2])}, ValueError, r"label: shape \(2,\).*jax.vmap"),
        ({"logits_fn": lambda x: x @ x.T}, ValueError, "ONE example"),
        ({"epsilon": -0.1}, ValueError, "epsilon: -0.1, expected a finite number of at least 0"),
        ({"epsilon": np.nan}, ValueError, "epsilon: nan, expected a finite number"),
        ({"epsilon": "large"}, ValueError, "epsilon: 'large', expected a finite number"),
        ({"epsilon": jnp.ones(2)}, ValueError, r"epsilon: shape \(2,\), expected one .*jax.vmap"),
        ({"box": 1.0}, ValueError, r"box: 1.0, expected a pair"),
        ({"box": (jnp.zeros(7), 1)}, ValueError, r"box: lower bound of shape \(7,\)"),
    ],
)
def test_arguments_of_the_wrong_type_or_shape_are_named(change, error, message):
    arguments = {"logits_fn": linear, "x": X[:, :, 0], "label": 1, "epsilon": EPSILON} | change
    x, label = arguments.pop("x"), arguments.pop("label")
    with pytest.raises(error, match=message):
        jax.jit(lambda: fgsm(**arguments)(x, label))()


def test_it_is_exported_beside_the_other_attacks():
    assert attacks.fgsm is fgsm
