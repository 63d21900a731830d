"""Adversarial digits beside noisy ones, on the sample inside."""

import json

import pytest
from PIL import Image

from experiments import figure7
from experiments.common import paper


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder = tmp_path_factory.mktemp("results")
        return figure7.main(quick=True, out=folder), folder


def test_three_panels_are_drawn_and_the_numbers_saved(quick):
    content, folder = quick
    saved = json.loads((folder / "figure7.json").read_text())
    assert {key: saved[key] for key in content} == json.loads(json.dumps(content))
    with Image.open(folder / "figure7.png") as figure:
        assert 700 <= figure.width <= 1000
    assert "(figure7.png)" in figure7.describe(content)


def test_the_nets_read_noise_better_than_what_was_distorted_for_them(quick):
    content, _ = quick
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


def with_noisy_share(content, share):
    other = json.loads(json.dumps(content))
    for run in other["runs"]:
        for row in run["rows"]:
            row["right"] |= dict.fromkeys(("noisy", "noisy_cut"), round(share * run["images"]))
    return other


def test_a_mark_says_whether_the_printed_share_could_be_ours(quick):
    content, _ = quick
    near, far = (with_noisy_share(content, share) for share in (0.53, 0.8))
    assert figure7.describe(near).count("✓") == 2 * len(figure7.PANELS) + 1
    assert "✗" not in figure7.describe(near)
    assert figure7.describe(far).count("✓") == 1, "where it is explained"
    assert [figure7.claims(some)[1].verdict for some in (near, far)] == ["holds", "does not hold"]


def test_what_is_no_better_than_the_attack_does_not_bear_the_claim_out(quick):
    content, _ = quick
    assert figure7.claims(with_noisy_share(content, 0))[0].verdict == "does not hold"
