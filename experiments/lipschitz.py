"""Certified radii held against attacks (section 4.3; 20 min; MNIST or a sample).

(a) A certificate must lie below every attack. For FC100-100-10 and random test images that it gets
right: the radius that each Lipschitz bound certifies, from the product of the layers' norms to the
bounds of each pair of logits, against the distance, in L2, of the nearest image of any other class
that `minimum_norm` and `lbfgs` find. The last bounds hold in a ball around each image only, where
the slopes of the sigmoids are smaller, and certify no more than the ball.

(b) The paper ends by suggesting to penalise the layers' bounds. `training.lipschitz_penalty` does,
with the sum of the logarithms of the layers' norms, in place of the weight decay of the other
experiments or beside it, everything else being equal. FC100-100-10 is trained as always and for
each seed, the ConvNet once and half as long as in the other experiments. Distances here, too, are
those to the nearest image of any other class, and 0 for an image that a net gets wrong;
certificates are those of pairs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from advjax import attacks, data, lipschitz, metrics, training
from experiments import nets, results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NET = "FC100-100-10"
ATTACKS = (attacks.minimum_norm, attacks.lbfgs)
RADIUS = 0.3
"""In L2, at which certified and withstood shares are counted."""

CONSTANTS: dict[str, Callable[..., Array | lipschitz.Bound]] = {
    "product": lambda *net: lipschitz.bound(*net).constant,
    "`eclipse`": lambda *net: lipschitz.bound(*net, method=lipschitz.eclipse).constant,
    "`lipsdp`": lambda *net: lipschitz.bound(*net, method=lipschitz.lipsdp).constant,
    "`lipsdp`, of pairs": lipschitz.pairwise,
}
"""Lipschitz bounds of a classifier for an example input, the loosest first."""

LOCAL = "`eclipse`, of pairs, near each image"
NEAR = (1.1, 1.25, 1.4)
"""How far the local bounds hold, over the radius of the ones before; each image takes its best."""


class Sweep(NamedTuple):
    """The trainings of a net in part (b)."""

    alone: tuple[float, ...]
    """Weights of the penalty, without weight decay."""
    decayed: tuple[float, ...]
    """Weights of the penalty, with the weight decay of the recipe."""
    steps: int
    images: int
    """How many of the test images to attack."""


SWEEPS = {
    NET: Sweep((0, 1e-2, 1e-1), (0, 1e-2), steps=14_000, images=250),
    "ConvNet": Sweep((0, 1e-2, 1e-1), (0,), steps=1_200, images=50),
}


def main(
    *,
    images: int = 1000,
    seeds: int = 3,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Holds certificates against attacks, and trains nets with a penalty on their bounds.

    Args:
        images: How many test images to attack in (a).
        seeds: How many times to train and to draw.
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the numbers and the figure.
        quick: A net that is hardly trained, two strengths, one seed, on the sample: a minute.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    images, seeds = (48, 1) if quick else (images, seeds)
    sweeps = {NET: Sweep((0, 1e-1), (0,), steps=100, images=12)} if quick else SWEEPS

    def measure(seed: int) -> results.Row:
        key = jax.random.key(seed)
        chosen = nets.random_victims(key, test, images)
        net = nets.load_or_train(
            NET, train.images, train.labels, key=key, steps=100 if quick else None
        )
        sandwich, radii, distances = _sandwich(net, chosen)
        if seed == 0:
            draw(radii, distances).savefig(out / "lipschitz.png")
        trainings = [
            _train_and_measure(name, decay, strength, sweep.steps, key, train, test, few)
            for name, sweep in sweeps.items()
            if name == NET or seed == 0
            for few in [nets.Victims(*(field[: sweep.images] for field in chosen))]
            for decay, strengths in ((False, sweep.alone), (True, sweep.decayed))
            for strength in strengths
        ]
        return {"sandwich": sandwich, "trainings": trainings}

    content = results.measure(
        "lipschitz",
        measure,
        seeds=seeds,
        config={"images": images, "dataset": dataset, "quick": quick},
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    results.show("lipschitz", describe(content), out)
    return content


# --- certificates and attacks ----------------------------------------------------------------


def _sandwich(
    net: nets.Net, chosen: nets.Victims
) -> tuple[results.Row, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What is certified and found, in numbers and for each image that the net gets right."""
    logits_fn, images, labels = net.logits_fn, jnp.asarray(chosen.images), chosen.labels
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
    distances = {attack.__name__: _distances(attack, net, chosen)[right] for attack in ATTACKS}
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
    """A constant that is one number; None for one of each pair."""
    return float(constant) if isinstance(constant, jax.Array) else None


