"""Certified radii against attacks (section 4.3; 20 min; MNIST or a sample).

(a) A certificate must lie below every attack. For FC100-100-10 and random test images that it gets
right, we compare two quantities: the radius that each Lipschitz bound certifies, from the product
of the layers' norms to bounds for each pair of logits, and the L2 distance to the nearest image of
any other class that `minimum_norm` and `lbfgs` find. The last bounds hold only in a ball around
each image, where the slopes of the sigmoids are smaller, and certify no more than the ball.

(b) The paper ends by suggesting a penalty on the layers' bounds. `training.lipschitz_penalty`
penalises the sum of the logarithms of the layers' norms. It replaces or accompanies the weight
decay of the other experiments; everything else is equal. FC100-100-10 is trained in full for each
seed, the ConvNet once and half as long as elsewhere. Here, too, distances are to the nearest image
of any other class, and 0 for an image that a network gets wrong; certificates are those of pairs.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from matplotlib.figure import Figure

from advjax import attacks, data, lipschitz, metrics, training
from experiments.common import markdown, networks, statistics
from experiments.common.claims import Claim, verdict
from experiments.common.measure import Arrays, Content, Row, grouped
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.victims import Victims, attack_every_class, random_victims

NETWORK = "FC100-100-10"
ATTACKS = (attacks.minimum_norm, attacks.lbfgs)
TRAINING = ("net", "decay", "strength")
RADIUS = 0.3
"""The L2 radius at which certified and robust images are counted."""

CONSTANTS: dict[str, Callable[..., Array | lipschitz.Bound]] = {
    "product": lambda *network: lipschitz.bound(*network).constant,
    "`eclipse`": lambda *network: lipschitz.bound(*network, method=lipschitz.eclipse).constant,
    "`lipsdp`": lambda *network: lipschitz.bound(*network, method=lipschitz.lipsdp).constant,
    "`lipsdp`, of pairs": lipschitz.pairwise,
}
"""Lipschitz bounds of a classifier for an example input, the loosest first."""

LOCAL = "`eclipse`, of pairs, near each image"
NEAR = (1.1, 1.25, 1.4)
"""Radii of the local bounds, relative to that of the bounds before; the best counts."""


class Sweep(NamedTuple):
    """The training runs of a network in part (b)."""

    alone: tuple[float, ...]
    """Weights of the penalty, without weight decay."""
    decayed: tuple[float, ...]
    """Weights of the penalty, with the weight decay of the recipe."""
    steps: int
    images: int
    """How many of the test images to attack."""


SWEEPS = {
    NETWORK: Sweep((0, 1e-2, 1e-1), (0, 1e-2), steps=14_000, images=250),
    "ConvNet": Sweep((0, 1e-2, 1e-1), (0,), steps=1_200, images=50),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Compares certificates with attacks, and trains networks with a penalty on their bounds."""

    images: int = 1000
    """How many test images to attack in (a)."""
    seeds: int = 3
    TRIAL = trial(images=48, seeds=1)
    TRIAL_STEPS = 100

    @property
    def sweeps(self) -> dict[str, Sweep]:
        """The training runs of each network in part (b)."""
        return {NETWORK: Sweep((0, 1e-1), (0,), steps=100, images=12)} if self.quick else SWEEPS


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Compare certificates with attacks, and train with the penalty."""
    key = jax.random.key(seed)
    chosen = random_victims(key, digits.test, options.images)
    network = networks.load_or_train(key, NETWORK, digits.train, steps=options.steps)
    sandwich, radii, distances = _sandwich(network, chosen)
    trainings = [
        _train_and_measure(name, decay, strength, sweep, key, digits, chosen)
        for name, sweep in options.sweeps.items()
        if name == NETWORK or seed == 0
        for decay, strengths in ((False, sweep.alone), (True, sweep.decayed))
        for strength in strengths
    ]
    return {"sandwich": sandwich, "trainings": trainings, **radii, **distances}


# --- certificates and attacks ----------------------------------------------------------------


def _sandwich(
    network: networks.Network, chosen: Victims
) -> tuple[Row, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Certified radii and attack distances: in numbers, and per image that is right."""
    logits_fn, images, labels = network.logits_fn, jnp.asarray(chosen.images), chosen.labels
    logits = jax.vmap(logits_fn)(images)
    right = np.asarray(logits.argmax(1) == labels)
    constants = {name: make(logits_fn, images[0]) for name, make in CONSTANTS.items()}
    radius = jax.vmap(lipschitz.certified_radius, in_axes=(0, 0, None))
    radii = {
        name: np.asarray(radius(logits, labels, constant))[right]
        for name, constant in constants.items()
    }
    *_, pairs = radii.values()
    local = [_local_radii(logits_fn, images[right], labels[right], k * pairs) for k in NEAR]
    radii[LOCAL] = np.max([pairs, *local], axis=0)
    distances = {make.__name__: _distances(make(logits_fn), chosen)[right] for make in ATTACKS}
    nearest = np.minimum(*distances.values())
    rows = [
        {
            "by": name,
            "constant": _number(constants.get(name)),
            "radius": float(some.mean()),
            "share_of_distance": float((some / distances["minimum_norm"]).mean()),
            "violations": int(sum(some >= nearest)),
        }
        for name, some in radii.items()
    ]
    found = [
        {
            "by": name,
            "distance": float(some[np.isfinite(some)].mean()),
            "failed": int(sum(np.isinf(some))),
            "nearer": int(sum(some < (1 - 1e-3) * other)),
        }
        for (name, some), other in zip(distances.items(), [*distances.values()][::-1], strict=True)
    ]
    return {"right": int(right.sum()), "certified": rows, "found": found}, radii, distances


