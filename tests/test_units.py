"""Top images, random bases and the rotation test, against NumPy loops and SciPy's distributions."""

import collections
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from advjax import units

RNG = np.random.default_rng(0)
N, D, CLASSES = 60, 7, 4
FEATURES = RNG.normal(size=(N, D)).astype(np.float32)
LABELS = RNG.integers(CLASSES, size=N)
KEY = jax.random.key(0)


# Top images


@pytest.mark.parametrize("k", [1, 10, N])
def test_the_top_images_are_those_that_a_loop_finds(k):
    directions = RNG.normal(size=(5, D)).astype(np.float32)
    result = units.top_images(FEATURES, directions, k=k)
    for row, v in enumerate(directions):
        scores = [float(np.dot(phi.astype(np.float64), v)) for phi in FEATURES]
        expected = sorted(range(N), key=lambda i: -scores[i])[:k]
        np.testing.assert_array_equal(result.indices[row], expected)
        np.testing.assert_allclose(result.scores[row], np.array(scores)[expected], rtol=1e-4)


def test_along_the_natural_basis_they_are_those_that_excite_each_unit_most():
    result = units.top_images(FEATURES, units.natural_basis(D), k=3)
    np.testing.assert_array_equal(result.indices, np.argsort(-FEATURES, axis=0)[:3].T)
    np.testing.assert_array_equal(result.scores, -np.sort(-FEATURES, axis=0)[:3].T)


def test_of_equal_images_the_first_come_first():
    result = units.top_images(jnp.zeros((5, 2)), units.natural_basis(2), k=3)
    np.testing.assert_array_equal(result.indices, [[0, 1, 2]] * 2)


def test_top_images_map_over_networks():
    features = np.stack([FEATURES, -FEATURES])
    top = functools.partial(units.top_images, directions=units.natural_basis(D), k=4)
    together = jax.jit(jax.vmap(top))(features)
    np.testing.assert_array_equal(together.indices[1], top(-FEATURES).indices)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": FEATURES.astype(int)}, TypeError, "features: dtype int32"),
        ({"features": FEATURES[:, :, None]}, ValueError, r"features: shape \(60, 7, 1\).*reshape"),
        ({"features": FEATURES[:0]}, ValueError, r"features: shape \(0, 7\)"),
        ({"directions": np.eye(D)[0]}, ValueError, r"directions: shape \(7,\)"),
        ({"directions": np.eye(3)}, ValueError, r"directions: shape \(3, 3\), expected \(m, 7\)"),
        ({"k": 0}, ValueError, "k: 0, expected an integer of at least 1"),
        ({"k": N + 1}, ValueError, "k: 61, expected at most 60"),
    ],
)
def test_top_images_name_what_is_wrong_with_their_arguments(change, error, message):
    arguments = {"features": FEATURES, "directions": np.eye(D, dtype=np.float32)} | change
    with pytest.raises(error, match=message):
        units.top_images(**arguments)


# Directions


def sphere(d):
    """The distribution of an entry of a uniform unit vector."""
    return stats.beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2)


def test_random_directions_are_uniform_on_the_sphere():
    directions = np.asarray(units.random_directions(KEY, 2000, 5))
    np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1, rtol=1e-6)
    axes = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    for entry in (directions @ axes).T:
        assert stats.kstest(entry, sphere(5).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("d", "x64"), [(1, False), (2, True), (3, False), (64, False)])
def test_a_random_rotation_is_orthogonal_of_determinant_one(d, x64):
    with jax.enable_x64(x64):
        q = np.asarray(units.random_rotation(KEY, d), np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(d), atol=1e-13 if x64 else 5e-6)
    assert np.linalg.det(q) == pytest.approx(1, abs=1e-4)


@pytest.fixture(scope="module")
def rotations():
    """Two thousand random rotations of four dimensions."""
    keys = jax.random.split(jax.random.key(1), 2000)
    return np.asarray(jax.vmap(lambda key: units.random_rotation(key, 4))(keys), np.float64)


