"""Photographs that excite units of a large net most (figure 3; 1 min; photographs).

The paper shows the validation images of ImageNet that go farthest along units of AlexNet. Here the
layer is the last hidden one of EfficientNet-Lite0, 1,280 units after the ReLU6, each averaged over
the pixels. Of photographs there are few, unless a folder of others is given. They are widened to 14
views of each: the square in the middle, and four and nine overlapping crops of it, magnified by 9/7
and 12/7. Most views show the same thing as others, so they do not stand for as many photographs.

For the first four units that count, the figure has the six photographs that go farthest, each by
its best view; nobody picks. A unit counts if it is above its least value on ten views or more. The
ten views that go farthest, whatever the photographs, are judged by their purity, the share of the
photograph that has the most of them: how far a unit tells one photograph, in whatever crop, from
the others. It cannot say whether a unit means anything that two photographs share: for that, look.
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from advjax import data, plots, units
from experiments.common import measure as results
from experiments.common import networks
from experiments.common import photographs as imagenet
from experiments.figure1 import TOP, alive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYER = "pooled"
SHOWN = 4
COLUMNS = 6
CUTS = ((1.0, 1), (9 / 7, 2), (12 / 7, 3))
"""By how much a photograph is magnified, and how many crops there are along each side."""
_THUMBNAIL = 112  # pixels


class Views(NamedTuple):
    """Crops of photographs, those of each photograph side by side."""

    images: Float[np.ndarray, "photographs views height width 3"]
    names: list[str]
    """What each photograph is of, or its number where this is not told."""
    splits: tuple[data.Dataset, ...]
    """The photographs that they were cut from, one set for each magnification."""


def main(
    *,
    images: Path | None = None,
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Draws the photographs that go farthest along single units.

    Args:
        images: A folder of photographs; the twenty in the package foolbox if None.
        out: The folder for the figure and the numbers.
        quick: Eight photographs, shrunk: half a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    views = load_views(images, quick=quick)

    def measure(seed: int) -> results.Row:
        phi = features(imagenet.load_net(), views.images, (LAYER,))[LAYER]
        counted = np.flatnonzero(alive(flat(phi)))
        random = np.random.default_rng(seed)
        at_random = random.permuted(
            np.tile(np.arange(flat(phi).shape[0]), (len(counted), 1)), axis=1
        )[:, :TOP]
        return {
            "photographs": phi.shape[0],
            "views": phi.shape[1],
            "alive": len(counted),
            "units_in_all": phi.shape[-1],
            "at_random": float(purity(at_random, phi).mean()),
            **farthest(
                phi,
                units.natural_basis(phi.shape[-1])[counted],
                [f"unit {i}" for i in counted[:SHOWN]],
                views.names,
            ),
        }

    content = results.measure(
        "figure3",
        measure,
        seeds=1,
        config={"dataset": results.PHOTOGRAPHS, "quick": quick},
        splits=views.splits,
        out=out,
        reuse=reuse,
    )
    imagenet.save(draw(views, content["runs"][0]["rows"]), out / "figure3.png")
    results.show("figure3", describe(content), out)
    return content


# --- photographs and what a layer makes of them ----------------------------------------------


def load_views(folder: Path | None, *, quick: bool) -> Views:
    """Cuts the photographs of a folder, or foolbox's; quick, the first eight, shrunk."""
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
    """Squares of one size, evenly spaced from corner to corner, `along` of them each way."""
    starts = np.linspace(0, images.shape[1] - size, along).round().astype(int)
    return np.stack([images[:, y : y + size, x : x + size] for y in starts for x in starts], axis=1)


def features(
    net: networks.Net,
    images: Float[np.ndarray, "photographs views height width 3"],
    layers: tuple[str, ...],
) -> dict[str, Float[Array, "photographs views units"]]:
    """What layers make of each view, channels averaged over the pixels."""
    found = _features(net.model, net.params, images.reshape(-1, *images.shape[2:]), layers)
    return {name: phi.reshape(*images.shape[:2], -1) for name, phi in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 3))
