"""Figure 5's words, on numbers that were made up, and its quick form where the photographs are."""

import numpy as np
import pytest

from experiments import figure5
from tests.experiment_runs import check, needs_photographs, run


def content(near=0.001, alone=True):
    rows = [
        {
            "attack": name,
            "distortion": [near, 2 * factor * near],
            "success": [True, True],
            "alone": [True, alone],
            "rounded": [False, True],
            "evals": 99.5,
        }
        for name, factor in ((figure5.STARTED, 1), (figure5.IMAGE, 1.1), (figure5.PAPERS, 1.2))
    ]
    peers = [{"attack": "DDN 300", "distortion": [0.002], "success": [True], "evals": 300.0}]
    run = {"rows": rows, "indices": [3, 5], "photographs": 20, "overhead": 1.04, "peers": peers}
    return {"experiment": "figure5", "runs": [run]}


def test_the_table_has_the_mean_and_the_extremes_of_each_attack():
    lines = figure5.describe(content()).splitlines()
    (ours,) = [line for line in lines if line.startswith(f"| {figure5.STARTED} ")]
    cells = [cell.strip() for cell in ours.split("|")[2:-1]]
    assert cells == [
        *("0.001500", "0.001000", "0.002000"),
        *("2 of 2", "2 of 2", "1 of 2"),
        "100",
    ]
    assert any("| DDN 300" in line and "0.002000" in line for line in lines)


def test_the_spread_is_that_of_the_two_starts():
    assert "ends nearer on 1 of 2; spread: 5.0 % on average, 10.0 % at most" in figure5.describe(
        content()
    )


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [(content(), "holds"), (content(near=0.01), "does not hold"), (content(alone=False), "does")],
)
def test_the_claim_holds_where_all_are_misled_by_less_than_the_papers_mean(numbers, verdict):
    (claim,) = figure5.claims(numbers)
    assert claim.verdict.startswith(verdict)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what foolbox imports
@needs_photographs
def test_the_quick_form_measures_and_draws(tmp_path, monkeypatch):
    found = run(figure5, tmp_path)
    check(found, monkeypatch)
    (one,) = found.content["runs"]
    assert len(one["rows"]) == 3
    assert np.isfinite([row["distortion"] for row in one["rows"]]).all()
    assert one["overhead"] > 0
    assert [len(row["distortion"]) for row in one["peers"]] == [1] * 3
