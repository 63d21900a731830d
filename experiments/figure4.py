"""Photographs along random directions, and rotations (figure 4; 2 min; photographs).

The network, the layer, the photographs and their views are those of figure 3. The directions are
drawn uniformly from the sphere in the space of the units that count, as many as there are units.
The first four of the first seed are shown, without selection.

The rotation test asks whether units differ from directions, by the purity of the ten views that go
farthest: the fraction that belongs to the most frequent photograph. T is its mean over the units of
a basis. Uniformly drawn rotations of the centred features give the T of random bases of the same
space, and the effect is the purity of the units minus that of random bases. Rotating all units
would take an hour, so each seed takes its own 256 units and its own rotations. The same is asked of
the 112 channels of an inner layer, averaged over the pixels (for one seed, since they are the same
for all); of the last hidden layer of an untrained network; and of noise, for which the ten views
are arbitrary.

The seeds differ only in their units: the network and the photographs are the same. Intervals over
seeds therefore say how other units of this network would do on these photographs, not on others. A
T within the range of the rotations is no evidence of "no distinction": two one-sided t-tests over
the seeds ask whether the effect is shown to be smaller than 0.05 in either direction, half a view
in ten.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from matplotlib.figure import Figure

from advjax import data, units
from experiments.common import markdown, networks, statistics
from experiments.common.claims import Claim
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import PhotographOptions, trial
from experiments.common.photographs import load_network
from experiments.common.units import (
    ALPHA,
    MARGIN,
    TOP,
    alive,
    as_row,
    cells,
    equivalence,
    outside,
)
from experiments.common.views import (
    LAYER,
    SHOWN,
    Views,
    draw_views,
    farthest,
    flat,
    load_views,
    photograph_of,
    pooled_features,
    table_of_views,
    thumbnails,
)

INNER = "block11"
UNITS = 256
"""How many units a seed rotates."""
TESTED = f"{LAYER}, units"
"""The case that the paper is about."""
UNTRAINED = f"{LAYER}, untrained"

Features = Float[Array, "photographs views units"]


class Materials(NamedTuple):
    """Views of photographs, and their features in a trained and an untrained network."""

    views: Views
    trained: dict[str, Features]
    untrained: dict[str, Features]

    @property
    def splits(self) -> tuple[data.Dataset, ...]:
        """The data sets that are measured on."""
        return self.views.splits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PhotographOptions):
    """Draws the photographs along random directions, and tests whether units are more alike."""

    rotations: int = 199
    """How many random bases to compare the units with."""
    seeds: int = 5
    """How many times to draw directions and to take other units."""
    TRIAL = trial(seeds=2, rotations=19)

    def load(self) -> Materials:
        """Load and crop the photographs, eight small ones in a trial, and compute the features."""
        views = load_views(self.folder, quick=self.quick)
        network = load_network()
        trained, untrained = (
            pooled_features(one, views.images, (LAYER, INNER))
            for one in (network, _untrained(network))
        )
        return Materials(views, trained, untrained)


def measure(options: Options, materials: Materials, seed: int) -> Row:
    """Find the views farthest along directions, and run the rotation test for each case."""
    key = jax.random.fold_in(jax.random.key(seed), 4)
    direction_key, noise_key, test_key = jax.random.split(key, 3)
    phi = materials.trained[LAYER]
    counted = np.flatnonzero(alive(flat(phi)))
    cases = {
        TESTED: _part(flat(phi), seed, options.seeds),
        UNTRAINED: _part(flat(materials.untrained[LAYER]), seed, options.seeds),
        "noise": jax.random.normal(noise_key, (len(flat(phi)), 100)),
    }
    if seed == 0:
        cases[f"{INNER}, units"] = _part(flat(materials.trained[INNER]), 0, 1)
    found = farthest(
        phi[..., counted],
        units.random_directions(direction_key, len(counted), len(counted)),
        [f"direction {i + 1}" for i in range(SHOWN)],
        materials.views.names,
    )
    return {
        "photographs": phi.shape[0],
        "views": phi.shape[1],
        "units": float(_purity_of_units(phi, counted)),
        **found,
        "tests": {
            name: _test(
                jax.random.fold_in(test_key, i), case, photograph_of(phi), options.rotations
            )
            for i, (name, case) in enumerate(cases.items())
        },
        "best": thumbnails(materials.views, found["rows"]),
    }


def _untrained(network: networks.Network) -> networks.Network:
    """The same network with its initial parameters."""
    image = jnp.zeros((32, 32, 3))
    return network._replace(params=jax.jit(network.model.init)(jax.random.key(0), image))


def _part(phi: Float[Array, "n units"], seed: int, seeds: int) -> Float[Array, "n part"]:
    """The units that a seed rotates: its own part of those that count."""
    counted = np.random.default_rng(0).permutation(np.flatnonzero(alive(phi)))
    return phi[:, np.array_split(counted, seeds)[seed][:UNITS]]


def _purity_of_units(phi: Float[Array, "photographs views units"], counted: np.ndarray) -> float:
    return farthest(phi, units.natural_basis(phi.shape[-1])[counted], [], [])["purity"]


def _test(
    key: Key[Array, ""],
    phi: Float[Array, "n units"],
    photographs: np.ndarray,
    rotations: int,
) -> Row:
    """Compare the purity of units with that of random bases."""
    found = units.rotation_test(key, phi, photographs, k=TOP, rotations=rotations).purity
    return {"units": phi.shape[1], **as_row(found)}


def describe(content: Content) -> str:
    """The figure, the mean purity of directions and of units, and the rotation tests."""
    runs = content["runs"]
    first = runs[0]
    tests = markdown.table(
        [
            ("features", name),
            ("seeds", str(len(found))),
            ("units a seed", str(found[0]["units"])),
            *cells(found),
        ]
        for name, found in _by_case(content).items()
    )
    along = markdown.percent(statistics.over(runs, "purity"), 1)
    return f"""\
