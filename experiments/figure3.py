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


import numpy as np
from matplotlib.figure import Figure

from advjax import units
from experiments.common import markdown
from experiments.common.claims import Claim
from experiments.common.measure import Arrays, Content, Row
from experiments.common.options import PhotographOptions
from experiments.common.photographs import load_network
from experiments.common.units import TOP, alive
from experiments.common.views import (
    LAYER,
    SHOWN,
    Views,
    draw_views,
    farthest,
    flat,
    load_views,
    pooled_features,
    purity,
    table_of_views,
    thumbnails,
)


class Options(PhotographOptions):
    """Draws the photographs that go farthest along single units."""

    def load(self) -> Views:
        """Loads and cuts the photographs; of a trial eight, shrunk."""
        return load_views(self.folder, quick=self.quick)


def measure(options: Options, views: Views, seed: int) -> Row:
    """What is at the ends of units, and how much of it is of one photograph."""
    phi = pooled_features(load_network(), views.images, (LAYER,))[LAYER]
    counted = np.flatnonzero(alive(flat(phi)))
    random = np.random.default_rng(seed)
    at_random = random.permuted(np.tile(np.arange(flat(phi).shape[0]), (len(counted), 1)), axis=1)
    found = farthest(
        phi,
        units.natural_basis(phi.shape[-1])[counted],
        [f"unit {i}" for i in counted[:SHOWN]],
        views.names,
    )
    return {
        "photographs": phi.shape[0],
        "views": phi.shape[1],
        "alive": len(counted),
        "units_in_all": phi.shape[-1],
        "at_random": float(purity(at_random[:, :TOP], phi).mean()),
        **found,
        "best": thumbnails(views, found["rows"]),
    }


def describe(content: Content) -> str:
    """The figure, what is in it, and the mean purity of all units."""
    (run,) = content["runs"]
    return f"""\
![Six photographs for each of four units](figure3.png)

{table_of_views(run["rows"])}

"Of one" is the purity of the ten views that go farthest. Its mean over the {run["alive"]:,} units
that count, of {run["units_in_all"]:,}, is {markdown.percent(run["purity"], 1)}; of as many sets of
ten views at random, {markdown.percent(run["at_random"], 1)}. On average the ten are of
{run["different"]:.1f} photographs of the {run["photographs"]}, of each of which there are
{run["views"]} views."""


def draw(content: Content, arrays: Arrays) -> dict[str, Figure]:
    """The best view of each of the photographs that go farthest, a row for each unit."""
    return {"figure3.png": draw_views(content, arrays)}


def claims(content: Content) -> list[Claim]:
    """That the images along a unit have something in common: seen of crops alone."""
    (run,) = content["runs"]
    return [
        Claim(
            "The images farthest along a unit of a net of ImageNet have something in common",
            "Figure 3, by eye",
            f"of the ten views of {run['photographs']} photographs that go farthest along a unit, "
            f"{markdown.percent(run['purity'], 1)} are of one photograph, at random "
            f"{markdown.percent(run['at_random'], 1)}; what different photographs share is left to "
            "the eye",
            "holds in part" if run["purity"] > run["at_random"] else "does not hold",
        )
    ]
