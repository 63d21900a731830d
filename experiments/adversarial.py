"""Adversarial training beside dropout (section 4.2; 15 min; MNIST or a sample).

The paper keeps a pool of adversarial examples, continually replaces a random part of it, and mixes
it into the training set. It reports a gain only with a pool for the outputs of each layer, which
trains the layers above. It does not give the size of the pools, how fast they were replaced, their
weight or their targets. Here a pool has 4,000 examples. Before each epoch 1,000 of them are
replaced by training images, or outputs of a layer, which the paper's attack (with looser tolerances
than by default) has just moved to the likeliest other class of the current network. Each step takes
64 examples from one randomly chosen pool and weighs their mean loss by 0.05 against that of 256
training images. In the noise pool Gaussian noise replaces the attack, unclipped, with the RMS that
the input pool of the same seed had at the end.

Within a seed all arms share the initial parameters, the order of the images and the weight decay of
Table 1's network, except for dropout, which uses a tenth of that decay and drops a fifth of the
pixels and a tenth of each hidden layer. These settings were chosen by the error on 10,000 training
images, with networks trained half as long on the other 50,000, mostly for one seed. Random targets,
larger weights and less weight decay were worse for the input pool and for the pools of all layers.
None of the pools tried beat weight decay alone. The distortions are those of `minimum_norm` on test
images towards random classes, the same for all arms of a seed.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, PyTree

from advjax import attacks, data, metrics, training, transfer
from experiments.common import markdown, networks, paper, statistics
from experiments.common.claims import Claim, verdict
from experiments.common.measure import Content, Row, grouped
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.victims import attack_victims, random_victims

RECIPE = networks.RECIPES["FC100-100-10"]
HIDDEN = ("hidden1", "hidden2")
DROPOUT = (0.2, 0.1, 0.1)
"""The dropout rates of the image and of each hidden layer's output."""
DROPOUT_DECAY = 0.1
"""The factor on the weight decay under dropout."""
POOL: dict[str, Any] = {"size": 4000, "count": 1000, "batch_size": 64, "weight": 0.05}

PLAIN, DROPPED, NOISE = "weight decay", "dropout", "noise pool"
INPUT, ALL = "input pool", "pools of all layers"


def _hidden(name: str) -> training.Layer:
    return training.Layer(
        lambda params, x: RECIPE.model.apply(params, x, method="layers")[name],
        functools.partial(RECIPE.model.apply, after=name),
    )


IMAGE = training.Layer(lambda params, x: x, RECIPE.model.apply)
POOLS: dict[str, tuple[training.Layer, ...]] = {
    INPUT: (IMAGE,),
    **{f"{name} pool": (_hidden(name),) for name in HIDDEN},
    ALL: (IMAGE, *map(_hidden, HIDDEN)),
}
"""The arms of adversarial training: which layers have pools."""
ARMS = (PLAIN, DROPPED, *POOLS, NOISE)


