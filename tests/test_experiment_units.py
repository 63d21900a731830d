"""Units and directions: the figures, and the rotation test, on the sample inside."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from advjax import data, plots
from experiments import figure1, rotation
from experiments.common.measure import grouped
from experiments.common.units import MARGIN, alive, features
from tests import experiment_runs
from tests.test_plots import drawn, text_fits, texts

# --- figures 1 and 2 -------------------------------------------------------------------------


figures = experiment_runs.quick(figure1)


def test_figures_1_and_2_show_four_rows_of_ten(figures, monkeypatch):
    experiment_runs.check(figures, monkeypatch)
    assert {path.name for path in figures.folder.glob("*.png")} == {"figure1.png", "figure2.png"}


def test_a_row_says_which_test_images_it_has_and_how_alike_they_are(figures):
    content = figures.content
    labels = data.load("mnist", "test", source="embedded").labels
    for run in content["runs"]:
        for kind, name in (("units", "unit"), ("directions", "direction")):
            assert len(run["rows"][kind]) == 4
            for row in run["rows"][kind]:
                assert row["name"].startswith(name)
                assert len(set(row["indices"])) == 10
                assert row["labels"] == labels[row["indices"]].tolist()
                assert row["purity"] == pytest.approx(np.bincount(row["labels"]).max() / 10)
        purity = run["purity"]
        assert purity["images at random"] < 0.4 < min(purity["units"], purity["directions"])


def test_the_figures_bear_out_what_the_paper_saw(figures):
    content = figures.content
    (claim,) = figure1.claims(content)
    assert claim.verdict == "holds"
    blurred = json.loads(json.dumps(content))
    for run in blurred["runs"]:
        run["purity"]["directions"] = run["purity"]["images at random"]
    assert figure1.claims(blurred)[0].verdict == "does not hold"


def test_a_unit_that_is_hardly_ever_active_does_not_count():
    phi = np.zeros((50, 3), np.float32)
    phi[:10, 1], phi[:9, 2] = 1, 1
    assert alive(jnp.asarray(phi)).tolist() == [False, True, False]


def test_features_are_those_of_the_named_layer():
    def apply(params, image, method):
        assert method == "layers"
        return {"flat": params * image, "other": jnp.zeros(3)}

    network = types.SimpleNamespace(model=types.SimpleNamespace(apply=apply), params=jnp.float32(2))
    images = np.arange(24, dtype=np.float32).reshape(3, 2, 2, 2)
    np.testing.assert_array_equal(features(network, "flat", images), 2 * images.reshape(3, 8))


# --- the rotation test -----------------------------------------------------------------------


rotated = experiment_runs.quick(rotation)


def by_case(found):
    return grouped(found.content, *rotation.CASE)


def test_both_networks_and_every_control_are_tested(rotated, monkeypatch):
    experiment_runs.check(rotated, monkeypatch)
    cases = by_case(rotated)
    assert len(cases) == 2 * 2 * 3 + 2
    assert sum(map(len, cases.values())) == 2 * 13 + 1, "the images are the same for all seeds"


def test_the_images_along_a_unit_are_the_same_before_and_after_a_sigmoid(rotated):
    cases = by_case(rotated)
    for kind in ("units", "units, untrained"):
        before, after = (cases["FC100-100-10", stage, kind] for stage in rotation.STAGES)
        for first, second in zip(before, after, strict=True):
            for score in rotation.SCORES:
                assert first[score]["identity"] == pytest.approx(
                    second[score]["identity"], abs=0.01
                )


def test_training_makes_them_alike_and_noise_and_principal_axes_do_not(rotated):
    cases = by_case(rotated)

    def purity(*case):
        return np.mean([row["purity"]["identity"] for row in cases[case]])

    for network in rotation.LAYERS:
        assert (
            purity(network, "after", "units") > purity(network, "after", "units, untrained") + 0.1
        )
        for row in cases[network, "after", "principal axes"]:
            assert row["purity"]["identity"] < row["purity"]["rotated_quantiles"][0]
    assert purity("noise", "", "units") < 0.35


def with_outcome(content, *, effect, identity):
    other = json.loads(json.dumps(content))
    for i, run in enumerate(other["runs"]):
        for row in run["rows"]:
            for score in rotation.SCORES:
                row[score] |= {"effect": effect + 1e-4 * i, "identity": identity}
                row[score]["rotated_quantiles"] = [0.5, 0.6, 0.8, 0.9]
    return other


@pytest.mark.parametrize(
    ("effect", "identity", "verdict"),
    [
        (0.01, 0.7, "holds"),
        (0.01, 0.81, "holds"),
        (0.2, 0.85, "does not hold"),
        (-0.2, 0.55, "does not hold"),
        (0.2, 0.7, "cannot be tested here"),
    ],
)
def test_the_claim_holds_only_where_the_effect_is_shown_to_be_small(
    rotated, effect, identity, verdict
):
    content = with_outcome(rotated.content, effect=effect, identity=identity)
    (claim,) = rotation.claims(content)
    assert claim.verdict == verdict
    n = 8 if abs(effect) < MARGIN else 0
    assert f"in {n} they are shown" in claim.ours


def test_the_qualities_are_ink_height_width_and_slant_and_less_of_each():
    images = np.zeros((4, 28, 28, 1), np.float32)
    images[0, 4:24, 13:15] = 1  # a 1
    images[1, 13:15, 4:24] = 1  # lying down
    for i in range(4, 24):
        images[2, i, 28 - i] = 1  # a thin slash
        images[3, i, i] = 1  # and a backslash
    ink, height, width, slant, *less = rotation.qualities(images).T
    assert ink[0] == ink[1] == 40
    assert ink[2] == ink[3] == 20
    assert height.argmin() == width.argmin() + 1 == 1
    np.testing.assert_allclose(slant, [0, 0, 1, -1], atol=1e-6)
    np.testing.assert_array_equal(less, -np.array([ink, height, width, slant]))


# --- the drawing -----------------------------------------------------------------------------


def test_each_direction_has_its_images_in_order_in_a_row_of_its_own():
    images = np.random.default_rng(0).uniform(size=(6, 28, 28, 1)).astype(np.float32)
    indices = np.array([[5, 0, 3], [1, 1, 2]])
    figure = plots.top_images_grid(images, indices, names=["unit 7", "direction 2"])
    for axes, index in zip(figure.axes, indices.ravel(), strict=True):
        np.testing.assert_array_equal(np.asarray(axes.images[0].get_array()), images[index, ..., 0])
    boxes = [axes.get_position() for axes in figure.axes]
    assert boxes[0].x1 < boxes[1].x0 < boxes[2].x0
    assert boxes[0].y0 > boxes[3].y1
    assert drawn(figure, figure.axes[0]).shape[:2] == (56, 56)
    assert texts(figure) == ["unit 7", "direction 2"]
    assert text_fits(figure)


@pytest.mark.parametrize("indices", [[0, 1], [[0, 3]], [[-1, 0]], [[]]])
def test_indices_of_images_are_asked_for(indices):
    with pytest.raises(ValueError, match=r"indices: shape .* 3 images"):
        plots.top_images_grid(np.zeros((3, 28, 28)), indices)


def test_a_name_for_each_direction_is_asked_for():
    with pytest.raises(ValueError, match="names: 1 for 2 directions"):
        plots.top_images_grid(np.zeros((3, 28, 28)), [[0], [1]], names=["one"])
    with pytest.raises(ValueError, match="images: shape"):
        plots.top_images_grid(np.zeros((28, 28)), [[0]])
