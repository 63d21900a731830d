"""The step of one gradient, beside the nearest images, on the sample inside."""

import numpy as np
import pytest

from experiments import fgsm
from experiments.common import paper
from tests import experiment_runs

quick = experiment_runs.quick(fgsm)


def rows_of(content):
    return [row for run in content["runs"] for row in run["rows"]]


def test_what_is_saved_is_what_is_returned_and_drawn(quick, monkeypatch):
    experiment_runs.check(quick, monkeypatch, kilobytes=150)


def test_a_longer_step_is_longer_and_the_longest_mislead_every_network(quick):
    content = quick.content
    assert [row["net"] for row in rows_of(content)] == 2 * ["FC10(1e-4)", "FC100-100-10"]
    for row in rows_of(content):
        assert [step["epsilon"] for step in row["steps"]] == list(fgsm.EPSILONS)
        lengths = [step["distortion"] for step in row["steps"]]
        assert lengths[0] == 0
        assert np.all(np.diff(lengths) > 0)
        assert np.all(np.array(lengths[1:]) < fgsm.EPSILONS[1:]), "clipping shortens"
        assert row["steps"][-1]["wrong"] == content["config"]["images"]
        assert 0.5 < row["published"]["clipped"]["confidence"] < 1


def test_no_step_misleads_more_images_than_are_as_near(quick):
    content = quick.content
    for row in rows_of(content):
        for level, nearest in zip(fgsm.LEVELS, row["nearest"]["quantiles"], strict=True):
            reached = fgsm._step_length(row, level, content["config"]["images"])
            assert not reached < nearest * 0.9, "0.9: the mean length of a step is compared"


def test_signs_matter_more_than_pixels(quick):
    content = quick.content
    for row in rows_of(content):
        near, far = row["transfer"]
        assert near["epsilon"] < far["epsilon"] == fgsm.TRANSFERRED
        assert near["distortion"] == pytest.approx(row["nearest"]["distortion"], rel=0.2)
        assert far["control"] < far["step"] <= far["total"] <= content["config"]["images"]
        assert near["step"] <= far["step"]


def test_the_report_sets_the_published_figure_beside_ours(quick):
    content = quick.content
    shown = fgsm.describe(content)
    assert "(fgsm.png)" in shown
    (line,) = [line for line in shown.splitlines() if "shallow softmax" in line]
    published = paper.FAST_GRADIENT["shallow softmax"]
    assert f"{published.error:g}" in line
    assert f"{published.confidence:g}" in line
    enough, cost, others = fgsm.claims(content)
    assert enough.verdict == "holds"
    assert "FC100-100-10" in cost.ours
    assert others.verdict != "does not hold"


@pytest.mark.parametrize(
    ("fraction", "length"), [(0.05, 0), (0.1, 0), (0.25, 0.1), (0.6, 0.36), (0.9, np.nan)]
)
def test_the_length_for_a_fraction_is_where_the_error_first_reaches_it(fraction, length):
    points = zip([10, 40, 30, 80, 70], [0.0, 0.2, 0.3, 0.4, 0.5], strict=True)
    row = {"steps": [{"wrong": wrong, "distortion": rms} for wrong, rms in points]}
    assert fgsm._step_length(row, fraction, 100) == pytest.approx(length, nan_ok=True)