def test_random_rotations_of_the_plane_are_by_a_uniform_angle():
    keys = jax.random.split(KEY, 2000)
    q = np.asarray(jax.vmap(lambda key: units.random_rotation(key, 2))(keys))
    angles = np.arctan2(q[:, 1, 0], q[:, 0, 0])
    assert stats.kstest(angles, stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


def test_every_entry_of_a_random_rotation_is_that_of_a_uniform_unit_vector(rotations):
    p_values = [
        stats.kstest(rotations[:, i, j], sphere(4).cdf).pvalue for i in range(4) for j in range(4)
    ]
    assert min(p_values) > 1e-3 / 16


def test_random_rotations_are_as_scipys_also_when_rotated_on_either_side(rotations):
    """The traces tell a QR without its signs fixed from the Haar measure."""
    expected = np.trace(stats.special_ortho_group(4, seed=0).rvs(2000), axis1=1, axis2=2)
    fixed = stats.special_ortho_group(4, seed=1).rvs()
    for q in (rotations, fixed @ rotations, rotations @ fixed):
        assert stats.ks_2samp(np.trace(q, axis1=1, axis2=2), expected).pvalue > 1e-3


def test_principal_axes_are_the_right_singular_vectors_of_the_centred_features():
    features = FEATURES * np.arange(1, D + 1, dtype=np.float32) + 3
    axes = np.asarray(units.principal_axes(features))
    expected = np.linalg.svd(features - features.mean(0))[2]
    np.testing.assert_allclose(np.abs(np.sum(axes * expected, axis=1)), 1, atol=1e-4)
    assert np.all(axes[np.arange(D), np.abs(axes).argmax(1)] > 0)


@pytest.mark.parametrize("d", [0, -1])
def test_a_dimension_that_is_not_positive_is_named(d):
    for make in (
        units.natural_basis,
        functools.partial(units.random_rotation, KEY),
        functools.partial(units.random_directions, KEY, 3),
    ):
        with pytest.raises(ValueError, match=f"d: {d}, expected an integer of at least 1"):
            make(d)


# What the sets of images have in common

SETS = np.stack([RNG.choice(N, 8, replace=False) for _ in range(20)])


def test_label_purity_is_the_fraction_of_the_commonest_label():
    expected = [collections.Counter(LABELS[s].tolist()).most_common(1)[0][1] / 8 for s in SETS]
    np.testing.assert_allclose(units.label_purity(SETS, LABELS), expected)


def auc(chosen, concept):
    """SciPy's, of one set by one concept."""
    outside = np.delete(concept, chosen)
    u = stats.mannwhitneyu(concept[chosen], outside).statistic
    return u / (len(chosen) * len(outside))


def test_the_concept_auc_is_that_of_the_concept_that_does_best():
    degrees = np.round(RNG.normal(size=(N, 3)), 1)  # rounded, so that there are equal ones
    expected = [max(auc(s, concept) for concept in degrees.T) for s in SETS]
    np.testing.assert_allclose(units.concept_auc(SETS, degrees), expected, rtol=1e-6)


def test_the_auc_of_a_concept_that_is_there_or_not_compares_two_fractions():
    present = (LABELS == 1)[:, None]
    inside = present[SETS, 0].mean(1)
    outside = (present.sum() - present[SETS, 0].sum(1)) / (N - 8)
    np.testing.assert_allclose(
        units.concept_auc(SETS, present), (1 + inside - outside) / 2, rtol=1e-6
    )


def test_sets_of_all_images_have_no_auc():
    with pytest.raises(ValueError, match="indices: 60 images of 60, expected fewer"):
        units.concept_auc(np.arange(N)[None], LABELS[:, None])


# The rotation test


ROTATIONS = 99
PLANTED = FEATURES + np.outer(4 * (LABELS == 0), np.eye(D)[0]).astype(np.float32)
small_test = functools.partial(units.rotation_test, KEY, k=5, rotations=ROTATIONS)


@pytest.fixture(scope="module")
def plain():
    """The test of features whose first unit answers to class 0."""
    return small_test(PLANTED, LABELS)


def test_the_statistics_are_those_of_a_loop_over_rotations(plain):
    onehot = np.eye(CLASSES)[LABELS]
    keys = jax.random.split(KEY, ROTATIONS)

    def statistics(directions):
        purities, aucs = [], []
        for v in directions:
            top = np.argsort(-(PLANTED @ v))[:5]
            purities.append(np.bincount(LABELS[top]).max() / 5)
            aucs.append(max(auc(top, concept) for concept in onehot.T))
        return np.mean(purities), np.mean(aucs)

    identity = statistics(np.eye(D))
    np.testing.assert_allclose((plain.purity.identity, plain.auc.identity), identity, rtol=1e-5)
    for b in (0, 50, 98):
        rotated = statistics(np.asarray(units.random_rotation(keys[b], D)))
        found = plain.purity.rotated[b], plain.auc.rotated[b]
        np.testing.assert_allclose(found, rotated, rtol=1e-5)


def test_the_p_values_and_effects_are_those_of_their_definitions(plain):
    for one in plain:
        t, null = float(one.identity), np.asarray(one.rotated, np.float64)
        assert len(null) == ROTATIONS
        assert float(one.p_value) == pytest.approx((1 + np.sum(null >= t - 1e-6)) / 100)
        assert float(one.effect) == pytest.approx(t - null.mean(), abs=1e-6)
        assert float(one.effect_size) == pytest.approx((t - null.mean()) / null.std(ddof=1), 1e-4)
        above, below = np.sum(null + 0.05 <= t + 1e-6), np.sum(null - 0.05 >= t - 1e-6)
        assert float(one.equivalence_p_value) == pytest.approx((1 + max(above, below)) / 100)


TEN = np.arange(500) % 10
NOISE = np.random.default_rng(1).normal(size=(500, 10)).astype(np.float32)
larger_test = functools.partial(units.rotation_test, KEY, labels=TEN, batch_size=111)


def test_concepts_along_the_units_are_found_and_not_along_a_random_basis():
    features = 2.5 * np.eye(10, dtype=np.float32)[TEN] + NOISE
    for one in larger_test(features):
        assert float(one.p_value) == pytest.approx(0.001)
        assert float(one.effect) > 0.05
        assert float(one.effect_size) > 3
        assert float(one.equivalence_p_value) > 0.9
    hidden = features @ stats.special_ortho_group(10, seed=0).rvs().astype(np.float32)
    for one in larger_test(hidden):
        assert float(one.p_value) > 0.05


def test_two_bases_of_a_sphere_are_equivalent_by_a_margin_that_their_noise_permits():
    for one in larger_test(NOISE, margin=0.1):
        assert float(one.equivalence_p_value) <= 0.05
    for one in larger_test(NOISE, margin=1e-4):
        assert float(one.equivalence_p_value) > 0.3


# The null holds if the features' distribution given the labels is the same in every basis.
NULLS = {"features that know nothing": 0.0, "classes at random places": 2.0}


@pytest.fixture(scope="module")
def p_values():
    """The p-values of many small tests, by random keys and the distance between classes."""
    labels = np.arange(80) % CLASSES

    def test(key, spread):
        noise, places, rotations = jax.random.split(key, 3)
        means = spread * jax.random.normal(places, (CLASSES, 4))
        features = means[labels] + jax.random.normal(noise, (80, 4))
        # Nineteen rotations make a test of exactly 5 %, and equal statistics a rarer one.
        result = units.rotation_test(rotations, features, labels, k=6, rotations=19, batch_size=19)
        return jnp.stack([result.purity.p_value, result.auc.p_value])

    return jax.jit(jax.vmap(test, in_axes=(0, None)))


@pytest.mark.parametrize("spread", NULLS.values(), ids=NULLS)
def test_a_basis_that_is_as_good_as_any_is_rejected_as_often_as_alpha_says(spread, p_values):
    trials = 1000
    rejected = np.asarray(p_values(jax.random.split(jax.random.key(2), trials), spread)) < 0.0501
    for count in rejected.sum(0):
        assert count <= stats.binom(trials, 0.05).ppf(0.999)
        assert count >= stats.binom(trials, 0.02).ppf(0.001), "it is not empty caution either"


def test_directions_and_concepts_may_be_others(plain):
    onehot = np.eye(CLASSES, dtype=np.float32)[LABELS]
    same = small_test(PLANTED, LABELS, directions=2 * units.natural_basis(D), concepts=onehot)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), same, plain)
    axes = units.principal_axes(PLANTED)
    identity = small_test(PLANTED, LABELS, directions=axes).purity.identity
    top = units.top_images(PLANTED, axes, k=5).indices
    assert float(identity) == pytest.approx(float(units.label_purity(top, LABELS).mean()))


