"""Certified radii, and the attacks that must not beat them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, lipschitz, runner


@dataclasses.dataclass(frozen=True, eq=False)
class Certified:
    """A trained network on test digits, with certificates of three kinds."""

    logits_fn: object
    images: jax.Array
    labels: jax.Array
    logits: jax.Array
    constants: dict
    radii: dict

    @property
    def right(self):
        return np.asarray(self.logits.argmax(1) == self.labels)

    @property
    def runner_up(self):
        others = jnp.where(jax.nn.one_hot(self.labels, 10) > 0, -jnp.inf, self.logits)
        return others.argmax(1)


@pytest.fixture(scope="module")
def net(fc100, mnist):
    _, test = mnist
    images, labels = jnp.asarray(test.images[:1000]), jnp.asarray(test.labels[:1000])
    logits = jax.vmap(fc100.logits_fn)(images)
    lipsdp = functools.partial(lipschitz.lipsdp, num_steps=40)
    constants = {
        "product": lipschitz.bound(fc100.logits_fn, images[0]).constant,
        "lipsdp": lipschitz.bound(fc100.logits_fn, images[0], method=lipsdp).constant,
        "pairs": lipschitz.pairwise(fc100.logits_fn, images[0], method=lipsdp),
    }
    radius = jax.vmap(lipschitz.certified_radius, in_axes=(0, 0, None))
    radii = {name: np.asarray(radius(logits, labels, c)) for name, c in constants.items()}
    return Certified(fc100.logits_fn, images, labels, logits, constants, radii)


def l2(result):
    return result.distortion * np.sqrt(28 * 28)


def test_lipsdp_certifies_no_less_than_the_product_and_pairs_no_less_than_that(net):
    product, lipsdp, pairs = (net.radii[name] for name in ("product", "lipsdp", "pairs"))
    assert np.all(product <= lipsdp)
    assert np.all(lipsdp <= pairs * (1 + 1e-5))


def test_lipsdp_and_pairs_certify_much_more_than_the_product(net, mnist):
    if mnist[0].source != "tfds":
        pytest.skip("a net that was trained on the sample is another one: this is of full MNIST")
    assert net.constants["lipsdp"] <= 0.65 * net.constants["product"]
    assert net.radii["pairs"].mean() >= 2 * net.radii["product"].mean()


def test_no_attack_beats_a_certificate(net):
    """Towards the runner-up, of a thousand images."""
    attack = attacks.minimum_norm(net.logits_fn)
    result = runner.attack_images(attack, net.images, net.runner_up)
    reached = result.success & net.right
    assert reached.sum() > 0.9 * len(net.images)
    distance = l2(result)[reached]
    for radii in net.radii.values():
        assert np.all(radii[reached] < distance)
    assert net.radii["pairs"][reached].mean() > 0.2 * distance.mean(), "it says something"


def test_no_random_or_steepest_step_within_the_radius_changes_a_prediction(net):
    keys = jax.random.split(jax.random.key(0), len(net.images))

    def prediction(image, radius, other, label, key):
        def lead(x):
            logits = net.logits_fn(x)
            return logits[label] - logits[other]

        random = jax.random.normal(key, image.shape)
        steps = jnp.stack([random, -jax.grad(lead)(image)])
        lengths = jnp.sqrt(jnp.sum(steps**2, (1, 2, 3), keepdims=True))
        return jax.vmap(net.logits_fn)(image[None] + radius * steps / lengths).argmax(1)

    found = jax.jit(jax.vmap(prediction))(
        net.images, net.radii["pairs"], net.runner_up, net.labels, keys
    )
    np.testing.assert_array_equal(found[net.right], np.stack(2 * [net.labels[net.right]], 1))


def test_the_certificate_the_exact_attack_and_the_papers_follow_one_another(net):
    chosen = np.flatnonzero(net.right)[:100]
    images, targets = net.images[chosen], net.runner_up[chosen]
    exact, paper = (
        runner.attack_images(attack(net.logits_fn), images, targets)
        for attack in (attacks.minimum_norm, attacks.lbfgs)
    )
    both = exact.success & paper.success
    assert both.mean() > 0.9
    radii = net.radii["pairs"][chosen]
    assert np.all(radii[both] < l2(exact)[both])
    # Each attack finds a local minimum, now and then the better one by chance.
    assert np.mean(exact.distortion[both] <= paper.distortion[both] * (1 + 1e-3)) > 0.9
    assert exact.distortion[both].mean() < paper.distortion[both].mean()


def test_a_mistake_has_no_radius(net):
    assert not net.right.all()
    for radii in net.radii.values():
        np.testing.assert_array_equal(radii[~net.right], 0)
        assert np.all(radii[net.right] > 0)


def test_the_radius_of_pairs_is_the_smallest_of_each_lead_over_its_constant():
    pairs = jnp.array([[0.0, 2.0, 8.0], [2.0, 0.0, 1.0], [8.0, 1.0, 0.0]])
    logits = jnp.array([4.0, 1.0, 0.0])
    exact = lipschitz.certified_radius(logits, 0, pairs, error=0)
    assert exact == pytest.approx(0.5, rel=1e-5)
    assert lipschitz.certified_radius(logits, 0, pairs) == pytest.approx(0.5, rel=1e-3)
    assert lipschitz.certified_radius(logits, 1, pairs) == 0
    with pytest.raises(ValueError, match="constant"):
        lipschitz.certified_radius(logits, 0, pairs[0])


def test_the_radius_is_the_margin_over_the_steepest_difference():
    radius = lipschitz.certified_radius(jnp.array([1.0, 4.0, 2.0]), 1, 3.0, error=0)
    assert radius == pytest.approx(2 / (np.sqrt(2) * 3), rel=2e-6)
    assert radius <= 2 / (np.sqrt(2) * 3)


def test_the_radius_is_reached_by_two_linear_logits_that_oppose_each_other():
    weights = jnp.array([[3.0, 4.0], [-3.0, -4.0]])
    x = jnp.array([0.4, 0.2])
    constant = lipschitz.bound(lambda x: weights @ x, x).constant
    exact = (2 * weights[0] @ x) / jnp.linalg.norm(2 * weights[0])
    radius = lipschitz.certified_radius(weights @ x, 0, constant, error=0)
    np.testing.assert_allclose(radius, exact, rtol=1e-4)


def test_logits_that_cannot_change_have_an_infinite_radius_where_they_lead():
    logits = jnp.array([1.0, 0.0])
    assert np.isposinf(lipschitz.certified_radius(logits, 0, 0.0))
    assert lipschitz.certified_radius(logits, 1, 0.0) == 0


@pytest.mark.parametrize("constant", [np.inf, np.nan])
def test_a_constant_that_is_not_finite_certifies_nothing(constant):
    assert lipschitz.certified_radius(jnp.array([1.0, 0.0]), 0, constant) == 0


def test_a_batch_is_refused():
    with pytest.raises(ValueError, match="logits"):
        lipschitz.certified_radius(jnp.zeros((2, 3)), 0, 1.0)


# Rounding of the logits


def test_a_class_that_leads_by_rounding_alone_has_no_radius():
    weights = np.float32([[1e-3, 3e-3], [2e-3, 2.9e-3]])
    x, shift = np.float32([1000.0, 2000.0]), np.float32([1e8 + 8, 1e8])
    logits = jnp.asarray(x @ weights) + shift
    exact = x.astype(np.float64) @ weights + np.float64([1e8, 1e8 + 4])
    constant = lipschitz.bound(lambda x: x @ weights, x)
    assert logits[0] > logits[1]
    assert exact[0] < exact[1]
    assert lipschitz.certified_radius(logits, 0, constant, error=0) > 900
    assert lipschitz.certified_radius(logits, 0, constant) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_logits_of_any_precision_that_are_one_rounding_apart_certify_nothing(dtype):
    logits = jnp.array([1 + jnp.finfo(dtype).eps, 1, 0], dtype)
    assert lipschitz.certified_radius(logits, 0, 1e-3) == 0
    clear = lipschitz.certified_radius(jnp.array([4, 1, 0], dtype), 0, 1.0)
    assert 0.9 * 3 < clear * np.sqrt(2) < 3


def test_an_error_that_is_given_replaces_that_of_float32():
    logits = jnp.array([3.0, 1.0])
    radius = lipschitz.certified_radius(logits, 0, 1.0, error=0.5)
    assert radius == pytest.approx(1 / np.sqrt(2), rel=1e-5)


def test_a_masked_class_does_not_hide_the_margin_of_the_others():
    for mask in (-jnp.inf, -1e9):
        radius = lipschitz.certified_radius(jnp.array([3.0, 1.0, mask]), 0, 1.0)
        assert radius == pytest.approx(2 / np.sqrt(2), rel=1e-3)


# Bounds that hold nearby only


def steps(x):
    """Flat at 0, with another class from 0.2 on."""
    return jnp.stack([0 * x[0], 1000 * jax.nn.relu(x[0] - 0.2) - 1])


@pytest.mark.parametrize("of", [lipschitz.bound, lipschitz.pairwise])
def test_a_local_bound_certifies_no_more_than_where_it_holds(of):
    x = jnp.zeros(1)
    local = of(steps, x, method=lipschitz.product, radius=0.05)
    assert local.constant.max() == 0
    radius = lipschitz.certified_radius(steps(x), 0, local)
    assert 0 < radius <= 0.05
    batch = jax.vmap(lambda x: of(steps, x, method=lipschitz.product, radius=0.05))(x[None])
    assert jax.vmap(lipschitz.certified_radius, (0, None, 0))(steps(x)[None], 0, batch) <= 0.05


def test_a_global_bound_holds_everywhere():
    assert np.isposinf(lipschitz.bound(steps, jnp.zeros(1)).radius)
    assert np.isposinf(lipschitz.pairwise(jnp.tanh, jnp.zeros(3)).radius)


def test_an_example_outside_the_box_has_no_certificate_from_a_bound_around_it():
    local = lipschitz.bound(steps, jnp.full(1, -1.0), radius=2.0, box=(0, 1))
    assert local.radius == 0
    assert lipschitz.certified_radius(jnp.array([1.0, 0.0]), 0, local) == 0


# --- certify ---------------------------------------------------------------------------------


def small_network(key, activation=jnp.tanh):
    """A random network of two inputs and three classes, as a pytree."""
    keys = jax.random.split(key, 3)
    shapes = ((2, 8), (8, 8), (8, 3))
    layers = [2 * jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=True)]
    return jax.tree_util.Partial(through, layers, activation=jax.tree_util.Partial(activation))


def through(layers, x, *, activation):
    for layer in layers[:-1]:
        x = activation(x @ layer)
    return x @ layers[-1]


def nearest_change(logits_fn, x, label, box=None):
    """How far the nearest image of another class is, by a search along many directions."""
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    lengths = np.linspace(0, 3, 3001)
    points = jnp.asarray(np.multiply.outer(lengths, np.stack([np.cos(angles), np.sin(angles)], 1)))
    points = jax.vmap(jax.vmap(lambda step: x + step))(points)
    inside = True if box is None else jnp.all((points >= box[0]) & (points <= box[1]), -1)
    changed = inside & (jax.vmap(jax.vmap(logits_fn))(points).argmax(-1) != label)
    return lengths[np.any(changed, axis=1)].min(initial=np.inf)


@pytest.mark.parametrize(
    ("activation", "box"), [(jnp.tanh, None), (jax.nn.relu, None), (jax.nn.sigmoid, (-0.2, 1.0))]
)
def test_certify_reaches_beyond_any_single_ball_and_never_too_far(activation, box):
    @jax.jit
    def certify(logits_fn, x):
        label = logits_fn(x).argmax()
        found = lipschitz.certify(logits_fn, x, label, box=box)

        def of_ball(radius):
            pairs = lipschitz.pairwise(
                logits_fn, x, method=lipschitz.eclipse, box=box, radius=radius
            )
            return lipschitz.certified_radius(logits_fn(x), label, pairs)

        return found, jnp.max(jax.lax.map(of_ball, found.radius * jnp.linspace(0.2, 1.5, 8)))

    gains = []
    for seed in range(6):
        logits_fn = small_network(jax.random.key(seed), activation)
        x = jax.random.uniform(jax.random.key(100 + seed), (2,))
        found, single = certify(logits_fn, x)
        assert found.status == lipschitz.Status.CERTIFIED
        assert 0 < found.radius <= nearest_change(logits_fn, x, logits_fn(x).argmax(), box)
        assert found.radius >= 0.98 * single
        gains.append(float(found.radius / single))
    assert np.mean(gains) > 1.02


def test_with_many_shells_certify_finds_the_exact_radius_of_one_unit():
    w = jnp.array([3.0, -4.0])

    def logits_fn(x):
        return jnp.tanh(x @ w[:, None]) @ jnp.array([[1.0, 0.0]])

    x = jnp.array([0.6, 0.2])  # w.x = 1, so that the class changes at a distance of 1/5
    coarse, fine = (
        lipschitz.certify(logits_fn, x, 0, num_shells=n, error=0.0).radius for n in (8, 256)
    )
    assert coarse < fine <= 0.2
    assert fine == pytest.approx(0.2, rel=5e-3)


def test_certify_names_the_class_that_limits_it():
    weights = jnp.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0.1]])
    x = jnp.array([4.0, 1.0, 3.0, 0.0])
    found = lipschitz.certify(lambda x: x @ weights, x, 0, error=0.0)
    # The margins of 3, 2.5 and 4 over slopes of sqrt 2, sqrt 1.25 and sqrt 1.01.
    assert found.nearest == 1
    assert found.radius == pytest.approx(3 / np.sqrt(2), rel=1e-4)


def test_certify_says_why_there_is_no_certificate():
    logits_fn, x = small_network(jax.random.key(0)), jnp.array([0.4, 0.6])
    best, worst = int(logits_fn(x).argmax()), int(logits_fn(x).argmin())
    cases = {
        lipschitz.Status.CERTIFIED: lipschitz.certify(logits_fn, x, best),
        lipschitz.Status.NOT_PREDICTED: lipschitz.certify(logits_fn, x, worst),
        lipschitz.Status.OUTSIDE_BOX: lipschitz.certify(logits_fn, x, best, box=(0, 0.5)),
        lipschitz.Status.UNBOUNDED: lipschitz.certify(
            lambda x: jnp.array([1.0, 0.0]) + x * 1e30 * 1e30, 0 * x, 0
        ),
    }
    for status, found in cases.items():
        assert found.status == status
        assert (found.radius > 0) == (status == lipschitz.Status.CERTIFIED)


def test_certify_may_be_mapped_compiled_and_given_traced_parameters():
    logits_fn = small_network(jax.random.key(1))
    xs = jax.random.uniform(jax.random.key(2), (5, 2))
    labels = jax.vmap(logits_fn)(xs).argmax(1)

    def certify(scale, x, label):
        return lipschitz.certify(lambda x: logits_fn(scale * x), x, label, num_shells=4)

    found = jax.jit(jax.vmap(certify, (None, 0, 0)))(1.0, xs, labels)
    alone = lipschitz.certify(logits_fn, xs[3], labels[3], num_shells=4)
    np.testing.assert_allclose(found.radius[3], alone.radius, rtol=1e-3)
    assert found.nearest[3] == alone.nearest


def test_a_masked_class_limits_no_certificate():
    logits_fn = small_network(jax.random.key(3))

    def masked(x):
        return jnp.append(logits_fn(x), -jnp.inf)

    x = jnp.array([0.3, 0.7])
    label = int(logits_fn(x).argmax())
    plain, found = (lipschitz.certify(f, x, label, num_shells=4) for f in (logits_fn, masked))
    np.testing.assert_allclose(found.radius, plain.radius, rtol=0.3)
    assert found.nearest == plain.nearest


def test_no_attack_on_digits_beats_certify(net):
    chosen = np.flatnonzero(net.right)[:20]
    images, labels = net.images[chosen], net.labels[chosen]
    certify = functools.partial(lipschitz.certify, net.logits_fn, box=(0, 1), num_shells=8)
    found = jax.jit(jax.vmap(certify))(images, labels)
    attack = attacks.untargeted(attacks.minimum_norm(net.logits_fn))
    distance = l2(runner.attack_images(attack, images, labels))
    assert np.all(found.radius < distance)
    assert np.all(found.radius >= 0.9 * net.radii["pairs"][chosen])
    assert np.mean(found.radius / distance) > 0.35
