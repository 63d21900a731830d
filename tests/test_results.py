"""How experiments keep what they measure, which intervals they give, and how they write it down."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.stats

from advjax import data, transfer
from experiments.common import measure as results

SPLIT = data.Dataset(np.zeros((2, 28, 28, 1), np.float32), np.arange(2), "embedded")


def measure(out, *, seeds=3, measure_seed=None, images=5, split=SPLIT, reuse=False):
    return results.measure(
        "trial",
        measure_seed or (lambda seed: {"square": seed**2}),
        seeds=seeds,
        config={"images": images, "dataset": "mnist", "quick": True},
        splits=[split],
        out=out,
        reuse=reuse,
    )


def never(seed):
    raise AssertionError(f"seed {seed} was measured")


def stop_at(last):
    def measure_seed(seed):
        if seed == last:
            raise KeyboardInterrupt
        return {"square": seed**2}

    return measure_seed


# --- measuring -------------------------------------------------------------------------------


def test_what_is_saved_says_what_made_it(tmp_path):
    content = measure(tmp_path / "new")
    assert content["runs"] == [{"square": 0}, {"square": 1}, {"square": 4}]
    assert content["command"] == (
        "python -m experiments trial --images 5 --dataset mnist --quick --seeds 3 --source embedded"
    )
    assert content["minutes"] < 0.1
    assert content["made_with"]["jax"] == jax.__version__
    assert json.loads((tmp_path / "new" / "trial.json").read_text()) == content
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trial.json"]


def test_a_run_that_was_stopped_goes_on_with_the_seed_that_was_cut_off(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, measure_seed=stop_at(2))
    measured = []
    content = measure(tmp_path, measure_seed=lambda seed: measured.append(seed) or {"square": 4})
    assert measured == [2]
    assert content["runs"] == [{"square": 0}, {"square": 1}, {"square": 4}]


def test_a_killed_run_ends_in_the_same_numbers(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import jax
from tests.test_results import measure

def measure_seed(seed):
    if seed == 1 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"draw": float(jax.random.normal(jax.random.key(seed)))}

measure(Path(sys.argv[1]), measure_seed=measure_seed)
"""

    def run(folder, how):
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / folder), how],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=False,
            capture_output=True,
        ).returncode

    assert run("killed", "kill") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "trial.json").exists()
    assert run("killed", "go on") == run("undisturbed", "go on") == 0
    killed, undisturbed = (
        json.loads((tmp_path / name / "trial.json").read_text())["runs"]
        for name in ("killed", "undisturbed")
    )
    assert killed == undisturbed


@pytest.mark.parametrize(
    "changed",
    [
        {"images": 6},
        {"seeds": 4},
        {"split": SPLIT._replace(labels=np.array([0, 2]))},
        {"split": SPLIT._replace(images=SPLIT.images + 1)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_another_run_left_is_not_mixed_in(tmp_path, changed):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, measure_seed=stop_at(1))
    measured = []
    measure(tmp_path, measure_seed=lambda seed: measured.append(seed) or {}, **changed)
    assert measured == list(range(changed.get("seeds", 3)))


def test_a_broken_file_of_a_stopped_run_is_measured_anew(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, measure_seed=stop_at(2))
    (tmp_path / "trial.partial" / "0.json").write_text('{"run": ')
    content = measure(tmp_path)
    assert "0.json cannot be read" in capsys.readouterr().out
    assert content["runs"] == [{"square": 0}, {"square": 1}, {"square": 4}]


def test_a_finished_run_is_taken_over_only_if_asked_for(tmp_path):
    content = measure(tmp_path)
    assert measure(tmp_path, measure_seed=never, reuse=True) == content
    with pytest.raises(AssertionError, match="seed 0 was measured"):
        measure(tmp_path, measure_seed=never)


def test_a_finished_run_of_other_options_is_named_and_measured_anew(tmp_path, capsys):
    measure(tmp_path)
    assert measure(tmp_path, images=6, reuse=True)["config"]["images"] == 6
    printed = capsys.readouterr().out
    assert "'images': 5" in printed
    assert "'images': 6" in printed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": null}'])
def test_a_broken_result_is_measured_anew(tmp_path, text):
    (tmp_path / "trial.json").write_text(text)
    assert len(measure(tmp_path, reuse=True)["runs"]) == 3


# --- intervals -------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_scipys():
    values = [0.3, 0.5, 0.1, 0.45]
    mean, *interval = results.mean(values)
    error = scipy.stats.sem(values)
    assert interval == pytest.approx(scipy.stats.t.interval(0.95, 3, mean, error))


def test_one_seed_has_no_interval_and_is_written_without():
    assert math.isnan(results.mean([0.25]).low)
    assert results.number(results.mean([0.25]), 2) == "0.25"


def test_a_share_on_which_all_seeds_agree_has_wilsons_interval():
    low, high = map(float, transfer.wilson_interval(0, 512))
    assert results.share([0, 0], [256, 256]) == (0, low, high)


def test_a_share_on_which_seeds_differ_has_students():
    assert results.share([30, 40, 50], [100] * 3) == results.mean([0.3, 0.4, 0.5])
    assert results.share([10, 40, 70], [100] * 3)[1:] == (0, 1), "and no further than a share goes"


def test_a_printed_share_agrees_where_the_intervals_meet():
    ours = results.Estimate(0.05, 0.04, 0.06)
    assert results.agrees(ours, 0.08), "20 of 256 may be from 5.1 to 11.7 %"
    assert not results.agrees(ours, 0.10)


def test_a_number_of_the_same_distribution_is_predicted_19_times_of_20():
    draws = np.random.default_rng(0).normal(size=(4000, 6))
    predicted = np.mean([results.predicts(row[:5], row[5]) for row in draws])
    assert predicted == pytest.approx(0.95, abs=0.015)


# --- words -----------------------------------------------------------------------------------


def test_a_table_is_markdown_with_names_to_the_left_and_numbers_to_the_right():
    assert results.table(("net", "error"), [("FC10", "7.4"), ("a", "12.25")]).splitlines() == [
        "| net  | error |",
        "| ---- | ----: |",
        "| FC10 |   7.4 |",
        "| a    | 12.25 |",
    ]


def test_a_bar_in_a_cell_does_not_end_it():
    line = results.table(("a", "b"), [("|x|", "1")], names=2).splitlines()[-1]
    assert line == "| \\|x\\| | 1 |"