@jax.jit
def _local_radii(
    logits_fn: jax.tree_util.Partial,
    images: Float[Array, "n *shape"],
    labels: Int[Array, " n"],
    within: Float[Array, " n"],
) -> Float[Array, " n"]:
    """What the bounds of pairs certify that hold within a distance of each image."""

    def radius(image, label, within):
        pairs = lipschitz.pairwise(logits_fn, image, method=lipschitz.eclipse, radius=within)
        return lipschitz.certified_radius(logits_fn(image), label, pairs)

    return jax.lax.map(lambda each: radius(*each), (images, labels, within), batch_size=100)


def _distances(attack: Any, net: nets.Net, chosen: nets.Victims) -> Float[np.ndarray, " n"]:
    """In L2, that of the nearest image of any other class that an attack finds."""
    found = nets.attack_every_class(attack, net, chosen)
    l2 = found.distortion * math.sqrt(math.prod(chosen.images.shape[1:]))
    return np.where(found.success, l2, np.inf)


def draw(radii: dict[str, np.ndarray], distances: dict[str, np.ndarray]) -> "Figure":
    """Each image's radii against its distance, and the share of images that each leaves beyond."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    nearest = distances["minimum_norm"]
    near, far = np.quantile(nearest, [0.005, 0.995])
    colors = dict(zip(radii, ("#bdbdbd", "#fdae6b", "#e6550d", "#6baed6", "#08519c"), strict=True))
    for name in (next(iter(radii)), *list(radii)[-2:]):
        left.plot(nearest, radii[name], ".", ms=2.5, color=colors[name], alpha=0.7)
    left.plot([near, far], [near, far], color="black", lw=1)
    left.annotate(
        "no image may be above",
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
    shares = np.linspace(1, 0, len(nearest))
    for name, values in radii.items():
        label = f"certified: {name.replace('`', '')}"
        right.plot(np.sort(values), shares, color=colors[name], label=label)
    for (name, values), style in zip(distances.items(), ("-", ":"), strict=True):
        right.plot(np.sort(values), shares, style, color="black", label=f"found: {name}")
    right.set(xlim=(0, far), ylim=(0, 1), xlabel="L2", ylabel="share of images beyond")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


# --- training with the penalty ---------------------------------------------------------------


def _train_and_measure(
    name: str,
    decay: bool,
    strength: float,
    steps: int,
    key: Key[Array, ""],
    train: data.Dataset,
    test: data.Dataset,
    chosen: nets.Victims,
) -> results.Row:
    print(f"{name}, {_regularizer(decay, strength)}: training", flush=True)
    net = _train(name, decay, strength, steps, key, train)
    logits_fn = net.logits_fn
    logits = jax.vmap(logits_fn)(test.images)
    pairs = lipschitz.pairwise(logits_fn, test.images[0])
    radii = jax.vmap(lipschitz.certified_radius, in_axes=(0, 0, None))(logits, test.labels, pairs)
    near = _distances(attacks.minimum_norm, net, chosen)
    return {
        "net": name,
        "decay": decay,
        "strength": strength,
        "bound": float(lipschitz.bound(logits_fn, test.images[0]).constant),
        "train_error": metrics.error_rate(logits_fn, train.images, train.labels),
        "test_error": metrics.error_rate(logits_fn, test.images, test.labels),
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
) -> nets.Net:
    """A net trained by its recipe, but for what its parameters are held back with."""
    recipe = nets.RECIPES[name]
    apply = recipe.model.apply
    init_key, order_key = jax.random.split(key)
    fitted = nets.fit(
        recipe,
        apply,
        recipe.model.init(init_key, train.images[0]),
        train.images,
        train.labels,
        key=order_key,
        steps=steps,
        before=training.lipschitz_penalty(strength, apply, train.images[0]) if strength else None,
        penalty=training.weight_decay(recipe.weight_decay) if decay else None,
    )
    return nets.Net(name, recipe.model, fitted.params)


# --- words -----------------------------------------------------------------------------------


def describe(content: dict[str, Any]) -> str:
    """The radii beside the distances, and a row for each training."""
    runs = [run["sandwich"] for run in content["runs"]]
    right = sum(run["right"] for run in runs)
    radii = results.table(
        ("bound", "constant", "mean radius", "of the distance", "violations"),
        (
            (
                rows[0]["by"],
                "-" if rows[0]["constant"] is None else _over(rows, "constant", 2),
                _over(rows, "radius", 4),
                results.percent(results.mean([row["share_of_distance"] for row in rows]), 1),
                f"{sum(row['violations'] for row in rows)}",
            )
            for rows in zip(*(run["certified"] for run in runs), strict=True)
        ),
    )
    distances = results.table(
        ("attack", "mean distance", "nearer than the other", "failed"),
        (
            (
                f"`{rows[0]['by']}`",
                _over(rows, "distance", 4),
                f"{sum(row['nearer'] for row in rows):,}",
                f"{sum(row['failed'] for row in rows):,}",
            )
            for rows in zip(*(run["found"] for run in runs), strict=True)
        ),
    )
    trainings = results.table(
        (
            "net",
            "held back by",
            "bound",
            "train error, %",
            "test error, %",
            "distance",
            f"withstand {RADIUS:g}",
            f"certified at {RADIUS:g}",
        ),
        _trainings(content),
    )
    return f"""\
