"""The sandwich and the trainings with a penalty, in their quick form."""

import numpy as np
import pytest

from experiments import lipschitz
from tests import experiment_runs

quick = experiment_runs.quick(lipschitz)


@pytest.fixture
def content(quick):
    return quick.content


def test_every_certificate_lies_below_every_attack_and_each_bound_certifies_more(content):
    sandwich = content["runs"][0]["sandwich"]
    rows = sandwich["certified"]
    assert [row["by"] for row in rows] == [*lipschitz.CONSTANTS, lipschitz.LOCAL]
    assert all(row["violations"] == 0 for row in rows)
    radii = [row["radius"] for row in rows]
    assert radii[0] > 0
    assert np.all(np.diff(radii) > -1e-6 * radii[0])
    assert radii[-1] > 1.05 * radii[-2], "near an image the bounds are smaller"
    exact, paper = sandwich["found"]
    assert radii[-1] < exact["distance"] <= paper["distance"] * (1 + 1e-3)
    assert 0 < sandwich["right"] <= content["config"]["images"]


def test_the_penalty_lowers_the_bound_below_that_of_weight_decay_and_of_nothing(content):
    nothing, penalised, decay = content["runs"][0]["trainings"]
    assert [row["decay"] for row in (nothing, penalised, decay)] == [False, False, True]
    assert penalised["bound"] < 0.8 * min(nothing["bound"], decay["bound"])
    for row in (nothing, decay, penalised):
        assert row["train_error"] < 0.3
        assert row["certified"] / row["tested"] <= 1 - row["test_error"] + 1e-9
    assert penalised["certified"] > nothing["certified"]


def test_the_figure_and_the_words_are_of_the_numbers(quick, content, monkeypatch):
    experiment_runs.check(quick, monkeypatch, kilobytes=150)
    description = lipschitz.describe(content)
    for row in content["runs"][0]["trainings"]:
        assert f"{100 * row['test_error']:.2f}" in description
    guarantee, *suggestion = lipschitz.claims(content)
    assert guarantee.verdict == "holds"
    assert guarantee.ours.startswith("0 of ")
    assert len(suggestion) == 2
