"""Images farthest along units and directions (figures 1, 2; 3 min; MNIST or a sample).

The network is convolutional; the paper says no more about it. The features are those of its last
hidden layer after the ReLU. For the first four units (figure 1) and the first four directions drawn
uniformly from the sphere (figure 2) we show the ten test images with the largest inner product,
without selection. A unit counts if it exceeds its minimum on at least ten images: for a dead unit
any ten images would do. Centring the features would not change a ranking.

The paper judges by eye. We also print the label purity of each row, which is the fraction of its
most common class, and its mean over all units, over as many random directions, and over as many
random sets of ten images. The rotation test asks whether units and directions differ.
"""

import dataclasses

import jax
import numpy as np
from matplotlib.figure import Figure

from advjax import metrics, units
from experiments.common import markdown, networks, statistics
from experiments.common.claims import Claim
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import DigitOptions, Digits, trial
from experiments.common.units import TOP, alive, draw_rows, features

NETWORK = "ConvNet"
LAYER = "hidden1"
SHOWN = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
    """Draws the test images that go farthest along units and along random directions."""

    seeds: int = 3
    TRIAL = trial(seeds=2)
    TRIAL_STEPS = 60


def measure(options: Options, digits: Digits, seed: int) -> Row:
    """Find the images farthest along units and directions, and the purity of their classes."""
    key = jax.random.key(seed)
    network = networks.load_or_train(key, NETWORK, digits.train, steps=options.steps)
    test = digits.test
    phi = features(network, LAYER, test.images)
    counted = np.flatnonzero(alive(phi))
    m, (n, d) = len(counted), phi.shape
    direction_key, set_key = jax.random.split(jax.random.fold_in(key, 2))
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
    rows = {
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
    }
    shown = {kind: test.images[[row["indices"] for row in some]] for kind, some in rows.items()}
    return {
        "test_error": metrics.error_rate(network.logits_fn, test.images, test.labels),
        "alive": m,
        "units_in_all": d,
        "purity": {
            kind: float(units.label_purity(indices, test.labels).mean())
            for kind, indices in (top | {"images at random": at_random}).items()
        },
        "rows": rows,
        **shown,
    }


def describe(content: Content) -> str:
    """Both figures, the classes in them, and the mean purity of all units and directions."""
    first, runs = content["runs"][0], content["runs"]
    shown = markdown.grid(
        ("row", "classes of the ten images", "of one class"),
        (
            (row["name"], " ".join(map(str, row["labels"])), markdown.percent(row["purity"], 0))
            for rows in first["rows"].values()
            for row in rows
        ),
    )
    purities = [run["purity"] for run in runs]
    means = markdown.grid(
        ("ten images along", "of one class, %"),
        (
            (kind, markdown.number(statistics.over(purities, kind, scale=100), 1))
            for kind in first["purity"]
        ),
    )
    errors = markdown.number(statistics.over(runs, "test_error", scale=100), 2)
    live = ", ".join(f"{run['alive']} of {run['units_in_all']}" for run in runs)
    return f"""\
Figure 1, the first units:

![Ten digits for each of four units](figure1.png)

Figure 2, the first random directions:

![Ten digits for each of four random directions](figure2.png)

{shown}

Test error: {errors} %. Units that count: {live}. The mean purity over all of them, over as many
directions, and over as many random sets:

{means}"""


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """The ten images of each row of the first seed."""
    return {
        f"{figure}.png": draw_rows(
            arrays[kind], [row["name"] for row in content["runs"][0]["rows"][kind]]
        )
        for figure, kind in (("figure1", "units"), ("figure2", "directions"))
    }


def claims(content: Content) -> list[Claim]:
    """The images along a random direction have something in common."""
    purities = {
        kind: [run["purity"][kind] for run in content["runs"]]
        for kind in content["runs"][0]["purity"]
    }
    beyond = min(purities["directions"]) > max(purities["images at random"])
    return [
        Claim(
            "The images farthest along a random direction have something in common, as those of a "
            "unit have",
            "seen in Figures 1 to 4",
            "purity of the ten: "
            + ", ".join(
                f"{markdown.percent(statistics.mean(some), 1)} ({kind})"
                for kind, some in purities.items()
            ),
            "holds" if beyond else "does not hold",
        )
    ]