(a) Radii and distances in L2, of {right:,} images that the nets get right. A violation is an image
for which an attack found another class within the radius.

{radii}

{distances}

![Certified radii and distances]({content["experiment"]}.png)

(b) The bound is the product; distances are means in L2, with 0 for an image that is wrong; shares
are those of images that are right and stay so within {RADIUS:g}, against `minimum_norm` or for
certain.

{trainings}"""


def _regularizer(decay: bool, strength: float) -> str:
    parts = ["weight decay"] * decay + [f"penalty {strength:g}"] * bool(strength)
    return ", ".join(parts) or "nothing"


def _over(rows: Sequence[results.Row], what: str, digits: int) -> str:
    return results.number(results.mean([row[what] for row in rows]), digits)


def _trainings(content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for (name, decay, strength), rows in _by_training(content).items():
        yield (
            name,
            _regularizer(decay, strength),
            _over(rows, "bound", 1),
            *(
                results.number(results.mean([100 * row[what] for row in rows]), 2)
                for what in ("train_error", "test_error")
            ),
            _over(rows, "distance", 3),
            *(
                results.percent(
                    results.share([row[part] for row in rows], [row[whole] for row in rows]), 1
                )
                for part, whole in (("withstood", "attacked"), ("certified", "tested"))
            ),
        )


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Small bounds guarantee that there are no adversarial images; penalising them may help."""
    sandwiches = [run["sandwich"] for run in content["runs"]]
    violations = sum(row["violations"] for run in sandwiches for row in run["certified"])
    tightest = [run["certified"][-1]["share_of_distance"] for run in sandwiches]
    loosest = [run["certified"][0]["share_of_distance"] for run in sandwiches]
    sweeps: dict[bool, dict[float, list[results.Row]]] = {False: {}, True: {}}
    for (name, decay, strength), rows in _by_training(content).items():
        if name == NET:
            sweeps[decay][strength] = rows
    alone, decayed = (_change(sweep) for sweep in sweeps.values())
    helps = [change.high < 0 for _, change in (alone, decayed) if change is not None]
    nothing, penalised = sweeps[False][0], sweeps[False][max(sweeps[False])]
    farther = [b["distance"] / a["distance"] for a, b in zip(nothing, penalised, strict=True)]
    return [
        results.Claim(
            "Small bounds guarantee that there are no adversarial images nearby",
            "stated",
            f"{violations} of {sum(run['right'] for run in sandwiches):,} images within any of "
            f"the certified radii, which reach {results.percent(float(np.mean(loosest)), 1)} "
            f"(product) to {results.percent(float(np.mean(tightest)), 1)} (pairs, near each "
            "image) of the way to the nearest",
            "holds" if not violations else "does not hold",
        ),
        results.Claim(
            "Penalising the bound of each layer might improve the generalisation error",
            "suggested, not tested",
            f"{NET}: "
            + "; ".join(
                f"{beside} the best of the strengths tried, {best:g}, changes the test error by "
                f"{results.number(change, 2)} points"
                for (best, change), beside in ((alone, "alone"), (decayed, "beside weight decay"))
                if change is not None
            ),
            results.verdict(helps),
        ),
        results.Claim(
            "It might make adversarial images farther",
            "suggested, not tested",
            f"{NET}: with {max(sweeps[False]):g} the nearest are "
            f"{results.number(results.mean(farther), 2)} times as far as with nothing, and "
            f"{results.percent(_certified(penalised), 1)} of the images are certified at "
            f"{RADIUS:g} instead of {results.percent(_certified(nothing), 1)}",
            "holds" if min(farther) > 1 else "does not hold",
        ),
    ]


def _change(
    sweep: dict[float, list[results.Row]],
) -> tuple[float, results.Estimate | None]:
    """The strength of the least test error, and by how many points it changes it."""
    errors = {strength: [row["test_error"] for row in rows] for strength, rows in sweep.items()}
    best = min((s for s in errors if s), key=lambda s: np.mean(errors[s]), default=0.0)
    if not best:
        return best, None
    changes = [100 * (b - a) for a, b in zip(errors[0], errors[best], strict=True)]
    return best, results.mean(changes)


def _certified(rows: Sequence[results.Row]) -> results.Estimate:
    return results.share([row["certified"] for row in rows], [row["tested"] for row in rows])


def _by_training(content: dict[str, Any]) -> dict[tuple[str, bool, float], list[results.Row]]:
    found: dict[tuple[str, bool, float], list[results.Row]] = {}
    for run in content["runs"]:
        for row in run["trainings"]:
            found.setdefault((row["net"], row["decay"], row["strength"]), []).append(row)
    return found
