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
    """A trained net on test digits, with certificates of three kinds."""

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
    attack = functools.partial(attacks.minimum_norm, net.logits_fn)
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
        runner.attack_images(functools.partial(attack, net.logits_fn), images, targets)
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
    assert lipschitz.certified_radius(logits, 0, pairs) == pytest.approx(0.5, rel=1e-5)
    assert lipschitz.certified_radius(logits, 1, pairs) == 0
    with pytest.raises(ValueError, match="constant"):
        lipschitz.certified_radius(logits, 0, pairs[0])


def test_the_radius_is_the_margin_over_the_steepest_difference():
    radius = lipschitz.certified_radius(jnp.array([1.0, 4.0, 2.0]), 1, 3.0)
    assert radius == pytest.approx(2 / (np.sqrt(2) * 3), rel=2e-6)
    assert radius <= 2 / (np.sqrt(2) * 3)


def test_the_radius_is_reached_by_two_linear_logits_that_oppose_each_other():
    weights = jnp.array([[3.0, 4.0], [-3.0, -4.0]])
    x = jnp.array([0.4, 0.2])
    constant = lipschitz.bound(lambda x: weights @ x, x).constant
    exact = (2 * weights[0] @ x) / jnp.linalg.norm(2 * weights[0])
    radius = lipschitz.certified_radius(weights @ x, 0, constant)
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