class Materials(NamedTuple):
    """Digits to train on, and the pools that each arm mixes with them."""

    train: data.Dataset
    test: data.Dataset
    pools: dict[str, training.AuxiliaryLoss]

    @property
    def splits(self) -> tuple[data.Dataset, ...]:
        """The data sets that are measured on."""
        return self.train, self.test


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Trains FC100-100-10 in each of several ways, and measures its errors and distortions."""

    images: int = 500
    """How many test images to attack for each seed."""
    seeds: int = 3
    TRIAL = trial(images=32, seeds=2)

    def load(self) -> Materials:  # type: ignore[override]
        """Load the digits and make the pools, once for all seeds since each compiles its attack."""
        digits = super().load()
        pools = {arm: self.pools(digits, layers, to_likeliest) for arm, layers in POOLS.items()}
        return Materials(*digits, pools)

    def pools(
        self, digits: Digits | Materials, layers: Sequence[training.Layer], distort: Any
    ) -> training.AuxiliaryLoss:
        """Pools for some layers, filled by `distort`."""
        return training.adversarial_pools(
            jnp.asarray(digits.train.images),
            digits.train.labels,
            layers,
            distort=distort,
            **POOL | ({"size": 400, "count": 100} if self.quick else {}),
        )


def measure(options: Options, digits: Materials, seed: int) -> Row:
    """Train every arm, and measure its errors and distortions."""
    chosen = random_victims(jax.random.key(seed), digits.test, options.images)
    rows: dict[str, Row] = {}
    for arm in ARMS:
        how: dict[str, Any] = {}
        if arm == DROPPED:
            how = {"apply": thinned, "stochastic": True, "decay": DROPOUT_DECAY}
        elif arm == NOISE:
            (rms,) = rows[INPUT]["pools"]
            distort = functools.partial(noisy, rms=rms)
            how = {"auxiliary": options.pools(digits, [IMAGE], distort)}
        elif arm in digits.pools:
            how = {"auxiliary": digits.pools[arm]}
        print(f"{arm}: training on {len(digits.train.labels):,} images", flush=True)
        start = time.monotonic()
        fitted = fit(jax.random.key(seed), digits.train, steps=options.steps, **how)
        minutes = (time.monotonic() - start) / 60
        network = networks.Network(arm, RECIPE.model, fitted.params)
        result = attack_victims(attacks.minimum_norm(network.logits_fn), chosen, arm)
        rows[arm] = {
            "arm": arm,
            "train_error": metrics.error_rate(network.logits_fn, *digits.train[:2]),
            "test_error": metrics.error_rate(network.logits_fn, *digits.test[:2]),
            "distortion": float(result.distortion.mean()),
            "success": float(result.success.mean()),
            "pools": [float(pool.distortion.mean()) for pool in fitted.auxiliary or ()],
            "minutes": minutes,
        }
    return {"rows": list(rows.values())}


def fit(
    key: Key[Array, ""], train: data.Dataset, *, decay: float = 1.0, **options: Any
) -> training.FitResult:
    """Train as `networks.train` does with the same key, except for the options."""
    penalty = training.weight_decay([decay * weight for weight in RECIPE.weight_decay])
    return networks.fit_from_scratch(key, RECIPE, train, penalty=penalty, **options)


def thinned(
    params: PyTree[Array],
    x: Float[Array, "*shape"],
    key: Key[Array, ""],
    *,
    rates: Sequence[float] = DROPOUT,
) -> Float[Array, " classes"]:
    """The logits of one image under dropout."""
    places = zip(rates, (None, *HIDDEN), (*HIDDEN, "logits"), strict=True)
    for rate, after, layer in places:
        key, dropout_key = jax.random.split(key)
        dropout: Any = nn.Dropout(rate, deterministic=False)
        x = dropout.apply({}, x, rngs={"dropout": dropout_key})
        x = RECIPE.model.apply(params, x, after=after, method="layers")[layer]
    return x


def to_likeliest(key: Any, logits_fn: Any, x: Array, label: Array) -> Array:
    """Move an example just across the boundary to the likeliest other class."""
    del key
    attack = attacks.lbfgs(logits_fn, tol=0.1, rtol=0.05, max_evals=60)
    result = attacks.untargeted(attack, k=1)(x, label)
    return jnp.where(result.success, result.x_adv, x)


def noisy(key: Any, logits_fn: Any, x: Array, label: Array, *, rms: float) -> Array:
    """Add Gaussian noise to an example."""
    del logits_fn, label
    return transfer.gaussian(key, x, rms)


def describe(content: Content) -> str:
    """Errors and distortions of each arm, and their differences to weight decay."""
    found = grouped(content, "arm")
    measured = markdown.table(
        [
            ("arm", arm),
            ("train error, %", markdown.number(statistics.over(rows, "train_error", scale=100), 2)),
            ("test error, %", markdown.number(statistics.over(rows, "test_error", scale=100), 2)),
            ("paper", paper.ADVERSARIAL_TRAINING.get(arm, "-")),
            ("distortion", markdown.number(statistics.over(rows, "distortion"))),
            ("RMS of its pools", _rms_of_pools(rows)),
            ("minutes", f"{statistics.over(rows, 'minutes').mean:.1f}"),
        ]
        for arm, rows in found.items()
    )
    differences = markdown.table(
        [
            ("arm", arm),
            ("test error, points", markdown.number(_points(found, arm, PLAIN), 2)),
            ("distortion", markdown.number(_difference(found, arm, PLAIN, "distortion"))),
        ]
        for arm in found
        if arm != PLAIN
    )
    return f"""\
{measured}