def test_the_batch_size_does_not_change_the_result(plain):
    other = small_test(PLANTED, LABELS, batch_size=10)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), other, plain)


def test_shifting_and_scaling_all_features_changes_nothing(plain):
    other = small_test(8 * PLANTED + 16, LABELS)
    np.testing.assert_allclose(other.purity.rotated, plain.purity.rotated, atol=1e-6)


def test_traced_labels_ask_for_their_classes():
    with pytest.raises(TypeError, match=r"labels: traced.*jax.nn.one_hot"):
        jax.eval_shape(lambda labels: small_test(PLANTED, labels), LABELS)

    def test(labels):
        return small_test(PLANTED, labels, concepts=jax.nn.one_hot(labels, CLASSES))

    assert jax.eval_shape(test, LABELS).auc.rotated.shape == (ROTATIONS,)


def test_features_that_are_not_finite_are_no_evidence():
    features = FEATURES.copy()
    features[3, 2] = np.nan
    for one in small_test(features, LABELS):
        assert np.isnan(one.identity)
        assert float(one.p_value) == float(one.equivalence_p_value) == 1


def test_features_that_are_all_the_same_show_nothing():
    for one in small_test(jnp.ones((N, D)), LABELS):
        assert float(one.p_value) == 1
        assert float(one.effect) == pytest.approx(0, abs=1e-6)
        assert float(one.effect_size) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": FEATURES.astype(int)}, TypeError, "features: dtype int32"),
        ({"features": FEATURES[0]}, ValueError, r"features: shape \(7,\).*matrix"),
        ({"labels": LABELS[:5]}, ValueError, r"labels: shape \(5,\), expected \(60,\)"),
        ({"labels": LABELS / 2}, TypeError, "labels: dtype float32, expected integer"),
        ({"concepts": LABELS}, ValueError, r"concepts: shape \(60,\), expected \(60, concepts\)"),
        ({"directions": np.eye(3)}, ValueError, r"directions: shape \(3, 3\), expected \(m, 7\)"),
        ({"k": N}, ValueError, "k: 60 images of 60, expected fewer"),
        ({"k": 0}, ValueError, "k: 0, expected an integer"),
        ({"rotations": 0}, ValueError, "rotations: 0, expected an integer"),
        ({"batch_size": 0}, ValueError, "batch_size: 0, expected an integer"),
        ({"margin": 0}, ValueError, "margin: 0, expected a finite number above 0"),
    ],
)
def test_the_rotation_test_names_what_is_wrong_with_its_arguments(change, error, message):
    arguments = {"features": FEATURES, "labels": LABELS, "rotations": 2} | change
    with pytest.raises(error, match=message):
        units.rotation_test(KEY, **arguments)


