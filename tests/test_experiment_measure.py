"""How experiments keep what they measure, which intervals they give, and how they write it down."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from PIL import Image

from advjax import data, transfer
from experiments.common import markdown, measure, options, statistics

SPLIT = data.Dataset(np.zeros((2, 28, 28, 1), np.float32), np.arange(2), "embedded")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options.DigitOptions):
    """Those of a trial of this apparatus."""

    images: int = 5
    seeds: int = 3
    weights: Path | None = None
    split: data.Dataset = SPLIT

    def load(self):
        """The same images for training and for testing."""
        return options.Digits(self.split, self.split)

    def config(self):
        """Those that bear on the numbers."""
        config = super().config()
        del config["split"]
        return config


def run(out, measure_seed=None, *, draw=None, **given):
    def measure_one(options, digits, seed):
        return measure_seed(seed)

    experiment = SimpleNamespace(
        __name__="experiments.trial",
        measure=measure_one if measure_seed else lambda options, digits, seed: {"square": seed**2},
        describe=lambda content: f"{len(content['runs'])} runs",
        **({"draw": draw} if draw else {}),
    )
    return measure.run(experiment, Options(**{"out": out, "quick": True} | given))


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
    content = run(tmp_path / "new")
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
        run(tmp_path, stop_at(2))
    measured = []
    content = run(tmp_path, lambda seed: measured.append(seed) or {"square": 4})
    assert measured == [2]
    assert content["runs"] == [{"square": 0}, {"square": 1}, {"square": 4}]


def test_a_killed_run_ends_in_the_same_numbers(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
import jax
from tests.test_experiment_measure import run

def measure_seed(seed):
    if seed == 1 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"draw": float(jax.random.normal(jax.random.key(seed)))}

run(Path(sys.argv[1]), measure_seed)
"""

    def process(folder, how):
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / folder), how],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            check=False,
            capture_output=True,
        ).returncode

    assert process("killed", "kill") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "trial.json").exists()
    assert process("killed", "go on") == process("undisturbed", "go on") == 0
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
        run(tmp_path, stop_at(1))
    measured = []
    run(tmp_path, lambda seed: measured.append(seed) or {}, **changed)
    assert measured == list(range(changed.get("seeds", 3)))


def test_a_broken_file_of_a_stopped_run_is_measured_anew(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop_at(2))
    (tmp_path / "trial.partial" / "0.json").write_text('{"run": ')
    content = run(tmp_path)
    assert "0.json cannot be read" in capsys.readouterr().out
    assert content["runs"] == [{"square": 0}, {"square": 1}, {"square": 4}]


def test_a_finished_run_is_taken_over_only_if_asked_for(tmp_path):
    content = run(tmp_path)
    assert run(tmp_path, never, reuse=True) == content
    with pytest.raises(AssertionError, match="seed 0 was measured"):
        run(tmp_path, never)


def test_a_finished_run_of_other_options_is_named_and_measured_anew(tmp_path, capsys):
    run(tmp_path)
    assert run(tmp_path, images=6, reuse=True)["config"]["images"] == 6
    printed = capsys.readouterr().out
    assert "'images': 5" in printed
    assert "'images': 6" in printed


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": null}'])
def test_a_broken_result_is_measured_anew(tmp_path, text):
    (tmp_path / "trial.json").write_text(text)
    assert len(run(tmp_path, reuse=True)["runs"]) == 3


# --- data that are missing, and options that are not set -------------------------------------


def written(out, source):
    """What another run left, of the full form and of data from some source."""
    config = {"images": 5, "dataset": "mnist", "quick": False, "seeds": 3, "source": source}
    content = {"config": config, "runs": [{"square": 7}]}
    (out / "trial.json").write_text(json.dumps(content))
    return content


@pytest.mark.parametrize("source", ["auto", "tfds"])
def test_what_was_measured_on_the_full_set_is_read_where_the_set_is_missing(
    tmp_path, monkeypatch, source
):
    def load(self):
        raise FileNotFoundError("mnist is not prepared")

    monkeypatch.setattr(Options, "load", load)
    with pytest.raises(FileNotFoundError):
        run(tmp_path, never, quick=False, reuse=True, source=source)
    content = written(tmp_path, "tfds")
    assert run(tmp_path, never, quick=False, reuse=True, source=source) == content


def test_what_was_measured_on_the_sample_is_read_only_where_it_is_the_best_there_is(tmp_path):
    content = written(tmp_path, "embedded")
    assert run(tmp_path, never, quick=False, reuse=True, source="auto") == content
    full = SPLIT._replace(source="tfds")
    with pytest.raises(AssertionError, match="seed 0 was measured"):
        run(tmp_path, never, quick=False, reuse=True, source="auto", split=full)


def test_an_option_that_is_not_set_is_in_neither_the_numbers_nor_the_command(tmp_path):
    assert "weights" not in Options().config()
    given = Options(weights=Path("alexnet.pt"))
    assert given.config()["weights"] == "alexnet.pt"
    assert "--weights alexnet.pt --dataset mnist --seeds 3" in given.command("trial", "tfds")


