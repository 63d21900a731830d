"""Adversarial digits beside noisy ones, on the sample inside."""

import json

from experiments import figure7
from experiments.common import paper
from tests import experiment_runs

quick = experiment_runs.quick(figure7)


def test_three_panels_are_drawn_and_the_numbers_saved(quick, monkeypatch):
    experiment_runs.check(quick, monkeypatch)


def test_the_networks_read_noise_better_than_what_was_distorted_for_them(quick):
    content = quick.content
    assert len(content["runs"]) == 2
    for run in content["runs"]:
        for row in run["rows"]:
            right = row["right"]
            assert row["adversarial"]["right"] == 0
            assert 0.03 < row["adversarial"]["distortion"] < 0.12
            for noisy in ("noisy", "noisy_cut"):
                assert 0.1 < right[noisy] / run["images"] < right["test"] / run["images"] < 1
    worse, printed = figure7.claims(content)
    assert worse.verdict == "holds"
    assert f"{paper.FIGURE7_GAUSSIAN_ACCURACY:g} %" in printed.paper


def with_noisy_fraction(content, fraction):
    other = json.loads(json.dumps(content))
    for run in other["runs"]:
        for row in run["rows"]:
            row["right"] |= dict.fromkeys(("noisy", "noisy_cut"), round(fraction * run["images"]))
    return other


def test_a_mark_says_whether_the_printed_fraction_could_be_ours(quick):
    content = quick.content
    near, far = (with_noisy_fraction(content, fraction) for fraction in (0.53, 0.8))
    assert figure7.describe(near).count("✓") == 2 * len(figure7.PANELS) + 1
    assert "✗" not in figure7.describe(near)
    assert figure7.describe(far).count("✓") == 1, "where it is explained"
    assert [figure7.claims(some)[1].verdict for some in (near, far)] == ["holds", "does not hold"]


def test_what_is_no_better_than_the_attack_does_not_bear_the_claim_out(quick):
    content = quick.content
    assert figure7.claims(with_noisy_fraction(content, 0))[0].verdict == "does not hold"
