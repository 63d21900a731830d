"""The images farthest along units and directions (figure 1; 3 min; MNIST or a sample).

A convolutional net, of which the paper tells no more, and its last hidden layer after the ReLU. For
the first four units (figure 1) and the first four directions of a random draw, uniform on the
sphere (figure 2), the ten test images with the largest inner product; nobody picks. A unit counts
if it is above its least value on ten images or more: of a dead one the ten would be any. Centring
the features would change no ranking.

The paper judges by eye. The label purity of a row, the share of its commonest class, is printed
beside, and its mean over all units, as many random directions, and as many sets of ten images at
random. Whether units and directions differ is asked by the rotation test.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from advjax import data, metrics, plots, units
from experiments.common import measure as results
from experiments.common import networks

NET = "ConvNet"
LAYER = "hidden1"
SHOWN = 4
TOP = 10


def main(
    *,
    seeds: int = 3,
    dataset: results.Name = "mnist",
    source: results.Source = "auto",
    out: Path = Path("results"),
    quick: bool = False,
    reuse: bool = False,
) -> dict[str, Any]:
    """Draws the test images that go farthest along units and along random directions.

    Args:
        seeds: How many nets to train; the first one is drawn.
        dataset: The data set.
        source: Where it comes from: tensorflow-datasets, the sample of MNIST inside the package, or
            the first of both that can be had.
        out: The folder for the figures and the numbers.
        quick: Two nets, briefly trained, on the sample: half a minute, for a trial.
        reuse: Whether to take the numbers in `out`, if they are of the same options.
    """
    train, test = results.load(dataset, source, quick=quick)
    seeds = 2 if quick else seeds

    def measure(seed: int) -> results.Row:
        net = networks.load_or_train(
            NET,
            train.images,
            train.labels,
            key=jax.random.key(seed),
            steps=60 if quick else None,
        )
        return _rows(net, test, jax.random.fold_in(jax.random.key(seed), 2))

    content = results.measure(
        "figure1",
        measure,
        seeds=seeds,
        config={"dataset": dataset, "quick": quick},
        splits=(train, test),
        out=out,
        reuse=reuse,
    )
    for figure, kind in (("figure1", "units"), ("figure2", "directions")):
        rows = content["runs"][0]["rows"][kind]
        plots.top_images_grid(
            test.images,
            np.array([row["indices"] for row in rows]),
            names=[row["name"] for row in rows],
        ).savefig(out / f"{figure}.png")
    results.show("figure1", describe(content), out)
    return content


def features(
    net: networks.Net, layer: str, images: Float[np.ndarray, "n *shape"]
) -> Float[Array, "n units"]:
    """What a layer of a net makes of images."""

    def phi(image):
        return jnp.ravel(net.model.apply(net.params, image, method="layers")[layer])

    return jax.lax.map(phi, images, batch_size=1000)


def alive(phi: Float[Array, "n units"]) -> Bool[np.ndarray, " units"]:
    """Which units are above their least value on as many images as a row shows."""
    return np.asarray(jnp.sum(phi > jnp.min(phi, axis=0, keepdims=True), axis=0) >= TOP)


def _rows(net: networks.Net, test: data.Dataset, key: Key[Array, ""]) -> results.Row:
    """What is at the ends of units and of directions, and how much of it is of one class."""
    phi = features(net, LAYER, test.images)
    counted = np.flatnonzero(alive(phi))
    m, (n, d) = len(counted), phi.shape
    direction_key, set_key = jax.random.split(key)
    directions = {
        "units": units.natural_basis(d)[counted],
        "directions": units.random_directions(direction_key, m, d),
    }
    top = {kind: units.top_images(phi, some, k=TOP).indices for kind, some in directions.items()}
    at_random = jax.random.randint(set_key, (m, TOP), 0, n)
    names = {
        "units": [f"unit {i}" for i in counted],
        "directions": [f"direction {i + 1}" for i in range(m)],
    }
    return {
        "test_error": metrics.error_rate(net.logits_fn, test.images, test.labels),
        "alive": m,
        "units_in_all": d,
        "purity": {
            kind: float(units.label_purity(indices, test.labels).mean())
            for kind, indices in (top | {"images at random": at_random}).items()
        },
        "rows": {
            kind: [
                {
                    "name": name,
                    "indices": row.tolist(),
                    "labels": test.labels[row].tolist(),
                    "purity": float(units.label_purity(row[None], test.labels)[0]),
                }
                for name, row in zip(names[kind][:SHOWN], np.asarray(indices), strict=False)
            ]
            for kind, indices in top.items()
        },
    }


def describe(content: dict[str, Any]) -> str:
    """Both figures, the classes in them, and the mean purity of all units and directions."""
    first, runs = content["runs"][0], content["runs"]
    shown = results.table(
        ("row", "classes of the ten images", "of one class"),
        (
            (row["name"], " ".join(map(str, row["labels"])), results.percent(row["purity"], 0))
            for rows in first["rows"].values()
            for row in rows
        ),
    )
    means = results.table(
        ("ten images along", "of one class, %"),
        (
            (
                kind,
                results.number(results.mean([100 * run["purity"][kind] for run in runs]), 1),
            )
            for kind in first["purity"]
        ),
    )
    errors = results.number(results.mean([100 * run["test_error"] for run in runs]), 2)
    live = ", ".join(f"{run['alive']} of {run['units_in_all']}" for run in runs)
    return f"""\
Figure 1, the first units:

![Ten digits for each of four units](figure1.png)

Figure 2, the first random directions:

![Ten digits for each of four random directions](figure2.png)

{shown}

Test error: {errors} %. Units that count: {live}. The mean over all of them, over as many
directions, and over as many sets:

{means}"""


def claims(content: dict[str, Any]) -> list[results.Claim]:
    """That the images along a random direction have something in common."""
    purities = {
        kind: [run["purity"][kind] for run in content["runs"]]
        for kind in content["runs"][0]["purity"]
    }
    beyond = min(purities["directions"]) > max(purities["images at random"])
    return [
        results.Claim(
            "The images farthest along a random direction have something in common, as those of a "
            "unit have",
            "seen in Figures 1 to 4",
            "the ten are of one class to "
            + ", ".join(
                f"{results.percent(results.mean(some), 1)} ({kind})"
                for kind, some in purities.items()
            ),
            "holds" if beyond else "does not hold",
        )
    ]