@pytest.mark.slow
def test_a_thousand_rotations_of_ten_thousand_images_take_seconds():
    features = jax.nn.sigmoid(jax.random.normal(KEY, (10_000, 100)))
    begin = time.perf_counter()
    jax.block_until_ready(units.rotation_test(KEY, features, np.arange(10_000) % 10))
    assert time.perf_counter() - begin < 60  # 3 to 10 on two cores with other work to do


# Equivalence over seeds


@pytest.mark.parametrize("seeds", [2, 5, 1000])
@pytest.mark.parametrize("shift", [0.04, -0.06])
def test_the_equivalence_test_is_scipys_two_one_sided_t_tests(seeds, shift):
    effects = shift + 0.02 * np.random.default_rng(seeds).normal(size=seeds).astype(np.float32)
    result = units.equivalence_test(effects, margin=0.05, confidence=0.9)
    test = functools.partial(stats.ttest_1samp, effects.astype(np.float64))
    p_value = max(test(0.05, alternative="less").pvalue, test(-0.05, alternative="greater").pvalue)
    interval = test(0).confidence_interval(0.9)
    assert float(result.p_value) == pytest.approx(p_value, rel=1e-3, abs=1e-6)
    np.testing.assert_allclose((result.lower, result.upper), interval, rtol=1e-3, atol=1e-5)
    assert float(result.mean) == pytest.approx(effects.mean(), abs=1e-6)


def test_the_interval_at_95_percent_is_scipys():
    effects = np.array([0.01, 0.03, -0.02], np.float32)
    result = units.equivalence_test(effects, margin=0.05)
    expected = stats.ttest_1samp(effects.astype(np.float64), 0).confidence_interval(0.95)
    np.testing.assert_allclose((result.lower, result.upper), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"effects": [0.1]}, ValueError, r"effects: shape \(1,\), expected \(seeds,\) of at least"),
        ({"effects": np.ones((2, 2))}, ValueError, r"effects: shape \(2, 2\)"),
        ({"effects": [1, 2]}, TypeError, "effects: dtype int32"),
        ({"margin": 0}, ValueError, "margin: 0, expected a finite number above 0"),
        ({"confidence": 95}, ValueError, "confidence: 95.0, expected a number below 1"),
        ({"confidence": 0}, ValueError, "confidence: 0, expected"),
    ],
)
def test_the_equivalence_test_names_what_is_wrong_with_its_arguments(change, error, message):
    with pytest.raises(error, match=message):
        units.equivalence_test(**{"effects": [0.1, 0.2], "margin": 0.05} | change)
