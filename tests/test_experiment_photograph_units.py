"""Units and directions on photographs: their views, figures 3 and 4, and the rotation test."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from advjax import units
from experiments import figure3, figure4
from experiments.common import measure, views
from tests.experiment_runs import check, needs_photographs, quick

# --- views -----------------------------------------------------------------------------------


def test_crops_reach_from_corner_to_corner():
    image = np.arange(36, dtype=np.float32).reshape(1, 6, 6, 1).repeat(3, axis=3)
    cut = views.crops(image, 4, 3)
    assert cut.shape == (1, 9, 4, 4, 3)
    np.testing.assert_array_equal(cut[0, :, 0, 0, 0], [0, 1, 2, 6, 7, 8, 12, 13, 14])
    np.testing.assert_array_equal(cut[0, 8, -1, -1], [35, 35, 35])
    np.testing.assert_array_equal(views.crops(image, 6, 1)[:, 0], image)


@needs_photographs
def test_every_photograph_has_as_many_views_in_one_row():
    found = views.load_views(None, quick=True)
    assert found.images.shape == (8, 14, 64, 64, 3)
    assert len(found.names) == 8
    assert found.names[6] == found.names[7] == "jeep"
    for split, first in zip(found.splits, (0, 1, 5), strict=True):
        corner = split.images[:, :64, :64]
        np.testing.assert_array_equal(found.images[:, first], corner)


# --- what is farthest ------------------------------------------------------------------------


def features(seed=0):
    return np.random.default_rng(seed).normal(size=(7, 3, 5)).astype(np.float32)


def test_each_photograph_is_shown_once_by_its_best_view():
    phi, directions = features(), features(1)[0]
    best = views.best_views(jnp.asarray(phi), jnp.asarray(directions), 4)
    for row, direction in zip(best, directions, strict=True):
        products = phi @ direction
        order = sorted(range(7), key=lambda i: -products[i].max())[:4]
        assert row.tolist() == [3 * i + int(products[i].argmax()) for i in order]


def test_the_purity_is_that_of_the_photographs_of_the_ten_views():
    phi = np.zeros((4, 5, 2), np.float32)
    phi[2, :, 0] = 3  # unit 0: five views of one photograph, and five of another
    phi[3, :, 0] = 2
    phi[:, :, 1] = np.arange(5)  # unit 1: the last views of all four, and two more
    directions = units.natural_basis(2)
    found = views.farthest(jnp.asarray(phi), directions, ["a", "b"], list("wxyz"))
    one, other = found["rows"]
    assert one["purity"] == pytest.approx(0.5)
    assert one["different"] == 2
    assert one["names"][:2] == ["y", "z"]
    assert other["purity"] == pytest.approx(0.3)
    assert other["different"] == 4
    assert found["purity"] == pytest.approx(0.4)
    assert found["different"] == pytest.approx(3)


def test_seeds_rotate_different_units_that_count():
    phi = np.random.default_rng(0).uniform(size=(30, 90)).astype(np.float32)
    phi[:, 17] = 0
    parts = [np.asarray(figure4._part(jnp.asarray(phi), seed, 3)) for seed in range(3)]
    together = np.concatenate(parts, axis=1)
    assert together.shape == (30, 89)
    np.testing.assert_array_equal(np.sort(together[0]), np.sort(np.delete(phi, 17, axis=1)[0]))


def test_features_are_means_over_the_pixels_of_the_named_layers():
    class Model:
        def apply(self, params, image, method):
            assert method == "layers"
            return {"inner": params * image, "last": image[0, 0], "other": jnp.zeros(3)}

    network = type("Net", (), {"model": Model(), "params": jnp.float32(2)})
    images = np.random.default_rng(0).uniform(size=(2, 3, 4, 4, 3)).astype(np.float32)
    found = views.pooled_features(network, images, ("inner", "last"))
    np.testing.assert_allclose(found["inner"], 2 * images.mean(axis=(2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(found["last"], images[:, :, 0, 0])


# --- the figures -----------------------------------------------------------------------------


def test_a_figure_shows_the_best_views_at_full_size_in_a_small_file(tmp_path):
    flat = np.linspace(0, 1, 12, dtype=np.float32).reshape(2, 6, 1, 1, 1)
    shown = views.Views(np.broadcast_to(flat, (2, 6, 224, 224, 3)), ["a", "b"], ())
    rows = [{"name": "unit 1", "best": [11, 0, 5]}]
    figure = views.draw_views({"runs": [{"rows": rows}]}, {"best": views.thumbnails(shown, rows)})
    measure._save_in_few_colours(figure, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as image:
        grey = np.asarray(image.convert("L"))
    lefts = (np.array([88, 146, 204]) + 28) * 2
    np.testing.assert_allclose(grey[grey.shape[0] // 2, lefts], [255, 0, 255 * 5 / 11], atol=2)
    assert grey.shape == (2 * (56 + 16), 2 * (88 + 3 * 58 - 2 + 8))


drawn3, drawn4 = map(quick, (figure3, figure4))


@needs_photographs
@pytest.mark.parametrize("drawn", ["drawn3", "drawn4"])
def test_figures_3_and_4_show_four_rows_of_different_photographs(drawn, request, monkeypatch):
    found = request.getfixturevalue(drawn)
    check(found, monkeypatch)
    for run in found.content["runs"]:
        assert len(run["rows"]) == 4
        for row in run["rows"]:
            photographs = np.array(row["best"]) // run["views"]
            assert len(set(photographs)) == 6
            assert max(photographs) < run["photographs"] == 8


@needs_photographs
def test_units_and_directions_tell_photographs_apart_and_noise_does_not(drawn3, drawn4):
    (run,) = drawn3.content["runs"]
    assert run["purity"] > run["at_random"] + 0.1
    cases = figure4._by_case(drawn4.content)
    assert len(cases) == 4
    assert [len(found) for found in cases.values()] == [2, 2, 2, 1]
    for one in cases["noise"]:
        assert one["rotated"] == pytest.approx(run["at_random"], abs=0.02)
    for experiment, content, _ in (drawn3, drawn4):
        assert experiment.claims(content)[0].verdict == "holds in part"


# --- the claims ------------------------------------------------------------------------------


def with_tests(effects, *, identity=0.5, purity=0.6):
    def tested(effect, t):
        return {
            "units": 9,
            "identity": t,
            "rotated": 0.3,
            "rotated_quantiles": [0.2, 0.4, 0.6, 0.7],
            "p_value": 0.5,
            "effect": effect,
            "effect_size": 1.0,
        }

    return {
        "runs": [
            {
                "photographs": 8,
                "views": 14,
                "purity": purity,
                "tests": {
                    figure4.TESTED: tested(effect, identity),
                    figure4.UNTRAINED: tested(0.0, 0.5),
                    "noise": tested(0.0, 0.5),
                },
            }
            for effect in effects
        ]
    }


@pytest.mark.parametrize(
    ("effects", "identity", "verdict"),
    [
        ((0.01, 0.011, 0.012), 0.5, "holds in part"),
        ((0.01, 0.011, 0.012), 0.65, "holds in part"),
        ((0.2, 0.21, 0.22), 0.65, "does not hold"),
        ((-0.2, -0.21, -0.22), 0.3, "does not hold"),
        ((0.2, -0.2, 0.1), 0.5, "cannot be tested here"),
        ((0.01,), 0.5, "cannot be tested here"),
    ],
)
def test_no_distinction_is_claimed_only_where_the_effect_is_shown_to_be_small(
    effects, identity, verdict
):
    _, claim = figure4.claims(with_tests(effects, identity=identity))
    assert claim.verdict == verdict
    assert ("not shown" not in claim.ours) == (verdict == "holds in part")


def test_directions_that_do_no_better_than_noise_bear_nothing_out():
    claim, _ = figure4.claims(with_tests((0.0, 0.0), purity=0.3))
    assert claim.verdict == "does not hold"
