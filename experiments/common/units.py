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
"""The number of images by which a unit or direction is judged."""
ALPHA = 0.05
MARGIN = 0.05
"""Effects below this do not matter."""
QUANTILES = (0.0, 0.025, 0.975, 1.0)

_equivalence_test = jax.jit(functools.partial(units.equivalence_test, margin=MARGIN))


def features(
    network: networks.Network, layer: str, images: Float[np.ndarray, "n *shape"]
) -> Float[Array, "n units"]:
    """The output of a layer for each image."""

    def phi(image: Array) -> Array:
        return jnp.ravel(network.model.apply(network.params, image, method="layers")[layer])

    return jax.lax.map(phi, images, batch_size=1000)


def alive(phi: Float[Array, "n units"]) -> Bool[np.ndarray, " units"]:
    """Which units exceed their minimum on at least as many images as a row shows."""
    return np.asarray(jnp.sum(phi > jnp.min(phi, axis=0, keepdims=True), axis=0) >= TOP)


def as_row(found: units.Comparison) -> Row:
    """A comparison of units with random bases, as JSON holds it."""
    return {
        "identity": float(found.identity),
        "rotated": float(found.rotated.mean()),
        "rotated_quantiles": np.quantile(found.rotated, QUANTILES).tolist(),
        "p_value": float(found.p_value),
        "effect": float(found.effect),
        "effect_size": float(found.effect_size),
    }


def outside(found: Row) -> int:
    """Whether T is above (1), below (-1) or within (0) the middle 95 % of the rotations."""
    _, low, high, _ = found["rotated_quantiles"]
    return int(found["identity"] > high) - int(found["identity"] < low)


def equivalence(found: Sequence[Row]) -> units.EquivalenceTest | None:
    """Test whether the effect is too small to matter; None for a single seed."""
    effects = np.array([one["effect"] for one in found])
    return _equivalence_test(effects) if len(found) > 1 else None


def draw_rows(images: Float[np.ndarray, "rows columns *shape"], names: Sequence[str]) -> Figure:
    """Draw rows of images, each with a name."""
    places = np.arange(images.shape[0] * images.shape[1]).reshape(images.shape[:2])
    return plots.top_images_grid(images.reshape(-1, *images.shape[2:]), places, names=names)


def cells(found: Sequence[Row], *, sides: bool = False) -> Iterator[tuple[str, str]]:
    """Table cells: the scores of units and of random bases over the seeds, and the tests.

    Args:
        found: The result of `as_row` for each seed.
        sides: Whether to count the seeds above and below the rotations.
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