The distortion is the mean of `minimum_norm` over {content["config"]["images"]:,} test images
towards random classes; the minutes are those of training.

Differences to weight decay, paired by seed:

{differences}"""


def claims(content: Content) -> list[Claim]:
    """Pools for all layers help, one for the input does not, and higher layers help more."""
    found = grouped(content, "arm")

    def error(arm: str) -> str:
        return markdown.percent(float(np.mean([row["test_error"] for row in found[arm]])))

    printed = paper.ADVERSARIAL_TRAINING
    rivals = {other: _points(found, ALL, other) for other in (PLAIN, DROPPED)}
    gained = [_below(difference) for difference in rivals.values()]
    alone = _points(found, INPUT, PLAIN)
    single = {arm: _points(found, arm, PLAIN) for arm in POOLS if arm != ALL}
    higher = _points(found, "hidden2 pool", INPUT)
    robust = {arm: _difference(found, arm, PLAIN, "distortion") for arm in (INPUT, ALL, NOISE)}
    further = [robust[arm].low > 0 for arm in (INPUT, ALL)]
    return [
        Claim(
            "Adversarial training with a pool for each layer has a lower test error than weight "
            "decay and than dropout",
            f"{printed[ALL]} % against {printed[PLAIN]} % and {printed[DROPPED]} %",
            f"{error(ALL)} against {error(PLAIN)} and {error(DROPPED)}; differences in points: "
            + _listed(rivals, 2),
            verdict(gained),
        ),
        Claim(
            "A pool for the input alone does not help; pools for all layers do",
            "stated",
            f"against weight decay, in points: {_listed({INPUT: alone, ALL: rivals[PLAIN]}, 2)}",
            verdict([not _below(alone), gained[0]]) if gained[0] else "does not hold",
        ),
        Claim(
            "Adversarial examples of the higher layers are the most useful",
            "observed",
            f"against weight decay, in points: {_listed(single, 2)}; the pool of hidden2 against "
            f"that of the input: {markdown.number(higher, 2)}",
            verdict([_below(higher), _below(single["hidden2 pool"])]),
        ),
        Claim(
            "Adversarial training makes a network more robust",
            "not measured",
            f"mean minimum distortion, compared with weight decay: {_listed(robust, 4)}",
            verdict(further),
        ),
    ]


def _rms_of_pools(rows: Sequence[Row]) -> str:
    means = np.mean([row["pools"] for row in rows], axis=0)
    return ", ".join(f"{rms:.3f}" for rms in means) or "-"


def _points(found: dict[str, list[Row]], arm: str, other: str) -> statistics.Estimate:
    """The difference between the test errors of two arms, in percentage points."""
    return _difference(found, arm, other, "test_error", scale=100)


def _below(difference: statistics.Estimate) -> bool:
    """Whether a difference is significantly below 0; with one seed none is."""
    return bool(difference.high < 0)


def _listed(differences: dict[str, statistics.Estimate], digits: int) -> str:
    return ", ".join(
        f"{markdown.number(difference, digits)} ({name})"
        for name, difference in differences.items()
    )


def _difference(
    found: dict[str, list[Row]], arm: str, other: str, what: str, *, scale: float = 1
) -> statistics.Estimate:
    """The difference between two arms, paired by seed."""
    pairs = zip(found[arm], found[other], strict=True)
    return statistics.mean([scale * (row[what] - beside[what]) for row, beside in pairs])
