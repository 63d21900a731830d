"""Adversarial training in its quick form, and what is concluded from what was saved."""

import functools

import jax
import numpy as np
import pytest

from advjax import data, models
from experiments import adversarial
from experiments.common import networks, options, paper
from tests import experiment_runs

quick = experiment_runs.quick(adversarial)


def by_arm(content):
    return [{row["arm"]: row for row in run["rows"]} for run in content["runs"]]


def test_every_arm_is_trained_and_attacked_for_every_seed(quick, monkeypatch):
    experiment_runs.check(quick, monkeypatch)
    for rows in by_arm(quick.content):
        assert tuple(rows) == adversarial.ARMS
        for row in rows.values():
            assert row["train_error"] < row["test_error"] < 0.15
            assert row["success"] == 1
            assert 0.03 < row["distortion"] < 0.2


def test_each_pool_has_its_own_rms_and_the_noise_has_that_of_the_input_pool(quick):
    for rows in by_arm(quick.content):
        for arm, layers in adversarial.POOLS.items():
            assert len(rows[arm]["pools"]) == len(layers)
            assert min(rows[arm]["pools"]) > 0.01
        assert rows["noise pool"]["pools"] == pytest.approx(rows["input pool"]["pools"], rel=0.02)
        assert rows["weight decay"]["pools"] == rows["dropout"]["pools"] == []


def test_a_pool_of_adversarial_images_makes_the_network_harder_to_mislead(quick):
    for rows in by_arm(quick.content):
        plain, pool = rows["weight decay"]["distortion"], rows["input pool"]["distortion"]
        assert pool > plain


def test_the_papers_errors_stand_beside_ours(quick):
    described = adversarial.describe(quick.content).splitlines()
    for arm in adversarial.ARMS:
        cells = [
            cell.strip()
            for line in described
            if line.startswith(f"| {arm} ")
            for cell in line.split("|")
        ]
        assert paper.ADVERSARIAL_TRAINING.get(arm, "-") in cells
    assert len(adversarial.claims(quick.content)) == 4


def test_weight_decay_alone_is_the_network_of_the_tables():
    train = data.load("mnist", "train", source="embedded")
    few = options.first(train, 300)
    key = jax.random.key(5)
    ours = adversarial.fit(key, few, steps=4).params
    tables = networks.train(key, "FC100-100-10", few, steps=4).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, tables)


def test_dropout_leaves_out_at_random_what_is_made_up_for_on_average():
    x = jax.random.uniform(jax.random.key(0), (28, 28, 1))
    params = models.MLP().init(jax.random.key(1), x)
    logits = models.MLP().apply(params, x)
    keys = jax.random.split(jax.random.key(2), 2000)

    def draws(**options):
        one = functools.partial(adversarial.thinned, params, x, **options)
        return np.asarray(jax.jit(jax.vmap(one))(keys))

    np.testing.assert_allclose(draws(rates=(0, 0, 0))[0], logits, atol=1e-6)
    assert draws().std(axis=0).min() > 0.01
    # Above the last hidden layer the network is linear, so the mean is that of the inputs.
    last = draws(rates=(0, 0, 0.5))
    spread = last.std(axis=0) / np.sqrt(len(keys))
    assert np.all(spread > 0)
    assert np.all(np.abs(last.mean(axis=0) - logits) < 5 * spread)


def saved(**test_errors):
    """Numbers of three seeds: the given test errors in percent, and a distortion of each arm."""
    spread = (-0.01, 0.0, 0.01)
    return {
        "config": {"images": 10},
        "runs": [
            {
                "rows": [
                    {
                        "arm": arm,
                        "test_error": (test_errors[arm] + some * (1 + i)) / 100,
                        "distortion": 0.06 + (0.02 + some / 10) * (arm in adversarial.POOLS),
                    }
                    for i, arm in enumerate(adversarial.ARMS)
                ]
            }
            for some in spread
        ],
    }


@pytest.mark.parametrize(
    ("changes", "verdicts"),
    [
        ({}, ["holds", "holds", "holds", "holds"]),
        ({"dropout": 1.0}, ["holds in part", "holds", "holds", "holds"]),
        ({"input pool": 1.2}, ["holds", "holds in part", "holds in part", "holds"]),
        (
            {"pools of all layers": 1.9, "hidden2 pool": 1.9},
            ["does not hold", "does not hold", "does not hold", "holds"],
        ),
    ],
)
def test_a_verdict_follows_from_the_differences_within_seeds(changes, verdicts):
    errors = {
        "weight decay": 1.6,
        "dropout": 1.4,
        "input pool": 1.7,
        "hidden1 pool": 1.5,
        "hidden2 pool": 1.2,
        "pools of all layers": 1.1,
        "noise pool": 1.6,
    }
    claims = adversarial.claims(saved(**errors | changes))
    assert [claim.verdict for claim in claims] == verdicts


def test_one_seed_proves_nothing():
    errors = dict.fromkeys(adversarial.ARMS, 1.5) | {"pools of all layers": 0.5}
    content = saved(**errors)
    content["runs"] = content["runs"][:1]
    assert {claim.verdict for claim in adversarial.claims(content)} == {"does not hold"}
