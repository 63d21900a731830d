"""Photographs along random directions, and rotations (figure 4; 2 min; photographs).

The net, the layer, the photographs and their views are those of figure 3; the directions are
uniform on the sphere, as many as there are units that count, in their space. The first four of the
first seed are drawn; nobody picks.

Whether units differ from directions is asked by the rotation test, of the purity of the ten views
that go farthest: the share of the photograph that has the most of them. T is its mean over the
units of a basis, and rotations of the centred features, drawn uniformly, give the T of random
bases of the same space. The purity of units less that of random bases is the effect. Rotations of
all units would take an hour: so each seed takes 256 of them, other ones than any other seed, and
draws the rotations anew. The same is asked of the 112 channels of an inner layer, averaged over the
pixels (with one seed, as they are the same for all); of the last hidden layer of a net that was not
trained; and of noise, along which the ten views are any.

The seeds differ by their units alone: the net and the photographs are the same, so that intervals
over them say how far other units of this net would do the same on these photographs, and not on
others. That T is within the range of the rotations is no evidence of "no distinction"; two
one-sided t-tests over the seeds ask whether the effect is shown to be less than 0.05 either way,
half a view in ten.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from advjax import units
from experiments.common import measure as results
from experiments.common import networks
from experiments.common import photographs as imagenet
from experiments.figure1 import TOP, alive
from experiments.figure3 import (
    LAYER,
    SHOWN,
    draw,
    farthest,
    features,
    flat,
    load_views,
    photograph_of,
    table,
)
from experiments.rotation import ALPHA, MARGIN, in_numbers

INNER = "block11"
UNITS = 256
"""How many a seed rotates."""
TESTED = f"{LAYER}, units"
"""The case that the paper speaks of."""
UNTRAINED = f"{LAYER}, untrained"

_equivalence_test = jax.jit(functools.partial(units.equivalence_test, margin=MARGIN))


def main(
    *,
    images: Path | None = None,
    seeds: int = 5,
    rotations: int = 199,
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Draws the photographs along random directions, and tests whether units are more alike.

    Args:
        images: A folder of photographs; the twenty in the package foolbox if None.
        seeds: How many draws of directions, and parts of the units.
        rotations: How many random bases to compare the units with.
        out: The folder for the figure and the numbers.
        quick: Eight photographs, shrunk, two seeds and 19 rotations: a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    views = load_views(images, quick=quick)
    seeds, rotations = (2, 19) if quick else (seeds, rotations)

    @functools.cache
    def outputs(trained: bool) -> dict[str, Float[Array, "photographs views units"]]:
        net = imagenet.load_net()
        return features(net if trained else _untrained(net), views.images, (LAYER, INNER))

    def measure(seed: int) -> results.Row:
        key = jax.random.fold_in(jax.random.key(seed), 4)
        direction_key, noise_key, test_key = jax.random.split(key, 3)
        phi = outputs(True)[LAYER]
        counted = np.flatnonzero(alive(flat(phi)))
        cases = {
            TESTED: _part(flat(phi), seed, seeds),
            UNTRAINED: _part(flat(outputs(False)[LAYER]), seed, seeds),
            "noise": jax.random.normal(noise_key, (len(flat(phi)), 100)),
        }
        if seed == 0:
            cases[f"{INNER}, units"] = _part(flat(outputs(True)[INNER]), 0, 1)
        return {
            "photographs": phi.shape[0],
            "views": phi.shape[1],
            "units": float(_purity_of_units(phi, counted)),
            **farthest(
                phi[..., counted],
                units.random_directions(direction_key, len(counted), len(counted)),
                [f"direction {i + 1}" for i in range(SHOWN)],
                views.names,
            ),
            "tests": {
                name: _test(jax.random.fold_in(test_key, i), case, photograph_of(phi), rotations)
                for i, (name, case) in enumerate(cases.items())
            },
        }

    content = results.measure(
        "figure4",
        measure,
        seeds=seeds,
        config={"rotations": rotations, "dataset": results.PHOTOGRAPHS, "quick": quick},
        splits=views.splits,
        out=out,
        reuse=reuse,
    )
    imagenet.save(draw(views, content["runs"][0]["rows"]), out / "figure4.png")
    results.show("figure4", describe(content), out)
    return content


def _untrained(net: networks.Net) -> networks.Net:
    """The same net with parameters as it is initialised with."""
    image = jnp.zeros((32, 32, 3))
    return net._replace(params=jax.jit(net.model.init)(jax.random.key(0), image))


def _part(phi: Float[Array, "n units"], seed: int, seeds: int) -> Float[Array, "n part"]:
    """The units that a seed rotates, of those that count: other ones than those of other seeds."""
    counted = np.random.default_rng(0).permutation(np.flatnonzero(alive(phi)))
    return phi[:, np.array_split(counted, seeds)[seed][:UNITS]]


def _purity_of_units(phi: Float[Array, "photographs views units"], counted: np.ndarray) -> float:
    return farthest(phi, units.natural_basis(phi.shape[-1])[counted], [], [])["purity"]


def _test(
    key: Key[Array, ""],
    phi: Float[Array, "n units"],
    photographs: np.ndarray,
    rotations: int,
) -> results.Row:
    """The purity of units beside that of random bases."""
    found = units.rotation_test(key, phi, photographs, k=TOP, rotations=rotations).purity
    return {"units": phi.shape[1], **in_numbers(found)}


def describe(content: dict[str, Any]) -> str:
    """The figure, the mean purity of directions and of units, and the rotation tests."""
    runs = content["runs"]
    first = runs[0]
    tests = results.table(
        (
            "features",
            "seeds",
            "units a seed",
            "their T",
            "rotated",
            "effect",
            "in deviations",
            "smallest p",
            "equivalent, p",
        ),
        _lines(content),
    )
    along = results.percent(results.mean([run["purity"] for run in runs]), 1)
    return f"""\