![Six photographs for each of four random directions](figure4.png)

{table_of_views(first["rows"])}

"Of one" is the purity of the ten views that go farthest. Its mean over random directions is
{along}; over all units that count it is {markdown.percent(first["units"], 1)}. There are
{first["photographs"]} photographs, with {first["views"]} views of each.

The rotation test. The last column tests whether the effect is within ±{MARGIN:g}:

{tests}"""


def _by_case(content: Content) -> dict[str, list[Row]]:
    """The results of each case, for the seeds that have it."""
    cases: dict[str, list[Row]] = {}
    for run in content["runs"]:
        for name, found in run["tests"].items():
            cases.setdefault(name, []).append(found)
    return cases


def _effect(found: list[Row]) -> str:
    return markdown.number(statistics.over(found, "effect"), 3)


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """The best view of each of the photographs that go farthest, a row for each direction."""
    return {"figure4.png": draw_views(content, arrays)}


def claims(content: Content) -> list[Claim]:
    """Directions do as well as units, as far as crops of a few photographs can tell."""
    runs = content["runs"]
    cases = _by_case(content)
    found = cases[TESTED]
    at_random = max(one["rotated"] for one in cases["noise"])
    purities = [run["purity"] for run in runs]
    tested = equivalence(found)
    equivalent = tested is not None and float(tested.p_value) <= ALPHA
    differ = sum(outside(one) != 0 for one in found)
    few = f"with {runs[0]['views']} views of each of {runs[0]['photographs']} photographs"
    return [
        Claim(
            "The images farthest along a random direction of an ImageNet network have something in "
            "common",
            "Figure 4, by eye",
            f"{few}, {markdown.percent(statistics.mean(purities), 1)} of the ten views show the "
            f"same photograph, along noise {markdown.percent(at_random, 1)}; what different "
            "photographs share is left to the eye",
            "holds in part" if min(purities) > at_random else "does not hold",
        ),
        Claim(
            "No distinction between units and random directions in an ImageNet network",
            "by eye, Figures 3 and 4",
            f"{few}, the purity of units minus that of random bases is {_effect(found)}, for an "
            f"untrained network {_effect(cases[UNTRAINED])}; {differ} of {len(found)} sets of "
            "units are outside the middle 95 % of the rotations; the effect is "
            f"{'' if equivalent else 'not '}shown to be within ±{MARGIN:g}; of other photographs "
            "this says nothing",
            "holds in part"
            if equivalent
            else "does not hold"
            if differ == len(found)
            else "cannot be tested here",
        ),
    ]
