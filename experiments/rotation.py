"""Whether units differ from random directions (section 3; 10 min; MNIST or a sample).

The paper finds, by eye, no distinction between single units and random linear combinations of them.
Here the ten test images with the largest inner product are scored for every unit of a layer: by
their label purity, the share of the commonest class, and by their concept AUC, how well one quality
of the drawing, be it the ink, height, width or slant, more of it or less, tells them from all other
images. (The classes as concepts would give the purity again.) T is the mean score of the units.
Rotations of the centred features, drawn uniformly, give the T of random bases of the same space;
the p-value is that of a T as large as the units' under rotation, and the effect is the units' T
less the mean of the rotations'. Units may also have less in common than random directions: so the
seeds are counted where T is above, or below, the middle 95 % of the rotations. That it is within is
no evidence of "no distinction": two one-sided t-tests over the seeds ask whether the effect is
shown to be less than 0.05 either way, the default margin of `units.rotation_test`; of the purity
that is half an image in ten.

The features are those of the last hidden layer of the paper's sigmoid net and of a convolutional
one with ReLUs, before and after the non-linearity. Controls: the same layers of nets that were not
trained; principal axes in place of units; pixels, of images of half the height and width, as
rotations of all 784 take minutes; and noise, along which the ten images are any. Units that are
above their least value on fewer than ten images are left out.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from advjax import data, units
from experiments.common import measure as results
from experiments.common import networks
from experiments.figure1 import TOP, alive, features

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = {"FC100-100-10": "hidden2", "ConvNet": "hidden1"}
"""The last hidden layer of each net."""
STAGES = {"before": "_preactivation", "after": ""}
"""Of the non-linearity."""
MARGIN = 0.05
SCORES = {"purity": "label purity", "auc": "concept AUC"}
QUANTILES = (0.0, 0.025, 0.975, 1.0)
ALPHA = 0.05

_equivalence_test = jax.jit(functools.partial(units.equivalence_test, margin=MARGIN))


def main(
    *,
    seeds: int = 5,
    convnet_seeds: int = 3,
    rotations: int = 999,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Tests whether the images along units are more alike than those along random directions.

    Args:
        seeds: How many sigmoid nets to train.
        convnet_seeds: How many convolutional ones, at most as many: each takes minutes.
        rotations: How many random bases to compare the units with.
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the figure and the numbers.
        quick: Nets briefly trained, two seeds and 99 rotations, on the sample: a minute, for a
            trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    seeds, convnet_seeds, rotations = (2, 2, 99) if quick else (seeds, convnet_seeds, rotations)

    def measure(seed: int) -> results.Row:
        test_key, noise_key, init_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), 3), 3
        )
        cases: dict[tuple[str, str, str], tuple[Array, Array | None]] = {}
        for name in LAYERS if seed < convnet_seeds else ("FC100-100-10",):
            net = networks.load_or_train(
                name,
                train.images,
                train.labels,
                key=jax.random.key(seed),
                steps=60 if quick else None,
            )
            cases |= _of_net(net, test, init_key)
        if seed == 0:  # the images are the same for all
            cases["images, halved", "", "pixels"] = _halved(test.images), None
        cases["noise", "", "units"] = jax.random.normal(noise_key, (len(test.labels), 100)), None
        return {
            "rows": [
                {
                    "net": net,
                    "non-linearity": stage,
                    "directions": kind,
                    **_test(jax.random.fold_in(test_key, i), phi, test, directions, rotations),
                }
                for i, ((net, stage, kind), (phi, directions)) in enumerate(cases.items())
            ]
        }

    content = results.measure(
        "rotation",
        measure,
        seeds=seeds,
        config={
            "convnet-seeds": convnet_seeds,
            "rotations": rotations,
            "dataset": dataset,
            "quick": quick,
        },
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    draw(content).savefig(out / "rotation.png")
    results.show("rotation", describe(content), out)
    return content


def _of_net(
    net: networks.Net, test: data.Dataset, key: Key[Array, ""]
) -> dict[tuple[str, str, str], tuple[Array, Array | None]]:
    """The features of its last hidden layer, and the basis to rotate; None is that of the units."""
    untrained = net._replace(params=net.model.init(key, test.images[0]))
    cases: dict[tuple[str, str, str], tuple[Array, Array | None]] = {}
    for stage, suffix in STAGES.items():
        layer = LAYERS[net.name] + suffix
        phi = _alive(features(net, layer, test.images))
        cases[net.name, stage, "units"] = phi, None
        cases[net.name, stage, "principal axes"] = phi, units.principal_axes(phi)
        untrained_phi = _alive(features(untrained, layer, test.images))
        cases[net.name, stage, "units, untrained"] = untrained_phi, None
    return cases


def _halved(images: Float[np.ndarray, "n height width 1"]) -> Float[Array, "n pixels"]:
    """Images of half the height and width, flat, without the pixels that are hardly ever grey."""
    n, height, width, _ = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2)
    return _alive(jnp.asarray(blocks.mean(axis=(2, 4)).reshape(n, -1)))


def qualities(images: Float[np.ndarray, "n height width 1"]) -> Float[np.ndarray, "n 8"]:
    """The ink, height, width and slant of what each image shows, and their negatives."""
    weights = images[..., 0].astype(float)
    ink = weights.sum(axis=(1, 2))
    y, x = np.indices(weights.shape[1:]).astype(float)

    def mean(values: Any) -> Any:
        return np.tensordot(weights, values, axes=2) / np.maximum(ink, 1e-6)

    def covariance(a: Any, b: Any) -> Any:
        return mean(a * b) - mean(a) * mean(b)

    height, width = covariance(y, y), covariance(x, x)
    found = np.stack([ink, height, width, -covariance(x, y) / np.maximum(height, 1e-6)], axis=1)
    return np.concatenate([found, -found], axis=1).astype(np.float32)


def _alive(phi: Float[Array, "n units"]) -> Float[Array, "n alive"]:
    return phi[:, alive(phi)]


def _test(
    key: Key[Array, ""],
    phi: Float[Array, "n d"],
    test: data.Dataset,
    directions: Float[Array, "m d"] | None,
    rotations: int,
) -> results.Row:
    found = units.rotation_test(
        key,
        phi,
        test.labels,
        directions=directions,
        concepts=qualities(test.images),
        k=TOP,
        rotations=rotations,
    )
    scores = {score: in_numbers(one) for score, one in found._asdict().items()}
    return {"units": phi.shape[1], **scores}


def in_numbers(found: units.Comparison) -> results.Row:
    """One score of the units beside that of random bases."""
    return {
        "identity": float(found.identity),
        "rotated": float(found.rotated.mean()),
        "rotated_quantiles": np.quantile(found.rotated, QUANTILES).tolist(),
        "p_value": float(found.p_value),
        "effect": float(found.effect),
        "effect_size": float(found.effect_size),
    }


def describe(content: dict[str, Any]) -> str:
    """A table for each score: the units beside the rotated bases, and the tests."""
    tables = {
        score: results.table(
            (
                "net",
                "non-linearity",
                "directions",
                "their T",
                "rotated",
                "effect",
                "in deviations",
                "smallest p",
                "above",
                "below",
                "equivalent, p",
            ),
            _lines(content, score),
        )
        for score in SCORES
    }
    return f"""\
