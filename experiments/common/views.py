"""Crops of photographs, and those that go farthest along units and directions."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, UInt8
from matplotlib.figure import Figure

from advjax import data, units
from experiments.common import markdown, networks
from experiments.common.measure import Arrays, Content, Row
from experiments.common.units import TOP, draw_rows

LAYER = "pooled"
"""The last hidden layer of EfficientNet-Lite0, averaged over the pixels."""
SHOWN = 4
COLUMNS = 6
CUTS = ((1.0, 1), (9 / 7, 2), (12 / 7, 3))
"""The magnification of a photograph, and the number of crops along each side."""
_THUMBNAIL = 112  # pixels


class Views(NamedTuple):
    """Crops of photographs, grouped by photograph."""

    images: Float[np.ndarray, "photographs views height width 3"]
    names: list[str]
    """The class of each photograph, or its number if the class is unknown."""
    splits: tuple[data.Dataset, ...]
    """The photographs before cropping, one set for each magnification."""


# --- photographs and what a layer makes of them ----------------------------------------------


def load_views(folder: Path | None, *, quick: bool) -> Views:
    """Load and crop the photographs of a folder, or foolbox's; eight small ones if quick."""
    size, count = (64, 8) if quick else (224, None)
    splits = tuple(
        data.load_photographs(folder=folder, size=round(scale * size), crop=1.0, count=count)
        for scale, _ in CUTS
    )
    cut = [crops(split.images, size, along) for split, (_, along) in zip(splits, CUTS, strict=True)]
    classes = data.imagenet_names()
    labels = splits[0].labels
    names = [classes[c] if c >= 0 else f"photograph {i + 1}" for i, c in enumerate(labels)]
    return Views(np.concatenate(cut, axis=1), names, splits)


def crops(
    images: Float[np.ndarray, "n side side 3"], size: int, along: int
) -> Float[np.ndarray, "n crops size size 3"]:
    """Square crops, evenly spaced from corner to corner, `along` of them in each direction."""
    starts = np.linspace(0, images.shape[1] - size, along).round().astype(int)
    return np.stack([images[:, y : y + size, x : x + size] for y in starts for x in starts], axis=1)


def pooled_features(
    network: networks.Network,
    images: Float[np.ndarray, "photographs views height width 3"],
    layers: tuple[str, ...],
) -> dict[str, Float[Array, "photographs views units"]]:
    """The outputs of layers for each view, averaged over the pixels."""
    found = _features(network.model, network.params, images.reshape(-1, *images.shape[2:]), layers)
    return {name: phi.reshape(*images.shape[:2], -1) for name, phi in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _features(
    model: Any, params: PyTree, images: Array, layers: tuple[str, ...]
) -> dict[str, Array]:
    def of_one(image: Array) -> dict[str, Array]:
        outputs = model.apply(params, image, method="layers")
        return {
            name: jnp.mean(outputs[name].reshape(-1, outputs[name].shape[-1]), axis=0)
            for name in layers
        }

    return jax.lax.map(of_one, images, batch_size=4)


def flat(phi: Float[Array, "photographs views units"]) -> Float[Array, "n units"]:
    """Merge the axes of photographs and views."""
    return phi.reshape(-1, phi.shape[-1])


def photograph_of(phi: Float[Array, "photographs views units"]) -> Int[np.ndarray, " n"]:
    """The index of the photograph that each view shows."""
    return np.repeat(np.arange(phi.shape[0]), phi.shape[1])


# --- directions ------------------------------------------------------------------------------


def purity(
    indices: Int[np.ndarray, "m k"], phi: Float[Array, "photographs views units"]
) -> Float[np.ndarray, " m"]:
    """The fraction of each set of views that shows its most frequent photograph."""
    return np.asarray(units.label_purity(indices, photograph_of(phi)))


def best_views(
    phi: Float[Array, "photographs views units"], directions: Float[Array, "m units"], k: int
) -> Int[np.ndarray, "m k"]:
    """The photographs that go farthest along each direction, each by its best view.

    Returns:
        The indices of these views, at most one per photograph, the farthest first.
    """
    products = np.asarray(jnp.einsum("pvd,md->mpv", phi, directions, precision="highest"))
    order = np.argsort(-products.max(axis=2), axis=1, kind="stable")[:, :k]
    view = np.take_along_axis(products.argmax(axis=2), order, axis=1)
    return order * products.shape[2] + view


def farthest(
    phi: Float[Array, "photographs views units"],
    directions: Float[Array, "m units"],
    shown: list[str],
    names: list[str],
) -> Row:
    """The purity of all directions, and the farthest views along the first ones.

    Args:
        phi: The features.
        directions: All directions.
        shown: The names of the first directions, which are shown.
        names: The names of the photographs.
    """
    ten = np.asarray(units.top_images(flat(phi), directions, k=TOP).indices)
    best = best_views(phi, directions[: len(shown)], COLUMNS)
    photographs = photograph_of(phi)
    return {
        "purity": float(purity(ten, phi).mean()),
        "different": float(np.mean([len(set(photographs[row])) for row in ten])),
        "rows": [
            {
                "name": name,
                "best": row.tolist(),
                "names": [names[i] for i in photographs[row]],
                "purity": float(fraction),
                "different": len(set(photographs[views])),
            }
            for name, row, fraction, views in zip(
                shown, best, purity(ten[: len(shown)], phi), ten, strict=False
            )
        ],
    }


# --- the figure and the table ----------------------------------------------------------------


def thumbnails(views: Views, rows: list[Row]) -> UInt8[np.ndarray, "rows columns side side 3"]:
    """The best views of each row, at a quarter of the pixels if they are large."""
    images = views.images.reshape(-1, *views.images.shape[2:])
    images = images[np.array([row["best"] for row in rows])]
    *places, side, _, _ = images.shape
    block = max(1, side // _THUMBNAIL)
    small = images.reshape(*places, side // block, block, side // block, block, 3)
    return np.rint(255 * small.mean(axis=(-4, -2))).astype(np.uint8)


def draw_views(content: Content, arrays: Arrays) -> Figure:
    """Draw the best views of the first seed's rows, at twice the size."""
    names = [row["name"] for row in content["runs"][0]["rows"]]
    figure = draw_rows(arrays["best"] / np.float32(255), names)
    figure.set_dpi(2 * figure.dpi)
    return figure


def table_of_views(rows: list[Row]) -> str:
    """A table of the photographs in each row of a figure."""
    return markdown.table(
        (
            [
                ("row", row["name"]),
                ("the photographs", ", ".join(row["names"])),
                ("of one", markdown.percent(row["purity"], 0)),
                ("photographs in ten views", str(row["different"])),
            ]
            for row in rows
        ),
        names=2,
    )
