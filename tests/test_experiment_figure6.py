"""A car detector on frozen features, and adversarial photographs shown to other networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from PIL import Image

from experiments import figure6, ostriches
from experiments.common import networks
from experiments.common.photographs import OSTRICH
from tests.experiment_runs import check, needs_photographs, run

CARS = jnp.array([True, True, True, False, False, False, False])


@pytest.fixture
def features():
    """Seven photographs in three views each; cars have more of the first feature."""
    noise = jax.random.uniform(jax.random.key(0), (7, 3, 5))
    return noise.at[:, :, 0].add(2.0 * CARS[:, None])


# --- the detector ----------------------------------------------------------------------------


def test_each_photograph_comes_first_and_its_crops_are_parts_of_it():
    ramp = jnp.broadcast_to(jnp.linspace(0, 1, 40)[None, :, None], (40, 40, 3))
    shown = figure6.views(jax.random.key(1), jnp.stack([ramp, 1 - ramp]), 8)
    assert shown.shape == (2, 9, 40, 40, 3)
    assert jnp.array_equal(shown[:, 0], jnp.stack([ramp, 1 - ramp]))
    middle = shown[:, 1:, 5:-5, 5:-5]
    slopes = jnp.diff(middle, axis=3) * 39
    for slope in slopes.reshape(16, -1):
        # Zooming in makes a ramp flatter by the fraction that is kept; mirroring turns it round.
        assert jnp.ptp(slope) < 1e-3
        assert figure6.SMALLEST_CROP - 1e-3 <= abs(slope[0]) <= 1 + 1e-3
    signs = jnp.sign(slopes[0, :, 0, 0, 0])
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_a_detector_is_where_the_slope_of_its_loss_vanishes(features):
    detector = figure6.fit(features, CARS, jnp.ones(7, bool))
    inputs, signs = np.sqrt(np.asarray(features, float) + 1e-2), np.where(CARS, 1, -1)[:, None]
    margins = inputs @ np.asarray(detector.weights, float) + float(detector.bias)
    weights = np.where(CARS, 1 / 6, 1 / 8)[:, None] / 3
    pull = weights * signs * scipy.special.expit(-signs * margins)
    slope = figure6.DECAY * np.asarray(detector.weights) - np.einsum("nv,nvf->f", pull, inputs)
    assert np.abs(slope).max() < 1e-3 > abs(pull.sum())


def test_each_photograph_is_judged_by_a_detector_that_has_not_seen_it(features):
    left_out = figure6.leave_one_out(features, CARS)
    other = figure6.leave_one_out(features.at[2].set(7.0), CARS)
    same = [
        bool(jnp.allclose(a, b, atol=1e-5))
        for a, b in zip(left_out.weights, other.weights, strict=True)
    ]
    assert same == [i == 2 for i in range(7)]
    margins = jax.vmap(figure6.Detector.margin)(left_out, features[:, 0])
    assert jnp.array_equal(margins > 0, CARS)


def test_photographs_seen_twice_do_not_make_their_class_weigh_more(features):
    everything = jnp.ones(7, bool)
    once = figure6.fit(features, CARS, everything)
    twice = figure6.fit(
        jnp.concatenate([features, features[3:]]),
        jnp.concatenate([CARS, CARS[3:]]),
        jnp.ones(11, bool),
    )
    assert jnp.allclose(once.weights, twice.weights, atol=3e-3)


class Colours:
    """A stand-in for a network: its features are the mean colours."""

    def apply(self, params, image, *, method):
        assert method == "layers"
        return {"pooled": params * jnp.mean(image, (0, 1))}


def test_the_attack_misleads_each_photographs_own_detector():
    network = networks.Network("colours", Colours(), jnp.ones(3))
    images = np.full((2, 4, 4, 3), 0.5, np.float32)
    # The first takes red for a car, from 0.4 on; the second blue, from 0.6 on.
    weights = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    thresholds = jnp.array([0.4, 0.6])
    detectors = figure6.Detector(weights, -jnp.sqrt(thresholds + 1e-2))
    assert (figure6._margins(network, detectors, images) > 0).tolist() == [True, False]
    found = figure6._attack(network, detectors, images, np.array([0, 1]), 50)
    assert found.success.all()
    assert jnp.allclose(found.distortion, 0.1 / jnp.sqrt(3), rtol=1e-2)
    changed = np.abs(found.x_adv - images).mean((1, 2))
    assert np.allclose(changed, 0.1 * weights, atol=1e-3)


def test_a_folder_without_cars_is_refused(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"imagenet_0{i}_{i}.png")
    with pytest.raises(ValueError, match="0 photographs of cars and 3 others"):
        run(figure6, tmp_path / "results", folder=tmp_path)


def found_by_the_detector(misled, by_noise):
    attacked = [
        {
            "photograph": i,
            "car": i < 2,
            "misled": i < misled,
            "distortion": 0.001 * (i + 1),
            "evaluations": 100,
            "misled_by_noise": i < by_noise,
        }
        for i in range(6)
    ]
    rows = [{"label": 609, "car": i < 2, "lead": 1.0 if i < 3 else -1.0} for i in range(6)]
    return {"runs": [{"rows": rows, "attacked": attacked}]}


def test_the_stand_in_bears_the_claim_out_in_part_at_most():
    verdicts = [
        figure6.claims(found_by_the_detector(*counts))[0].verdict
        for counts in ((6, 0), (6, 4), (3, 0))
    ]
    assert verdicts == ["holds in part", "does not hold", "does not hold"]


def test_the_tables_count_errors_and_distortions():
    lines = figure6.describe(found_by_the_detector(6, 1)).splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert ["car", "2", "0"] in cells
    assert ["other", "4", "1"] in cells
    assert ["other", "4", "4", "0.00450", "0.00300", "0.00600", "100", "0"] in cells


@needs_photographs
def test_a_detector_is_trained_and_attacked(tmp_path, monkeypatch):
    found = run(figure6, tmp_path)
    check(found, monkeypatch)
    (one,) = found.content["runs"]
    assert sum(row["car"] for row in one["rows"]) == 2
    wrong = sum((row["lead"] > 0) != row["car"] for row in one["rows"])
    assert wrong <= 2, "of twenty, eighteen of which are no cars"
    assert len(one["attacked"]) == 3
    assert all(row["distortion"] < 0.05 for row in one["attacked"])


# --- transfer --------------------------------------------------------------------------------


def test_a_resized_model_sees_a_smaller_image_and_a_normalized_one_others_pixels():
    class Model:
        def apply(self, params, image):
            return jnp.array([image.shape[0], *jnp.mean(image, (0, 1))])

    image = jnp.full((8, 8, 3), 0.485)
    small = ostriches.Resized(Model(), 5).apply(None, image)
    assert jnp.allclose(small, jnp.array([5, 0.485, 0.485, 0.485]))
    normal = ostriches.Normalized(Model()).apply(None, image)
    assert jnp.allclose(normal[1:], jnp.array([0, 0.029 / 0.224, 0.079 / 0.225]), atol=1e-5)


LABELS = [1, 2, 3, 4, 5, 6]


def found_by_networks(names, adversarial, noise, clean=LABELS):
    """All networks make the same of what was made for any."""
    rows = [
        {
            "made_for": name,
            "kind": kind,
            "rms": rms,
            "distortion": rms or 0.001,
            "predictions": [predictions] * len(names),
        }
        for name in names
        for kind, predictions in (("adversarial", adversarial), ("noise", noise))
        for rms in (None, *ostriches.RMS)
    ]
    clean = [LABELS] * (len(names) - 1) + [clean]
    return {"runs": [{"nets": names, "labels": LABELS, "clean": clean, "rows": rows}]}


def test_photographs_that_a_network_had_wrong_anyway_do_not_count():
    content = found_by_networks(
        ["a", "b"], [OSTRICH, 0, 3, 4, 5, 6], LABELS, clean=[0, *LABELS[1:]]
    )
    rows = ostriches.rows_of(content, "adversarial", None)
    # Of the first photograph only the pair (b, a) is left, as b had it wrong.
    wrong = ostriches.between(rows, "wrong")
    assert wrong.tolist() == [1, 1, 0, 0, 0, 0]
    assert ostriches.between(rows, "ostrich").tolist() == [1, 0, 0, 0, 0, 0]
    description = ostriches.describe(content)
    assert "33 [10, 70] (1)" in description, "2 of 6, one an ostrich"
    assert "20 [4, 62] (0)" in description, "1 of 5"


def test_a_network_does_not_count_as_another_one():
    content = found_by_networks(["a", "b"], LABELS, LABELS)
    for row in content["runs"][0]["rows"]:
        own = row["made_for"] == "b"
        row["predictions"] = [LABELS, [OSTRICH] * 6] if own else [[OSTRICH] * 6, LABELS]
    rows = ostriches.rows_of(content, "adversarial", None)
    assert not ostriches.between(rows, "wrong").any()


def test_the_sign_test_is_that_of_fair_coins():
    more, less = np.array([1, 1, 1, 1, 1, 0.5, 0]), np.array([0, 0, 0, 0, 0, 0.5, 1])
    assert ostriches.p_value(more, less) == pytest.approx(7 / 64)
    assert ostriches.p_value(more, more) == 1


def test_what_noise_does_too_is_no_transfer_and_one_network_in_sizes_no_other_network():
    all_wrong = [OSTRICH] * 6
    found = [
        (["a", "b"], all_wrong, LABELS),
        (["a", ostriches.ALEXNET], all_wrong, LABELS),
        (["a", ostriches.ALEXNET], all_wrong, all_wrong),
    ]
    verdicts = [ostriches.claims(found_by_networks(*one))[0].verdict for one in found]
    assert verdicts == ["holds in part", "holds", "does not hold"]


@needs_photographs
def test_ostriches_are_made_for_each_network_and_shown_to_all(tmp_path, monkeypatch):
    found = run(ostriches, tmp_path)
    check(found, monkeypatch)
    (one,) = found.content["runs"]
    assert one["clean"][0] == one["labels"], "of the first network's own victims"
    assert len(one["rows"]) == 2 * 2 * (1 + len(ostriches.RMS))
    for row in one["rows"]:
        if row["rms"] is not None:
            assert 0.8 * row["rms"] < row["distortion"] < 1.02 * row["rms"]
