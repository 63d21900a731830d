"""Transfer and its controls against NumPy loops, and Wilson's interval against SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from advjax import metrics, transfer

RNG = np.random.default_rng(0)
CLASSES, N = 5, 31
XS = RNG.uniform(size=(N, 3, 4)).astype(np.float32)
XS_ADV = [(XS + scale * RNG.normal(size=XS.shape)).astype(np.float32) for scale in (0.1, 0.4)]
LABELS = RNG.integers(CLASSES, size=N)
KERNELS = [RNG.normal(size=(12, CLASSES)).astype(np.float32) for _ in range(3)]
NETWORKS = [
    functools.partial(lambda kernel, x: jnp.ravel(x) @ kernel, kernel) for kernel in KERNELS
]
X, X_ADV = jnp.asarray(XS[0]), jnp.asarray(XS_ADV[0][0])
KEY = jax.random.key(0)


def is_wrong(kernel, image, label):
    return int(np.argmax(np.ravel(image) @ kernel)) != label


# The matrix


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_each_cell_counts_the_images_of_its_row_that_its_columns_network_gets_wrong(batch_size):
    result = transfer.transfer_matrix(NETWORKS, XS_ADV, LABELS, batch_size=batch_size)
    for row, images in enumerate(XS_ADV):
        for column, kernel in enumerate(KERNELS):
            wrong = sum(is_wrong(kernel, *pair) for pair in zip(images, LABELS, strict=True))
            assert int(result.wrong[row, column]) == wrong
            assert float(result.rate[row, column]) == pytest.approx(wrong / N)
    np.testing.assert_array_equal(result.total, np.full((2, 3), N))


def test_net_transfer_counts_only_what_the_columns_network_had_right():
    result = transfer.transfer_matrix(NETWORKS, XS_ADV, LABELS, xs=XS)
    for row, images in enumerate(XS_ADV):
        for column, kernel in enumerate(KERNELS):
            had = [i for i in range(N) if not is_wrong(kernel, XS[i], LABELS[i])]
            wrong = sum(is_wrong(kernel, images[i], LABELS[i]) for i in had)
            assert 0 < len(had) < N
            assert int(result.total[row, column]) == len(had)
            assert int(result.wrong[row, column]) == wrong
            assert float(result.rate[row, column]) == pytest.approx(wrong / len(had))


def test_images_that_are_not_distorted_have_no_net_transfer():
    result = transfer.transfer_matrix(NETWORKS, [XS], LABELS, xs=XS)
    np.testing.assert_array_equal(result.rate, 0)


def test_a_network_that_had_nothing_right_has_no_rate_of_net_transfer():
    labels = np.argmin(XS.reshape(N, -1) @ KERNELS[0], axis=1)
    result = transfer.transfer_matrix(NETWORKS[:1], XS_ADV, labels, xs=XS)
    np.testing.assert_array_equal(result.total, 0)
    np.testing.assert_array_equal(result.rate, np.nan)
    interval = transfer.wilson_interval(result.wrong, result.total)
    np.testing.assert_array_equal(interval, [np.zeros((2, 1)), np.ones((2, 1))])


def test_the_rows_may_be_one_array_and_the_matrix_under_jit():
    eager = transfer.transfer_matrix(NETWORKS, XS_ADV, LABELS)
    jitted = jax.jit(functools.partial(transfer.transfer_matrix, NETWORKS))(
        np.stack(XS_ADV), LABELS
    )
    np.testing.assert_array_equal(eager.wrong, jitted.wrong)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits_fns": []}, ValueError, "0 networks and 2 rows"),
        ({"xs_adv": []}, ValueError, "3 networks and 0 rows"),
        ({"xs_adv": [XS, XS[:5]]}, ValueError, r"xs_adv\[1\]: shape \(5, 3, 4\), expected \(31,"),
        ({"xs": XS[:5]}, ValueError, r"xs: shape \(5, 3, 4\), expected \(31,"),
        ({"xs_adv": [(255 * XS).astype(np.uint8)]}, TypeError, r"xs_adv\[0\]: .*/ 255"),
        (
            {"labels": LABELS[:5]},
            ValueError,
            r"labels: shape \(5,\) for .*\(31, 3, 4\)",
        ),
        ({"labels": np.eye(CLASSES)[LABELS]}, TypeError, "labels: dtype float32"),
        ({"xs_adv": [XS[:0]], "labels": LABELS[:0]}, ValueError, "at least one image"),
        ({"logits_fns": [lambda x: x]}, ValueError, "logits_fn: returns shape"),
        ({"batch_size": 0}, ValueError, "batch_size: 0"),
    ],
)
def test_the_matrix_names_what_is_wrong_with_its_arguments(change, error, message):
    arguments = {"logits_fns": NETWORKS, "xs_adv": XS_ADV, "labels": LABELS} | change
    with pytest.raises(error, match=message):
        transfer.transfer_matrix(**arguments)


# Magnified


@settings(deadline=None, max_examples=30)
@given(rms=st.floats(0, 10), scale=st.floats(1e-3, 1e3))
def test_a_magnified_distortion_has_the_rms_asked_for_and_the_old_direction(rms, scale):
    far = X + scale * (X_ADV - X)
    result = np.asarray(transfer.magnify(X, far, np.float32(rms)), np.float64)
    r, old = result - X, np.asarray(far, np.float64) - X
    np.testing.assert_allclose(np.sqrt(np.mean(r**2)), rms, rtol=1e-3, atol=1e-6)
    cosine = np.sum(r * old) / max(np.linalg.norm(r) * np.linalg.norm(old), 1e-30)
    assert rms < 1e-2 or cosine == pytest.approx(1, abs=1e-4)


def test_an_image_that_is_not_distorted_cannot_be_magnified_and_stays():
    np.testing.assert_array_equal(transfer.magnify(X, X, 0.1), X)


def test_a_box_clips_the_magnified_image():
    free = transfer.magnify(X, X_ADV, 1.0)
    boxed = transfer.magnify(X, X_ADV, 1.0, box=(0.2, 0.9))
    np.testing.assert_array_equal(boxed, jnp.clip(free, 0.2, 0.9))
    assert float(metrics.distortion(X, boxed)) < 1


def test_magnify_maps_over_images_and_over_a_curve_of_rms():
    rms = jnp.array([0.02, 0.1, 0.3])
    over_images = jax.vmap(transfer.magnify, in_axes=(0, 0, None))
    curve = jax.jit(jax.vmap(over_images, in_axes=(None, None, 0)))(XS, XS_ADV[0], rms)
    lengths = jax.vmap(jax.vmap(metrics.distortion), in_axes=(None, 0))(XS, curve)
    np.testing.assert_allclose(lengths, np.repeat(rms[:, None], N, 1), rtol=1e-4)


# Noise


def test_gaussian_noise_is_gaussian_of_the_rms_asked_for():
    x = jnp.full((100, 200), 0.5)
    noise = np.ravel(transfer.gaussian(KEY, x, 0.3) - x)
    assert stats.kstest(noise, stats.norm(scale=0.3).cdf).pvalue > 0.01
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(0.3, rel=4 / np.sqrt(2 * x.size))


def test_clipping_takes_half_the_variance_of_the_pixels_on_a_bound():
    x = jnp.zeros((100, 100)).at[20:].set(1.0).at[60:].set(0.5)
    clipped = transfer.gaussian(KEY, x, 0.1, box=(0, 1))
    np.testing.assert_array_equal(clipped, jnp.clip(transfer.gaussian(KEY, x, 0.1), 0, 1))
    expected = 0.1 * np.sqrt(0.6 / 2 + 0.4)
    assert float(metrics.distortion(x, clipped)) == pytest.approx(expected, rel=0.02)


def test_clipping_noise_on_digits_leaves_three_quarters_of_it(mnist):
    images = jnp.asarray(mnist[1].images[:100])
    keys = jax.random.split(KEY, len(images))
    noise = functools.partial(transfer.gaussian, box=(0, 1))
    noisy = jax.vmap(noise, in_axes=(0, 0, None))(keys, images, 0.1)
    left = jax.vmap(metrics.distortion)(images, noisy).mean() / 0.1
    assert float(left) == pytest.approx(0.75, abs=0.02)


def test_each_key_has_its_own_noise_and_keeps_it():
    once, again = (transfer.gaussian(KEY, X, 0.1) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    other = transfer.gaussian(jax.random.key(1), X, 0.1)
    assert not np.any(np.asarray(once) == np.asarray(other))


# Random signs


def test_random_signs_keep_every_pixels_distortion_but_for_its_sign():
    x_adv = X_ADV.at[0].set(X[0])  # some pixels that the attack left alone
    result = transfer.random_signs(KEY, X, x_adv)
    np.testing.assert_allclose(jnp.abs(result - X), jnp.abs(x_adv - X), atol=1e-6)
    np.testing.assert_allclose(
        metrics.distortion(X, result), metrics.distortion(X, x_adv), rtol=1e-5
    )


def test_random_signs_are_a_fair_coin_for_each_pixel():
    keys = jax.random.split(KEY, 1000)
    results = jax.vmap(transfer.random_signs, in_axes=(0, None, None))(keys, X, X_ADV)
    kept = np.sum(np.abs(np.asarray(results) - np.asarray(X_ADV)) < 1e-6, axis=0)
    assert stats.binomtest(int(kept.sum()), 1000 * X.size).pvalue > 0.001
    # Each pixel by itself, too: within 5 standard deviations of a half.
    assert np.all(np.abs(kept - 500) < 5 * np.sqrt(250))


def test_random_signs_may_be_clipped():
    result = transfer.random_signs(KEY, X, X_ADV, box=(0.3, 0.6))
    free = transfer.random_signs(KEY, X, X_ADV)
    np.testing.assert_array_equal(result, jnp.clip(free, 0.3, 0.6))


CONTROLS = {
    "magnify": lambda x, x_adv, **options: transfer.magnify(x, x_adv, 0.1, **options),
    "gaussian": lambda x, x_adv, **options: transfer.gaussian(KEY, x, 0.1, **options),
    "random_signs": functools.partial(transfer.random_signs, KEY),
}
each_control = pytest.mark.parametrize("control", CONTROLS.values(), ids=CONTROLS)


@each_control
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_the_answer_is_an_image_of_the_same_dtype(control, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x, x_adv = jnp.asarray(X, dtype), jnp.asarray(X_ADV, dtype)
        assert control(x, x_adv).dtype == dtype
        assert control(x, x_adv, box=(0, 1)).dtype == dtype


@each_control
def test_bytes_and_boxes_that_do_not_fit_are_named(control):
    with pytest.raises(TypeError, match="x: dtype uint8"):
        control((255 * X).astype(jnp.uint8), X_ADV)
    with pytest.raises(ValueError, match="box: upper bound"):
        control(X, X_ADV, box=(0, jnp.ones(7)))


@pytest.mark.parametrize("control", [CONTROLS["magnify"], CONTROLS["random_signs"]])
def test_two_images_of_different_shapes_are_named(control):
    with pytest.raises(ValueError, match=r"x_adv: shape \(2, 4\), expected \(3, 4\)"):
        control(X, X_ADV[:2])


@pytest.mark.parametrize(
    ("rms", "message"),
    [(-1, "rms: -1, expected"), (np.inf, "rms: inf"), (jnp.ones(2), r"rms: shape \(2,\)")],
)
def test_an_rms_that_is_none_is_named(rms, message):
    with pytest.raises(ValueError, match=message):
        transfer.magnify(X, X_ADV, rms)
    with pytest.raises(ValueError, match=message):
        transfer.gaussian(KEY, X, rms)


# Intervals


@pytest.mark.parametrize("confidence", [0.95, 0.999])
@pytest.mark.parametrize("n", [1, 16, 10_000])
def test_wilsons_interval_is_scipys(n, confidence):
    ks = np.unique(np.linspace(0, n, 20).astype(int))
    interval = transfer.wilson_interval(ks, n, confidence=confidence)
    expected = [stats.binomtest(int(k), n).proportion_ci(confidence, method="wilson") for k in ks]
    np.testing.assert_allclose(np.stack(interval, 1), expected, atol=1e-6)
    assert float(interval.lower[0]) == 0
    assert float(interval.upper[-1]) == 1


def test_wilsons_interval_of_fifteen_in_256_is_the_papers():
    lower, upper = transfer.wilson_interval(15, 256)
    assert (round(100 * float(lower), 1), round(100 * float(upper), 1)) == (3.6, 9.4)


def test_wilsons_interval_without_a_case_is_everything_and_of_no_proportion_is_nan():
    lower, upper = transfer.wilson_interval(np.array([0, -1, 5]), np.array([0, 4, 4]))
    np.testing.assert_array_equal(lower, [0, np.nan, np.nan])
    np.testing.assert_array_equal(upper, [1, np.nan, np.nan])


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_that_is_none_is_named(confidence):
    with pytest.raises(ValueError, match="confidence: "):
        transfer.wilson_interval(1, 2, confidence=confidence)