![T of the units beside those of rotated bases](rotation.png)

Label purity of the {TOP} images. Above and below are the seeds where T is so, of the middle 95 %
of the rotations; the last column tests whether the effect is within ±{MARGIN:g}.

{tables["purity"]}

Concept AUC, in the same way:

{tables["auc"]}"""


def _lines(content: dict[str, Any], score: str) -> Iterator[tuple[str, ...]]:
    for case, rows in _by_case(content).items():
        found = [row[score] for row in rows]
        outside = [_outside(one) for one in found]
        tested = _equivalence(rows, score)
        yield (
            *case,
            f"{np.mean([one['identity'] for one in found]):.3f}",
            f"{np.mean([one['rotated'] for one in found]):.3f}",
            results.number(results.mean([one["effect"] for one in found]), 3),
            f"{np.mean([one['effect_size'] for one in found]):+.1f}",
            f"{min(one['p_value'] for one in found):.3f}",
            *(f"{outside.count(side)} of {len(outside)}" for side in (1, -1)),
            "-" if tested is None else f"{float(tested.p_value):.3f}",
        )


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Claim 1: no distinction between units and random directions."""
    tested = [
        (case, score, rows, equivalence)
        for case, rows in _by_case(content).items()
        for score in SCORES
        if case[0] in LAYERS and case[2] == "units"
        if (equivalence := _equivalence(rows, score)) is not None
    ]
    equivalent = sum(float(equivalence.p_value) <= ALPHA for *_, equivalence in tested)
    sides = [{_outside(row[score]) for row in rows} for _, score, rows, _ in tested]
    above, below = sides.count({1}), sides.count({-1})
    effects = ", ".join(
        f"{float(equivalence.mean):+.3f} ({net}, {stage})"
        for (net, stage, _), score, _, equivalence in tested
        if score == "purity"
    )
    return [
        results.Claim(
            "No distinction between individual units and random linear combinations of them",
            "by eye, four of each",
            "label purity of units less that of random bases, before and after the non-linearity: "
            f"{effects}; of {len(tested)} comparisons of purity and AUC, in {above} the units are "
            f"above the middle 95 % of the rotations for every seed, in {below} below, and in "
            f"{equivalent} they are shown to be within ±{MARGIN:g}",
            "holds"
            if tested and equivalent == len(tested)
            else "holds in part"
            if equivalent
            else "does not hold"
            if above or below
            else "cannot be tested here",
        )
    ]