def _features(model, params, images, layers):
    def of_one(image):
        outputs = model.apply(params, image, method="layers")
        return {
            name: jnp.mean(outputs[name].reshape(-1, outputs[name].shape[-1]), axis=0)
            for name in layers
        }

    return jax.lax.map(of_one, images, batch_size=4)


def flat(phi: Float[Array, "photographs views units"]) -> Float[Array, "n units"]:
    """All views one after the other."""
    return phi.reshape(-1, phi.shape[-1])


def photograph_of(phi: Float[Array, "photographs views units"]) -> Int[np.ndarray, " n"]:
    """Which photograph each view is of."""
    return np.repeat(np.arange(phi.shape[0]), phi.shape[1])


# --- directions ------------------------------------------------------------------------------


def purity(
    indices: Int[np.ndarray, "m k"], phi: Float[Array, "photographs views units"]
) -> Float[np.ndarray, " m"]:
    """The share of each set of views that is of one photograph."""
    return np.asarray(units.label_purity(indices, photograph_of(phi)))


def best_views(
    phi: Float[Array, "photographs views units"], directions: Float[Array, "m units"], k: int
) -> Int[np.ndarray, "m k"]:
    """The photographs that go farthest along each direction, each by its best view.

    Returns:
        The places of these views among all, at most one of each photograph, the farthest first.
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
) -> results.Row:
    """The purity of all directions, and what is at the ends of the first ones.

    Args:
        phi: The features.
        directions: All directions.
        shown: What to call the first ones, which are to be shown.
        names: What to call the photographs.
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
                "purity": float(share),
                "different": len(set(photographs[views])),
            }
            for name, row, share, views in zip(
                shown, best, purity(ten[: len(shown)], phi), ten, strict=False
            )
        ],
    }


# --- the figure and the words ----------------------------------------------------------------


def draw(views: Views, rows: list[results.Row]) -> "Figure":
    """The best view of each of the photographs that go farthest, a row for each direction."""
    images = views.images.reshape(-1, *views.images.shape[2:])
    n, side = images.shape[:2]
    block = max(1, side // _THUMBNAIL)
    small = images.reshape(n, side // block, block, side // block, block, 3).mean(axis=(2, 4))
    return plots.top_images_grid(
        small,
        np.array([row["best"] for row in rows]),
        names=[row["name"] for row in rows],
    )


def table(rows: list[results.Row]) -> str:
    """The rows of a figure, in words."""
    return results.table(
        ("row", "the photographs", "of one", "photographs in ten views"),
        (
            (
                row["name"],
                ", ".join(row["names"]),
                results.percent(row["purity"], 0),
                str(row["different"]),
            )
            for row in rows
        ),
        names=2,
    )


def describe(content: dict[str, Any]) -> str:
    """The figure, what is in it, and the mean purity of all units."""
    (run,) = content["runs"]
    return f"""\
![Six photographs for each of four units](figure3.png)

{table(run["rows"])}

"Of one" is the purity of the ten views that go farthest. Its mean over the {run["alive"]:,} units
that count, of {run["units_in_all"]:,}, is {results.percent(run["purity"], 1)}; of as many sets of
ten views at random, {results.percent(run["at_random"], 1)}. On average the ten are of
{run["different"]:.1f} photographs of the {run["photographs"]}, of each of which there are
{run["views"]} views."""


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """That the images along a unit have something in common: seen of crops alone."""
    (run,) = content["runs"]
    return [
        results.Claim(
            "The images farthest along a unit of a net of ImageNet have something in common",
            "Figure 3, by eye",
            f"of the ten views of {run['photographs']} photographs that go farthest along a unit, "
            f"{results.percent(run['purity'], 1)} are of one photograph, at random "
            f"{results.percent(run['at_random'], 1)}; what different photographs share is left to "
            "the eye",
            "holds in part" if run["purity"] > run["at_random"] else "does not hold",
        )
    ]