![Six photographs for each of four random directions](figure4.png)

{table(first["rows"])}

"Of one" is the purity of the ten views that go farthest. Its mean over random directions is
{along}; over all units that count, {results.percent(first["units"], 1)}. There are
{first["photographs"]} photographs, with {first["views"]} views of each.

The rotation test. The last column tests whether the effect is within ±{MARGIN:g}:

{tests}"""


def _by_case(content: dict[str, Any]) -> dict[str, list[results.Row]]:
    """What the seeds found of each case, of those that have it."""
    cases: dict[str, list[results.Row]] = {}
    for run in content["runs"]:
        for name, found in run["tests"].items():
            cases.setdefault(name, []).append(found)
    return cases


def _equivalence(found: list[results.Row]) -> units.EquivalenceTest | None:
    """Whether the effect is shown to be too small to matter; None of a single seed."""
    effects = np.array([one["effect"] for one in found])
    return _equivalence_test(effects) if len(found) > 1 else None


def _effect(found: list[results.Row]) -> str:
    return results.number(results.mean([one["effect"] for one in found]), 3)


def _lines(content: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, found in _by_case(content).items():
        tested = _equivalence(found)
        yield (
            name,
            str(len(found)),
            str(found[0]["units"]),
            f"{np.mean([one['identity'] for one in found]):.3f}",
            f"{np.mean([one['rotated'] for one in found]):.3f}",
            _effect(found),
            f"{np.mean([one['effect_size'] for one in found]):+.1f}",
            f"{min(one['p_value'] for one in found):.3f}",
            "-" if tested is None else f"{float(tested.p_value):.3f}",
        )


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """Claim 1 on photographs: directions do as well as units, as far as crops of a few can tell."""
    runs = content["runs"]
    cases = _by_case(content)
    found = cases[TESTED]
    at_random = max(one["rotated"] for one in cases["noise"])
    purities = [run["purity"] for run in runs]
    tested = _equivalence(found)
    equivalent = tested is not None and float(tested.p_value) <= ALPHA
    outside = sum(
        not low <= one["identity"] <= high
        for one in found
        for _, low, high, _ in [one["rotated_quantiles"]]
    )
    few = f"with {runs[0]['views']} views of each of {runs[0]['photographs']} photographs"
    return [
        results.Claim(
            "The images farthest along a random direction of a net of ImageNet have something in "
            "common",
            "Figure 4, by eye",
            f"{few}, {results.percent(results.mean(purities), 1)} of the ten views are of one "
            f"photograph, along noise {results.percent(at_random, 1)}; what different photographs "
            "share is left to the eye",
            "holds in part" if min(purities) > at_random else "does not hold",
        ),
        results.Claim(
            "No distinction between units and random directions in a net of ImageNet",
            "by eye, Figures 3 and 4",
            f"{few}, the purity of units less that of random bases is {_effect(found)}, of a net "
            f"that was not trained {_effect(cases[UNTRAINED])}; {outside} of {len(found)} sets of "
            "units are outside the middle 95 % of the rotations; the effect is "
            f"{'' if equivalent else 'not '}shown to be within ±{MARGIN:g}; of other photographs "
            "this says nothing",
            "holds in part"
            if equivalent
            else "does not hold"
            if outside == len(found)
            else "cannot be tested here",
        ),
    ]