def _number(constant: Array | lipschitz.Bound | None) -> float | None:
    """A single constant as a number; None for one per pair."""
    return float(constant) if isinstance(constant, jax.Array) else None


@jax.jit
def _local_radii(
    logits_fn: jax.tree_util.Partial,
    images: Float[Array, "n *shape"],
    labels: Int[Array, " n"],
    within: Float[Array, " n"],
) -> Float[Array, " n"]:
    """The radii that local bounds of pairs certify, which hold within a distance of each image."""

    def radius(image: Array, label: Array, within: Array) -> Array:
        pairs = lipschitz.pairwise(logits_fn, image, method=lipschitz.eclipse, radius=within)
        return lipschitz.certified_radius(logits_fn(image), label, pairs)

    return jax.lax.map(lambda each: radius(*each), (images, labels, within), batch_size=100)


def _distances(attack: attacks.Attack, chosen: Victims) -> Float[np.ndarray, " n"]:
    """The L2 distance of the nearest image of any other class that an attack finds."""
    found = attack_every_class(attack, chosen)
    l2 = found.distortion * math.sqrt(math.prod(chosen.images.shape[1:]))
    return np.where(found.success, l2, np.inf)


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """Radii against distances per image, and the fraction of images beyond each radius."""
    sandwich = content["runs"][0]["sandwich"]
    radii = {row["by"]: arrays[row["by"]] for row in sandwich["certified"]}
    distances = {row["by"]: arrays[row["by"]] for row in sandwich["found"]}
    figure = Figure(figsize=(8, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    nearest = distances["minimum_norm"]
    near, far = np.quantile(nearest, [0.005, 0.995])
    colors = dict(zip(radii, ("#bdbdbd", "#fdae6b", "#e6550d", "#6baed6", "#08519c"), strict=True))
    for name in (next(iter(radii)), *list(radii)[-2:]):
        left.plot(nearest, radii[name], ".", ms=2.5, color=colors[name], alpha=0.7)
    left.plot([near, far], [near, far], color="black", lw=1)
    left.annotate(
        "no image may lie above",
        (np.sqrt(near * far), np.sqrt(near * far)),
        xytext=(-8, 4),
        textcoords="offset points",
        ha="right",
        size=8,
    )
    left.set(
        xscale="log",
        yscale="log",
        xlim=(near, far),
        ylim=(np.quantile(next(iter(radii.values())), 0.005), far),
        xlabel="distance of the nearest adversarial image, L2",
        ylabel="certified radius, L2",
    )
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    fractions = np.linspace(1, 0, len(nearest))
    for name, values in radii.items():
        label = f"certified: {name.replace('`', '')}"
        right.plot(np.sort(values), fractions, color=colors[name], label=label)
    for (name, values), style in zip(distances.items(), ("-", ":"), strict=True):
        right.plot(np.sort(values), fractions, style, color="black", label=f"found: {name}")
    right.set(xlim=(0, far), ylim=(0, 1), xlabel="L2", ylabel="fraction of images beyond")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return {"lipschitz.png": figure}


# --- training with the penalty ---------------------------------------------------------------


def _train_and_measure(
    name: str,
    decay: bool,
    strength: float,
    sweep: Sweep,
    key: Key[Array, ""],
    digits: Digits,
    chosen: Victims,
) -> Row:
    print(f"{name}, {_regularizer(decay, strength)}: training", flush=True)
    network = _train(name, decay, strength, sweep.steps, key, digits.train)
    logits_fn, test = network.logits_fn, digits.test
    logits = jax.vmap(logits_fn)(test.images)
    pairs = lipschitz.pairwise(logits_fn, test.images[0])
    radii = jax.vmap(lipschitz.certified_radius, in_axes=(0, 0, None))(logits, test.labels, pairs)
    near = _distances(attacks.minimum_norm(logits_fn), chosen.first(sweep.images))
    return {
        "net": name,
        "decay": decay,
        "strength": strength,
        "bound": float(lipschitz.bound(logits_fn, test.images[0]).constant),
        "train_error": metrics.error_rate(logits_fn, *digits.train[:2]),
        "test_error": metrics.error_rate(logits_fn, *test[:2]),
        "distance": float(near.mean()),
        "withstood": int(np.sum(near > RADIUS)),
        "attacked": len(near),
        "certified": int(np.sum(radii > RADIUS)),
        "tested": len(test.labels),
    }


def _train(
    name: str,
    decay: bool,
    strength: float,
    steps: int,
    key: Key[Array, ""],
    train: data.Dataset,
) -> networks.Network:
    """Train a network by its recipe, except for the regularisation."""
    recipe = networks.RECIPES[name]
    given = recipe.model.apply, train.images[0]
    fitted = networks.fit_from_scratch(
        key,
        recipe,
        train,
        steps=steps,
        before=training.lipschitz_penalty(strength, *given) if strength else None,
        penalty=training.weight_decay(recipe.weight_decay) if decay else None,
    )
    return networks.Network(name, recipe.model, fitted.params)


# --- words -----------------------------------------------------------------------------------


def describe(content: Content) -> str:
    """Radii and distances, and a row for each training run."""
    runs = [run["sandwich"] for run in content["runs"]]
    right = sum(run["right"] for run in runs)
    radii = markdown.table(
        [
            ("bound", name),
            ("constant", "-" if rows[0]["constant"] is None else _over(rows, "constant", 2)),
            ("mean radius", _over(rows, "radius", 4)),
            ("of the distance", markdown.percent(statistics.over(rows, "share_of_distance"), 1)),
            ("violations", f"{sum(row['violations'] for row in rows)}"),
        ]
        for name, rows in grouped({"runs": runs}, "by", within="certified").items()
    )
    distances = markdown.table(
        [
            ("attack", f"`{name}`"),
            ("mean distance", _over(rows, "distance", 4)),
            ("nearer than the other", f"{sum(row['nearer'] for row in rows):,}"),
            ("failed", f"{sum(row['failed'] for row in rows):,}"),
        ]
        for name, rows in grouped({"runs": runs}, "by", within="found").items()
    )
    trainings = markdown.table(
        [
            ("network", name),
            ("regularisation", _regularizer(decay, strength)),
            ("bound", _over(rows, "bound", 1)),
            ("train error, %", _over(rows, "train_error", 2, scale=100)),
            ("test error, %", _over(rows, "test_error", 2, scale=100)),
            ("distance", _over(rows, "distance", 3)),
            (f"withstand {RADIUS:g}", markdown.percent(_part(rows, "withstood", "attacked"), 1)),
            (f"certified at {RADIUS:g}", markdown.percent(_part(rows, "certified", "tested"), 1)),
        ]
        for (name, decay, strength), rows in grouped(content, *TRAINING, within="trainings").items()
    )
    return f"""\
(a) Radii and distances in L2, for {right:,} images that the networks get right. A violation is an
image for which an attack found another class within the radius.

{radii}

{distances}

![Certified radii and distances]({content["experiment"]}.png)

(b) The bound is the product; distances are means in L2, with 0 for a wrong image. The last two
columns are the fractions of images that are right and stay right within {RADIUS:g}: against
`minimum_norm`, and by certificate.

{trainings}"""


def _regularizer(decay: bool, strength: float) -> str:
    parts = ["weight decay"] * decay + [f"penalty {strength:g}"] * bool(strength)
    return ", ".join(parts) or "nothing"


def _over(rows: Sequence[Row], what: str, digits: int, *, scale: float = 1) -> str:
    return markdown.number(statistics.over(rows, what, scale=scale), digits)


def _part(rows: Sequence[Row], part: str, whole: str) -> statistics.Estimate:
    return statistics.fraction([row[part] for row in rows], [row[whole] for row in rows])


def claims(content: Content) -> list[Claim]:
    """Small bounds rule out nearby adversarial images; penalising them may help."""
    sandwiches = [run["sandwich"] for run in content["runs"]]
    violations = sum(row["violations"] for run in sandwiches for row in run["certified"])
    tightest = [run["certified"][-1]["share_of_distance"] for run in sandwiches]
    loosest = [run["certified"][0]["share_of_distance"] for run in sandwiches]
    sweeps: dict[bool, dict[float, list[Row]]] = {False: {}, True: {}}
    for (name, decay, strength), rows in grouped(content, *TRAINING, within="trainings").items():
        if name == NETWORK:
            sweeps[decay][strength] = rows
    alone, decayed = (_change(sweep) for sweep in sweeps.values())
    helps = [change.high < 0 for _, change in (alone, decayed) if change is not None]
    nothing, penalised = sweeps[False][0], sweeps[False][max(sweeps[False])]
    before, after = (
        markdown.percent(_part(rows, "certified", "tested"), 1) for rows in (nothing, penalised)
    )
    farther = [b["distance"] / a["distance"] for a, b in zip(nothing, penalised, strict=True)]
    return [
        Claim(
            "Small bounds guarantee that there are no adversarial images nearby",
            "stated",
            f"{violations} of {sum(run['right'] for run in sandwiches):,} images within any of "
            f"the certified radii, which reach {markdown.percent(float(np.mean(loosest)), 1)} "
            f"(product) to {markdown.percent(float(np.mean(tightest)), 1)} (pairs, near each "
            "image) of the distance to the nearest",
            "holds" if not violations else "does not hold",
        ),
        Claim(
            "Penalising the bound of each layer might improve generalisation",
            "suggested, not tested",
            f"{NETWORK}: "
            + "; ".join(
                f"{beside}, the best strength tried ({best:g}) changes the test error by "
                f"{markdown.number(change, 2)} points"
                for (best, change), beside in ((alone, "alone"), (decayed, "beside weight decay"))
                if change is not None
            ),
            verdict(helps),
        ),
        Claim(
            "It might increase the distance of adversarial images",
            "suggested, not tested",
            f"{NETWORK}: with strength {max(sweeps[False]):g} the nearest are "
            f"{markdown.number(statistics.mean(farther), 2)} times as far as without, and "
            f"{after} of the images are certified at {RADIUS:g}, instead of {before}",
            "holds" if min(farther) > 1 else "does not hold",
        ),
    ]


def _change(
    sweep: dict[float, list[Row]],
) -> tuple[float, statistics.Estimate | None]:
    """The strength with the lowest test error, and the change in percentage points."""
    errors = {strength: [row["test_error"] for row in rows] for strength, rows in sweep.items()}
    best = min((s for s in errors if s), key=lambda s: np.mean(errors[s]), default=0.0)
    if not best:
        return best, None
    changes = [100 * (b - a) for a, b in zip(errors[0], errors[best], strict=True)]
    return best, statistics.mean(changes)