def test_a_folder_of_photographs_is_named_in_the_command_and_foolboxs_twenty_are_not():
    photographs = options.PhotographOptions()
    assert photographs.command("trial", "foolbox") == "python -m experiments trial"
    mine = options.PhotographOptions(folder=Path("mine"))
    assert mine.command("trial", "mine") == "python -m experiments trial --folder mine"
    assert mine.expected_source == "mine"
    assert mine.config() == photographs.config()


# --- figures ---------------------------------------------------------------------------------


def drawn(content, arrays):
    figure = Figure(figsize=arrays["size"] * len(content["runs"]))
    return {"trial.png": figure}


def sizes(seed):
    return {"square": seed, "size": np.array([1.0 + seed, 0.5])}


def test_a_figure_is_drawn_from_the_first_seeds_arrays_and_again_if_it_is_missing(tmp_path):
    content = run(tmp_path, sizes, draw=drawn)
    assert content["runs"] == [{"square": 0}, {"square": 1}, {"square": 2}]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("trial.json", "trial.npz", "trial.png")
    ]
    picture = tmp_path / "trial.png"
    with Image.open(picture) as image:
        assert image.size == (300, 150)
    before = picture.read_bytes()
    picture.unlink()
    run(tmp_path, never, draw=drawn, reuse=True)
    assert picture.read_bytes() == before


def test_a_stopped_run_keeps_the_arrays_of_the_first_seed(tmp_path):
    def stopped(seed):
        if seed == 2:
            raise KeyboardInterrupt
        return sizes(seed)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stopped, draw=drawn)
    run(tmp_path, sizes, draw=drawn)
    with np.load(tmp_path / "trial.npz") as arrays:
        assert arrays["size"].tolist() == [1, 0.5]


def test_without_its_arrays_a_figure_is_left_as_it_is(tmp_path, capsys):
    run(tmp_path, sizes, draw=drawn)
    (tmp_path / "trial.npz").unlink()
    (tmp_path / "trial.png").write_text("as it was")
    run(tmp_path, never, draw=drawn, reuse=True)
    assert (tmp_path / "trial.png").read_text() == "as it was"
    assert "trial.npz, which holds their data, is missing" in capsys.readouterr().out


def test_arrays_of_another_run_do_not_stay(tmp_path):
    run(tmp_path, sizes)
    run(tmp_path)
    assert not (tmp_path / "trial.npz").exists()


# --- intervals -------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_scipys():
    values = [0.3, 0.5, 0.1, 0.45]
    mean, *interval = statistics.mean(values)
    error = scipy.stats.sem(values)
    assert interval == pytest.approx(scipy.stats.t.interval(0.95, 3, mean, error))


def test_one_seed_has_no_interval_and_is_written_without():
    assert math.isnan(statistics.mean([0.25]).low)
    assert markdown.number(statistics.mean([0.25]), 2) == "0.25"


def test_a_fraction_on_which_all_seeds_agree_has_wilsons_interval():
    low, high = map(float, transfer.wilson_interval(0, 512))
    assert statistics.fraction([0, 0], [256, 256]) == (0, low, high)


def test_a_fraction_on_which_seeds_differ_has_students():
    assert statistics.fraction([30, 40, 50], [100] * 3) == statistics.mean([0.3, 0.4, 0.5])
    assert statistics.fraction([10, 40, 70], [100] * 3)[1:] == (0, 1), "no further than it can"


def test_a_printed_fraction_agrees_where_the_intervals_meet():
    ours = statistics.Estimate(0.05, 0.04, 0.06)
    assert statistics.agrees(ours, 0.08), "20 of 256 may be from 5.1 to 11.7 %"
    assert not statistics.agrees(ours, 0.10)


def test_a_number_of_the_same_distribution_is_predicted_19_times_of_20():
    draws = np.random.default_rng(0).normal(size=(4000, 6))
    predicted = np.mean([statistics.predicts(row[:5], row[5]) for row in draws])
    assert predicted == pytest.approx(0.95, abs=0.015)


# --- tables ----------------------------------------------------------------------------------


def test_a_table_is_markdown_with_names_to_the_left_and_numbers_to_the_right():
    rows = [("FC10", "7.4"), ("a", "12.25")]
    table = markdown.table([("network", name), ("error", error)] for name, error in rows)
    assert table == markdown.grid(("network", "error"), rows)
    assert table.splitlines() == [
        "| network | error |",
        "| ------- | ----: |",
        "| FC10    |   7.4 |",
        "| a       | 12.25 |",
    ]


def test_a_bar_in_a_cell_does_not_end_it():
    line = markdown.grid(("a", "b"), [("|x|", "1")], names=2).splitlines()[-1]
    assert line == "| \\|x\\| | 1 |"
