"""The paper's networks, trained once and kept; the images to attack; and the paper's numbers."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from advjax import attacks, data, models
from experiments.common import networks, options, paper
from experiments.common.victims import Victims, attack_every_class, random_victims

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture(scope="module")
def digits():
    return options.first(data.load("mnist", "train", source="embedded"), 300)


def cached(cache_folder):
    return {path.name for path in cache_folder.glob("*.safetensors")}


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_network_is_trained_once_and_read_afterwards(digits, cache_folder, capsys):
    load = functools.partial(networks.load_or_train, jax.random.key(9), "FC10(1)", digits, steps=5)
    first = load()
    assert "training on 300 images" in capsys.readouterr().out
    second = load()
    assert "trained before" in capsys.readouterr().out
    assert same(first.params, second.params)


@pytest.mark.parametrize("change", ["name", "key", "steps", "images", "labels"])
def test_whatever_defines_a_network_makes_another_file(change, digits, cache_folder):
    given = {"key": jax.random.key(9), "name": "FC10(1)", "split": digits, "steps": 5}
    other = {
        "key": {"key": jax.random.key(10)},
        "name": {"name": "FC10(1e-2)"},
        "steps": {"steps": 10},
        "images": {"split": digits._replace(images=digits.images[:, ::-1])},
        "labels": {"split": digits._replace(labels=digits.labels[::-1].copy())},
    }
    networks.load_or_train(**given)
    before = cached(cache_folder)
    networks.load_or_train(**given | other[change])
    assert len(cached(cache_folder) - before) == 1


def test_the_activation_defines_a_network_too(digits, cache_folder, monkeypatch):
    load = functools.partial(
        networks.load_or_train, jax.random.key(9), "FC100-100-10", digits, steps=2
    )
    load()
    before = cached(cache_folder)
    tanh = networks.RECIPES["FC100-100-10"]._replace(model=models.MLP(activation=jnp.tanh))
    monkeypatch.setitem(networks.RECIPES, "FC100-100-10", tanh)
    load()
    assert len(cached(cache_folder) - before) == 1


def test_the_name_of_the_file_is_the_same_in_another_process(digits):
    code = (
        "import jax; from advjax import data; from experiments.common import networks\n"
        "d = data.load('mnist', 'train', source='embedded')\n"
        "r = networks.RECIPES['FC100-100-10']\n"
        "d = d._replace(images=d.images[:300], labels=d.labels[:300])\n"
        "print(networks._fingerprint(r, d, jax.random.key(9), 2))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    recipe = networks.RECIPES["FC100-100-10"]
    assert ran.stdout.strip() == networks._fingerprint(recipe, digits, jax.random.key(9), 2)


def test_a_damaged_file_is_made_anew(digits, cache_folder):
    load = functools.partial(networks.load_or_train, jax.random.key(11), "FC10(1)", digits, steps=5)
    before = cached(cache_folder)
    first = load()
    (name,) = cached(cache_folder) - before
    (cache_folder / name).write_bytes(b"half")
    assert same(first.params, load().params)
    assert (cache_folder / name).stat().st_size > 1000


def test_a_cache_that_cannot_be_written_costs_a_warning_only(digits, tmp_path, monkeypatch):
    (tmp_path / "advjax").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="could not keep the trained network"):
        networks.load_or_train(jax.random.key(9), "FC10(1)", digits, steps=2)


@pytest.mark.parametrize("make", [networks.train, networks.load_or_train])
def test_an_unknown_network_lists_the_known_ones(make, digits):
    with pytest.raises(ValueError, match=r"name: 'FC7', expected one of FC10\(1e-4\), "):
        make(jax.random.key(0), "FC7", digits)


def test_the_nearest_of_every_class_is_that_of_the_untargeted_attack(digits):
    network = networks.load_or_train(jax.random.key(9), "FC10(1)", digits, steps=5)
    few = digits.images[:6], digits.labels[:6]
    chosen = Victims(np.arange(6), *few, targets=(few[1] + 1) % 10)
    attack = attacks.lbfgs(network.logits_fn)
    nearest = attack_every_class(attack, chosen)
    expected = jax.vmap(attacks.untargeted(attack))(*few)
    np.testing.assert_allclose(nearest.distortion, expected.distortion, rtol=1e-4)
    np.testing.assert_array_equal(nearest.prediction, expected.prediction)


def test_random_victims_of_a_larger_number_begin_with_those_of_a_smaller_one():
    test = data.load("mnist", "test", source="embedded")
    few, many = (random_victims(jax.random.key(0), test, n) for n in (5, 300))
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
    images, labels, _ = digits
    small = networks.RECIPES["AE400-10"]._replace(model=models.AutoencoderClassifier(code=50))
    monkeypatch.setitem(networks.RECIPES, "AE400-10", small)
    train = functools.partial(networks.train, jax.random.key(0), "AE400-10", steps=40)
    network, misled = train(digits), train(digits._replace(labels=np.roll(labels, 7)))
    for layer in ("encoder", "decoder"):
        assert same(network.params["params"][layer], misled.params["params"][layer])
    right = np.mean(jax.vmap(network.logits_fn)(images).argmax(1) == labels)
    assert right > np.mean(jax.vmap(misled.logits_fn)(images).argmax(1) == labels) + 0.2
