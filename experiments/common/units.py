"""Units of a layer beside random directions: features, scores and tests."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from matplotlib.figure import Figure

from advjax import plots, units
from experiments.common import markdown, networks, statistics
from experiments.common.measure import Row

TOP = 10
"""How many images a unit or direction is judged by."""
ALPHA = 0.05
MARGIN = 0.05
"""Smaller effects do not matter."""
QUANTILES = (0.0, 0.025, 0.975, 1.0)

_equivalence_test = jax.jit(functools.partial(units.equivalence_test, margin=MARGIN))


def features(
    network: networks.Network, layer: str, images: Float[np.ndarray, "n *shape"]
) -> Float[Array, "n units"]:
    """What a layer of a net makes of images."""

    def phi(image):
        return jnp.ravel(network.model.apply(network.params, image, method="layers")[layer])

    return jax.lax.map(phi, images, batch_size=1000)


def alive(phi: Float[Array, "n units"]) -> Bool[np.ndarray, " units"]:
    """Which units are above their least value on as many images as a row shows."""
    return np.asarray(jnp.sum(phi > jnp.min(phi, axis=0, keepdims=True), axis=0) >= TOP)


def in_numbers(found: units.Comparison) -> Row:
    """One score of the units beside that of random bases."""
    return {
        "identity": float(found.identity),
        "rotated": float(found.rotated.mean()),
        "rotated_quantiles": np.quantile(found.rotated, QUANTILES).tolist(),
        "p_value": float(found.p_value),
        "effect": float(found.effect),
        "effect_size": float(found.effect_size),
    }


def outside(found: Row) -> int:
    """Whether T is above (1), below (-1) or within the middle 95 % of the rotations."""
    _, low, high, _ = found["rotated_quantiles"]
    return int(found["identity"] > high) - int(found["identity"] < low)


def equivalence(found: Sequence[Row]) -> units.EquivalenceTest | None:
    """Whether the effect is shown to be too small to matter; None of a single seed."""
    effects = np.array([one["effect"] for one in found])
    return _equivalence_test(effects) if len(found) > 1 else None


def draw_rows(images: Float[np.ndarray, "rows columns *shape"], names: Sequence[str]) -> Figure:
    """Draws rows of images, with the name of each row."""
    places = np.arange(images.shape[0] * images.shape[1]).reshape(images.shape[:2])
    return plots.top_images_grid(images.reshape(-1, *images.shape[2:]), places, names=names)


def cells(found: Sequence[Row], *, sides: bool = False) -> Iterator[tuple[str, str]]:
    """The scores of the units over the seeds beside those of random bases, and the tests.

    Args:
        found: What `in_numbers` gave for each seed.
        sides: Whether to count the seeds that are above the rotations, and those below.
    """
    tested = equivalence(found)
    yield "their T", f"{statistics.over(found, 'identity').mean:.3f}"
    yield "rotated", f"{statistics.over(found, 'rotated').mean:.3f}"
    yield "effect", markdown.number(statistics.over(found, "effect"), 3)
    yield "in deviations", f"{statistics.over(found, 'effect_size').mean:+.1f}"
    yield "smallest p", f"{min(one['p_value'] for one in found):.3f}"
    for side, number in (("above", 1), ("below", -1)) if sides else ():
        yield side, f"{sum(outside(one) == number for one in found)} of {len(found)}"
    yield "equivalent, p", "-" if tested is None else f"{float(tested.p_value):.3f}"