def draw(content: dict[str, Any]) -> "Figure":
    """T of each seed's basis, over the range of its rotations."""
    from matplotlib.figure import Figure

    cases = _by_case(content)
    figure = Figure(figsize=(10, 0.9 + 0.4 * len(cases)), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (score, title) in zip(panels, SCORES.items(), strict=True):
        for i, rows in enumerate(cases.values()):
            for j, row in enumerate(rows):
                y = i + 0.6 * ((j + 0.5) / len(rows) - 0.5)
                one = row[score]
                least, low, high, most = one["rotated_quantiles"]
                axes.hlines(y, least, most, color="0.8", lw=1)
                axes.hlines(y, low, high, color="0.6", lw=2.5)
                axes.plot(one["identity"], y, "o", ms=4, color="tab:red")
        axes.set(title=title, xlabel="mean over the directions")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    labels = [", ".join(filter(None, (case[0], case[1], case[2]))) for case in cases]
    panels[0].set_yticks(range(len(cases)), labels)
    panels[0].invert_yaxis()
    panels[1].plot([], [], "o", ms=4, color="tab:red", label="as they are, each seed")
    panels[1].plot([], [], lw=3, color="0.6", label="95 % of the rotations")
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


def _by_case(content: dict[str, Any]) -> dict[tuple[str, str, str], list[results.Row]]:
    """The rows of the seeds that have a case, by net, non-linearity and directions."""
    cases: dict[tuple[str, str, str], list[results.Row]] = {}
    for run in content["runs"]:
        for row in run["rows"]:
            case = row["net"], row["non-linearity"], row["directions"]
            cases.setdefault(case, []).append(row)
    return cases


def _outside(found: results.Row) -> int:
    """Whether T is above (1), below (-1) or within the middle 95 % of the rotations."""
    _, low, high, _ = found["rotated_quantiles"]
    return int(found["identity"] > high) - int(found["identity"] < low)


def _equivalence(rows: list[results.Row], score: str) -> units.EquivalenceTest | None:
    """Whether the effect is shown to be too small to matter; None of a single seed."""
    effects = np.array([row[score]["effect"] for row in rows])
    return _equivalence_test(effects) if len(rows) > 1 else None
