"""Whether units differ from random directions (section 3; 10 min; MNIST or a sample).

By eye, the paper finds no distinction between single units and random linear combinations of them.
Here the ten test images with the largest inner product are scored for every unit of a layer, in two
ways. Label purity is the fraction of the most common class. Concept AUC measures how well one
property of the drawing (ink, height, width or slant, more of it or less) separates the ten images
from all others. (Classes as concepts would give the purity again.) T is the mean score of the
units. Uniformly drawn rotations of the centred features give the T of random bases of the same
space. The p-value is the probability of a T at least as large as the units' under rotation, and the
effect is the units' T minus the mean over rotations. Units may also be less alike than random
directions, so we count the seeds where T is above, or below, the middle 95 % of the rotations. A T
inside that range is no evidence of "no distinction": two one-sided t-tests over the seeds ask
whether the effect is shown to be smaller than 0.05 in either direction, the default margin of
`units.rotation_test`. For purity that is half an image in ten.

The features are those of the last hidden layer of the paper's sigmoid network and of a
convolutional one with ReLUs, before and after the non-linearity. The controls are the same layers
of untrained networks; principal axes in place of units; pixels, of images at half resolution,
because rotations of all 784 take minutes; and noise, for which the ten images are arbitrary. Units
that exceed their minimum on fewer than ten images are left out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from advjax import data, units
from experiments.common import markdown, networks
from experiments.common.claims import Claim
from experiments.common.measure import Arrays, Content, Row, grouped
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.units import (
    ALPHA,
    MARGIN,
    TOP,
    alive,
    as_row,
    cells,
    equivalence,
    features,
    outside,
)

LAYERS = {"FC100-100-10": "hidden2", "ConvNet": "hidden1"}
"""The last hidden layer of each network."""
STAGES = {"before": "_preactivation", "after": ""}
"""Suffixes of the layer before and after the non-linearity."""
CASE = ("net", "non-linearity", "directions")
SCORES = {"purity": "label purity", "auc": "concept AUC"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Tests whether the images along units are more alike than those along random directions."""

    seeds: int = 5
    convnet_seeds: int = 3
    """How many of the seeds train a convolutional network too, which takes minutes each."""
    rotations: int = 999
    """How many random bases to compare the units with."""
    TRIAL = trial(seeds=2, convnet_seeds=2, rotations=99)
    TRIAL_STEPS = 60


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Score each basis and random ones."""
    key, test = jax.random.key(seed), digits.test
    test_key, noise_key, init_key = jax.random.split(jax.random.fold_in(key, 3), 3)
    cases: dict[tuple[str, str, str], tuple[Array, Array | None]] = {}
    for name in LAYERS if seed < options.convnet_seeds else ("FC100-100-10",):
        network = networks.load_or_train(key, name, digits.train, steps=options.steps)
        cases |= _of_network(network, test, init_key)
    if seed == 0:  # the images are the same for all seeds
        cases["images, halved", "", "pixels"] = _halved(test.images), None
    cases["noise", "", "units"] = jax.random.normal(noise_key, (len(test.labels), 100)), None
    return {
        "rows": [
            {
                "net": network,
                "non-linearity": stage,
                "directions": kind,
                **_test(jax.random.fold_in(test_key, i), phi, test, directions, options.rotations),
            }
            for i, ((network, stage, kind), (phi, directions)) in enumerate(cases.items())
        ]
    }


def _of_network(
    network: networks.Network, test: data.Dataset, key: Key[Array, ""]
) -> dict[tuple[str, str, str], tuple[Array, Array | None]]:
    """The features of the last hidden layer with the basis to rotate; None means the units."""
    untrained = network._replace(params=network.model.init(key, test.images[0]))
    cases: dict[tuple[str, str, str], tuple[Array, Array | None]] = {}
    for stage, suffix in STAGES.items():
        layer = LAYERS[network.name] + suffix
        phi = _alive(features(network, layer, test.images))
        cases[network.name, stage, "units"] = phi, None
        cases[network.name, stage, "principal axes"] = phi, units.principal_axes(phi)
        untrained_phi = _alive(features(untrained, layer, test.images))
        cases[network.name, stage, "units, untrained"] = untrained_phi, None
    return cases


def _halved(images: Float[np.ndarray, "n height width 1"]) -> Float[Array, "n pixels"]:
    """Images at half resolution, flattened, without the pixels that are almost never active."""
    n, height, width, _ = images.shape
    blocks = images.reshape(n, height // 2, 2, width // 2, 2)
    return _alive(jnp.asarray(blocks.mean(axis=(2, 4)).reshape(n, -1)))


def qualities(images: Float[np.ndarray, "n height width 1"]) -> Float[np.ndarray, "n 8"]:
    """The ink, height, width and slant of each digit, and their negatives."""
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
) -> Row:
    found = units.rotation_test(
        key,
        phi,
        test.labels,
        directions=directions,
        concepts=qualities(test.images),
        k=TOP,
        rotations=rotations,
    )
    scores = {score: as_row(one) for score, one in found._asdict().items()}
    return {"units": phi.shape[1], **scores}


def describe(content: Content) -> str:
    """A table for each score: the units beside the rotated bases, and the tests."""
    tables = {
        score: markdown.table(
            [
                *zip(("network", *CASE[1:]), case, strict=True),
                *cells([row[score] for row in rows], sides=True),
            ]
            for case, rows in grouped(content, *CASE).items()
        )
        for score in SCORES
    }
    return f"""\
![T of the units beside those of rotated bases](rotation.png)

Label purity of the {TOP} images. "Above" and "below" count the seeds where T is above or below the
middle 95 % of the rotations; the last column tests whether the effect is within ±{MARGIN:g}.

{tables["purity"]}

Concept AUC:

{tables["auc"]}"""


def claims(content: Content) -> list[Claim]:
    """There is no distinction between units and random directions."""
    tested = [
        (case, score, rows, test)
        for case, rows in grouped(content, *CASE).items()
        for score in SCORES
        if case[0] in LAYERS and case[2] == "units"
        if (test := equivalence([row[score] for row in rows])) is not None
    ]
    equivalent = sum(float(test.p_value) <= ALPHA for *_, test in tested)
    sides = [{outside(row[score]) for row in rows} for _, score, rows, _ in tested]
    above, below = sides.count({1}), sides.count({-1})
    effects = ", ".join(
        f"{float(test.mean):+.3f} ({network}, {stage})"
        for (network, stage, _), score, _, test in tested
        if score == "purity"
    )
    return [
        Claim(
            "No distinction between individual units and random linear combinations of them",
            "by eye, four of each",
            "label purity of units minus that of random bases, before and after the non-linearity: "
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


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """T of each seed's basis, with the range of its rotations."""
    del arrays
    cases = grouped(content, *CASE)
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
    return {"rotation.png": figure}
