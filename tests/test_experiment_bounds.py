"""The bounds of a large network's layers: the words on made-up numbers, and the quick form."""

import itertools

import pytest

from experiments import bounds
from tests.experiment_runs import check, needs_photographs, run


def content(steepest=30.0):
    layers = [
        {"layer": "stem", "bound": 5.0, "lanczos": 4.0},
        {"layer": "block1/depthwise", "bound": 3.0, "lanczos": 3.0},
        {"layer": "block1/project", "bound": 2.0, "lanczos": 2.0},
        {"layer": "logits", "bound": 7.0, "lanczos": 7.0},
    ]
    run = {
        "layers": layers,
        "reached": {"stem": 10.0, "block1": 70.0, "logits": 490.0},
        "bound": 490.0,
        "seconds": 3.0,
        "steepest": steepest,
        "radii": [0.3, 4.9],
    }
    return {"experiment": "bounds", "runs": [run]}


def test_each_block_has_a_line_with_its_skip_connection_counted():
    lines = bounds.describe(content()).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert rows[2:] == [
        ["stem", "-", "-", "-", "5 (1.2500)"],
        ["block1", "-", "3 (1.0000)", "2 (1.0000)", "7"],
        ["logits", "-", "-", "-", "7 (1.0000)"],
    ]


def test_the_network_as_a_whole_is_told_with_what_it_certifies():
    text = " ".join(bounds.describe(content()).split())
    assert "The steepest slope found is 30." in text
    assert "certifies photographs within an L2 distance of at most 1e-02" in text
    assert "would certify them within 0.01 to 0.16." in text


@pytest.mark.parametrize(("steepest", "verdict"), [(30.0, "holds"), (500.0, "does not hold")])
def test_the_claim_holds_while_no_slope_exceeds_the_bound(steepest, verdict):
    (claim,) = bounds.claims(content(steepest))
    assert claim.verdict == verdict


@pytest.mark.slow
@needs_photographs
def test_the_quick_form_bounds_fifty_layers_from_both_sides(tmp_path, monkeypatch):
    found = run(bounds, tmp_path)
    check(found, monkeypatch)
    (one,) = found.content["runs"]
    assert len(one["layers"]) == 50
    for layer in one["layers"]:
        assert 0 < layer["lanczos"] <= layer["bound"] < 2 * layer["lanczos"]
    reached = list(one["reached"].values())
    assert all(last < constant for last, constant in itertools.pairwise(reached))
    assert one["steepest"] < one["bound"] < float("inf")
